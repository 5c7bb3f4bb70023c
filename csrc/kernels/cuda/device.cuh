// What threads do together: joining sums over a warp, and telling which block is last.
#pragma once

#include "kernels/cuda/plan.h"
#include "kernels/cuda/prelude.h"

namespace normfused::cuda {

inline constexpr int kWarps = kThreads / kWarp;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// Launches that overlap, by programmatic dependent launch. The next launch in the stream may start once every block of
// this one has called allow_next_launch() or has ended.
NF_DEVICE void allow_next_launch() {
#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Waits until the launch before this one has ended and what it wrote is visible. It must never itself allow the next
// launch earlier: that one relies on all launches before this one having ended.
NF_DEVICE void wait_for_previous_launch() {
#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  cudaGridDependencySynchronize();
#endif
}

// How many neighbouring threads of a block there are for each of `count` things: a power of two.
NF_DEVICE int lanes_for(int64_t count) {
  int lanes = kThreads;
  while (lanes > 1 && count * lanes > kThreads) lanes /= 2;
  return lanes;
}

// Joins the sums of each `lanes` neighbouring threads, a power of two, in an order that `lanes` alone decides; the
// result is the first one's. All threads of the block take part, and between two calls with more lanes than a warp has,
// they wait for each other.
template <class Op>
NF_DEVICE void join_lanes(typename Op::Sum (&sums)[Op::kSums], int lanes) {
  using Sum = typename Op::Sum;
  NF_SHARED(Sum, of_warps, [kWarps * Op::kSums]);
  for (int step = (lanes < kWarp ? lanes : kWarp) / 2; step > 0; step /= 2)
    for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::join(k, sums[k], __shfl_down_sync(kAllLanes, sums[k], step));
  if (lanes <= kWarp) return;
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0)
    for (int k = 0; k < Op::kSums; ++k) of_warps[warp * Op::kSums + k] = sums[k];
  __syncthreads();
  if (threadIdx.x % lanes == 0)
    for (int w = 1; w < lanes / kWarp; ++w)
      for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::join(k, sums[k], of_warps[(warp + w) * Op::kSums + k]);
}

// Whether this block is the last of `expected` to arrive at the ticket; then it sees what all others wrote before they
// arrived. Tickets are zero before the launch, and the last block leaves them so. One thread fences for all: the
// barriers about it order their accesses before and after its own, and a fence is for all that is ordered so.
NF_DEVICE bool last_to_arrive(unsigned* ticket, unsigned expected) {
  NF_SHARED(bool, last);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // the block's writes come before the arrival
    last = atomicAdd(ticket, 1u) == expected - 1;
    __threadfence();  // and the others' before what follows
    if (last) *ticket = 0;
  }
  __syncthreads();
  return last;
}

}  // namespace normfused::cuda
