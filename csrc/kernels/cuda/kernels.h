// The interface of the CUDA kernels. Each function launches on the stream of its Resources, does not synchronize, and
// returns the first error. kernels/list.h documents what they compute. Pointers in argument structs point to device
// memory, except where the list says otherwise.
#pragma once

#include <driver_types.h>

#include "kernels/cuda/plan.h"
#include "kernels/types.h"

namespace normfused::cuda {

// What the caller provides for launches: device limits, a stream, and device memory.
class Resources {
 public:
  Resources(const DeviceLimits& limits, cudaStream_t stream) : limits(limits), stream(stream) {}
  virtual ~Resources() = default;

  // Returns uninitialized device memory, aligned to 16 bytes, for launches on the stream during the lifetime of this
  // object.
  virtual void* scratch(int64_t bytes) = 0;
  // Returns counters in device memory, which are zero. Launches reset them to zero before they end.
  virtual unsigned* tickets(int64_t count) = 0;

  const DeviceLimits limits;
  const cudaStream_t stream;
};

// Whether the current device, and the code compiled for it, support programmatic dependent launch and clusters.
bool has_sm90_launches();

#define NF_KERNEL(name, Args) cudaError_t name(const Args& args, Resources& resources);
#include "kernels/list.h"

}  // namespace normfused::cuda
