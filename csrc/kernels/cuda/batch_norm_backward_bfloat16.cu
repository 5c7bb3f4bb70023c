#include "kernels/cuda/batch_norm_launch.cuh"

namespace normfused::cuda {

template cudaError_t BatchNormOf<__nv_bfloat16>::backward(const BatchNormBackward&, Resources&);

}  // namespace normfused::cuda
