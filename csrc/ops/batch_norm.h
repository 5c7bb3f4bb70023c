// Batch norm as torch operators: output = activation(normalized * weight + bias + residual). See activation.h for the
// activations.
//
// `statistics`: float64, shape (2, C), the mean and the inverse standard deviation that normalized the output. Backward
// reads it, because a mean rounded to float32 is not accurate enough.
// `mask`: one bit per element in memory order, set if the activation's argument was positive, then zero padding (see
// mask_bytes() in kernels/types.h). Empty without save_mask.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "ops/running_statistics.h"

namespace normfused::ops {

inline const OptionalTensor kNoTensor{};

// The arguments that all forward operators have in common.
struct BatchNormOptions {
  const at::Tensor& input;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& residual;
  std::string_view activation;
  double activation_param;
  bool save_mask;
};

// Normalizes with the batch's statistics. Updates the buffers of running() that are given.
struct BatchNormTrainingCall {
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // output, statistics, mask
  using Signature = Result(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                           const OptionalTensor&, const OptionalTensor&, std::optional<double>, double,
                           const OptionalTensor&, std::string_view, double, bool, int64_t, const OptionalTensor&, bool);

  const at::Tensor& input;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  const OptionalTensor& num_batches_tracked;
  std::optional<double> momentum;
  double eps;
  const OptionalTensor& residual;
  std::string_view activation;
  double activation_param;
  bool save_mask;
  int64_t correction;
  const OptionalTensor& nonfinite_batches;
  bool update_in_backward;

  BatchNormOptions options() const { return {input, weight, bias, residual, activation, activation_param, save_mask}; }
  RunningStatistics running() const {
    return {running_mean, running_var, num_batches_tracked, nonfinite_batches,
            momentum,     eps,         correction,          update_in_backward};
  }
};

// Normalizes with the running statistics.
struct BatchNormInferenceCall {
  using Result = BatchNormTrainingCall::Result;
  using Signature = Result(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const at::Tensor&,
                           const at::Tensor&, double, const OptionalTensor&, std::string_view, double, bool);

  const at::Tensor& input;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const at::Tensor& running_mean;
  const at::Tensor& running_var;
  double eps;
  const OptionalTensor& residual;
  std::string_view activation;
  double activation_param;
  bool save_mask;

  BatchNormOptions options() const { return {input, weight, bias, residual, activation, activation_param, save_mask}; }
};

// Normalizes with the given statistics. Not differentiable: its caller knows the derivative of the statistics.
struct BatchNormByStatisticsCall {
  using Result = std::tuple<at::Tensor, at::Tensor>;  // output, mask
  using Signature = Result(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                           const OptionalTensor&, std::string_view, double, bool);

  const at::Tensor& input;
  const at::Tensor& statistics;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& residual;
  std::string_view activation;
  double activation_param;
  bool save_mask;

  BatchNormOptions options() const { return {input, weight, bias, residual, activation, activation_param, save_mask}; }
};

// In place: the output overwrites the input, and the result is the statistics. If gradients are recorded, the
// activation must be invertible.
struct BatchNormTrainingInPlaceCall {
  using Signature = at::Tensor(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                               const OptionalTensor&, const OptionalTensor&, std::optional<double>, double,
                               std::string_view, double, int64_t, const OptionalTensor&, bool);

  const at::Tensor& input;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  const OptionalTensor& num_batches_tracked;
  std::optional<double> momentum;
  double eps;
  std::string_view activation;
  double activation_param;
  int64_t correction;
  const OptionalTensor& nonfinite_batches;
  bool update_in_backward;

  BatchNormOptions options() const { return {input, weight, bias, kNoTensor, activation, activation_param, false}; }
  RunningStatistics running() const {
    return {running_mean, running_var, num_batches_tracked, nonfinite_batches,
            momentum,     eps,         correction,          update_in_backward};
  }
};

struct BatchNormInferenceInPlaceCall {
  using Signature = at::Tensor(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const at::Tensor&,
                               const at::Tensor&, double, std::string_view, double);

  const at::Tensor& input;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const at::Tensor& running_mean;
  const at::Tensor& running_var;
  double eps;
  std::string_view activation;
  double activation_param;

  BatchNormOptions options() const { return {input, weight, bias, kNoTensor, activation, activation_param, false}; }
};

// The gradients of input, weight, bias and residual that output_mask requests; the others are empty.
struct BatchNormBackwardCall {
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
  using Signature = Result(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&, bool,
                           std::array<bool, 4>, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                           std::string_view, double, bool, const OptionalTensor&, const OptionalTensor&);

  const at::Tensor& grad_output;
  const at::Tensor& input;  // only its layout is used if no requested gradient depends on its values
  const OptionalTensor& weight;
  const at::Tensor& statistics;
  bool training;  // the statistics are the batch's own, so gradients flow through them
  std::array<bool, 4> output_mask;
  const OptionalTensor& bias = kNoTensor;      // not read with a mask
  const OptionalTensor& residual = kNoTensor;  // not read with a mask
  const OptionalTensor& mask = kNoTensor;
  std::string_view activation = "identity";
  double activation_param = 0;
  // `input` is forward's output. Preconditions: an invertible activation, weights that are not too small, and neither
  // residual nor mask.
  bool from_output = false;
  // If the statistics cover more elements than the input, `count`, int64, is their number per channel, and `sums`,
  // float32 or float64 of shape (2, C), are the gradients of weight and bias over all of them. These are then read,
  // and grad_weight and grad_bias are not computed.
  const OptionalTensor& sums = kNoTensor;
  const OptionalTensor& count = kNoTensor;
};

// Each calls its operator through the dispatcher, so that autograd, compilers and device backends see the call.
BatchNormTrainingCall::Result batch_norm_training(const BatchNormTrainingCall& call);
BatchNormInferenceCall::Result batch_norm_inference(const BatchNormInferenceCall& call);
BatchNormByStatisticsCall::Result batch_norm_by_statistics(const BatchNormByStatisticsCall& call);
at::Tensor batch_norm_training_(const BatchNormTrainingInPlaceCall& call);
at::Tensor batch_norm_inference_(const BatchNormInferenceInPlaceCall& call);
BatchNormBackwardCall::Result batch_norm_backward(const BatchNormBackwardCall& call);

}  // namespace normfused::ops
