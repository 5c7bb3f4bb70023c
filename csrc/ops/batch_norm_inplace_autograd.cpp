// The derivative of in-place batch norm (Rota Bulò, Porzi and Kontschieder, 2018, arXiv:1712.02616): the output y
// overwrites the input x, and backward recovers x from y.
#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/autograd.h"
#include "ops/batch_norm_composite.h"
#include "ops/call.h"

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
      return std::numeric_limits<float>::min();  // also bfloat16's
  }
}

// The indices of the channels whose input must be saved, because the output does not determine it accurately enough.
// y = weight * d + bias is rounded, so the deviation d recovered from it has an error of a few ulps times
// 1 + |bias / weight|: three bits at the bound. Below the smallest normal number, y itself loses bits.
Tensor channels_to_save(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                        const Activation& activation) {
  constexpr double kMaxBiasOverWeight = 8;
  if (!weight && !bias) return at::empty({0}, input.options().dtype(at::kLong));
  const auto magnitude = [](const Tensor& t) { return t.detach().to(at::kDouble).abs(); };
  const double slope = activation.kind == ActivationKind::kLeakyRelu ? std::min(1., activation.parameter) : 1;
  const Tensor size = weight ? magnitude(*weight) : at::ones_like(*bias, at::kDouble);
  Tensor recoverable = size * slope >= smallest_normal(input.scalar_type());
  if (bias) recoverable = recoverable & (magnitude(*bias) <= kMaxBiasOverWeight * size);
  return at::nonzero(at::logical_not(recoverable)).view(-1);
}

struct InPlaceFunction : torch::autograd::Function<InPlaceFunction> {
  // `run` calls the operator below autograd and returns the statistics.
  template <class Run>
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Mode& mode, const Run& run) {
    const at::AutoDispatchBelowADInplaceOrView below;
    // Finding these channels waits for the device. Without them only the gradients that do not depend on x are
    // available.
    const bool reads_input = mode.training || needs_grad(weight);
    const Tensor none, channels = reads_input ? channels_to_save(input, weight, bias, mode.activation)
                                              : at::empty({0}, input.options().dtype(at::kLong));
    const Tensor saved_input = channels.numel() > 0 ? input.index_select(1, channels) : none;
    // An empty tensor with x's gradient edge, which the input tensor loses when it becomes the output.
    Tensor edge;
    if (needs_grad(input)) {
      edge = at::empty({0}, input.options().memory_format(at::MemoryFormat::Contiguous));
      set_gradient_edge(edge, torch::autograd::impl::gradient_edge(input));
    }
    const auto version = input._version();
    const Tensor statistics = run();
    // Selective checkpointing may return saved statistics without running the operator.
    TORCH_CHECK(input.numel() == 0 || input.key_set().has_any(at::kTensorSubclassLike) || input._version() != version,
                "normfused::batch_norm_training_ and batch_norm_inference_ overwrite their input: selective "
                "checkpointing must recompute them, not save their results");
    ctx->mark_dirty({input});
    // tensor_data(), because a node that saves its own output, if that is a view, would keep itself alive. The version
    // is that of the output.
    ctx->save_for_backward(
        {input.tensor_data(), weight.value_or(none), bias.value_or(none), statistics, channels, saved_input, edge});
    save_present(ctx, weight, bias, std::nullopt);
    mode.save(ctx);
    ctx->set_materialize_grads(false);
    return input;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(5);
    if (!grads[0].defined()) return results;
    const Saved saved(ctx);
    const Tensor& grad = grads[0];
    variable_list all;
    if (!saved.mode.training && !saved.requested[kWeight]) {
      all = saved.gradients_without_input(grad);
    } else if (at::GradMode::is_enabled() || has_tangent(grad) || in_transform()) {
      all = saved.differentiable_gradients(grad);
    } else {
      all = saved.gradients_from_output(grad);
    }
    for (const Argument argument : {kInput, kWeight, kBias})
      if (saved.requested[argument]) results[argument] = all[argument];
    return results;
  }

 private:
  // What forward saved, and the three ways to compute the gradients of input, weight and bias.
  struct Saved {
    explicit Saved(AutogradContext* ctx)
        : tensors(ctx->get_saved_variables()), mode(Mode::saved(ctx)), requested(requested_gradients(ctx)) {}

    // With constant statistics these gradients do not depend on x, and the activation's depends on the sign of y only,
    // whatever the weights are.
    variable_list gradients_without_input(const Tensor& grad) const {
      const bool leaky = mode.activation.kind == ActivationKind::kLeakyRelu;
      const Tensor grad_z =
          leaky ? at::leaky_relu_backward(grad, output, mode.activation.parameter, /*self_is_result=*/true) : grad;
      return first_three(batch_norm_backward({grad_z, output, weight, statistics, false, requested}));
    }

    // The gradients as functions of the recovered x, to be differentiated again.
    variable_list differentiable_gradients(const Tensor& grad) const {
      const Tensor x = input();
      if (edge.defined()) set_gradient_edge(x, torch::autograd::impl::gradient_edge(edge));
      return gradients(grad, x, weight, bias, statistics, /*from_output=*/false);
    }

    // The gradients by the kernels that recover x, except for the channels whose input was saved.
    variable_list gradients_from_output(const Tensor& grad) const {
      const variable_list all = gradients(grad, output, weight, bias, statistics, /*from_output=*/true);
      if (channels.numel() == 0) return all;
      const auto select = [&](const OptionalTensor& t) {
        return t ? OptionalTensor(t->index_select(0, channels)) : std::nullopt;
      };
      const variable_list some = gradients(grad.index_select(1, channels), saved_input, select(weight), select(bias),
                                           statistics.index_select(1, channels), /*from_output=*/false);
      for (const Argument argument : {kInput, kWeight, kBias})
        if (requested[argument]) all[argument].index_copy_(argument == kInput ? 1 : 0, channels, some[argument]);
      return all;
    }

    // x, recovered from y.
    Tensor input() const {
      const at::NoGradGuard no_grad;
      Tensor x = output.to(at::kDouble);
      if (mode.activation.kind == ActivationKind::kLeakyRelu) x = at::where(x > 0, x, x / mode.activation.parameter);
      if (bias) x = x - per_channel(*bias, x);
      if (weight) x = x / per_channel(*weight, x);
      x = (x / per_channel(statistics[1], x) + per_channel(statistics[0], x)).to(output.scalar_type());
      return channels.numel() > 0 ? x.index_copy_(1, channels, saved_input) : x;
    }

    variable_list gradients(const Tensor& grad, const Tensor& x, const OptionalTensor& w, const OptionalTensor& b,
                            const Tensor& s, bool from_output) const {
      return first_three(batch_norm_backward({grad, x, w, s, mode.training, requested, b, kNoTensor, kNoTensor,
                                              name_of(mode.activation), mode.activation.parameter, from_output}));
    }

    static variable_list first_three(const BatchNormBackwardCall::Result& results) {
      return {std::get<0>(results), std::get<1>(results), std::get<2>(results)};
    }

    const variable_list tensors;
    const Mode mode;
    const std::array<bool, kArguments> requested;
    const Tensor& output = tensors[0];
    const OptionalTensor weight = optional(tensors[1]), bias = optional(tensors[2]);
    const Tensor& statistics = tensors[3];
    const Tensor& channels = tensors[4];  // those whose input was saved
    const Tensor& saved_input = tensors[5];
    const Tensor& edge = tensors[6];
  };

  static void set_gradient_edge(const Tensor& tensor, const torch::autograd::Edge& edge) {
    torch::autograd::impl::set_gradient_edge(tensor, edge);
  }
};

template <class Call>
Tensor differentiable(const Call& call, bool training, Tensor (*op)(const Call&)) {
  check_buffers(call.running_mean, call.running_var);
  const Mode mode{training, activation_of(call.activation, call.activation_param)};
  const Tensor& input = call.input;
  const OptionalTensor &weight = call.weight, &bias = call.bias;
  TORCH_CHECK_NOT_IMPLEMENTED(!in_transform() && !has_tangent(input) && !has_tangent(weight) && !has_tangent(bias),
                              "in-place batch norm operators have no derivative under torch.func or in forward mode; "
                              "use the out-of-place operators");
  if (is_recorded(input, weight, bias)) {
    torch::autograd::check_inplace(input, /*requires_grad=*/true);
    TORCH_CHECK_VALUE(is_invertible(mode.activation), "in place the activation must be invertible, got ",
                      std::string(name_of(mode.activation)));
    Tensor statistics;
    InPlaceFunction::apply(input, weight, bias, mode, [&] { return statistics = op(call); });
    return statistics;
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return op(call);
}

Tensor training_inplace_autograd(const BatchNormTrainingInPlaceCall& call) {
  return differentiable(call, true, batch_norm_training_);
}

Tensor inference_inplace_autograd(const BatchNormInferenceInPlaceCall& call) {
  return differentiable(call, false, batch_norm_inference_);
}

}  // namespace

TORCH_LIBRARY_IMPL(normfused, Autograd, m) {
  m.impl("batch_norm_training_", call_object<training_inplace_autograd>());
  m.impl("batch_norm_inference_", call_object<inference_inplace_autograd>());
}

}  // namespace normfused::ops
