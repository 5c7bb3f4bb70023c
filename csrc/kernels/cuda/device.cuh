// Primitives for threads that work together: merging sums across lanes, finding the last block to arrive, overlapping
// launches. "Lanes" are neighbouring threads of a block that share one channel; their number is a power of two and can
// exceed a warp.
#pragma once

#include "kernels/cuda/plan.h"
#include "kernels/cuda/prelude.h"

namespace normfused::cuda {

inline constexpr int kWarps = kThreads / kWarp;
inline constexpr int kMaxWarps = kResidentThreads / kWarp;  // of any block
inline constexpr unsigned kAllLanes = 0xffffffffu;
// How long a block that waits for another one sleeps before it looks again: less than an access to the L2 cache takes.
inline constexpr unsigned kPollNanoseconds = 100;

// Programmatic dependent launch, first half: the next launch of the stream may start once every block of this launch
// has called this function or has ended. Called by every thread.
NF_DEVICE void allow_next_launch() {
#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Second half: waits until the previous launch has ended and its writes are visible. Called by every thread of a kernel
// that is launched with `overlaps`, before its first memory access. Such a kernel must not call allow_next_launch()
// before this function: the next launch relies on all earlier launches having ended.
NF_DEVICE void wait_for_previous_launch() {
#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  cudaGridDependencySynchronize();
#endif
}

// Cluster-wide, or block-wide if a cluster is one block: a barrier of all threads, after which they see what the others
// wrote before it.
NF_DEVICE void sync_blocks(int blocks) {
  if (blocks == 1) return __syncthreads();
#if !defined(__CUDACC__)
  cooperative_groups::this_cluster().sync();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Lanes per channel for a block that processes `channels` channels at once: the largest power of two with
// channels * lanes <= kThreads, and at least 1.
NF_DEVICE int lanes_for(int64_t channels) {
  int lanes = kThreads;
  while (lanes > 1 && channels * lanes > kThreads) lanes /= 2;
  return lanes;
}

// Block-wide: merges the sums of every `lanes` neighbouring threads, in an order that depends on `lanes` only, and
// returns the result in `sums` of the first of them; the other threads' sums are undefined afterwards.
//
// All threads of the block must call it, with the same `lanes`. With more lanes than a warp it uses shared memory:
// a barrier must separate two such calls.
template <class Op>
NF_DEVICE void merge_lanes(typename Op::Sum (&sums)[Op::kSums], int lanes) {
  using Sum = typename Op::Sum;
  NF_SHARED(Sum, warp_sums, [kWarps * Op::kSums]);
  for (int step = (lanes < kWarp ? lanes : kWarp) / 2; step > 0; step /= 2)
    for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::merge(k, sums[k], __shfl_down_sync(kAllLanes, sums[k], step));
  if (lanes <= kWarp) return;
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0)
    for (int k = 0; k < Op::kSums; ++k) warp_sums[warp * Op::kSums + k] = sums[k];
  __syncthreads();
  if (threadIdx.x % lanes == 0)
    for (int w = 1; w < lanes / kWarp; ++w)
      for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::merge(k, sums[k], warp_sums[(warp + w) * Op::kSums + k]);
}

// Block-wide: the sums of n values over every `lanes` neighbouring threads, in all of these threads and bitwise equal
// there. All threads of the block must call it, with the same `lanes`. With more lanes than a warp it begins with a
// barrier.
template <int n>
NF_DEVICE void sum_lanes(double (&values)[n], int lanes) {
  NF_SHARED(double, warp_sums, [kMaxWarps * n]);
  for (int step = (lanes < kWarp ? lanes : kWarp) / 2; step > 0; step /= 2)
    for (int k = 0; k < n; ++k) values[k] += __shfl_xor_sync(kAllLanes, values[k], step);
  if (lanes <= kWarp) return;
  __syncthreads();  // all threads have read the sums of the previous call
  const int warp = threadIdx.x / kWarp, first = threadIdx.x / lanes * (lanes / kWarp);
  if (threadIdx.x % kWarp == 0)
    for (int k = 0; k < n; ++k) warp_sums[warp * n + k] = values[k];
  __syncthreads();
  for (int k = 0; k < n; ++k) {
    values[k] = warp_sums[first * n + k];
    for (int w = 1; w < lanes / kWarp; ++w) values[k] += warp_sums[(first + w) * n + k];
  }
}

// Grid-wide: whether this block is the last of `expected` blocks to arrive at the ticket. If it is, it sees everything
// the other blocks wrote before they arrived. All threads of the block must call it and get the same answer; it begins
// and ends with a barrier. The ticket must be zero before the launch; the last block resets it to zero.
//
// One thread fences for the whole block: the barriers order the other threads' accesses with its own, and a fence
// applies to everything that is ordered in this way.
NF_DEVICE bool last_to_arrive(unsigned* ticket, unsigned expected) {
  NF_SHARED(bool, last);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // release: the block's writes become visible before its arrival
    last = atomicAdd(ticket, 1u) == expected - 1;
    __threadfence();  // acquire: the other blocks' writes are visible to all that follows
    if (last) *ticket = 0;
  }
  __syncthreads();
  return last;
}

// Block-wide: the next number of a counter that the blocks of a launch share, from 0 on. A block takes numbers until it
// gets one that is `end` or larger. The counter must be zero before the launch; the last block to end resets it to
// zero.
//
// All threads of the block must call it; it contains a barrier. Another one must separate two calls.
NF_DEVICE unsigned next_number(unsigned* counter, unsigned end) {
  NF_SHARED(unsigned, number);
  if (threadIdx.x == 0) {
    number = atomicAdd(counter, 1u);
    if (number == end + gridDim.x - 1) atomicExch(counter, 0u);
  }
  __syncthreads();
  return number;
}

// Grid-wide: lets `blocks` other blocks pass wait_for(), which then see everything that this block wrote. Called by all
// threads of the block; it begins with a barrier. The flag must be zero before.
NF_DEVICE void release(unsigned* flag, unsigned blocks) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();  // the block's writes become visible before the flag
  atomicExch(flag, blocks);
}

// Block-wide: waits for release(). The last of the released blocks leaves the flag zero. Called by all threads of the
// block; it ends with a barrier.
NF_DEVICE void wait_for(unsigned* flag) {
  if (threadIdx.x == 0) {
    while (load_relaxed(flag) == 0) __nanosleep(kPollNanoseconds);
    __threadfence();  // the releasing block's writes are visible to all that follows
    atomicSub(flag, 1u);
  }
  __syncthreads();
}

}  // namespace normfused::cuda
