// The launches of batch norm.
#pragma once

#include "kernels/cuda/batch_norm.cuh"
#include "kernels/cuda/batch_norm_dtype.h"
#include "kernels/cuda/launch.cuh"

namespace normfused::cuda {

// Calls f with a std::bool_constant: whether a residual or an activation follows the normalization.
template <class Args, class F>
cudaError_t for_variant(const Args& args, const F& f) {
  return args.fused() ? f(std::true_type{}) : f(std::false_type{});
}

template <class Op>
ApplyPlan apply_plan(const ChannelView& view, bool aligned, const Resources& resources) {
  return plan_apply(view, planned_itemsize<Op>(), sizeof(typename Op::Output), aligned, resources.limits);
}

// Applies an Op whose coefficients the previous launch computes.
template <class Op>
cudaError_t apply_next(const Op& op, const ApplyPlan& plan, const Resources& resources) {
  return apply(op, plan, resources.stream, resources.limits.overlap);
}
template <class Op>
cudaError_t apply_next(const Op& op, const ChannelView& view, bool aligned, const Resources& resources) {
  return apply_next(op, apply_plan<Op>(view, aligned, resources), resources);
}

// Sets up a NormalizeOp. If it will write the mask bit by bit, which happens with vectors of one value, a launch clears
// the mask first; otherwise every byte is written by one thread, and only the padding needs clearing.
template <class Normalize>
cudaError_t prepare_normalize(const BatchNormForward& args, bool aligned, int64_t* counter,
                              typename Normalize::S* table, const Resources& resources, Normalize& normalize) {
  using T = typename Normalize::T;
  normalize = {static_cast<const T*>(args.input),
               static_cast<T*>(args.output),
               table,
               counter,
               static_cast<const T*>(args.residual),
               args.activation,
               args.mask};
  if (args.mask == nullptr) return cudaSuccess;
  const int64_t bytes = mask_bytes(args.view.numel());
  const ApplyPlan plan = apply_plan<Normalize>(args.view, aligned, resources);
  if ((plan.by_rows ? plan.flat.values : plan.columns.values) == 1)
    return for_each_channel(ClearMask{args.mask}, bytes, resources.stream);
  normalize.mask_padding = args.mask + bytes - kMaskPadding;
  return cudaSuccess;
}

// What a launch reads that reduces and applies an Op.
template <class Op>
Reduced reduced_and_applied(int inputs, bool aligned, bool writes_mask) {
  return {sizeof(typename Op::T), inputs, aligned, true, writes_mask, values_per_access(planned_itemsize<Op>())};
}

// Whether there is such a launch.
template <class Op>
constexpr bool may_be_single() {
  return declares_states(values_per_access(planned_itemsize<Op>()), sizeof(typename Op::S));
}

template <class T>
cudaError_t BatchNormOf<T>::normalize(const BatchNormForward& args, void* table, Resources& resources) {
  return for_variant(args, [&](auto fused) {
    using Normalize = NormalizeOp<T, fused()>;
    const bool aligned = all_aligned(args.input, args.output, args.residual);
    Normalize normalize;
    const cudaError_t error =
        prepare_normalize(args, aligned, nullptr, static_cast<typename Normalize::S*>(table), resources, normalize);
    return error != cudaSuccess ? error : apply_next(normalize, args.view, aligned, resources);
  });
}

template <class T>
cudaError_t BatchNormOf<T>::training(const BatchNormForward& args, Resources& resources) {
  return for_variant(args, [&](auto fused) {
    using Normalize = NormalizeOp<T, fused()>;
    using S = typename Normalize::S;
    S* const table = table_for<Normalize>(args.view, resources);
    const MomentsOp<T, false> moments{static_cast<const T*>(args.input), args.view, args.eps};
    const bool aligned = all_aligned(args.input, args.output, args.residual);
    Normalize normalize;
    cudaError_t error = prepare_normalize(args, aligned, args.num_batches_tracked, table, resources, normalize);
    if (error != cudaSuccess) return error;
    const FinishTraining<S> finish{args, table};
    // A cumulative average reads the counter that the application increments. In one launch the blocks would race.
    if constexpr (may_be_single<Normalize>())
      if (args.momentum == args.momentum) {
        const int inputs = args.residual == nullptr ? 1 : 2;
        const auto reduced = reduced_and_applied<Normalize>(inputs, aligned, args.mask != nullptr);
        const ReductionPlan plan = plan_for(moments, finish, reduced, resources);
        if (plan.one_launch()) error = reduce(moments, finish, normalize, plan, resources);
        if (plan.one_launch() && error != kNoCluster) return error;
      }
    const ReductionPlan plan = plan_for(moments, finish, {sizeof(T), 1, aligned}, resources);
    error = reduce(moments, finish, NoApply{}, plan, resources);
    return error != cudaSuccess ? error : apply_next(normalize, args.view, aligned, resources);
  });
}

template <class T>
cudaError_t BatchNormOf<T>::inference(const BatchNormForward& args, Resources& resources) {
  return for_variant(args, [&](auto fused) {
    using Normalize = NormalizeOp<T, fused()>;
    using S = typename Normalize::S;
    const bool aligned = all_aligned(args.input, args.output, args.residual);
    const ApplyPlan plan = apply_plan<Normalize>(args.view, aligned, resources);
    S* const table = plan.may_prepare() ? nullptr : table_for<Normalize>(args.view, resources);
    Normalize normalize;
    cudaError_t error = prepare_normalize(args, aligned, nullptr, table, resources, normalize);
    if (error != cudaSuccess) return error;
    if (plan.may_prepare()) return apply(InferenceOp<T, fused()>{normalize, args}, plan, resources.stream, false);
    error = for_each_channel(PrepareInference<S>{args, table}, args.view.channels, resources.stream);
    return error != cudaSuccess ? error : apply_next(normalize, plan, resources);
  });
}

// The operands of one call of backward.
template <class T, bool kFused>
struct BackwardOperands {
  using GradInput = GradInputOp<T, kFused>;
  using S = typename GradInput::S;
  using Sums = GradSumsOp<T, kFused>;
  using Finish = FinishBackward<S, kFused>;

  const BatchNormBackward& args;
  S* const table;
  const bool reduces = args.count == nullptr && (args.training || args.grad_weight || args.grad_bias);
  const T* const grad_output = static_cast<const T*>(args.grad_output);
  const T* const input = args.training || reduces || args.mask == nullptr ? static_cast<const T*>(args.input) : nullptr;
  const T* const residual = static_cast<const T*>(args.residual);
  const int inputs = residual == nullptr ? 2 : 3;
  T* const grad_input = static_cast<T*>(args.grad_input);
  T* const grad_residual = static_cast<T*>(args.grad_residual);
  const bool aligned = all_aligned(grad_output, input, residual, grad_input, grad_residual);

  GradInput through_statistics() const {
    return {grad_output,   input,           grad_input, table,         residual,
            grad_residual, args.activation, args.mask,  args.training, args.from_output};
  }
  ReductionPlan plan(const Reduced& reduced, const Resources& resources) const {
    return plan_for(Sums{args}, Finish{args, table}, reduced, resources);
  }
  // Sums and applies in one launch, if there is a plan for that. Otherwise returns false.
  bool in_one_launch(Resources& resources, cudaError_t& error) const {
    if constexpr (may_be_single<GradInput>()) {
      if (!args.training || grad_input == nullptr) return false;
      const ReductionPlan applies = plan(reduced_and_applied<GradInput>(inputs, aligned, false), resources);
      if (!applies.one_launch()) return false;
      error = reduce(Sums{args}, Finish{args, table}, through_statistics(), applies, resources);
      return error != kNoCluster;
    }
    return false;
  }
  cudaError_t sum(Resources& resources) const {
    const ReductionPlan split = plan({sizeof(T), inputs, aligned}, resources);
    return reduce(Sums{args}, Finish{args, table}, NoApply{}, split, resources);
  }
  cudaError_t apply_last(const Resources& resources) const {
    if (grad_input == nullptr) return cudaSuccess;
    if (args.training || kFused) return apply_next(through_statistics(), args.view, aligned, resources);
    const ScaleOp<T> scale{grad_output, grad_input, table + GradCoefficient::kScale * args.view.statistics()};
    return apply_next(scale, args.view, aligned, resources);
  }
};

template <class T>
cudaError_t BatchNormOf<T>::grad_sums(const BatchNormBackward& args, void* table, Resources& resources) {
  return for_variant(args, [&](auto fused) {
    using Operands = BackwardOperands<T, fused()>;
    const Operands operands{args, static_cast<typename Operands::S*>(table)};
    return operands.sum(resources);
  });
}

template <class T>
cudaError_t BatchNormOf<T>::grad_input(const BatchNormBackward& args, void* table, Resources& resources) {
  return for_variant(args, [&](auto fused) {
    using Operands = BackwardOperands<T, fused()>;
    return Operands{args, static_cast<typename Operands::S*>(table)}.apply_last(resources);
  });
}

template <class T>
cudaError_t BatchNormOf<T>::backward(const BatchNormBackward& args, Resources& resources) {
  return for_variant(args, [&](auto fused) {
    using Operands = BackwardOperands<T, fused()>;
    const Operands operands{args, table_for<typename Operands::GradInput>(args.view, resources)};
    if (!operands.reduces) {
      const typename Operands::Finish finish{args, operands.table};
      const cudaError_t error = for_each_channel(finish, args.view.channels, resources.stream);
      return error != cudaSuccess ? error : operands.apply_last(resources);
    }
    cudaError_t error = cudaSuccess;
    if (operands.in_one_launch(resources, error)) return error;
    error = operands.sum(resources);
    return error != cudaSuccess ? error : operands.apply_last(resources);
  });
}

}  // namespace normfused::cuda
