// Standardization of images as torch operators, called through the dispatcher: (input * scale - mean) / std for each
// channel, with constants that stay on the host.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace normfused::ops {

// Of images (N, C, H, W) in any strides, to `dtype` and `memory_format`; by default input's, or float32 of bytes.
at::Tensor standardize(const at::Tensor& input, at::ArrayRef<double> mean, at::ArrayRef<double> std, double scale,
                       std::optional<at::ScalarType> dtype, std::optional<at::MemoryFormat> memory_format);

// Into `out`, of the same shape. Not differentiable.
void standardize_out(const at::Tensor& input, at::ArrayRef<double> mean, at::ArrayRef<double> std, double scale,
                     const at::Tensor& out);

// Over the input, which must be floating.
void standardize_(const at::Tensor& input, at::ArrayRef<double> mean, at::ArrayRef<double> std, double scale);

}  // namespace normfused::ops
