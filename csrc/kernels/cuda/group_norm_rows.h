// Group norm of channels-first tensors in one launch. It has its own source file, so that it compiles in parallel.
#pragma once

#include "kernels/cuda/kernels.h"

namespace normfused::cuda {

// Sets `supported` to whether it is computed in one launch; otherwise nothing is launched.
cudaError_t group_norm_rows(const GroupNormForward& args, Resources& resources, bool& supported);

}  // namespace normfused::cuda
