// The CUDA kernels as the rest of the library sees them: each starts its launches on a stream and returns the first
// error. What they compute is said in kernels/cpu/kernels.h; tensors of kernels here are in device memory.
#pragma once

#include <driver_types.h>

#include "kernels/cuda/plan.h"
#include "kernels/types.h"

namespace normfused::cuda {

// What launches need of their caller.
class Resources {
 public:
  Resources(const DeviceLimits& limits, cudaStream_t stream) : limits(limits), stream(stream) {}
  virtual ~Resources() = default;

  // Device memory, uninitialized and aligned to 16 bytes, until the stream has done what is started here.
  virtual void* scratch(int64_t bytes) = 0;
  // Zeros; the launches leave them so.
  virtual unsigned* tickets(int64_t count) = 0;

  const DeviceLimits limits;
  const cudaStream_t stream;
};

// Whether the current device and the code compiled for it let launches overlap.
bool launches_overlap();

cudaError_t batch_norm_training(const BatchNormForward& args, Resources& resources);
cudaError_t batch_norm_inference(const BatchNormForward& args, Resources& resources);
cudaError_t batch_norm_backward(const BatchNormBackward& args, Resources& resources);

// Floating and integer dtypes.
cudaError_t channel_moments(const ChannelStats& args, Resources& resources);
// Integer dtypes: the results are int64.
cudaError_t channel_sums(const ChannelStats& args, Resources& resources);

cudaError_t pack_moments(const PackMoments& args, Resources& resources);
cudaError_t merge_ranks(const MergeRanks& args, Resources& resources);

// One launch for each 128 channels; mean and std are in the host's memory.
cudaError_t standardize(const Standardize& args, Resources& resources);

// Where plan_windows() has a plan for it.
cudaError_t local_response_norm(const LocalResponseNorm& args, Resources& resources);

}  // namespace normfused::cuda
