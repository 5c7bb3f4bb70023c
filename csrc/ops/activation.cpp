#include "ops/activation.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <string>

namespace normfused::ops {

namespace {

struct Named {
  std::string_view name;
  ActivationKind kind;
};
constexpr Named kActivations[] = {
    {"identity", ActivationKind::kIdentity},
    {"relu", ActivationKind::kRelu},
    {"relu6", ActivationKind::kRelu6},
    {"leaky_relu", ActivationKind::kLeakyRelu},
    {"elu", ActivationKind::kElu},
    {"hardswish", ActivationKind::kHardswish},
    {"sigmoid", ActivationKind::kSigmoid},
    {"tanh", ActivationKind::kTanh},
    {"silu", ActivationKind::kSilu},
    {"gelu", ActivationKind::kGelu},
    {"gelu_tanh", ActivationKind::kGeluTanh},
};

}  // namespace

Activation activation_of(std::string_view name, double parameter) {
  for (const Named& activation : kActivations)
    if (activation.name == name) return {activation.kind, parameter};
  std::string known;
  for (const Named& activation : kActivations) known += (known.empty() ? "" : ", ") + std::string(activation.name);
  TORCH_CHECK_VALUE(false, "unknown activation '", std::string(name), "': must be one of ", known);
}

std::string_view name_of(const Activation& activation) {
  for (const Named& named : kActivations)
    if (named.kind == activation.kind) return named.name;
  TORCH_INTERNAL_ASSERT(false);
}

at::Tensor activate(const Activation& activation, const at::Tensor& z) {
  switch (activation.kind) {
    case ActivationKind::kIdentity:
      return z;
    case ActivationKind::kRelu:
      return at::relu(z);
    case ActivationKind::kRelu6:
      return at::hardtanh(z, 0, 6);
    case ActivationKind::kLeakyRelu:
      return at::leaky_relu(z, activation.parameter);
    case ActivationKind::kElu:
      return at::elu(z, activation.parameter);
    case ActivationKind::kHardswish:
      return at::hardswish(z);
    case ActivationKind::kSigmoid:
      return at::sigmoid(z);
    case ActivationKind::kTanh:
      return at::tanh(z);
    case ActivationKind::kSilu:
      return z * at::sigmoid(z);  // at::silu_backward has no forward-mode derivative
    case ActivationKind::kGelu:
      return at::gelu(z, "none");
    case ActivationKind::kGeluTanh:
      return at::gelu(z, "tanh");
  }
  TORCH_INTERNAL_ASSERT(false);
}

at::Tensor activate_backward(const Activation& activation, const at::Tensor& grad_output, const at::Tensor& z) {
  switch (activation.kind) {
    case ActivationKind::kIdentity:
      return grad_output;
    case ActivationKind::kRelu:
      return at::threshold_backward(grad_output, z, 0);
    case ActivationKind::kRelu6:
      return at::hardtanh_backward(grad_output, z, 0, 6);
    case ActivationKind::kLeakyRelu:
      return at::leaky_relu_backward(grad_output, z, activation.parameter, /*self_is_result=*/false);
    case ActivationKind::kElu:
      return at::elu_backward(grad_output, activation.parameter, 1, 1, /*is_result=*/false, z);
    case ActivationKind::kHardswish:
      return at::hardswish_backward(grad_output, z);
    case ActivationKind::kSigmoid:
      return at::sigmoid_backward(grad_output, at::sigmoid(z));
    case ActivationKind::kTanh:
      return at::tanh_backward(grad_output, at::tanh(z));
    case ActivationKind::kSilu: {
      const at::Tensor s = at::sigmoid(z);
      return grad_output * s * (1 + z * (1 - s));
    }
    case ActivationKind::kGelu:
      return at::gelu_backward(grad_output, z, "none");
    case ActivationKind::kGeluTanh:
      return at::gelu_backward(grad_output, z, "tanh");
  }
  TORCH_INTERNAL_ASSERT(false);
}

}  // namespace normfused::ops
