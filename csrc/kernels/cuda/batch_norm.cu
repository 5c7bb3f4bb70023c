#include "kernels/cuda/batch_norm_dtype.h"
#include "kernels/cuda/launch.cuh"

namespace normfused::cuda {

cudaError_t batch_norm_training(const BatchNormForward& args, Resources& resources) {
  return for_floating(args.dtype,
                      [&](auto type) { return BatchNormOf<typename decltype(type)::type>::training(args, resources); });
}

cudaError_t batch_norm_inference(const BatchNormForward& args, Resources& resources) {
  return for_floating(
      args.dtype, [&](auto type) { return BatchNormOf<typename decltype(type)::type>::inference(args, resources); });
}

cudaError_t batch_norm_backward(const BatchNormBackward& args, Resources& resources) {
  return for_floating(args.dtype,
                      [&](auto type) { return BatchNormOf<typename decltype(type)::type>::backward(args, resources); });
}

}  // namespace normfused::cuda
