// Layer norm of channels-first tensors. It has its own source file, so that it compiles in parallel.
#pragma once

#include "kernels/cuda/kernels.h"

namespace normfused::cuda {

// `aligned`: every tensor begins on a multiple of kAccessBytes.
cudaError_t layer_norm_columns(const LayerNormForward& args, bool aligned, Resources& resources);

}  // namespace normfused::cuda
