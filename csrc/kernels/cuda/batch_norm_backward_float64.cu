#include "kernels/cuda/batch_norm_launch.cuh"

namespace normfused::cuda {

template cudaError_t BatchNormOf<double>::backward(const BatchNormBackward&, Resources&);
template cudaError_t BatchNormOf<double>::grad_sums(const BatchNormBackward&, void*, Resources&);
template cudaError_t BatchNormOf<double>::grad_input(const BatchNormBackward&, void*, Resources&);

}  // namespace normfused::cuda
