// Which launch for which shape: pure functions of shape, dtype sizes, alignment and device, so that every choice can be
// tested on any machine. Each returns what its kernel is told.
#pragma once

#include <cstdint>

#include "kernels/cuda/divider.h"
#include "kernels/types.h"

namespace normfused::cuda {

struct DeviceLimits {
  int multiprocessors;
  int64_t l2_bytes;
  bool overlap = false;  // an application may start before the reduction before it has ended
};

#ifndef NORMFUSED_CUDA_THREADS
#define NORMFUSED_CUDA_THREADS 256  // a test builds with fewer, because ThreadSanitizer tells only 255 threads apart
#endif

// Threads of every block, and how many blocks share a multiprocessor at least, which leaves a thread 128 registers:
// none of the kernels needs more, and two blocks with four loads of 16 bytes for each thread keep 32 KiB in flight,
// where 4.8 TB/s over 132 multiprocessors times 700 ns of latency ask for 25.
inline constexpr int kThreads = NORMFUSED_CUDA_THREADS;
inline constexpr int kMinBlocks = 2;
inline constexpr int kWarp = 32;

// Blocks of each kernel of a reduction that a multiprocessor holds at once, which registers and shared memory decide.
struct Residency {
  int rows = kMinBlocks, masked_rows = kMinBlocks, columns = kMinBlocks;
};
// Bytes of one memory access, the widest there is; and values of it at most, so that the columns' sums of a block,
// which it folds in shared memory, stay within 48 KiB.
inline constexpr int kAccessBytes = 16;
inline constexpr int kMaxValues = 8;

// Values per access of operands whose widest item has this size.
constexpr int values_per_access(int itemsize) {
  return kAccessBytes / itemsize < kMaxValues ? kAccessBytes / itemsize : kMaxValues;
}

// Vectors of each of so many inputs that a thread has in flight together, its round: four loads of rows at most;
// eight of columns, of which each has sums of its own, so fewer where these are doubles.
constexpr int row_vectors_in_flight(int inputs) { return 4 / inputs; }
constexpr int column_vectors_in_flight(int inputs, bool doubles) { return 8 / inputs / (doubles ? 2 : 1); }

// Reductions. Each channel's values are cut into `splits` of `chunk` units, a block for each split and tile of
// channels; blockIdx is (tile, split), so that blocks in launch order follow the memory.

// Channels first: `lanes` threads to a channel, kThreads / lanes channels to a block. A unit is a vector of a row.
struct RowsPlan {
  ChannelView view;
  int values;           // of a vector
  bool masked;          // rows begin or end inside vectors, which they share with their neighbours
  int64_t row_vectors;  // that a row can touch
  Divider<uint64_t> by_row_vectors;
  int lanes;
  int64_t outer_step, vector_step;  // lanes vectors further on: so many rows and vectors
  int64_t tiles;
  int64_t chunk;
  int splits;
  bool single;  // one block has all of a channel, and applies the result too

  constexpr int64_t units() const { return view.outer * row_vectors; }
};

// A matrix of vectors. Channels last, its rows are `repeat` positions put side by side where channels alone do not fill
// vectors: column c belongs to channel c % channels. Channels first it is folded, where the rows of single channels do
// not fill vectors but those of all channels together do: column c belongs to channel c / inner. A block is `width`
// vectors by `height` rows of threads. A unit is a row.
struct ColumnsPlan {
  ChannelView view;
  int values;
  int repeat;
  int64_t columns, rows;
  int width, height;
  int64_t tiles;
  int64_t chunk;
  int splits;
  bool single;

  constexpr int64_t chunks() const { return (rows + chunk - 1) / chunk; }

  constexpr bool folded() const { return view.inner > 1; }
  constexpr bool plain() const { return repeat == 1 && !folded(); }  // columns are channels
  // Channels that a tile of an application meets, of which the first one can begin before it.
  constexpr int64_t first_channel(int64_t tile) const { return repeat > 1 ? 0 : channel_of(tile * width * values); }
  constexpr int channels_met(int64_t tile) const {
    if (repeat > 1) return static_cast<int>(view.channels);
    const int64_t end = (tile + 1) * width * values;
    return static_cast<int>(channel_of((end < columns ? end : columns) - 1) + 1 - first_channel(tile));
  }
  constexpr bool begins_in(int64_t channel, int64_t tile) const {
    return repeat > 1 || channel * view.inner >= tile * width * values;
  }
  // Where positions are not side by side. Folded columns are fewer than 2^31.
  constexpr int64_t channel_of(int64_t column) const {
    return plain() ? column : static_cast<uint32_t>(column) / static_cast<uint32_t>(view.inner);
  }
  // A tile of a reduction has all columns of each of its channels.
  constexpr int tile_channels() const {
    return repeat > 1 ? static_cast<int>(view.channels) : width * values / static_cast<int>(view.inner);
  }
  constexpr int columns_each() const { return repeat * static_cast<int>(view.inner); }
  // Column j of a tile's channel.
  constexpr int tile_column(int channel, int j) const {
    return folded() ? channel * static_cast<int>(view.inner) + j : channel + j * static_cast<int>(view.channels);
  }
};

struct ReductionPlan {
  bool by_rows;
  RowsPlan rows;
  ColumnsPlan columns;
  // The last block of each so many splits merges those, and the last of these merges what they left.
  int group;

  constexpr bool single() const { return by_rows ? rows.single : columns.single; }
  constexpr int64_t tiles() const { return by_rows ? rows.tiles : columns.tiles; }
  constexpr int splits() const { return by_rows ? rows.splits : columns.splits; }
  constexpr int groups() const { return (splits() + group - 1) / group; }
};

// `inputs` tensors of `itemsize` are read together; `aligned`: all of them begin on a multiple of kAccessBytes.
// `may_finish`: the kernel can apply what it reduced.
ReductionPlan plan_reduction(const ChannelView& view, int itemsize, int inputs, bool aligned, bool may_finish,
                             const DeviceLimits& limits, const Residency& resident = {});

// Application. Blocks go against the order of memory: what the reduction read last is still in the L2 cache.

// Channels first: the tensor as one run of vectors, of which a block takes kThreads * kFlatVectors.
struct FlatPlan {
  ChannelView view;
  int values;
  bool aligned;  // a vector lies in one row; otherwise in one or two
  int64_t blocks;

  // Rows that a block meets at most, and one more, which a vector at the end looks at.
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
  bool streaming;  // store past the caches

  // Whether the channels that a block meets are so few that it can prepare their coefficients itself, a thread each.
  constexpr bool may_prepare() const {
    if (by_rows) return flat.rows_met() <= kThreads;
    if (columns.repeat > 1) return columns.view.channels <= kThreads;
    const int64_t across = int64_t{columns.width} * columns.values;
    return (columns.plain() ? across : across / columns.view.inner + 2) <= kThreads;
  }
};

// `itemsize` is that of the widest operand, `output_itemsize` that of what is written.
ApplyPlan plan_apply(const ChannelView& view, int itemsize, int output_itemsize, bool aligned,
                     const DeviceLimits& limits);

// Windows of channels. A block writes a chunk of the channels at kWarp positions. In shared memory it has those about
// them too, as they are needed: with a value for each, up to three times, which makes 48 KiB.
inline constexpr int kTileBytes = 16 << 10;

template <class S>
inline constexpr int kTileChannels = kTileBytes / kWarp / static_cast<int>(sizeof(S));

struct WindowPlan {
  int64_t chunk;  // 0: the window is too wide for a tile
  int64_t chunks;
  int64_t tiles;
};

WindowPlan plan_windows(const LocalResponseNorm& args);

}  // namespace normfused::cuda
