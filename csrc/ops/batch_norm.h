// Batch norm as torch operators. `statistics` is float64 of shape (2, C): the mean and the inverse standard deviation
// that normalized the output, so that backward need not trust a mean rounded to float32.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace normfused::ops {

using OptionalTensor = std::optional<at::Tensor>;

// Each calls the operator of its name through the dispatcher: autograd, compilers and device backends see it.

// Normalizes with the batch's statistics and updates running_mean, running_var and num_batches_tracked where given.
// Without momentum they are cumulative averages. Returns output and statistics.
std::tuple<at::Tensor, at::Tensor> batch_norm_training(const at::Tensor& input, const OptionalTensor& weight,
                                                       const OptionalTensor& bias, const OptionalTensor& running_mean,
                                                       const OptionalTensor& running_var,
                                                       const OptionalTensor& num_batches_tracked,
                                                       std::optional<double> momentum, double eps);

// Normalizes with the running statistics. Returns output and statistics.
std::tuple<at::Tensor, at::Tensor> batch_norm_inference(const at::Tensor& input, const OptionalTensor& weight,
                                                        const OptionalTensor& bias, const at::Tensor& running_mean,
                                                        const at::Tensor& running_var, double eps);

// Gradients of input, weight and bias, those that the mask asks for; the others are empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(const at::Tensor& grad_output,
                                                                   const at::Tensor& input,
                                                                   const OptionalTensor& weight,
                                                                   const at::Tensor& statistics, bool training,
                                                                   std::array<bool, 3> output_mask);

}  // namespace normfused::ops
