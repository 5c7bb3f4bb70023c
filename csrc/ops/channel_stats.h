// Statistics per channel as torch operators, called through the dispatcher. Not differentiable.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace normfused::ops {

// Mean, sum of squared deviations from the mean, minimum and maximum, in float64, of shape (C).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> channel_moments(const at::Tensor& input);

// Sum, sum of squares, minimum and maximum, of shape (C): float64, or exact int64 for integers. Throws for integers
// whose sums do not fit; for 32 and 64 bits that waits for the device.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> channel_sums(const at::Tensor& input);

// The rows of IntegerSums (see kernels/types.h), of shape (8, C), int64.
at::Tensor integer_sums(const at::Tensor& input);

}  // namespace normfused::ops
