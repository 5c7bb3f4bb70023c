// Local response normalization as torch operators, called through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

namespace normfused::ops {

at::Tensor local_response_norm(const at::Tensor& input, int64_t size, double alpha, double beta, double k);

// The gradient of the input. Differentiable, where gradients are wanted of it, by torch's own operators.
at::Tensor local_response_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, int64_t size,
                                        double alpha, double beta, double k);

}  // namespace normfused::ops
