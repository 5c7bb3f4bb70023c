// Batch norm in ATen operators: differentiable any number of times, and the batching rule for vmap (see derivatives.h).
#pragma once

#include "ops/activation.h"
#include "ops/batch_norm.h"

namespace normfused::ops {

// A vector of shape (C) in the dtype of `like`, viewed as (1, C, 1, ...) to broadcast with it.
at::Tensor per_channel(const at::Tensor& vector, const at::Tensor& like);

// The bits of a mask as bools, in the shape and strides of `like`, which must be the forward input's.
at::Tensor unpacked_mask(const at::Tensor& mask, const at::Tensor& like);

// The output. `statistics` are those that the forward operator returned; in training their derivative is included.
at::Tensor batch_norm_composite(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& residual, const at::Tensor& statistics, bool training,
                                const Activation& activation);

// Precondition: neither from_output nor sums.
BatchNormBackwardCall::Result batch_norm_backward_composite(const BatchNormBackwardCall& call);

}  // namespace normfused::ops
