#include "kernels/cuda/group_norm_backward_single.cuh"

#include "kernels/cuda/batch_norm_launch.cuh"
#include "kernels/cuda/group_norm_single.h"

namespace normfused::cuda {

namespace {

template <class T, bool kFused>
cudaError_t single(const GroupNormBackward& args, double* grad_weight, double* grad_bias, Resources& resources,
                   bool& supported) {
  using S = compute_t<T>;
  using GradInput = GradInputOp<T, kFused>;
  const BatchNormBackward by_channel = by_channel_of(args, grad_weight, grad_bias);
  const BackwardOperands<T, kFused> operands{by_channel, nullptr};
  Reduced reduced = reduced_and_applied<GradInput>(operands.inputs, operands.aligned, false);
  reduced.together = args.view.width();
  const ReductionPlan plan = plan_reduction(by_channel.view, reduced, resources.limits);
  supported = plan.single() && (plan.by_rows || may_be_single<GradInput>());
  if (!supported) return cudaSuccess;
  S* const table = table_for<GradInput>(by_channel.view, resources);
  GradInput apply = operands.through_statistics();
  apply.table = table;
  const GroupNormalization normalization{args};
  const FinishGroupsTogether<S, kFused> finish{
      {by_channel, table}, {args, grad_weight, grad_bias, table}, normalization};
  const cudaError_t error =
      reduce(GroupGradSumsOp<T, kFused>{{by_channel}, normalization}, finish, apply, plan, resources);
  supported = error != kNoCluster;
  return supported ? error : cudaSuccess;
}

}  // namespace

cudaError_t group_norm_backward_single(const GroupNormBackward& args, double* grad_weight, double* grad_bias,
                                       Resources& resources, bool& supported) {
  return for_floating(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return args.fused() ? single<T, true>(args, grad_weight, grad_bias, resources, supported)
                        : single<T, false>(args, grad_weight, grad_bias, resources, supported);
  });
}

}  // namespace normfused::cuda
