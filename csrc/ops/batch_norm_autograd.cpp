// Derivatives of batch norm: the first by the backward operator, the second by formula, the third refused.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/batch_norm.h"

namespace normfused::ops {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool needs_grad(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
bool needs_grad(const OptionalTensor& tensor) { return tensor && needs_grad(*tensor); }

void check_buffers(const OptionalTensor& running_mean, const OptionalTensor& running_var) {
  TORCH_CHECK_VALUE(!at::GradMode::is_enabled() || (!needs_grad(running_mean) && !needs_grad(running_var)),
                    "running statistics are not differentiated");
}

OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// Passes a second derivative on, so that it still counts as depending on what it was computed from.
struct ThirdOrder : torch::autograd::Function<ThirdOrder> {
  static Tensor forward(AutogradContext*, const Tensor& result, const Tensor&, const Tensor&, const OptionalTensor&) {
    return result.view_as(result);
  }
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

struct BackwardFunction : torch::autograd::Function<BackwardFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input,
                               const OptionalTensor& weight, const Tensor& statistics, bool training,
                               std::array<bool, 3> output_mask) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [grad_input, grad_weight, grad_bias] =
        batch_norm_backward(grad_output, input, weight, statistics, training, output_mask);
    ctx->save_for_backward({grad_output, input, weight.value_or(Tensor()), statistics});
    ctx->saved_data["training"] = training;
    ctx->set_materialize_grads(false);
    const variable_list results{grad_input, grad_weight, grad_bias};
    variable_list unwanted;
    for (size_t i = 0; i < results.size(); ++i)
      if (!output_mask[i]) unwanted.push_back(results[i]);
    ctx->mark_non_differentiable(unwanted);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad_output = saved[0], &input = saved[1], &weight = saved[2];
    variable_list results = batch_norm_double_backward(grads[0], grads[1], grads[2], grad_output, input, weight,
                                                       saved[3], ctx->saved_data["training"].toBool());
    if (at::GradMode::is_enabled())
      for (Tensor& result : results)
        if (result.defined()) result = ThirdOrder::apply(result, grad_output, input, optional(weight));
    return {results[0], results[1], results[2], Tensor(), Tensor(), Tensor()};
  }
};

// What training and inference share: the edges of input, weight and bias, and their gradients.
template <class Forward>
std::tuple<Tensor, Tensor> save(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                                const OptionalTensor& bias, bool training, const Forward& forward) {
  const at::AutoDispatchBelowADInplaceOrView below;
  auto [output, statistics] = forward();
  ctx->save_for_backward({input, weight.value_or(Tensor()), statistics});
  ctx->mark_non_differentiable({statistics});
  ctx->set_materialize_grads(false);
  ctx->saved_data["training"] = training;
  ctx->saved_data["has_bias"] = bias.has_value();
  return {output, statistics};
}

// The gradients of input, weight and bias, followed by nothing for the other arguments of forward.
variable_list gradients(AutogradContext* ctx, const variable_list& grads, size_t arguments) {
  variable_list results(arguments);
  if (!grads[0].defined()) return results;
  const variable_list saved = ctx->get_saved_variables();
  const Tensor &input = saved[0], &weight = saved[1];
  // Only tensors that are there have an edge.
  const bool has_bias = ctx->saved_data["has_bias"].toBool();
  const size_t bias_edge = weight.defined() ? 2 : 1;
  const std::array<bool, 3> mask{ctx->needs_input_grad(0), weight.defined() && ctx->needs_input_grad(1),
                                 has_bias && ctx->needs_input_grad(bias_edge)};
  const auto [grad_input, grad_weight, grad_bias] =
      batch_norm_backward(grads[0], input, optional(weight), saved[2], ctx->saved_data["training"].toBool(), mask);
  if (mask[0]) results[0] = grad_input;
  if (mask[1]) results[1] = grad_weight;
  if (mask[2]) results[2] = grad_bias;
  return results;
}

struct TrainingFunction : torch::autograd::Function<TrainingFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                               std::optional<double> momentum, double eps) {
    const auto [output, statistics] = save(ctx, input, weight, bias, true, [&] {
      return batch_norm_training(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps);
    });
    return {output, statistics};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return gradients(ctx, grads, 8); }
};

struct InferenceFunction : torch::autograd::Function<InferenceFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& running_mean, const Tensor& running_var,
                               double eps) {
    const auto [output, statistics] = save(ctx, input, weight, bias, false, [&] {
      return batch_norm_inference(input, weight, bias, running_mean, running_var, eps);
    });
    return {output, statistics};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return gradients(ctx, grads, 6); }
};

std::tuple<Tensor, Tensor> batch_norm_training_autograd(const Tensor& input, const OptionalTensor& weight,
                                                        const OptionalTensor& bias, const OptionalTensor& running_mean,
                                                        const OptionalTensor& running_var,
                                                        const OptionalTensor& num_batches_tracked,
                                                        std::optional<double> momentum, double eps) {
  check_buffers(running_mean, running_var);
  if (at::GradMode::is_enabled() && (needs_grad(input) || needs_grad(weight) || needs_grad(bias))) {
    const auto results =
        TrainingFunction::apply(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps);
    return {results[0], results[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return batch_norm_training(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps);
}

std::tuple<Tensor, Tensor> batch_norm_inference_autograd(const Tensor& input, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, const Tensor& running_mean,
                                                         const Tensor& running_var, double eps) {
  check_buffers(running_mean, running_var);
  if (at::GradMode::is_enabled() && (needs_grad(input) || needs_grad(weight) || needs_grad(bias))) {
    const auto results = InferenceFunction::apply(input, weight, bias, running_mean, running_var, eps);
    return {results[0], results[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return batch_norm_inference(input, weight, bias, running_mean, running_var, eps);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward_autograd(const Tensor& grad_output, const Tensor& input,
                                                                const OptionalTensor& weight, const Tensor& statistics,
                                                                bool training, std::array<bool, 3> output_mask) {
  if (at::GradMode::is_enabled() && (needs_grad(grad_output) || needs_grad(input) || needs_grad(weight))) {
    const auto results = BackwardFunction::apply(grad_output, input, weight, statistics, training, output_mask);
    return {results[0], results[1], results[2]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return batch_norm_backward(grad_output, input, weight, statistics, training, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(normfused, Autograd, m) {
  m.impl("batch_norm_training", batch_norm_training_autograd);
  m.impl("batch_norm_inference", batch_norm_inference_autograd);
  m.impl("batch_norm_backward", batch_norm_backward_autograd);
}

}  // namespace normfused::ops
