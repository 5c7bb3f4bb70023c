// What batch norm's operators check of their arguments, in kernels and composites alike. Terse: functional.py explains
// refusals to users. These keep a direct call of an operator from crashing.
#pragma once

#include "ops/batch_norm.h"

namespace normfused::ops {

void check_input(const at::Tensor& input);
void check_channels(const char* name, const OptionalTensor& vector, const at::Tensor& input);
// Shape, dtype and device are the input's.
void check_like_input(const char* name, const OptionalTensor& tensor, const at::Tensor& input);
void check_statistics(const at::Tensor& statistics, const at::Tensor& input);
void check_backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                    const at::Tensor& statistics, bool training, std::array<bool, 4> output_mask,
                    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
                    std::string_view activation, double activation_param, bool from_output, const OptionalTensor& sums,
                    const OptionalTensor& count);

}  // namespace normfused::ops
