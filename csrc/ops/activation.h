// Activations by the names that users give them.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "kernels/types.h"

namespace normfused::ops {

// `parameter`: leaky ReLU's negative slope, ELU's alpha. Throws a ValueError that lists the names where there is no
// such.
Activation activation_of(std::string_view name, double parameter);

std::string_view name_of(const Activation& activation);

// Whether the gradient asks only which values were above zero.
inline bool gradient_is_by_sign(const Activation& activation) {
  return activation.kind == ActivationKind::kRelu || activation.kind == ActivationKind::kLeakyRelu;
}

// Whether z can be told from the activated z.
inline bool is_invertible(const Activation& activation) {
  return activation.kind == ActivationKind::kIdentity ||
         (activation.kind == ActivationKind::kLeakyRelu && activation.parameter > 0);
}

// The activation and its gradient, grad_output * activation'(z), in torch's own operators.
at::Tensor activate(const Activation& activation, const at::Tensor& z);
at::Tensor activate_backward(const Activation& activation, const at::Tensor& grad_output, const at::Tensor& z);

}  // namespace normfused::ops
