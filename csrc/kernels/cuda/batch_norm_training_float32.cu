#include "kernels/cuda/batch_norm_launch.cuh"

namespace normfused::cuda {

template cudaError_t BatchNormOf<float>::training(const BatchNormForward&, Resources&);
template cudaError_t BatchNormOf<float>::normalize(const BatchNormForward&, void*, Resources&);

}  // namespace normfused::cuda
