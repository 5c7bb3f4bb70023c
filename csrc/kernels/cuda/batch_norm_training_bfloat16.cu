#include "kernels/cuda/batch_norm_launch.cuh"

namespace normfused::cuda {

template cudaError_t BatchNormOf<__nv_bfloat16>::training(const BatchNormForward&, Resources&);
template cudaError_t BatchNormOf<__nv_bfloat16>::normalize(const BatchNormForward&, void*, Resources&);

}  // namespace normfused::cuda
