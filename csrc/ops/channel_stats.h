// Statistics per channel as torch operators, called through the dispatcher; every result has shape (C).
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace normfused::ops {

// Mean, sum of squared deviations, least and greatest value, in float64.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> channel_moments(const at::Tensor& input);

// Sum, sum of squares, least and greatest value: float64, or int64 for integers.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> channel_sums(const at::Tensor& input);

}  // namespace normfused::ops
