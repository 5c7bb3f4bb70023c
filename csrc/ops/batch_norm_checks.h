// Argument checks of the batch norm operators. They prevent invalid memory accesses by a direct call of an operator;
// normfused/functional.py repeats a failed call's checks with messages for users.
#pragma once

#include "ops/activation.h"
#include "ops/batch_norm.h"

namespace normfused::ops {

// Throws unless the tensor has shape (C), the input's device, and the input's dtype or float32 for a 16-bit input.
void check_channels(const char* name, const OptionalTensor& vector, const at::Tensor& input);
// Throws unless the tensor has the input's device, and the input's dtype or float32 for a 16-bit input.
void check_parameter_type(const char* name, const at::Tensor& parameter, const at::Tensor& input);
// Throws unless the tensor has the input's shape, dtype and device.
void check_like_input(const char* name, const OptionalTensor& tensor, const at::Tensor& input);
// Input, weight, bias and running statistics.
void check_operands(const BatchNormOptions& options, const OptionalTensor& running_mean,
                    const OptionalTensor& running_var);
// Throws if a channel has exactly one element: its variance is 0, and its unbiased variance is not defined.
void check_training_count(int64_t count, const at::Tensor& input);
void check_statistics(const at::Tensor& statistics, const at::Tensor& input);
// Throws unless the sign mask can be that of the input and the activation.
void check_mask(const at::Tensor& mask, const at::Tensor& input, const Activation& activation);
void check_backward(const BatchNormBackwardCall& call);

}  // namespace normfused::ops
