// The launch of the channel statistics. Each has its own source file, so that they compile in parallel.
#pragma once

#include "kernels/cuda/channel_stats.cuh"
#include "kernels/cuda/launch.cuh"

namespace normfused::cuda {

// result(k): where result k is written.
template <class Op, class Args, class F>
cudaError_t channel_stats(const Args& args, Resources& resources, const F& result) {
  const Op op{static_cast<const typename Op::T*>(args.input), args.view};
  WriteResults<typename Op::Sum> write{};
  for (int k = 0; k < Op::kSums; ++k) write.results[k] = result(k);
  const ReductionPlan plan = plan_for(op, write, {sizeof(typename Op::T), 1, all_aligned(args.input)}, resources);
  return reduce(op, write, NoApply{}, plan, resources);
}

template <class Op>
cudaError_t channel_stats(const ChannelStats& args, Resources& resources) {
  return channel_stats<Op>(args, resources, [&](int k) { return args.results[k]; });
}

}  // namespace normfused::cuda
