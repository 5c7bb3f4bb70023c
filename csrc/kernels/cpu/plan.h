// How a tensor is divided into tasks. Plans are pure functions of shape and item size, never of the number of threads:
// the order of every merge, and so every bit of the result, is the same for any number of threads.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace normfused::cpu {

// Upper bounds of the accumulator arrays on the stack: channels of a unit (channels first), and lanes of a row (lane
// layout, see lanes.inl). For 1024 lanes of float, two sums and a pivot use 20 KiB of a 48 KiB L1 cache.
inline constexpr int64_t kMaxChannelsFirst = 64;
inline constexpr int64_t kMaxLanes = 1024;

// A grid of units: `channel_units` ranges of channels by `position_units` ranges of positions (splits).
//
// With one split, a unit has all values of its channels: it reduces, finalizes and applies while they are in cache.
// With more splits, all units reduce, then the partial results of each channel are merged, then all units apply.
struct Plan {
  int64_t channel_block;   // channels of a unit
  int64_t channel_units;   // ranges of channels
  int64_t position_block;  // positions of a unit
  int64_t position_units;  // ranges of positions: splits
  int64_t unit_bytes;
  // Positions of a task of the apply phase that follows a reduction with several splits. Tasks are smaller than units
  // if these exceed the cache, so that each thread can begin with the values that it read last.
  int64_t apply_block;

  int64_t units() const { return channel_units * position_units; }
  int64_t apply_blocks() const { return (position_block + apply_block - 1) / apply_block; }  // of a unit
};

// For a reduction followed by an elementwise pass. `operands` is the number of tensors of the view's shape that both
// read.
Plan plan_reduction(const ChannelView& view, int64_t itemsize, int64_t operands);

// For an elementwise pass alone. Units are in memory order.
Plan plan_elementwise(const ChannelView& view, int64_t itemsize, int64_t operands);

// The division of a tensor whose statistics are independent of each other, such as those of group norm. It depends on
// the shape of one sample, not on how many there are, so that a sample's results are the same in every batch.
//
// A task has all values of its statistics, as `rows` by `positions`. It has one part if these fit the cache; then it
// runs all phases of the part. Otherwise its parts are ranges of rows by ranges of positions (splits).
struct GroupPlan {
  int64_t statistics;      // of a task; channels last those of one sample
  int64_t row_block;       // rows of a part
  int64_t row_parts;       // ranges of rows
  int64_t position_block;  // positions of a part
  int64_t splits;          // ranges of positions
  int64_t part_bytes;

  int64_t parts() const { return row_parts * splits; }
};

// Channels first: a statistic is over `rows` rows of `positions` contiguous values.
GroupPlan plan_rows(int64_t rows, int64_t positions, int64_t item_bytes);

// Channels last: a sample has `positions` rows of `groups` groups of contiguous channels, of `group_bytes` bytes in one
// tensor. Its tasks are ranges of groups in whole cache lines, if these fit the cache with all their positions. Else it
// is one task, and its parts are ranges of positions.
GroupPlan plan_columns(int64_t positions, int64_t groups, int64_t group_bytes, int64_t operands);

// As plan_rows for one row, for a kernel that processes four rows together: a task has a multiple of four rows if four
// fit the cache.
GroupPlan plan_layer_rows(int64_t columns, int64_t item_bytes);

// Whether a row is divided if rows are to be read twice and summed by column too. Otherwise the sums of each chunk of
// rows are kept, which need as much memory as a few rows.
bool divides_layer_rows(int64_t columns, int64_t item_bytes);

// Number of neighbouring columns of `rows` values that a task normalizes: as many as fit the cache, in whole cache
// lines, at most kMaxLanes.
int64_t layer_column_block(int64_t rows, int64_t columns, int64_t item_bytes);

// A range of items in chunks of `block`, each with sums of its own, which are merged in order. A chunk has at least
// `least_items` items, if there are so many.
struct ChunkPlan {
  int64_t block;
  int64_t chunks;
};
ChunkPlan plan_chunks(int64_t items, int64_t item_bytes, int64_t least_items);

// Blocks of positions with all of their channels, in memory order, for a kernel that has one block in scratch memory.
// A task is a range of blocks that reuse the same scratch.
struct BlockPlan {
  int64_t positions;  // of a block, and of a row of scratch; channels first, a block lies within one outer index
  int64_t blocks;
  int64_t tasks;
  int64_t task_bytes;
};

// `position_bytes` is the scratch memory that one position needs.
BlockPlan plan_blocks(const ChannelView& view, int64_t position_bytes);

// Minimum number of tasks for one thread. Waking a thread costs more than 32 KiB of work.
int64_t grain(const Plan& plan);
int64_t grain(const BlockPlan& plan);
int64_t grain(const GroupPlan& plan);

}  // namespace normfused::cpu
