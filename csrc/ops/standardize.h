// Standardization of images as torch operators, called through the dispatcher: (input * scale - mean) / std per
// channel. mean and std are constants in host memory, one per channel.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace normfused::ops {

// Input: shape (N, C, H, W) or (C, H, W), any strides. Default dtype: the input's, or float32 for uint8; default
// memory format: the input's.
at::Tensor standardize(const at::Tensor& input, at::ArrayRef<double> mean, at::ArrayRef<double> std, double scale,
                       std::optional<at::ScalarType> dtype, std::optional<at::MemoryFormat> memory_format);

// Writes to `out`, which has the input's shape and must not overlap it. Not differentiable.
void standardize_out(const at::Tensor& input, at::ArrayRef<double> mean, at::ArrayRef<double> std, double scale,
                     const at::Tensor& out);

// In place. Precondition: a floating-point input.
void standardize_(const at::Tensor& input, at::ArrayRef<double> mean, at::ArrayRef<double> std, double scale);

}  // namespace normfused::ops
