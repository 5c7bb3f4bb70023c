// Which thread does which part of a tensor: pure functions of shape and item size, so that the order of every merge,
// and with it every bit of the result, is the same for any number of threads.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace normfused::cpu {

// Bounds of a unit's channels, whose accumulators live on the stack. Channels last: two sums and a pivot a channel take
// 20 of 48 KiB of L1 in float.
inline constexpr int64_t kMaxChannelsFirst = 64;
inline constexpr int64_t kMaxChannelsLast = 1024;

// The tensor cut into a grid of units: `channel_units` ranges of channels by `position_units` ranges of positions.
// With one range of positions a unit owns its channels whole: it reduces, finalizes and applies while they are still
// in its cache. With several, all units reduce, then partial results are merged, then all units apply.
struct Plan {
  int64_t channel_block;
  int64_t channel_units;
  int64_t position_block;
  int64_t position_units;
  int64_t unit_bytes;

  int64_t units() const { return channel_units * position_units; }
};

// For a reduction followed by an elementwise pass over `operands` tensors of the view's shape.
Plan plan_reduction(const ChannelView& view, int64_t itemsize, int64_t operands);

// For an elementwise pass alone: units in memory order.
Plan plan_elementwise(const ChannelView& view, int64_t itemsize, int64_t operands);

// Tasks that one thread should take at least: below 32 KiB a thread's work is smaller than the cost of waking it.
int64_t grain(const Plan& plan);

}  // namespace normfused::cpu
