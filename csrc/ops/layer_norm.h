// Layer norm and RMS norm as torch operators: output = normalized * weight + bias, where input is normalized with the
// statistics over its dimensions start_dim to end_dim, inclusive. Without subtract_mean (RMS norm) the mean counts as
// 0.
//
// `weight`, `bias`: the shape of these dimensions, or for each sample with dimension 0 of the input before it.
// `residual`: added to the input before the norm; the sum is an output. Without it, `sum` is empty.
// `statistics`: float64, the mean and the inverse standard deviation: dimension 2, then those of the input with size 1
// for the normalized ones.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "ops/batch_norm.h"

namespace normfused::ops {

struct LayerNormCall {
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // output, sum, statistics
  using Signature = Result(const at::Tensor&, int64_t, int64_t, const OptionalTensor&, const OptionalTensor&, double,
                           const OptionalTensor&, bool);

  const at::Tensor& input;
  int64_t start_dim, end_dim;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  double eps;
  const OptionalTensor& residual;
  bool subtract_mean;
};

// The gradients of input, weight and bias that output_mask requests; the others are empty. `input` is what was
// normalized. grad_sum, the gradient of forward's `sum`, is added to that of the input.
struct LayerNormBackwardCall {
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
  using Signature = Result(const at::Tensor&, const at::Tensor&, int64_t, int64_t, const OptionalTensor&,
                           const OptionalTensor&, const at::Tensor&, std::array<bool, 3>, const OptionalTensor&, bool);

  const at::Tensor& grad_output;
  const at::Tensor& input;
  int64_t start_dim, end_dim;
  const OptionalTensor& weight;
  const OptionalTensor& bias;  // only its shape and dtype are read
  const at::Tensor& statistics;
  std::array<bool, 3> output_mask;
  const OptionalTensor& grad_sum;
  bool subtract_mean;
};

// Each calls its operator through the dispatcher, so that autograd, compilers and device backends see the call.
LayerNormCall::Result layer_norm(const LayerNormCall& call);
LayerNormBackwardCall::Result layer_norm_backward(const LayerNormBackwardCall& call);

// Throw unless the arguments fit together.
void check(const LayerNormCall& call);
void check(const LayerNormBackwardCall& call);

// The same in ATen operators (see derivatives.h). `statistics` are those that the forward operator returned; their
// derivative is included in the output, which is followed by the sum.
std::pair<at::Tensor, at::Tensor> layer_norm_composite(const LayerNormCall& call, const at::Tensor& statistics);
LayerNormBackwardCall::Result layer_norm_backward_composite(const LayerNormBackwardCall& call);
at::Tensor layer_statistics(const LayerNormCall& call);

}  // namespace normfused::ops
