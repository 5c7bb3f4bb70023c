// The bytes that an operation's launches move through device memory, counted from their plans.
#pragma once

#include "kernels/cuda/plan.h"

namespace normfused::cuda {

enum class Operation { kTraining, kInference, kBackward, kInferenceBackward, kMoments, kSums };

struct Traffic {
  bool single;  // one launch reduces and applies, with the tensor on chip in between
  int launches;
  int merged;             // the maximum number of a channel's partial sums that one block merges
  int64_t read, written;  // bytes, without the vectors of one entry per channel
  ReductionPlan reduction;
  ApplyPlan apply;
};

// For a tensor of `itemsize` bytes per value, in the usual case: aligned, with a momentum, all gradients requested.
Traffic traffic(Operation operation, const ChannelView& view, int itemsize, const DeviceLimits& limits,
                const Residency& resident = {});

}  // namespace normfused::cuda
