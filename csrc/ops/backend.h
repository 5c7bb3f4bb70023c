// The kernels of each device type, as a table of functions.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/types.h"

namespace normfused::ops {

// Each function runs a kernel of kernels/list.h on `device`, which holds all its tensors; on CUDA asynchronously on the
// current stream. Throws if a kernel cannot be launched.
struct Backend {
#define NF_KERNEL(name, Args) void (*name)(const Args& args, const at::Device& device);
#include "kernels/list.h"

  // Whether local_response_norm has a kernel for these arguments.
  bool (*supports)(const LocalResponseNorm& args);
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
