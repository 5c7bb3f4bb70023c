// Batch norm as torch operators. `statistics` is float64 of shape (2, C): the mean and the inverse standard deviation
// that normalized the output, so that backward need not trust a mean rounded to float32.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace normfused::ops {

using OptionalTensor = std::optional<at::Tensor>;

// Each calls the operator of its name through the dispatcher: autograd, compilers and device backends see it.
//
// output = activation(normalized * weight + bias + residual), by the activation's name and its parameter (see
// activation.h). `mask` has one bit for each value, in the order of memory: whether what the activation took in was
// above zero; then zeros (see mask_bytes() in kernels/types.h). It is empty unless save_mask asks for it.

// Normalizes with the batch's statistics and updates running_mean, running_var and num_batches_tracked where given.
// Without momentum they are cumulative averages. The variance that goes into running_var is the sum of squares divided
// by count - correction. With `nonfinite_batches`, int64 of shape (C), a channel whose statistics are not finite leaves
// its running ones as they are and is counted there. Without update_in_backward a call inside a backward pass, which is
// a recomputation, updates nothing. Returns output, statistics and mask.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_training(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum, double eps, const OptionalTensor& residual, std::string_view activation,
    double activation_param, bool save_mask, int64_t correction, const OptionalTensor& nonfinite_batches,
    bool update_in_backward);

// Normalizes with the running statistics. Returns output, statistics and mask.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_inference(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const at::Tensor& running_mean,
    const at::Tensor& running_var, double eps, const OptionalTensor& residual, std::string_view activation,
    double activation_param, bool save_mask);

// Normalizes with `statistics`, whatever they are of. Returns output and mask; has no derivative of its own.
std::tuple<at::Tensor, at::Tensor> batch_norm_by_statistics(const at::Tensor& input, const at::Tensor& statistics,
                                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                                            const OptionalTensor& residual, std::string_view activation,
                                                            double activation_param, bool save_mask);

// The same in place: the output is written over the input. They return the statistics. With gradients the activation
// must be one that can be undone.
at::Tensor batch_norm_training_(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                                std::string_view activation, double activation_param, int64_t correction,
                                const OptionalTensor& nonfinite_batches, bool update_in_backward);
at::Tensor batch_norm_inference_(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                 const at::Tensor& running_mean, const at::Tensor& running_var, double eps,
                                 std::string_view activation, double activation_param);

// Gradients of input, weight, bias and residual, those that output_mask asks for; the others are empty. `bias` and
// `residual` are not needed with a mask. Of `input` only the layout is used where neither the statistics nor weight nor
// the activation have a gradient that depends on it. With `from_output` it is what forward gave instead: this needs an
// activation that can be undone and weights that are not too small, and takes neither residual nor mask. Where the
// statistics were of more values than the input's, `count` says of how many, int64, and `sums`, float32 or float64 of
// shape (2, C), are the gradients of weight and bias over all of those; their own are not computed then.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight, const at::Tensor& statistics,
    bool training, std::array<bool, 4> output_mask, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& mask, std::string_view activation, double activation_param, bool from_output = false,
    const OptionalTensor& sums = std::nullopt, const OptionalTensor& count = std::nullopt);

}  // namespace normfused::ops
