// The interface of the CUDA kernels. Each launches on the stream of its Resources, does not wait, and returns the first
// error. kernels/list.h documents what they compute. Pointers in argument structs are to device memory unless the list
// says otherwise.
#pragma once

#include <driver_types.h>

#include "kernels/cuda/plan.h"
#include "kernels/types.h"

namespace normfused::cuda {

// The resources that launches need from their caller.
class Resources {
 public:
  Resources(const DeviceLimits& limits, cudaStream_t stream) : limits(limits), stream(stream) {}
  virtual ~Resources() = default;

  // Uninitialized device memory, aligned to 16 bytes. Valid until the work launched so far on the stream has finished.
  virtual void* scratch(int64_t bytes) = 0;
  // Counters in device memory, initially zero. Launches reset them to zero before they end.
  virtual unsigned* tickets(int64_t count) = 0;

  const DeviceLimits limits;
  const cudaStream_t stream;
};

// Whether the current device, and the code compiled for it, support programmatic dependent launch.
bool launches_overlap();

#define NF_KERNEL(name, Args) cudaError_t name(const Args& args, Resources& resources);
#include "kernels/list.h"

}  // namespace normfused::cuda
