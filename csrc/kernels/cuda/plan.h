// Plans: which kernel is launched for a shape, and with which grid and tiling. Pure functions of shape, item sizes,
// alignment and device limits, so that every choice can be tested on any machine. A plan is an argument of its kernel.
#pragma once

#include <cstdint>

#include "kernels/cuda/divider.h"
#include "kernels/types.h"

namespace normfused::cuda {

struct DeviceLimits {
  int multiprocessors;
  int64_t l2_bytes;
  bool overlap = false;             // an application may start before the reduction that precedes it has ended
  int64_t shared_bytes = 48 << 10;  // the maximum shared memory of a block
  int max_cluster = 1;              // the maximum number of blocks that run together and can wait for each other
  bool pipelines = true;            // launches may be pipelined (see RowsPlan) or persistent (see ColumnsPlan)
};

#ifndef NORMFUSED_CUDA_THREADS
#define NORMFUSED_CUDA_THREADS 256  // tests build with 64: ThreadSanitizer distinguishes only 255 threads
#endif

// Threads per block, and the minimum number of blocks that share a multiprocessor. Two blocks leave 128 registers per
// thread, which is enough for every kernel. With four loads of 16 bytes per thread they keep 32 KiB in flight, and
// 4.8 TB/s / 132 multiprocessors * 700 ns of latency = 25 KiB are needed.
inline constexpr int kThreads = NORMFUSED_CUDA_THREADS;
inline constexpr int kMinBlocks = 2;
inline constexpr int kWarp = 32;

// Blocks of each kernel of a reduction that a multiprocessor holds at once; registers and shared memory limit them.
struct Residency {
  int rows = kMinBlocks, masked_rows = kMinBlocks, columns = kMinBlocks;
};

// Bytes of a vector, the widest memory access. A vector has at most kMaxValues values, so that the states of a block's
// columns fit into 48 KiB of shared memory.
inline constexpr int kAccessBytes = 16;
inline constexpr int kMaxValues = 8;

// Values per vector for operands whose widest item has this size.
constexpr int values_per_access(int itemsize) {
  return kAccessBytes / itemsize < kMaxValues ? kAccessBytes / itemsize : kMaxValues;
}

// Vectors of each input that a thread has in flight in one iteration: four loads of rows, or eight loads of columns.
// Every value of a column vector has its own state, so doubles leave registers for half as many.
constexpr int row_vectors_in_flight(int inputs) { return 4 / inputs; }
constexpr int column_vectors_in_flight(int inputs, bool doubles) { return 8 / inputs / (doubles ? 2 : 1); }

// --- reductions. The units of a channel are cut into `splits` splits of `chunk` units. A block reduces one split of
// one tile of channels; blockIdx is (tile, split), so that blocks in launch order follow the memory. In a single launch
// the splits of a tile are the consecutive blocks of a cluster.

// The copies that a block of a single launch keeps in shared memory (see Stage).
struct Staged {
  int64_t vectors;  // the maximum that a thread has of one input
  int threads;      // that have copies: the first of the block
  int64_t bytes;    // of all inputs and threads
};

// What a block of a pipelined launch does next: reduces or applies one split of one tile.
struct PipelineStep {
  int64_t tile;
  int split;
  bool applies;
};

// Channels first: `lanes` threads per channel, `channels` channels per tile. A row is the `inner` consecutive values of
// a channel; a unit is a vector of a row.
//
// A pipelined launch reduces and applies a tensor that does not fit the L2 cache: it applies a tile soon after it has
// reduced it, while the tile is still there. Its blocks take numbers, each of which is a step. With a window of 2 tiles
// the order is: reduce 0, reduce 1, apply 0, reduce 2, apply 1, ... A step waits only for steps with smaller numbers.
// So the launch ends however few of its blocks run at the same time.
struct RowsPlan {
  ChannelView view;
  int values;           // per vector
  bool masked;          // rows can begin or end inside vectors, which they share with their neighbours
  int64_t row_vectors;  // how many vectors a row can touch
  Divider<uint64_t> by_row_vectors;
  int lanes, channels;
  int64_t outer_step, vector_step;  // the distance of `lanes` vectors, as rows and vectors
  int64_t tiles;
  int64_t chunk;
  int splits;
  bool single;  // one launch reduces and applies: the splits of a tile are a cluster of blocks
  Staged staged;
  int64_t window;  // of a pipelined launch: how many tiles are reduced before the first is applied; otherwise 0
  int64_t blocks;  // of a pipelined launch

  constexpr int64_t units() const { return view.outer * row_vectors; }

  constexpr int64_t steps() const { return 2 * tiles * splits; }
  constexpr PipelineStep step(uint32_t number) const {
    const uint32_t place = number / static_cast<uint32_t>(splits);  // in the order of tiles
    const int split = static_cast<int>(number - place * static_cast<uint32_t>(splits));
    if (place < window) return {place, split, false};
    if (place >= 2 * tiles - window) return {place - tiles, split, true};
    const uint32_t past = place - static_cast<uint32_t>(window);
    return {past / 2 + past % 2 * window, split, past % 2 == 0};
  }
};

// The tensor as a matrix, of which a block reads `width` vectors of columns by `height` rows at a time. A unit is a row
// of the matrix. There are three forms:
//   plain     channels last; columns are channels
//   repeated  channels last, if the channels of one position do not fill vectors: a row holds `repeat` positions, and
//             column c belongs to channel c % channels
//   folded    channels first, if the values of one channel do not fill vectors but those of all channels together do:
//             column c belongs to channel c / inner
// With several samples, the matrices of all samples are below one another, and each sample has its own tiles.
//
// A persistent launch reduces and applies a matrix that shared memory holds a part of. Its blocks take numbers until
// all splits are reduced; then each block applies the splits that it has reduced, in reverse order. The split that it
// took first is in shared memory, and the one that it took last is likely to be in the L2 cache. A block waits only for
// splits that running blocks have taken. So the launch ends however few of its blocks run at the same time.
struct ColumnsPlan {
  ChannelView view;
  int values;  // per vector
  int repeat;
  int64_t columns, rows;  // of one sample
  int width, height;
  int64_t tiles;  // of one sample
  int64_t chunk;
  int splits;
  bool single;  // one launch reduces and applies: the splits of a tile are a cluster of blocks
  Staged staged;
  int64_t blocks;  // of a persistent launch; otherwise 0

  constexpr int64_t chunks() const { return (rows + chunk - 1) / chunk; }

  constexpr bool folded() const { return view.inner > 1; }
  constexpr bool plain() const { return repeat == 1 && !folded(); }

  // The channels that a tile of an application contains values of. The first can begin before the tile.
  constexpr int64_t first_channel(int64_t tile) const { return repeat > 1 ? 0 : channel_of(tile * width * values); }
  constexpr int channels_met(int64_t tile) const {
    if (repeat > 1) return static_cast<int>(view.channels);
    const int64_t end = (tile + 1) * width * values;
    return static_cast<int>(channel_of((end < columns ? end : columns) - 1) + 1 - first_channel(tile));
  }
  constexpr bool begins_in(int64_t channel, int64_t tile) const {
    return repeat > 1 || channel * view.inner >= tile * width * values;
  }
  // Unless repeated. There are fewer than 2^31 folded columns.
  constexpr int64_t channel_of(int64_t column) const {
    return plain() ? column : static_cast<uint32_t>(column) / static_cast<uint32_t>(view.inner);
  }

  // A tile of a reduction contains all columns of its channels: how many channels, how many columns each, and column j
  // of one of them.
  constexpr int tile_channels() const {
    return repeat > 1 ? static_cast<int>(view.channels) : width * values / static_cast<int>(view.inner);
  }
  constexpr int columns_each() const { return repeat * static_cast<int>(view.inner); }
  constexpr int tile_column(int channel, int j) const {
    return folded() ? channel * static_cast<int>(view.inner) + j : channel + j * static_cast<int>(view.channels);
  }
};

struct ReductionPlan {
  bool by_rows;
  RowsPlan rows;
  ColumnsPlan columns;
  // Splits per group. The last block of a group merges the group's partial sums, the last group's block merges those of
  // all groups.
  int group;

  constexpr bool single() const { return by_rows ? rows.single : columns.single; }
  constexpr bool pipelined() const { return by_rows && rows.window > 0; }
  constexpr bool persistent() const { return !by_rows && columns.blocks > 0; }
  constexpr bool one_launch() const { return single() || pipelined() || persistent(); }  // reduces and applies
  constexpr int values() const { return by_rows ? rows.values : columns.values; }        // per vector
  constexpr const Staged& staged() const { return by_rows ? rows.staged : columns.staged; }
  constexpr int64_t tiles() const { return by_rows ? rows.tiles : columns.view.samples * columns.tiles; }
  constexpr int splits() const { return by_rows ? rows.splits : columns.splits; }
  constexpr int groups() const { return (splits() + group - 1) / group; }
};

// What a reduction reads, and whether its launch may apply the results.
struct Reduced {
  int itemsize;  // bytes per value
  int inputs;    // tensors
  bool aligned;  // every tensor begins on a multiple of kAccessBytes
  // The launch may apply the results. The tensors are then those that the application reads.
  bool may_apply = false;
  bool writes_mask = false;                  // by whole bytes: no two threads may write values of the same vector
  int values = values_per_access(itemsize);  // per vector, if aligned
  // If not 0, a launch that applies finishes this many neighbouring channels together: a tile has a multiple of them.
  int64_t together = 0;

  constexpr int vector_bytes() const { return values * itemsize; }
};

// The states of a block's columns if each is at most five numbers of the arithmetic.
constexpr int64_t column_state_bytes(int values, int itemsize) {
  return int64_t{kThreads} * values * 5 * (itemsize > 4 ? itemsize : 4);
}
// Whether a kernel can declare them: more than 48 KiB of shared memory must be dynamic.
constexpr bool declares_states(int values, int itemsize) { return column_state_bytes(values, itemsize) < 48 << 10; }

// The plan of a reduction. Several samples must be channels last, or have an outer extent of 1; how their values are
// summed does not depend on the number of samples.
ReductionPlan plan_reduction(const ChannelView& view, const Reduced& reduced, const DeviceLimits& limits,
                             const Residency& resident = {});

// --- applications. Blocks process the tensor from its end to its beginning: the values that the reduction read last
// are still in the L2 cache.

// Channels first: the tensor as one sequence of vectors, kThreads * kFlatVectors per block.
struct FlatPlan {
  ChannelView view;
  int values;    // per vector
  bool aligned;  // a vector lies in one row; otherwise in one or two
  int64_t blocks;

  // An upper bound of the rows that a block contains values of, and one more, whose coefficients the last vector reads.
  constexpr int rows_met() const;
};
inline constexpr int kFlatVectors = 4;
constexpr int FlatPlan::rows_met() const {
  const int64_t rows = (int64_t{kThreads} * kFlatVectors * values - 1) / view.inner + 3;
  return static_cast<int>(rows < kThreads + 1 ? rows : kThreads + 1);
}

struct ApplyPlan {
  bool by_rows;
  FlatPlan flat;
  ColumnsPlan columns;
  bool streaming;  // outputs are evicted from the caches first

  // Whether a block contains values of at most kThreads channels, so that it can prepare their coefficients itself, one
  // per thread.
  constexpr bool may_prepare() const {
    if (by_rows) return flat.rows_met() <= kThreads;
    if (columns.repeat > 1) return columns.view.channels <= kThreads;
    const int64_t tile_columns = int64_t{columns.width} * columns.values;
    return (columns.plain() ? tile_columns : tile_columns / columns.view.inner + 2) <= kThreads;
  }
};

// `itemsize`: bytes per value of the widest operand. `output_itemsize`: bytes per value of the outputs.
ApplyPlan plan_apply(const ChannelView& view, int itemsize, int output_itemsize, bool aligned,
                     const DeviceLimits& limits);

// --- norms whose statistics are rows of memory. `lanes` neighbouring threads hold a chunk of a row in registers,
// `vectors` vectors each. A longer row is staged in shared memory by one block or by a cluster, a chunk each, or takes
// two launches, of which the first sums each chunk.
struct ResidentRowsPlan {
  int values, vectors;  // per vector; per thread, in registers
  int lanes, threads;   // of a chunk; of a block
  int64_t chunk;        // values of a row, a multiple of `values`
  int chunks;
  int64_t rows;    // of one sample
  int64_t blocks;  // for each chunk; in backward for each sample too, and each processes many rows
  bool streaming;  // outputs are evicted from the caches first
  bool is_staged;
  Staged staged;  // if is_staged

  constexpr int slots() const { return threads / lanes; }  // rows that a block processes at once
};

// The bytes of values that a thread holds: of the input, and in backward of each of two inputs and two sums.
inline constexpr int kResidentBytes = 128, kResidentBackwardBytes = 64;
// Threads of a block for rows that kThreads threads cannot hold.
inline constexpr int kResidentThreads = 2 * kThreads;

// Vectors per thread, of `values` values that take `bytes` bytes each in registers: for rows that a few lanes hold, or
// for longer ones.
constexpr int resident_vectors(int bytes, int values, bool is_backward, bool is_short) {
  if (is_short) return is_backward ? 1 : 2;
  return (is_backward ? kResidentBackwardBytes : kResidentBytes) / bytes / (values > 1 ? values : 4);
}

// Rows of memory, and how they are read.
struct ResidentRows {
  int64_t rows, row_values;
  int64_t samples;  // divides the rows: in backward each sample has parameters of its own
  int itemsize;     // of the values in memory
  int values;       // per vector, if the rows are aligned and whole vectors
  bool aligned;
  bool may_stage = false;
};

// The positions of a channels-last view, for layer norm, and the statistics of a channels-first view, for group norm.
constexpr ResidentRows rows_of(const ChannelView& view, int64_t samples, int itemsize, bool aligned,
                               bool may_stage = false) {
  return {view.outer, view.channels, samples, itemsize, values_per_access(itemsize), aligned, may_stage};
}
constexpr ResidentRows rows_of(const GroupView& view, int itemsize, int values, bool aligned) {
  return {view.statistics(), view.count(), 1, itemsize, values, aligned, true};
}

// How the values of a row are summed depends on the size of a row and on how it is read, not on the number of rows.
ResidentRowsPlan plan_resident_rows(const ResidentRows& rows, bool is_backward, const DeviceLimits& limits);

// Whether group norm uses this plan: the statistics are rows, one launch reads them once, and the values of a vector
// belong to at most two channels. A mask is then written by whole bytes.
constexpr bool is_resident(const ResidentRowsPlan& plan, const GroupView& view, bool has_mask) {
  return !view.channels_last && (plan.chunks == 1 || plan.is_staged) &&
         (plan.values == 1 ? !has_mask : view.inner >= plan.values);
}

// --- layer norm

// Channels first: a statistic is a column of a matrix for each outer index, (channels, inner). A block reads `width`
// vectors of columns by `height` rows at a time. How the values of a column are summed depends on the shape of the
// matrix and on `aligned` only.
struct LayerColumnsPlan {
  int values;
  int width, height;
  int64_t tiles;  // of one outer index
  Divider<uint64_t> by_tiles;
  int64_t outers;  // outer indices of one sample
  int64_t blocks;  // of one sample, in backward: each processes many tiles
  bool streaming;
};

// Values per vector of a tile of columns.
constexpr int layer_column_values(int itemsize) { return itemsize == 8 ? 2 : 4; }

LayerColumnsPlan plan_layer_columns(const ChannelView& view, int64_t samples, int itemsize, bool aligned,
                                    const DeviceLimits& limits);

// --- local response normalization. A block writes `chunk` channels at kWarp positions. Its tile in shared memory also
// holds the neighbouring channels of their windows. Backward needs three such tiles, 48 KiB.
inline constexpr int kTileBytes = 16 << 10;

template <class S>
inline constexpr int kTileChannels = kTileBytes / kWarp / static_cast<int>(sizeof(S));

struct WindowPlan {
  int64_t chunk;   // channels per block; 0: no plan, the window is too wide for a tile
  int64_t chunks;  // of the channels
  int64_t tiles;   // of the positions
};

WindowPlan plan_windows(const LocalResponseNorm& args);

}  // namespace normfused::cuda
