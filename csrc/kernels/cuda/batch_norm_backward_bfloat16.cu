#include "kernels/cuda/batch_norm_launch.cuh"

namespace normfused::cuda {

template cudaError_t BatchNormOf<__nv_bfloat16>::backward(const BatchNormBackward&, Resources&);
template cudaError_t BatchNormOf<__nv_bfloat16>::grad_sums(const BatchNormBackward&, void*, Resources&);
template cudaError_t BatchNormOf<__nv_bfloat16>::grad_input(const BatchNormBackward&, void*, Resources&);

}  // namespace normfused::cuda
