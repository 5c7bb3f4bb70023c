// The derivative of batch norm in place (Rota Bulò, Porzi and Kontschieder, 2018): x is gone, and backward works from
// y.
#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/autograd.h"

namespace normfused::ops {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

double smallest_normal(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return std::numeric_limits<c10::Half>::min();
    case at::kDouble:
      return std::numeric_limits<double>::min();
    default:
      return std::numeric_limits<float>::min();  // bfloat16's too
  }
}

// The channels of which x must be kept. y = weight * d + bias is stored rounded, so the deviation d that is got back
// from it is off by some ulps times 1 + |bias / weight|: this loses three bits at the bound. Below the least normal
// number, y loses bits of its own.
Tensor channels_to_keep(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                        const Activation& activation) {
  constexpr double kBiasOverWeight = 8;
  if (!weight && !bias) return at::empty({0}, input.options().dtype(at::kLong));
  const auto size_of = [](const Tensor& t) { return t.detach().to(at::kDouble).abs(); };
  const double slope = activation.kind == ActivationKind::kLeakyRelu ? std::min(1., activation.parameter) : 1;
  const Tensor size = weight ? size_of(*weight) : at::ones_like(*bias, at::kDouble);
  Tensor can_be_told = size * slope >= smallest_normal(input.scalar_type());
  if (bias) can_be_told = can_be_told & (size_of(*bias) <= kBiasOverWeight * size);
  return at::nonzero(at::logical_not(can_be_told)).view(-1);
}

struct InPlaceFunction : torch::autograd::Function<InPlaceFunction> {
  // `call` runs the operator below autograd and returns the statistics.
  template <class Call>
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Mode& mode, const Call& call) {
    const at::AutoDispatchBelowADInplaceOrView below;
    // Finding them waits for the device. Without them only the gradients by constant statistics can be computed.
    const bool reads_input = mode.training || needs_grad(weight);
    const Tensor none, kept = reads_input ? channels_to_keep(input, weight, bias, mode.activation)
                                          : at::empty({0}, input.options().dtype(at::kLong));
    const Tensor kept_input = kept.numel() > 0 ? input.index_select(1, kept) : none;
    // Has x's place in the graph, which the input is about to leave.
    Tensor place;
    if (needs_grad(input)) {
      place = at::empty({0}, input.options().memory_format(at::MemoryFormat::Contiguous));
      set_gradient_edge(place, torch::autograd::impl::gradient_edge(input));
    }
    const auto version = input._version();
    const Tensor statistics = call();
    // Selective checkpointing can give back the statistics that it saved and leave the input as it was.
    TORCH_CHECK(input.numel() == 0 || input.key_set().has_any(at::kTensorSubclassLike) || input._version() != version,
                "normfused::batch_norm_training_ and batch_norm_inference_ write over their input: selective "
                "checkpointing must recompute them, not save their results");
    ctx->mark_dirty({input});
    // Not the output itself: of a view, the node would hold itself alive. Its version is the output's.
    ctx->save_for_backward(
        {input.tensor_data(), weight.value_or(none), bias.value_or(none), statistics, kept, kept_input, place});
    save_given(ctx, weight, bias, std::nullopt);
    mode.save(ctx);
    ctx->set_materialize_grads(false);
    return input;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(5);
    if (!grads[0].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad = grads[0], &output = saved[0], &statistics = saved[3], &kept = saved[4], &kept_input = saved[5],
                 &place = saved[6];
    const OptionalTensor weight = optional(saved[1]), bias = optional(saved[2]);
    const Mode mode = Mode::saved(ctx);
    const std::array<bool, kArguments> wanted = wanted_gradients(ctx);
    const auto gradients = [&](const Tensor& g, const Tensor& x, const OptionalTensor& w, const OptionalTensor& b,
                               const Tensor& s, bool from_output) {
      const auto [grad_input, grad_weight, grad_bias, unused] =
          batch_norm_backward(g, x, w, s, mode.training, wanted, b, std::nullopt, std::nullopt,
                              name_of(mode.activation), mode.activation.parameter, from_output);
      return variable_list{grad_input, grad_weight, grad_bias};
    };

    variable_list all;
    if (!mode.training && !wanted[kWeight]) {
      // x has no part in these gradients, and the activation's depends on the sign of y, whatever the weights are.
      const bool leaky = mode.activation.kind == ActivationKind::kLeakyRelu;
      const Tensor through =
          leaky ? at::leaky_relu_backward(grad, output, mode.activation.parameter, /*self_is_result=*/true) : grad;
      const auto [grad_input, grad_weight, grad_bias, unused] =
          batch_norm_backward(through, output, weight, statistics, false, wanted, std::nullopt, std::nullopt,
                              std::nullopt, name_of(Activation{}), 0);
      all = {grad_input, grad_weight, grad_bias};
    } else if (at::GradMode::is_enabled() || has_tangent(grad) || in_transform()) {
      // To be differentiated again, with respect to the x that there was.
      const Tensor x = input_of(output, weight, bias, statistics, kept, kept_input, mode.activation);
      if (place.defined()) set_gradient_edge(x, torch::autograd::impl::gradient_edge(place));
      all = gradients(grad, x, weight, bias, statistics, false);
    } else {
      all = gradients(grad, output, weight, bias, statistics, true);
      if (kept.numel() > 0) {
        const auto of_kept = [&](const OptionalTensor& t) {
          return t ? OptionalTensor(t->index_select(0, kept)) : std::nullopt;
        };
        const variable_list some = gradients(grad.index_select(1, kept), kept_input, of_kept(weight), of_kept(bias),
                                             statistics.index_select(1, kept), false);
        for (const Argument argument : {kInput, kWeight, kBias})
          if (wanted[argument]) all[argument].index_copy_(argument == kInput ? 1 : 0, kept, some[argument]);
      }
    }
    for (const Argument argument : {kInput, kWeight, kBias})
      if (wanted[argument]) results[argument] = all[argument];
    return results;
  }

  static void set_gradient_edge(const Tensor& tensor, const torch::autograd::Edge& edge) {
    torch::autograd::impl::set_gradient_edge(tensor, edge);
  }

  static Tensor input_of(const Tensor& output, const OptionalTensor& weight, const OptionalTensor& bias,
                         const Tensor& statistics, const Tensor& kept, const Tensor& kept_input,
                         const Activation& activation) {
    const at::NoGradGuard no_grad;
    at::DimVector shape(output.dim(), 1);
    shape[1] = -1;
    const auto per_channel = [&](const Tensor& t) { return t.to(at::kDouble).view(shape); };
    Tensor x = output.to(at::kDouble);
    if (activation.kind == ActivationKind::kLeakyRelu) x = at::where(x > 0, x, x / activation.parameter);
    if (bias) x = x - per_channel(*bias);
    if (weight) x = x / per_channel(*weight);
    x = (x / per_channel(statistics[1]) + per_channel(statistics[0])).to(output.scalar_type());
    return kept.numel() > 0 ? x.index_copy_(1, kept, kept_input) : x;
  }
};

template <class Call>
Tensor differentiable(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Mode& mode,
                      const Call& call) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !in_transform() && !has_tangent(input) && !has_tangent(weight) && !has_tangent(bias),
      "batch norm's operators in place have no derivative under torch.func or in forward mode; use those that are not "
      "in place");
  if (is_recorded(input, weight, bias)) {
    torch::autograd::check_inplace(input, /*requires_grad=*/true);
    TORCH_CHECK_VALUE(is_invertible(mode.activation), "in place the activation must be one that can be undone, got ",
                      std::string(name_of(mode.activation)));
    Tensor statistics;
    InPlaceFunction::apply(input, weight, bias, mode, [&] { return statistics = call(); });
    return statistics;
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call();
}

Tensor batch_norm_training_inplace_autograd(const Tensor& input, const OptionalTensor& weight,
                                            const OptionalTensor& bias, const OptionalTensor& running_mean,
                                            const OptionalTensor& running_var,
                                            const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                                            double eps, std::string_view activation, double activation_param,
                                            int64_t correction, const OptionalTensor& nonfinite_batches,
                                            bool update_in_backward) {
  check_buffers(running_mean, running_var);
  return differentiable(input, weight, bias, {true, activation_of(activation, activation_param)}, [&] {
    return batch_norm_training_(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps,
                                activation, activation_param, correction, nonfinite_batches, update_in_backward);
  });
}

Tensor batch_norm_inference_inplace_autograd(const Tensor& input, const OptionalTensor& weight,
                                             const OptionalTensor& bias, const Tensor& running_mean,
                                             const Tensor& running_var, double eps, std::string_view activation,
                                             double activation_param) {
  check_buffers(running_mean, running_var);
  return differentiable(input, weight, bias, {false, activation_of(activation, activation_param)}, [&] {
    return batch_norm_inference_(input, weight, bias, running_mean, running_var, eps, activation, activation_param);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(normfused, Autograd, m) {
  m.impl("batch_norm_training_", batch_norm_training_inplace_autograd);
  m.impl("batch_norm_inference_", batch_norm_inference_inplace_autograd);
}

}  // namespace normfused::ops
