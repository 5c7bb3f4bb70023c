#include "kernels/cuda/batch_norm_launch.cuh"

namespace normfused::cuda {

template cudaError_t BatchNormOf<__half>::training(const BatchNormForward&, Resources&);
template cudaError_t BatchNormOf<__half>::normalize(const BatchNormForward&, void*, Resources&);

}  // namespace normfused::cuda
