// Derivatives of batch norm: the first by the backward operator, all others by the composite (see derivatives.h).
#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/autograd.h"
#include "ops/batch_norm_checks.h"
#include "ops/batch_norm_composite.h"

namespace normfused::ops {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// `tensor` in the given strides.
Tensor laid_out(const Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides) {
  return tensor.strides() == strides ? tensor : tensor.new_empty_strided(sizes, strides).copy_(tensor);
}

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

// Training and inference alike; `call` runs the operator below autograd, and is told whether to give a mask.
struct ForwardFunction : torch::autograd::Function<ForwardFunction> {
  template <class Call>
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& residual, const Mode& mode,
                               const Call& call) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Activation& activation = mode.activation;
    // Constant statistics make grad_input a multiple of the activation's gradient.
    const bool reads_input = mode.training || needs_grad(weight);
    const bool is_identity = activation.kind == ActivationKind::kIdentity;
    const bool by_mask = gradient_is_by_sign(activation) && (residual || !reads_input);
    const bool recomputes = !is_identity && !by_mask;
    const auto [output, statistics, mask] = call(by_mask);
    const bool saves_input = reads_input || recomputes;
    const Tensor none;
    ctx->save_for_backward({saves_input ? input : none, weight.value_or(none), recomputes ? bias.value_or(none) : none,
                            recomputes ? residual.value_or(none) : none, statistics, by_mask ? mask : none});
    save_given(ctx, weight, bias, residual);
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
    // Where the input's values are not needed, any tensor laid out as it was serves.
    const Tensor input = saved[0].defined() ? saved[0]
                                            : laid_out(grads[0], ctx->saved_data["sizes"].toIntVector(),
                                                       ctx->saved_data["strides"].toIntVector());
    const Mode mode = Mode::saved(ctx);
    std::array<bool, kArguments> wanted = wanted_gradients(ctx);
    const bool passes_on = wanted[kResidual] && mode.activation.kind == ActivationKind::kIdentity;
    if (passes_on) results[kResidual] = grads[0];
    wanted[kResidual] = wanted[kResidual] && !passes_on;
    const auto [grad_input, grad_weight, grad_bias, grad_residual] =
        batch_norm_backward(grads[0], input, optional(weight), statistics, mode.training, wanted, optional(bias),
                            optional(residual), optional(mask), name_of(mode.activation), mode.activation.parameter);
    if (wanted[kInput]) results[kInput] = grad_input;
    if (wanted[kWeight]) results[kWeight] = grad_weight;
    if (wanted[kBias]) results[kBias] = grad_bias;
    if (wanted[kResidual]) results[kResidual] = grad_residual;
    return results;
  }
};

template <class Call>
Outputs differentiable(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual, const Mode& mode, bool save_mask, const Call& call) {
  if (needs_composite(input, weight, bias, residual)) {
    // Below autograd the operator updates the buffers, by values alone, and finds the statistics.
    Outputs outputs;
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      outputs = call(save_mask);
    }
    std::get<0>(outputs) =
        batch_norm_composite(input, weight, bias, residual, std::get<1>(outputs), mode.training, mode.activation);
    return outputs;
  }
  if (is_recorded(input, weight, bias, residual)) {
    const auto results = ForwardFunction::apply(input, weight, bias, residual, mode, call);
    return {results[0], results[1], results[2]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call(save_mask);
}

Outputs batch_norm_training_autograd(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                     const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                     const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                                     double eps, const OptionalTensor& residual, std::string_view activation,
                                     double activation_param, bool save_mask, int64_t correction,
                                     const OptionalTensor& nonfinite_batches, bool update_in_backward) {
  check_buffers(running_mean, running_var);
  const Mode mode{true, activation_of(activation, activation_param)};
  return differentiable(input, weight, bias, residual, mode, save_mask, [&](bool with_mask) {
    return batch_norm_training(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps,
                               residual, activation, activation_param, with_mask, correction, nonfinite_batches,
                               update_in_backward);
  });
}

Outputs batch_norm_inference_autograd(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                      const Tensor& running_mean, const Tensor& running_var, double eps,
                                      const OptionalTensor& residual, std::string_view activation,
                                      double activation_param, bool save_mask) {
  check_buffers(running_mean, running_var);
  const Mode mode{false, activation_of(activation, activation_param)};
  return differentiable(input, weight, bias, residual, mode, save_mask, [&](bool with_mask) {
    return batch_norm_inference(input, weight, bias, running_mean, running_var, eps, residual, activation,
                                activation_param, with_mask);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward_autograd(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& statistics,
    bool training, std::array<bool, 4> output_mask, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& mask, std::string_view activation, double activation_param, bool from_output,
    const OptionalTensor& sums, const OptionalTensor& count) {
  if (backward_needs_composite(grad_output, input, weight, bias, residual)) {
    check_backward(grad_output, input, weight, statistics, training, output_mask, bias, residual, mask, activation,
                   activation_param, from_output, sums, count);
    TORCH_CHECK_NOT_IMPLEMENTED(!from_output && !sums, "backward from the output or from sums has no derivative");
    return batch_norm_backward_composite(grad_output, input, weight, statistics, training, output_mask, bias, residual,
                                         mask, activation_of(activation, activation_param));
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return batch_norm_backward(grad_output, input, weight, statistics, training, output_mask, bias, residual, mask,
                             activation, activation_param, from_output, sums, count);
}

}  // namespace

TORCH_LIBRARY_IMPL(normfused, Autograd, m) {
  m.impl("batch_norm_training", batch_norm_training_autograd);
  m.impl("batch_norm_inference", batch_norm_inference_autograd);
  m.impl("batch_norm_backward", batch_norm_backward_autograd);
}

}  // namespace normfused::ops
