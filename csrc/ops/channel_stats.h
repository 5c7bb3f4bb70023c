// Statistics per channel as torch operators, called through the dispatcher. Every result has shape (C). Not
// differentiable.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace normfused::ops {

// Mean, sum of squared deviations from the mean, minimum and maximum, in float64.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> channel_moments(const at::Tensor& input);

// Sum, sum of squares, minimum and maximum: float64, or exact int64 for integers.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> channel_sums(const at::Tensor& input);

}  // namespace normfused::ops
