// Local response normalization as torch operators, called through the dispatcher: y[c] = x[c] * base[c]^-beta, where
// base[c] = k + alpha / size * (the sum of x[j]^2 over the `size` channels j around c).
#pragma once

#include <ATen/core/Tensor.h>

namespace normfused::ops {

at::Tensor local_response_norm(const at::Tensor& input, int64_t size, double alpha, double beta, double k);

// The gradient of the input. Differentiable, via ATen operators.
at::Tensor local_response_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t size,
                                        double alpha, double beta, double k);

}  // namespace normfused::ops
