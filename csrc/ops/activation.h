// Activations by name, and in ATen operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "kernels/types.h"

namespace normfused::ops {

// `parameter`: leaky ReLU's negative slope, ELU's alpha; otherwise ignored. Throws a ValueError that lists the known
// names for an unknown name.
Activation activation_of(std::string_view name, double parameter);

std::string_view name_of(const Activation& activation);

// Whether the gradient depends only on which arguments were positive.
inline bool gradient_is_by_sign(const Activation& activation) {
  return activation.kind == ActivationKind::kRelu || activation.kind == ActivationKind::kLeakyRelu;
}

// Whether activation(z) determines z.
inline bool is_invertible(const Activation& activation) {
  return activation.kind == ActivationKind::kIdentity ||
         (activation.kind == ActivationKind::kLeakyRelu && activation.parameter > 0);
}

// activation(z), and grad_output * activation'(z), in ATen operators.
at::Tensor activate(const Activation& activation, const at::Tensor& z);
at::Tensor activate_backward(const Activation& activation, const at::Tensor& grad_output, const at::Tensor& z);

}  // namespace normfused::ops
