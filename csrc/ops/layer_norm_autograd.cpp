// Derivatives of layer norm and RMS norm: the first via the backward operator, all others via the composite (see
// derivatives.h).
#include <ATen/ATen.h>
#include <torch/library.h>

#include <numeric>

#include "ops/autograd.h"
#include "ops/call.h"
#include "ops/layer_norm.h"
#include "ops/normalized.h"

namespace normfused::ops {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::DimVector dims_of(int64_t start, int64_t end) {
  at::DimVector dims(static_cast<size_t>(end - start + 1));
  std::iota(dims.begin(), dims.end(), start);
  return dims;
}

// The shape with which a parameter broadcasts with the input.
at::DimVector broadcast_shape(const Tensor& parameter, const Tensor& input, int64_t start, int64_t end) {
  at::DimVector shape(static_cast<size_t>(input.dim()), 1);
  const bool by_sample = parameter.dim() > end - start + 1;
  if (by_sample) shape[0] = parameter.size(0);
  for (int64_t dim = start; dim <= end; ++dim)
    shape[static_cast<size_t>(dim)] = parameter.size(dim - start + by_sample);
  return shape;
}

struct LayerNormFunction : torch::autograd::Function<LayerNormFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& residual, const LayerNormCall& call) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, sum, statistics] = layer_norm(call);
    const Tensor none;
    ctx->save_for_backward({residual ? sum : input, weight.value_or(none), bias.value_or(none), statistics});
    save_present(ctx, weight, bias, residual);
    ctx->saved_data["start_dim"] = call.start_dim;
    ctx->saved_data["end_dim"] = call.end_dim;
    ctx->saved_data["subtract_mean"] = call.subtract_mean;
    if (residual)
      ctx->mark_non_differentiable({statistics});
    else
      ctx->mark_non_differentiable({sum, statistics});
    ctx->set_materialize_grads(false);
    return {output, sum, statistics};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(5);
    const std::array<bool, kArguments> requested = requested_gradients(ctx);
    if (!grads[0].defined()) {  // only the sum is used, or nothing
      if (requested[kInput]) results[kInput] = grads[1];
      if (requested[kResidual]) results[kResidual] = grads[1];
      return results;
    }
    const variable_list saved = ctx->get_saved_variables();
    const bool of_sum = requested[kInput] || requested[kResidual];
    const auto [grad_input, grad_weight, grad_bias] =
        layer_norm_backward({grads[0], saved[0], ctx->saved_data["start_dim"].toInt(),
                             ctx->saved_data["end_dim"].toInt(), optional(saved[1]), optional(saved[2]), saved[3],
                             std::array<bool, 3>{of_sum, requested[kWeight], requested[kBias]}, optional(grads[1]),
                             ctx->saved_data["subtract_mean"].toBool()});
    if (requested[kInput]) results[kInput] = grad_input;
    if (requested[kResidual]) results[kResidual] = grad_input;
    if (requested[kWeight]) results[kWeight] = grad_weight;
    if (requested[kBias]) results[kBias] = grad_bias;
    return results;
  }
};

LayerNormCall::Result forward_autograd(const LayerNormCall& call) {
  if (needs_composite(call.input, call.weight, call.bias, call.residual)) {
    LayerNormCall::Result results;
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      results = layer_norm(call);
    }
    const auto [output, sum] = layer_norm_composite(call, std::get<2>(results));
    return {output, call.residual ? sum : std::get<1>(results), std::get<2>(results)};
  }
  if (is_recorded(call.input, call.weight, call.bias, call.residual)) {
    const auto results = LayerNormFunction::apply(call.input, call.weight, call.bias, call.residual, call);
    return {results[0], results[1], results[2]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return layer_norm(call);
}

LayerNormBackwardCall::Result backward_autograd(const LayerNormBackwardCall& call) {
  if (backward_needs_composite(call.grad_output, call.input, call.weight, call.grad_sum)) {
    check(call);
    return layer_norm_backward_composite(call);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return layer_norm_backward(call);
}

LayerNormCall::Result forward_batched(const LayerNormCall& call) {
  check(call);
  const Tensor statistics = layer_statistics(call);
  const auto [output, sum] = layer_norm_composite(call, statistics);
  return {output, call.residual ? sum : at::empty({0}, call.input.options()), statistics};
}

LayerNormBackwardCall::Result backward_batched(const LayerNormBackwardCall& call) {
  check(call);
  return layer_norm_backward_composite(call);
}

}  // namespace

at::Tensor layer_statistics(const LayerNormCall& call) {
  const Tensor x = call.residual ? call.input + *call.residual : call.input;
  const auto [mean, invstd] = statistics_of(x, dims_of(call.start_dim, call.end_dim), call.eps, call.subtract_mean);
  return at::stack({mean, invstd}).detach();
}

std::pair<at::Tensor, at::Tensor> layer_norm_composite(const LayerNormCall& call, const Tensor& statistics) {
  const Tensor& input = call.input;
  const Tensor sum = call.residual ? input + *call.residual : input;
  if (input.numel() == 0) return {sum.clone(), sum};
  const at::DimVector dims = dims_of(call.start_dim, call.end_dim);
  Tensor y = normalized(sum, dims, statistics.select(0, 0), statistics.select(0, 1), call.subtract_mean).deviation;
  const auto as_input = [&](const Tensor& parameter) {
    return parameter.to(y.scalar_type()).view(broadcast_shape(parameter, input, call.start_dim, call.end_dim));
  };
  if (call.weight) y = y * as_input(*call.weight);
  if (call.bias) y = y + as_input(*call.bias);
  return {y.to(input.scalar_type()), sum};
}

// With d = (x - mean) * invstd and k = grad_output * weight: grad_bias = sum(grad_output), grad_weight =
// sum(grad_output * d), grad_input = invstd * (k - avg(k) - d * avg(k * d)), the first average not for RMS norm.
LayerNormBackwardCall::Result layer_norm_backward_composite(const LayerNormBackwardCall& call) {
  const Tensor& input = call.input;
  const auto& requested = call.output_mask;
  const at::DimVector dims = dims_of(call.start_dim, call.end_dim);
  const Normalized of_input =
      normalized(input, dims, call.statistics.select(0, 0), call.statistics.select(0, 1), call.subtract_mean);
  const Tensor& d = of_input.deviation;
  const Tensor grad = call.grad_output.to(d.scalar_type());
  const auto shape = [&](const Tensor& like) { return broadcast_shape(like, input, call.start_dim, call.end_dim); };
  const Tensor whole = at::empty(input.sizes().slice(static_cast<size_t>(call.start_dim), dims.size()), grad.options());
  const auto gradient = [&](bool wanted, const OptionalTensor& given, const Tensor& values) {
    const Tensor& like = given ? *given : whole;
    if (!wanted) return at::empty({0}, like.options());
    return values.sum_to_size(shape(like)).view(like.sizes()).to(like.scalar_type());
  };
  Tensor grad_input = at::empty({0}, input.options());
  if (requested[0]) {
    const Tensor k = call.weight ? grad * call.weight->to(grad.scalar_type()).view(shape(*call.weight)) : grad;
    grad_input = gradient_of_normalized(k, of_input, dims, call.subtract_mean);
    if (call.grad_sum) grad_input = grad_input + call.grad_sum->to(grad.scalar_type());
    grad_input = grad_input.to(input.scalar_type());
  }
  return {grad_input, gradient(requested[1], call.weight, grad * d),
          gradient(requested[2], call.bias ? call.bias : call.weight, grad)};
}

TORCH_LIBRARY_IMPL(normfused, FuncTorchBatched, m) {
  m.impl("layer_norm", call_object<forward_batched>());
  m.impl("layer_norm_backward", call_object<backward_batched>());
}

TORCH_LIBRARY_IMPL(normfused, Autograd, m) {
  m.impl("layer_norm", call_object<forward_autograd>());
  m.impl("layer_norm_backward", call_object<backward_autograd>());
}

}  // namespace normfused::ops
