// Group norm as torch operators: output = activation(normalized * weight + bias + residual), where each group of
// channels of each sample is normalized with its own statistics. Instance norm is the case of one channel per group.
//
// `weight`, `bias`: one value per channel, of shape (C), or for each sample (N, C).
// `statistics`: float64, shape (2, N, num_groups), the mean and the inverse standard deviation.
// `mask`: as in batch_norm.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string_view>
#include <tuple>

#include "ops/batch_norm.h"

namespace normfused::ops {

struct GroupNormCall {
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // output, statistics, mask
  using Signature = Result(const at::Tensor&, int64_t, const OptionalTensor&, const OptionalTensor&, double,
                           const OptionalTensor&, std::string_view, double, bool);

  const at::Tensor& input;
  int64_t num_groups;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  double eps;
  const OptionalTensor& residual;
  std::string_view activation;
  double activation_param;
  bool save_mask;
};

// The gradients of input, weight, bias and residual that output_mask requests; the others are empty.
struct GroupNormBackwardCall {
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
  using Signature = Result(const at::Tensor&, const at::Tensor&, int64_t, const OptionalTensor&, const at::Tensor&,
                           std::array<bool, 4>, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                           std::string_view, double);

  const at::Tensor& grad_output;
  const at::Tensor& input;
  int64_t num_groups;
  const OptionalTensor& weight;
  const at::Tensor& statistics;
  std::array<bool, 4> output_mask;
  const OptionalTensor& bias = kNoTensor;      // not read with a mask, except for its shape
  const OptionalTensor& residual = kNoTensor;  // not read with a mask
  const OptionalTensor& mask = kNoTensor;
  std::string_view activation = "identity";
  double activation_param = 0;
};

// Each calls its operator through the dispatcher, so that autograd, compilers and device backends see the call.
GroupNormCall::Result group_norm(const GroupNormCall& call);
GroupNormBackwardCall::Result group_norm_backward(const GroupNormBackwardCall& call);

// Throw unless the arguments fit together.
void check(const GroupNormCall& call);
void check(const GroupNormBackwardCall& call);

// The same in ATen operators (see derivatives.h). `statistics` are those that the forward operator returned; their
// derivative is included.
at::Tensor group_norm_composite(const GroupNormCall& call, const at::Tensor& statistics);
GroupNormBackwardCall::Result group_norm_backward_composite(const GroupNormBackwardCall& call);
// The statistics, in ATen operators.
at::Tensor group_statistics(const GroupNormCall& call);

}  // namespace normfused::ops
