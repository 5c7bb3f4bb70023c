// What threads do together: joining sums over a warp, and telling which block is last.
#pragma once

#include "kernels/cuda/plan.h"
#include "kernels/cuda/prelude.h"

namespace normfused::cuda {

inline constexpr int kWarps = kThreads / kWarp;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// How many neighbouring threads of a warp there are for each of `count` things: a power of two.
NF_DEVICE int lanes_for(int64_t count) {
  int lanes = kWarp;
  while (lanes > 1 && count * lanes > kThreads) lanes /= 2;
  return lanes;
}

// Joins the sums of each `lanes` neighbouring threads of a warp, a power of two, in an order that `lanes` alone
// decides; the result is the first one's. All threads of a warp take part.
template <class Op>
NF_DEVICE void join_lanes(typename Op::Sum (&sums)[Op::kSums], int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2)
    for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::join(k, sums[k], __shfl_down_sync(kAllLanes, sums[k], step));
}

// Whether this block is the last of `expected` to arrive at the ticket; then it sees what all others wrote before they
// arrived. Tickets are zero before the launch, and the last block leaves them so.
NF_DEVICE bool last_to_arrive(unsigned* ticket, unsigned expected) {
  NF_SHARED(bool, last);
  __threadfence();  // this thread's writes come before the arrival
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == expected - 1;
  __syncthreads();
  if (!last) return false;
  __threadfence();  // and the others' before what follows
  if (threadIdx.x == 0) *ticket = 0;
  return true;
}

}  // namespace normfused::cuda
