// Derivatives of batch norm: the first via the backward operator, all others via the composite (see derivatives.h).
#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/autograd.h"
#include "ops/batch_norm_checks.h"
#include "ops/batch_norm_composite.h"
#include "ops/call.h"

namespace normfused::ops {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The tensor's values with these strides.
Tensor laid_out(const Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides) {
  return tensor.strides() == strides ? tensor : tensor.new_empty_strided(sizes, strides).copy_(tensor);
}

// Training and inference. `run` calls the operator below autograd, with or without a mask.
struct ForwardFunction : torch::autograd::Function<ForwardFunction> {
  template <class Run>
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& residual, const Mode& mode,
                               const Run& run) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Activation& activation = mode.activation;
    // With constant statistics grad_input is a multiple of the activation's gradient, and does not depend on the input.
    const bool reads_input = mode.training || needs_grad(weight);
    const bool is_identity = activation.kind == ActivationKind::kIdentity;
    const bool by_mask = gradient_is_by_sign(activation) && (residual || !reads_input);
    const bool recomputes = !is_identity && !by_mask;
    const auto [output, statistics, mask] = run(by_mask);
    const bool saves_input = reads_input || recomputes;
    const Tensor none;
    ctx->save_for_backward({saves_input ? input : none, weight.value_or(none), recomputes ? bias.value_or(none) : none,
                            recomputes ? residual.value_or(none) : none, statistics, by_mask ? mask : none});
    save_present(ctx, weight, bias, residual);
    if (!saves_input) {
      ctx->saved_data["sizes"] = output.sizes();
      ctx->saved_data["strides"] = output.strides();
    }
    mode.save(ctx);
    ctx->mark_non_differentiable({statistics, mask});
    ctx->set_materialize_grads(false);
    return {output, statistics, mask};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(6);
    if (!grads[0].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &weight = saved[1], &bias = saved[2], &residual = saved[3], &statistics = saved[4], &mask = saved[5];
    // If the input was not saved, backward needs its layout only, and any tensor with that layout replaces it.
    const Tensor input = saved[0].defined() ? saved[0]
                                            : laid_out(grads[0], ctx->saved_data["sizes"].toIntVector(),
                                                       ctx->saved_data["strides"].toIntVector());
    const Mode mode = Mode::saved(ctx);
    std::array<bool, kArguments> requested = requested_gradients(ctx);
    // Without an activation the residual's gradient is grad_output itself.
    const bool passes_through = requested[kResidual] && mode.activation.kind == ActivationKind::kIdentity;
    if (passes_through) results[kResidual] = grads[0];
    requested[kResidual] = requested[kResidual] && !passes_through;
    const auto [grad_input, grad_weight, grad_bias, grad_residual] =
        batch_norm_backward({grads[0], input, optional(weight), statistics, mode.training, requested, optional(bias),
                             optional(residual), optional(mask), name_of(mode.activation), mode.activation.parameter});
    if (requested[kInput]) results[kInput] = grad_input;
    if (requested[kWeight]) results[kWeight] = grad_weight;
    if (requested[kBias]) results[kBias] = grad_bias;
    if (requested[kResidual]) results[kResidual] = grad_residual;
    return results;
  }
};

template <class Call>
typename Call::Result differentiable(const Call& call, bool training, typename Call::Result (*op)(const Call&)) {
  check_buffers(call.running_mean, call.running_var);
  const Mode mode{training, activation_of(call.activation, call.activation_param)};
  const auto run = [&](bool save_mask) {
    Call changed = call;
    changed.save_mask = save_mask;
    return op(changed);
  };
  const Tensor& input = call.input;
  const OptionalTensor &weight = call.weight, &bias = call.bias, &residual = call.residual;
  if (needs_composite(input, weight, bias, residual)) {
    // The operator, below autograd, computes the statistics and updates the buffers; the composite is differentiated.
    typename Call::Result results;
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      results = run(call.save_mask);
    }
    std::get<0>(results) =
        batch_norm_composite(input, weight, bias, residual, std::get<1>(results), training, mode.activation);
    return results;
  }
  if (is_recorded(input, weight, bias, residual)) {
    const auto results = ForwardFunction::apply(input, weight, bias, residual, mode, run);
    return {results[0], results[1], results[2]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return run(call.save_mask);
}

BatchNormTrainingCall::Result training_autograd(const BatchNormTrainingCall& call) {
  return differentiable(call, true, batch_norm_training);
}

BatchNormInferenceCall::Result inference_autograd(const BatchNormInferenceCall& call) {
  return differentiable(call, false, batch_norm_inference);
}

BatchNormBackwardCall::Result backward_autograd(const BatchNormBackwardCall& call) {
  if (backward_needs_composite(call.grad_output, call.input, call.weight, call.bias, call.residual)) {
    check_backward(call);
    TORCH_CHECK_NOT_IMPLEMENTED(!call.from_output && !call.sums,
                                "backward from the output or from sums has no derivative");
    return batch_norm_backward_composite(call);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return batch_norm_backward(call);
}

}  // namespace

TORCH_LIBRARY_IMPL(normfused, Autograd, m) {
  m.impl("batch_norm_training", call_object<training_autograd>());
  m.impl("batch_norm_inference", call_object<inference_autograd>());
  m.impl("batch_norm_backward", call_object<backward_autograd>());
}

}  // namespace normfused::ops
