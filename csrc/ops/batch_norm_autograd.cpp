// Derivatives of batch norm: the first by the backward operator, the second by formula, the third refused.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/library.h>

#include <algorithm>
#include <iterator>

#include "ops/autograd.h"
#include "ops/layout.h"

namespace normfused::ops {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// `tensor` in the given strides.
Tensor laid_out(const Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides) {
  return tensor.strides() == strides ? tensor : at::empty_strided(sizes, strides, tensor.options()).copy_(tensor);
}

// Passes a second derivative on, so that it still counts as depending on what it was computed from.
struct ThirdOrder : torch::autograd::Function<ThirdOrder> {
  static Tensor forward(AutogradContext*, const Tensor& result, at::TensorList) { return result.view_as(result); }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "normfused: batch norm has no third derivative");
  }
};

// With d = (x - mean) * invstd and P(a) = a - avg(a) - d * avg(a * d), training computes
//   grad_input = weight * invstd * P(g),  grad_weight = sum(g * d),  grad_bias = sum(g)
// and inference the same with P(a) = a and constant statistics. P is symmetric, which the formulas below use.
// Given gradients of those three (u of grad_input, v of grad_weight, w of grad_bias), returns those of g, x and weight.
variable_list batch_norm_double_backward(const Tensor& u_in, const Tensor& v_in, const Tensor& w_in, const Tensor& g_in,
                                         const Tensor& x_in, const Tensor& weight_in, const Tensor& statistics,
                                         bool training) {
  const at::NoGradGuard no_grad;
  const auto type = at::toOpMathType(x_in.scalar_type());
  at::DimVector axes, shape(x_in.dim(), 1);
  shape[1] = -1;
  for (int64_t dim = 0; dim < x_in.dim(); ++dim)
    if (dim != 1) axes.push_back(dim);
  const auto per_channel = [&](const Tensor& t) { return t.defined() ? t.to(type).view(shape) : Tensor(); };
  const auto sum = [&](const Tensor& t) { return t.sum(axes, /*keepdim=*/true); };
  const auto avg = [&](const Tensor& t) { return t.mean(axes, /*keepdim=*/true); };
  const auto plus = [](const Tensor& a, const Tensor& b) { return a.defined() ? (b.defined() ? a + b : a) : b; };

  const Tensor g = g_in.to(type), x = x_in.to(type);
  const Tensor u = u_in.defined() ? u_in.to(type) : Tensor();
  const Tensor v = per_channel(v_in), w = per_channel(w_in);
  const Tensor invstd = per_channel(statistics[1]);
  const Tensor weight = weight_in.defined() ? per_channel(weight_in) : at::ones_like(invstd);
  const Tensor d = (x.to(at::kDouble) - statistics[0].view(shape)).to(type) * invstd;
  const auto project = [&](const Tensor& a) { return training ? a - avg(a) - d * avg(a * d) : a; };

  Tensor grad_g, grad_x, grad_weight;
  Tensor grad_d;  // how the three depend on x by way of d
  if (u.defined()) {
    const Tensor projected = project(u);
    grad_g = weight * invstd * projected;
    grad_weight = (invstd * sum(projected * g)).view(-1);
    if (training) {
      grad_d = -weight * invstd * (u * avg(g * d) + g * avg(u * d));
      // … and by way of invstd, whose derivative is -invstd² d / M.
      grad_x = -weight * invstd * invstd * avg(projected * g) * d;
    }
  }
  if (v.defined()) {
    grad_g = plus(grad_g, v * d);
    grad_d = plus(grad_d, v * g);
  }
  if (w.defined()) grad_g = plus(grad_g, w.expand_as(g));
  if (grad_d.defined()) grad_x = plus(grad_x, invstd * project(grad_d));

  const auto as = [](const Tensor& t, const Tensor& like) {
    return t.defined() && like.defined() ? t.to(like.scalar_type()) : Tensor();
  };
  return {as(grad_g, g_in), as(grad_x, x_in), as(grad_weight, weight_in)};
}

// The bits of a mask as a tensor of bools like `like`, which is laid out in memory as the values were.
Tensor unpacked(const Tensor& mask, const Tensor& like) {
  const Tensor places = at::arange(8, mask.options());
  const Tensor bits = at::bitwise_and(at::bitwise_right_shift(mask.unsqueeze(1), places), 1).view(-1).to(at::kBool);
  return bits.slice(0, 0, like.numel()).as_strided(like.sizes(), like.strides());
}

// What the activation took in, from what was saved.
Tensor before_activation(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const Tensor& statistics, const OptionalTensor& residual) {
  const auto type = at::toOpMathType(input.scalar_type());
  at::DimVector shape(input.dim(), 1);
  shape[1] = -1;
  Tensor scale = statistics[1];
  if (weight) scale = scale * weight->to(at::kDouble);
  Tensor z = (input.to(at::kDouble) - statistics[0].view(shape)) * scale.view(shape);
  if (bias) z = z + bias->to(at::kDouble).view(shape);
  if (residual) z = z + residual->to(at::kDouble);
  return z.to(type);
}

struct BackwardFunction : torch::autograd::Function<BackwardFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input,
                               const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                               const Tensor& statistics, const OptionalTensor& mask, const Mode& mode,
                               std::array<bool, 4> output_mask) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [grad_input, grad_weight, grad_bias, grad_residual] =
        batch_norm_backward(grad_output, input, weight, statistics, mode.training, output_mask, bias, residual, mask,
                            name_of(mode.activation), mode.activation.parameter);
    const Tensor none;
    ctx->save_for_backward({grad_output, input, weight.value_or(none), bias.value_or(none), residual.value_or(none),
                            statistics, mask.value_or(none)});
    mode.save(ctx);
    ctx->set_materialize_grads(false);
    const variable_list results{grad_input, grad_weight, grad_bias, grad_residual};
    variable_list unwanted;
    for (size_t i = 0; i < results.size(); ++i)
      if (!output_mask[i]) unwanted.push_back(results[i]);
    ctx->mark_non_differentiable(unwanted);
    return results;
  }

  // With z what the activation takes in and h its gradient, the first derivative is h = grad_output * activation'(z)
  // and then batch norm's own, of h; grad_residual is h. So its derivative is batch norm's second with respect to h, x
  // and weight, and what comes to z by way of h goes through batch norm's first.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad_output = saved[0], &input = saved[1], &weight = saved[2], &bias = saved[3], &residual = saved[4],
                 &statistics = saved[5], &mask = saved[6];
    const Mode mode = Mode::saved(ctx);
    const Activation& activation = mode.activation;
    Tensor h = grad_output, z_leaf, grad_leaf;
    Tensor slope;  // of the activation, where it depends on the sign alone
    if (mask.defined()) {
      const double below = activation.kind == ActivationKind::kLeakyRelu ? activation.parameter : 0;
      slope = at::where(unpacked(mask, with_view(input)), 1., below).to(grad_output.scalar_type());
      h = grad_output * slope;
    } else if (activation.kind != ActivationKind::kIdentity) {
      const at::AutoGradMode with_grad(true);
      z_leaf = before_activation(input.detach(), detached(weight), detached(bias), statistics, detached(residual))
                   .requires_grad_();
      grad_leaf = grad_output.detach().to(z_leaf.scalar_type()).requires_grad_();
      h = torch::autograd::grad({activate(activation, z_leaf)}, {z_leaf}, {grad_leaf}, true, true)[0];
    }

    variable_list second =
        batch_norm_double_backward(grads[0], grads[1], grads[2], h.detach(), input, weight, statistics, mode.training);
    Tensor grad_h = second[0], grad_input = second[1], grad_weight = second[2], grad_bias, grad_residual;
    if (grads[3].defined()) grad_h = grad_h.defined() ? grad_h + grads[3] : grads[3];
    if (grad_h.defined() && slope.defined()) {
      grad_h = grad_h * slope;
    } else if (grad_h.defined() && z_leaf.defined()) {
      const variable_list through = torch::autograd::grad({h}, {grad_leaf, z_leaf}, {grad_h.to(h.scalar_type())},
                                                          std::nullopt, false, /*allow_unused=*/true);
      grad_h = through[0];
      if (through[1].defined()) {
        const at::NoGradGuard no_grad;
        const Tensor grad_z = through[1].to(input.scalar_type());
        const auto [of_input, of_weight, of_bias, unused] = batch_norm_backward(
            grad_z, input, optional(weight), statistics, mode.training, {true, weight.defined(), bias.defined(), false},
            std::nullopt, std::nullopt, std::nullopt, "identity", 0);
        grad_input = grad_input.defined() ? grad_input + of_input : of_input;
        if (weight.defined()) grad_weight = grad_weight.defined() ? grad_weight + of_weight : of_weight;
        if (bias.defined()) grad_bias = of_bias;
        if (residual.defined()) grad_residual = grad_z;
      }
    }
    if (grad_h.defined()) grad_h = grad_h.to(grad_output.scalar_type());

    variable_list results{grad_h, grad_input, grad_weight, grad_bias, grad_residual};
    if (at::GradMode::is_enabled()) {
      variable_list sources;
      for (const variable_list& some : {saved, grads})
        std::copy_if(some.begin(), some.end(), std::back_inserter(sources),
                     [](const Tensor& t) { return t.defined(); });
      for (Tensor& result : results)
        if (result.defined()) result = ThirdOrder::apply(result, at::TensorList(sources));
    }
    results.resize(9);
    return results;
  }

  static OptionalTensor detached(const Tensor& tensor) {
    return tensor.defined() ? OptionalTensor(tensor.detach()) : std::nullopt;
  }
};

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
  if (at::GradMode::is_enabled() &&
      (needs_grad(input) || needs_grad(weight) || needs_grad(bias) || needs_grad(residual))) {
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
                                     const OptionalTensor& skipped, bool update_in_backward) {
  check_buffers(running_mean, running_var);
  const Mode mode{true, activation_of(activation, activation_param)};
  return differentiable(input, weight, bias, residual, mode, save_mask, [&](bool with_mask) {
    return batch_norm_training(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps,
                               residual, activation, activation_param, with_mask, correction, skipped,
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
  if (at::GradMode::is_enabled() && (needs_grad(grad_output) || needs_grad(input) || needs_grad(weight) ||
                                     needs_grad(bias) || needs_grad(residual))) {
    TORCH_CHECK_NOT_IMPLEMENTED(!from_output && !sums, "backward from the output or from sums has no derivative");
    const Mode mode{training, activation_of(activation, activation_param)};
    const auto results =
        BackwardFunction::apply(grad_output, input, weight, bias, residual, statistics, mask, mode, output_mask);
    return {results[0], results[1], results[2], results[3]};
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
