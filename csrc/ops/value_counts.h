// The histogram of each channel of a CPU tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace normfused::ops {

// The values of all channels one after another (float64), rounded as kernels/cpu/value_counts.h says; how often each
// occurs (int64); and the number of values of each channel (int64, of shape (C)).
std::tuple<at::Tensor, at::Tensor, at::Tensor> value_counts(const at::Tensor& input);

}  // namespace normfused::ops
