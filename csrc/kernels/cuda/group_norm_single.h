// Group norm whose values are read once: forward in one launch, backward in one and two short ones. Each function has
// its own source file, so that they compile in parallel.
#pragma once

#include "kernels/cuda/kernels.h"

namespace normfused::cuda {

// Forward, channels first. Sets `supported` to whether it is computed in one launch; otherwise nothing is launched.
cudaError_t group_norm_rows(const GroupNormForward& args, Resources& resources, bool& supported);

// The same, channels last.
cudaError_t group_norm_columns(const GroupNormForward& args, Resources& resources, bool& supported);

// The same for grad_input and grad_residual, and for the gradients of weight and bias of each channel of each sample,
// (N, C), in both layouts. Precondition: grad_input is requested.
cudaError_t group_norm_backward_single(const GroupNormBackward& args, double* grad_weight, double* grad_bias,
                                       Resources& resources, bool& supported);

}  // namespace normfused::cuda
