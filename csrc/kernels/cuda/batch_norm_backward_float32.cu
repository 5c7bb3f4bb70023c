#include "kernels/cuda/batch_norm_launch.cuh"

namespace normfused::cuda {

template cudaError_t BatchNormOf<float>::backward(const BatchNormBackward&, Resources&);
template cudaError_t BatchNormOf<float>::grad_sums(const BatchNormBackward&, void*, Resources&);
template cudaError_t BatchNormOf<float>::grad_input(const BatchNormBackward&, void*, Resources&);

}  // namespace normfused::cuda
