// What the autograd Functions of batch norm have in common.
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
                    "running statistics are not differentiated");
  TORCH_CHECK_VALUE(!has_tangent(running_mean) && !has_tangent(running_var),
                    "running statistics are not differentiated: running_mean and running_var must have no tangent");
}

// The operators' arguments that have derivatives, in their order.
enum Argument { kInput, kWeight, kBias, kResidual, kArguments };

// What backward needs besides the tensors: whether the statistics were the batch's own, and what came after them.
struct Mode {
  bool training;
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

// Only tensors that are there have an edge: notes which are.
inline void save_given(torch::autograd::AutogradContext* ctx, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual) {
  int64_t given = 0;
  for (const bool there : {true, weight.has_value(), bias.has_value(), residual.has_value()}) given = 2 * given + there;
  ctx->saved_data["given"] = given;
}

// Of which arguments the gradient is asked for.
inline std::array<bool, kArguments> wanted_gradients(torch::autograd::AutogradContext* ctx) {
  std::array<bool, kArguments> wanted{};
  const int64_t given = ctx->saved_data["given"].toInt();
  for (size_t argument = 0, edge = 0; argument < kArguments; ++argument)
    if (given >> (kArguments - 1 - argument) & 1) wanted[argument] = ctx->needs_input_grad(edge++);
  return wanted;
}

}  // namespace normfused::ops
