#include "kernels/cuda/batch_norm_launch.cuh"

namespace normfused::cuda {

template cudaError_t BatchNormOf<float>::inference(const BatchNormForward&, Resources&);

}  // namespace normfused::cuda
