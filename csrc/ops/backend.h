// The kernels of each kind of device, behind one table of functions.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/types.h"

namespace normfused::ops {

struct Backend {
  // On `device`, where all tensors are; on CUDA on the current stream. Throw where kernels cannot be started.
  void (*batch_norm_training)(const BatchNormForward& args, const at::Device& device);
  void (*batch_norm_inference)(const BatchNormForward& args, const at::Device& device);
  void (*batch_norm_backward)(const BatchNormBackward& args, const at::Device& device);
  void (*channel_moments)(const ChannelStats& args, const at::Device& device);
  void (*channel_sums)(const ChannelStats& args, const at::Device& device);
  void (*pack_moments)(const PackMoments& args, const at::Device& device);
  void (*merge_ranks)(const MergeRanks& args, const at::Device& device);
  void (*standardize)(const Standardize& args, const at::Device& device);
  // False: nothing is done, because the window is too wide for the kernel.
  bool (*local_response_norm)(const LocalResponseNorm& args, const at::Device& device);
};

extern const Backend kCpuBackend;
#if defined(NORMFUSED_WITH_CUDA)
extern const Backend kCudaBackend;
#endif

inline const Backend& backend_of(const at::Tensor& tensor) {
#if defined(NORMFUSED_WITH_CUDA)
  if (tensor.is_cuda()) return kCudaBackend;
#endif
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.is_cpu(), "normfused has no kernels for tensors on ", tensor.device());
  return kCpuBackend;
}

}  // namespace normfused::ops
