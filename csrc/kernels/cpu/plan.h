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

// Output bytes from which streaming stores pay: they spare the read of what they overwrite, but leave nothing in cache.
// An output that is kept for backward lies where nothing was read for long: from 6 MB on, streamed, it and its next
// reader took 0.7 of the time on Ice Lake, 0.8 on Granite Rapids.
inline constexpr int64_t kStreamBytes = 4 << 20;

// In inference and in backward an output lies where one before it lay, which is still in a large last-level cache. Up
// to these parts of that it pays to leave the output there for its next reader. On Granite Rapids (480 MiB) inference
// took 1.5 times as long streamed at 13 MB and 0.75 times at 51 MB; backward with the gradient's reader 1.1 to 1.7
// times at 6 MB, 0.9 to 1.4 times at 13 MB, where forward and backward without a reader took 0.8 to 0.9 times as long,
// and 0.9 to 1.2 times at 26 MB. On Ice Lake (48 MiB) it is as above.
inline constexpr int64_t kInferencePart = 12, kBackwardPart = 48;
int64_t reused_stream_bytes(int64_t part);

// Tasks that one thread should take at least: below 32 KiB a thread's work is smaller than the cost of waking it.
int64_t grain(const Plan& plan);
int64_t grain(const BlockPlan& plan);

}  // namespace normfused::cpu
