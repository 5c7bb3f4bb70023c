// The launch of channel_moments and channel_sums. Each has its own source file, so that they compile in parallel.
#pragma once

#include "kernels/cuda/channel_stats.cuh"
#include "kernels/cuda/launch.cuh"

namespace normfused::cuda {

template <class Op>
cudaError_t channel_stats(const ChannelStats& args, Resources& resources) {
  using T = typename Op::T;
  using Sum = typename Op::Sum;
  const Op op{static_cast<const T*>(args.input), args.view};
  WriteResults<Sum> write{};
  for (int k = 0; k < Op::kSums; ++k) write.results[k] = static_cast<Sum*>(args.results[k]);
  const ReductionPlan plan = plan_for(op, write, 1, all_aligned(args.input), false, resources);
  return reduce(op, write, NoApply{}, plan, resources);
}

}  // namespace normfused::cuda
