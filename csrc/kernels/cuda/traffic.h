// What an operator's launches move through device memory, counted from their plans.
#pragma once

#include "kernels/cuda/plan.h"

namespace normfused::cuda {

enum class Operation { kTraining, kInference, kBackward, kInferenceBackward, kMoments, kSums };

struct Traffic {
  bool single;  // one launch has the tensors on chip between statistics and application
  int launches;
  int merged;             // partial results of a channel that one block merges, at most
  int64_t read, written;  // bytes; vectors of one value for each channel are not counted
  ReductionPlan reduction;
  ApplyPlan apply;
};

// Of a tensor of `itemsize` bytes a value, in the usual case: aligned, a momentum, all gradients asked for.
Traffic traffic(Operation operation, const ChannelView& view, int itemsize, const DeviceLimits& limits,
                const Residency& resident = {});

}  // namespace normfused::cuda
