// Derivatives of group norm: the first via the backward operator, all others via the composite (see derivatives.h).
#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/autograd.h"
#include "ops/backend.h"
#include "ops/batch_norm_composite.h"
#include "ops/call.h"
#include "ops/group_norm.h"
#include "ops/layout.h"
#include "ops/normalized.h"

namespace normfused::ops {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The values of each statistic, shape (N, G, values).
Tensor grouped(const Tensor& values, int64_t groups) {
  return values.reshape({values.size(0), groups, c10::multiply_integers(values.sizes().slice(1)) / groups});
}

// A parameter of shape (C) or (N, C), in the dtype of `like` and a shape that broadcasts with it.
Tensor per_channel_or_sample(const Tensor& parameter, const Tensor& like) {
  if (parameter.dim() == 1) return per_channel(parameter, like);
  at::DimVector shape(like.dim(), 1);
  shape[0] = parameter.size(0);
  shape[1] = parameter.size(1);
  return parameter.to(like.scalar_type()).view(shape);
}

// By groups: shapes (N, G, values) and (N, G, 1).
Normalized normalized_groups(const Tensor& input, int64_t groups, const Tensor& statistics) {
  return normalized(grouped(input, groups), -1, statistics.select(0, 0).unsqueeze(-1),
                    statistics.select(0, 1).unsqueeze(-1), /*subtract_mean=*/true);
}

// The argument of the activation.
Tensor affine(Tensor z, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual) {
  if (weight) z = z * per_channel_or_sample(*weight, z);
  if (bias) z = z + per_channel_or_sample(*bias, z);
  return residual ? z + residual->to(z.scalar_type()) : z;
}

struct GroupNormFunction : torch::autograd::Function<GroupNormFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& residual, const GroupNormCall& call) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Mode mode{true, activation_of(call.activation, call.activation_param)};
    const bool by_mask = gradient_is_by_sign(mode.activation) && residual;
    const bool recomputes = mode.activation.kind != ActivationKind::kIdentity && !by_mask;
    GroupNormCall changed = call;
    changed.save_mask = by_mask;
    const auto [output, statistics, mask] = group_norm(changed);
    const Tensor none;
    ctx->save_for_backward({input, weight.value_or(none), bias.value_or(none),
                            recomputes ? residual.value_or(none) : none, statistics, by_mask ? mask : none});
    save_present(ctx, weight, bias, residual);
    ctx->saved_data["num_groups"] = call.num_groups;
    mode.save(ctx);
    ctx->mark_non_differentiable({statistics, mask});
    ctx->set_materialize_grads(false);
    return {output, statistics, mask};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(5);
    if (!grads[0].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &bias = saved[2], &residual = saved[3], &statistics = saved[4];
    const Mode mode = Mode::saved(ctx);
    std::array<bool, kArguments> requested = requested_gradients(ctx);
    // Without an activation the residual's gradient is grad_output itself.
    const bool passes_through = requested[kResidual] && mode.activation.kind == ActivationKind::kIdentity;
    if (passes_through) results[kResidual] = grads[0];
    requested[kResidual] = requested[kResidual] && !passes_through;
    const auto [grad_input, grad_weight, grad_bias, grad_residual] = group_norm_backward(
        {grads[0], input, ctx->saved_data["num_groups"].toInt(), optional(weight), statistics, requested,
         optional(bias), optional(residual), optional(saved[5]), name_of(mode.activation), mode.activation.parameter});
    if (requested[kInput]) results[kInput] = grad_input;
    if (requested[kWeight]) results[kWeight] = grad_weight;
    if (requested[kBias]) results[kBias] = grad_bias;
    if (requested[kResidual]) results[kResidual] = grad_residual;
    return results;
  }
};

GroupNormCall::Result forward_autograd(const GroupNormCall& call) {
  if (needs_composite(call.input, call.weight, call.bias, call.residual)) {
    GroupNormCall::Result results;
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      results = group_norm(call);
    }
    std::get<0>(results) = group_norm_composite(call, std::get<1>(results));
    return results;
  }
  if (is_recorded(call.input, call.weight, call.bias, call.residual)) {
    const auto results = GroupNormFunction::apply(call.input, call.weight, call.bias, call.residual, call);
    return {results[0], results[1], results[2]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return group_norm(call);
}

GroupNormBackwardCall::Result backward_autograd(const GroupNormBackwardCall& call) {
  if (backward_needs_composite(call.grad_output, call.input, call.weight, call.bias, call.residual)) {
    check(call);
    return group_norm_backward_composite(call);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return group_norm_backward(call);
}

GroupNormCall::Result forward_batched(const GroupNormCall& call) {
  check(call);
  TORCH_CHECK_NOT_IMPLEMENTED(!call.save_mask, "save_mask has no batching rule");
  const Tensor statistics = group_statistics(call);
  return {group_norm_composite(call, statistics), statistics, at::empty({0}, call.input.options().dtype(at::kByte))};
}

GroupNormBackwardCall::Result backward_batched(const GroupNormBackwardCall& call) {
  check(call);
  return group_norm_backward_composite(call);
}

}  // namespace

at::Tensor group_statistics(const GroupNormCall& call) {
  const auto [mean, invstd] = statistics_of(grouped(call.input, call.num_groups), -1, call.eps, /*subtract_mean=*/true);
  return at::stack({mean, invstd}).squeeze(-1).detach();
}

at::Tensor group_norm_composite(const GroupNormCall& call, const Tensor& statistics) {
  if (call.input.numel() == 0) return call.input.clone();
  const Tensor deviation =
      normalized_groups(call.input, call.num_groups, statistics).deviation.view(call.input.sizes());
  const Activation activation = activation_of(call.activation, call.activation_param);
  return activate(activation, affine(deviation, call.weight, call.bias, call.residual)).to(call.input.scalar_type());
}

// With d = (x - mean) * invstd, z the argument of the activation, h = grad_output * activation'(z) and k = h * weight:
//   grad_bias = sum(h), grad_weight = sum(h * d), grad_residual = h, grad_input = invstd * (k - avg(k) - d * avg(k *
//   d)),
// with averages over the values of each statistic.
GroupNormBackwardCall::Result group_norm_backward_composite(const GroupNormBackwardCall& call) {
  const Tensor& input = call.input;
  const auto& requested = call.output_mask;
  const Activation activation = activation_of(call.activation, call.activation_param);
  const Normalized by_group = normalized_groups(input, call.num_groups, call.statistics);
  const Tensor d = by_group.deviation.view(input.sizes());
  Tensor h = call.grad_output.to(d.scalar_type());
  if (call.mask) {
    const double slope = activation.kind == ActivationKind::kLeakyRelu ? activation.parameter : 0;
    h = at::where(unpacked_mask(*call.mask, as_dense(input)), h, h * slope);
  } else {
    h = activate_backward(activation, h, affine(d, call.weight, call.bias, call.residual));
  }
  const Tensor none = at::empty({0}, input.options());
  // The sum over all dimensions that the parameter does not have.
  const auto gradient = [&](bool wanted, const OptionalTensor& like, const Tensor& values) {
    const at::ScalarType type = like ? like->scalar_type() : at::toOpMathType(input.scalar_type());
    if (!wanted) return none.to(type);
    const bool by_sample = like && like->dim() == 2;
    const Tensor by_channel = values.flatten(2).sum(-1);
    return (by_sample ? by_channel : by_channel.sum(0)).to(type);
  };
  const auto flat = [](const Tensor& values) { return values.dim() == 2 ? values.unsqueeze(-1) : values; };
  Tensor grad_input = none;
  if (requested[0]) {
    const Tensor k = grouped(affine(h, call.weight, std::nullopt, std::nullopt), call.num_groups);
    grad_input = gradient_of_normalized(k, by_group, -1, /*subtract_mean=*/true);
    grad_input = grad_input.view(input.sizes()).to(input.scalar_type());
  }
  const OptionalTensor& of_bias = call.bias ? call.bias : call.weight;
  return {grad_input, gradient(requested[1], call.weight, flat(h * d)), gradient(requested[2], of_bias, flat(h)),
          requested[3] ? h.to(input.scalar_type()) : none};
}

TORCH_LIBRARY_IMPL(normfused, FuncTorchBatched, m) {
  m.impl("group_norm", call_object<forward_batched>());
  m.impl("group_norm_backward", call_object<backward_batched>());
}

TORCH_LIBRARY_IMPL(normfused, Autograd, m) {
  m.impl("group_norm", call_object<forward_autograd>());
  m.impl("group_norm_backward", call_object<backward_autograd>());
}

}  // namespace normfused::ops
