// Group norm of channels-first tensors in one launch. Forward and backward have their own source files, so that they
// compile in parallel.
#pragma once

#include "kernels/cuda/kernels.h"

namespace normfused::cuda {

// Sets `supported` to whether it is computed in one launch; otherwise nothing is launched.
cudaError_t group_norm_rows(const GroupNormForward& args, Resources& resources, bool& supported);

// The same for grad_input and grad_residual, and for the gradients of weight and bias of each channel of each sample,
// (N, C). Precondition: grad_input is requested.
cudaError_t group_norm_backward_rows(const GroupNormBackward& args, double* grad_weight, double* grad_bias,
                                     Resources& resources, bool& supported);

}  // namespace normfused::cuda
