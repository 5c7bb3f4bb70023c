#include "kernels/cuda/group_norm_columns.cuh"

#include "kernels/cuda/batch_norm_launch.cuh"
#include "kernels/cuda/group_norm_single.h"

namespace normfused::cuda {

namespace {

template <class T, bool kFused>
cudaError_t columns(const GroupNormForward& args, Resources& resources, bool& supported) {
  using Normalize = NormalizeOp<T, kFused>;
  using S = typename Normalize::S;
  supported = false;
  if constexpr (may_be_single<Normalize>()) {
    const BatchNormForward by_channel = by_channel_of(args);
    const ChannelView& view = by_channel.view;
    const bool aligned = all_aligned(args.input, args.output, args.residual);
    Reduced reduced = reduced_and_applied<Normalize>(args.residual == nullptr ? 1 : 2, aligned, args.mask != nullptr);
    reduced.together = args.view.width();
    const ReductionPlan plan = plan_reduction(view, reduced, resources.limits);
    if (!plan.single()) return cudaSuccess;
    S* const table = table_for<Normalize>(view, resources);
    const int64_t count = view.statistics();
    auto* const moments = static_cast<double*>(resources.scratch(2 * count * static_cast<int64_t>(sizeof(double))));
    Normalize apply;
    cudaError_t error = prepare_normalize(by_channel, aligned, nullptr, table, resources, apply);
    if (error != cudaSuccess) return error;
    const FinishGroupMoments<S> finish{
        {args, moments, moments + count, args.view.width(), view.positions(), table}, moments, moments + count};
    const MomentsOp<T, false> op{static_cast<const T*>(args.input), view, args.eps};
    error = reduce(op, finish, apply, plan, resources);
    supported = error != kNoCluster;
    return supported ? error : cudaSuccess;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t group_norm_columns(const GroupNormForward& args, Resources& resources, bool& supported) {
  return for_floating(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return args.fused() ? columns<T, true>(args, resources, supported) : columns<T, false>(args, resources, supported);
  });
}

}  // namespace normfused::cuda
