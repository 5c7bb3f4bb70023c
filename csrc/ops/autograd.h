// Shared by the autograd Functions of batch norm: what forward saves in the context, and how backward reads it.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "ops/activation.h"
#include "ops/batch_norm.h"
#include "ops/derivatives.h"

namespace normfused::ops {

inline OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

inline void check_buffers(const OptionalTensor& running_mean, const OptionalTensor& running_var) {
  TORCH_CHECK_VALUE(!at::GradMode::is_enabled() || (!needs_grad(running_mean) && !needs_grad(running_var)),
                    "running statistics are not differentiated: running_mean and running_var must not require grad");
  TORCH_CHECK_VALUE(!has_tangent(running_mean) && !has_tangent(running_var),
                    "running statistics are not differentiated: running_mean and running_var must have no tangent");
}

// The differentiable arguments of the operators, in schema order.
enum Argument { kInput, kWeight, kBias, kResidual, kArguments };

// What backward needs besides tensors.
struct Mode {
  bool training;  // the statistics are the batch's own
  Activation activation;

  void save(torch::autograd::AutogradContext* ctx) const {
    ctx->saved_data["training"] = training;
    if (activation.kind == ActivationKind::kIdentity) return;
    ctx->saved_data["activation"] = static_cast<int64_t>(activation.kind);
    ctx->saved_data["activation_param"] = activation.parameter;
  }
  static Mode saved(torch::autograd::AutogradContext* ctx) {
    Mode mode{ctx->saved_data["training"].toBool(), {}};
    if (const auto kind = ctx->saved_data.find("activation"); kind != ctx->saved_data.end())
      mode.activation = {static_cast<ActivationKind>(kind->second.toInt()),
                         ctx->saved_data["activation_param"].toDouble()};
    return mode;
  }
};

// Records which arguments are present: needs_input_grad() counts only those.
inline void save_present(torch::autograd::AutogradContext* ctx, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& residual) {
  int64_t bits = 0;
  for (const bool present : {true, weight.has_value(), bias.has_value(), residual.has_value()})
    bits = 2 * bits + present;
  ctx->saved_data["present"] = bits;
}

// The arguments whose gradients are requested.
inline std::array<bool, kArguments> requested_gradients(torch::autograd::AutogradContext* ctx) {
  std::array<bool, kArguments> requested{};
  const int64_t present = ctx->saved_data["present"].toInt();
  for (size_t argument = 0, edge = 0; argument < kArguments; ++argument)
    if (present >> (kArguments - 1 - argument) & 1) requested[argument] = ctx->needs_input_grad(edge++);
  return requested;
}

}  // namespace normfused::ops
