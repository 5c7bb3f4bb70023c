// Batch norm in torch's own operators; see derivatives.h. The arguments are those of the operators in batch_norm.h.
#pragma once

#include "ops/activation.h"
#include "ops/batch_norm.h"

namespace normfused::ops {

// The output, given the statistics that forward found.
at::Tensor batch_norm_composite(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& residual, const at::Tensor& statistics, bool training,
                                const Activation& activation);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_backward_composite(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight, const at::Tensor& statistics,
    bool training, std::array<bool, 4> output_mask, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& mask, const Activation& activation);

}  // namespace normfused::ops
