#include "kernels/cuda/batch_norm_launch.cuh"

namespace normfused::cuda {

template cudaError_t BatchNormOf<__half>::inference(const BatchNormForward&, Resources&);

}  // namespace normfused::cuda
