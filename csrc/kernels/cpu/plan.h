// Which thread does which part of a tensor: pure functions of shape and item size, so that the order of every merge,
// and with it every bit of the result, is the same for any number of threads.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace normfused::cpu {

// Bounds of what has accumulators on the stack: a unit's channels, channels first, and lanes that are walked together,
// of which two sums and a pivot each take 20 of 48 KiB of L1 in float.
inline constexpr int64_t kMaxChannelsFirst = 64;
inline constexpr int64_t kMaxLanes = 1024;

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

// Blocks of positions with all of their channels, in memory order, for a kernel that keeps a block in scratch. A task
// is a range of blocks, between which it keeps the scratch.
struct BlockPlan {
  int64_t positions;  // of a block, and of a row of scratch; channels first a block has those of one outer index
  int64_t blocks;
  int64_t tasks;
  int64_t task_bytes;
};

// Scratch is `position_bytes` for each position.
BlockPlan plan_blocks(const ChannelView& view, int64_t position_bytes);

// Tasks that one thread should take at least: below 32 KiB a thread's work is smaller than the cost of waking it.
int64_t grain(const Plan& plan);
int64_t grain(const BlockPlan& plan);

}  // namespace normfused::cpu
