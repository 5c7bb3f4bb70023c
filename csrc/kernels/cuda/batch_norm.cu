#include "kernels/cuda/batch_norm.cuh"

#include "kernels/cuda/launch.cuh"

namespace normfused::cuda {

cudaError_t batch_norm_training(const BatchNormForward& args, Resources& resources) {
  return for_floating(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Normalize = NormalizeOp<T>;
    using S = typename Normalize::S;
    S* const table = table_for<Normalize>(args.view, resources);
    const MomentsOp<T, false> moments{static_cast<const T*>(args.input), args.view};
    const Normalize normalize{moments.tensor, static_cast<T*>(args.output), table, args.num_batches_tracked};
    const FinishTraining<S> finish{args, table};
    const bool aligned = all_aligned(args.input, args.output);
    // A cumulative average reads the counter, which the apply counts up: in one launch, blocks would race.
    const bool may_finish = args.momentum == args.momentum;
    const ReductionPlan plan = plan_reduction(args.view, sizeof(T), 1, aligned, may_finish, resources.limits);
    if (plan.single()) return reduce(moments, finish, normalize, plan, resources);
    const cudaError_t error = reduce(moments, finish, Nothing{}, plan, resources);
    if (error != cudaSuccess) return error;
    return apply(normalize, plan_apply(args.view, sizeof(T), sizeof(T), aligned, resources.limits), resources.stream);
  });
}

cudaError_t batch_norm_inference(const BatchNormForward& args, Resources& resources) {
  return for_floating(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Normalize = NormalizeOp<T>;
    using S = typename Normalize::S;
    S* const table = table_for<Normalize>(args.view, resources);
    const Normalize normalize{static_cast<const T*>(args.input), static_cast<T*>(args.output), table, nullptr};
    const cudaError_t error = for_each_channel(PrepareInference<S>{args, table}, args.view.channels, resources.stream);
    if (error != cudaSuccess) return error;
    const bool aligned = all_aligned(args.input, args.output);
    return apply(normalize, plan_apply(args.view, sizeof(T), sizeof(T), aligned, resources.limits), resources.stream);
  });
}

cudaError_t batch_norm_backward(const BatchNormBackward& args, Resources& resources) {
  return for_floating(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using GradInput = GradInputOp<T>;
    using Scale = ScaleOp<T>;
    using S = typename GradInput::S;
    const T* const grad_output = static_cast<const T*>(args.grad_output);
    const T* const input = static_cast<const T*>(args.input);
    T* const grad_input = static_cast<T*>(args.grad_input);
    S* const table = table_for<GradInput>(args.view, resources);
    const GradInput through_statistics{grad_output, input, grad_input, table};
    const bool aligned = all_aligned(grad_output, input, grad_input);
    const auto apply_planned = [&](const auto& op) {
      return apply(op, plan_apply(args.view, sizeof(T), sizeof(T), aligned, resources.limits), resources.stream);
    };

    if (!args.training && !args.grad_weight && !args.grad_bias) {
      const cudaError_t error = for_each_channel(PrepareScale<S>{args, table}, args.view.channels, resources.stream);
      return error != cudaSuccess ? error : apply_planned(Scale{grad_output, grad_input, table});
    }

    const GradSumsOp<T> sums{grad_output, input, args.mean, args.view};
    const FinishBackward<S> finish{args, table};
    const bool may_finish = args.training && grad_input != nullptr;
    const ReductionPlan plan = plan_reduction(args.view, sizeof(T), 2, aligned, may_finish, resources.limits);
    if (plan.single()) return reduce(sums, finish, through_statistics, plan, resources);
    const cudaError_t error = reduce(sums, finish, Nothing{}, plan, resources);
    if (error != cudaSuccess || grad_input == nullptr) return error;
    return args.training ? apply_planned(through_statistics)
                         : apply_planned(Scale{grad_output, grad_input, table + args.view.channels});
  });
}

}  // namespace normfused::cuda
