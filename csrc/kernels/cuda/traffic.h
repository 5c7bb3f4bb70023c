// The bytes that an operation's launches move through device memory, counted from their plans.
#pragma once

#include "kernels/cuda/plan.h"

namespace normfused::cuda {

enum class Operation { kTraining, kInference, kBackward, kInferenceBackward, kMoments, kSums };

struct Traffic {
  bool single;      // one launch reduces and applies, with the tensor on chip in between
  bool pipelined;   // one launch reduces and applies, with each tile in the L2 cache in between
  bool persistent;  // one launch reduces and applies, with a part of the tensor on chip in between
  int64_t kept;     // bytes of that part, of all inputs
  int launches;
  int merged;             // the maximum number of a channel's partial sums that one block merges
  int64_t read, written;  // bytes, without the vectors of one entry per channel
  ReductionPlan reduction;
  ApplyPlan apply;
};

// For a tensor of `itemsize` bytes per value, in the usual case: aligned, with a momentum, all gradients requested.
// `fused`: with an activation, without a residual and so without a mask.
Traffic traffic(Operation operation, const ChannelView& view, int itemsize, bool fused, const DeviceLimits& limits,
                const Residency& resident = {});

// The same for norms whose statistics belong to samples.
struct SampleTraffic {
  int launches;
  int64_t read, written;
  ReductionPlan reduction;  // of group norm, unless a launch holds whole statistics
  ResidentRowsPlan rows;    // in that case, forward
};

SampleTraffic group_norm_traffic(const GroupView& view, int itemsize, bool is_backward, const DeviceLimits& limits);

// Channels first, a tile is counted once: its values are read again from the caches.
SampleTraffic layer_norm_traffic(const ChannelView& view, int itemsize, bool is_backward, const DeviceLimits& limits);

}  // namespace normfused::cuda
