#include "kernels/cuda/batch_norm_launch.cuh"

namespace normfused::cuda {

template cudaError_t BatchNormOf<double>::backward(const BatchNormBackward&, Resources&);

}  // namespace normfused::cuda
