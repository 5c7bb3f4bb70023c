// Which launch for which shape: pure functions of shape, dtype sizes, alignment and device, so that every choice can be
// tested on any machine. Each returns what its kernel is told.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace normfused::cuda {

struct DeviceLimits {
  int multiprocessors;
  int64_t l2_bytes;
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
// Bytes of one memory access, the widest there is; and values of it at most, so that the columns' sums of a block,
// which it folds in shared memory, stay within 48 KiB.
inline constexpr int kAccessBytes = 16;
inline constexpr int kMaxValues = 8;

// Values per access of operands whose widest item has this size.
constexpr int values_per_access(int itemsize) {
  return kAccessBytes / itemsize < kMaxValues ? kAccessBytes / itemsize : kMaxValues;
}

// Reductions. Each channel's values are cut into `splits` of `chunk` units, a block for each split and tile of
// channels; blockIdx is (tile, split), so that blocks in launch order follow the memory.

// Channels first: `lanes` threads to a channel, kThreads / lanes channels to a block. A unit is a vector of a row.
struct RowsPlan {
  ChannelView view;
  int values;           // of a vector
  bool masked;          // rows begin or end inside vectors, which they share with their neighbours
  int64_t row_vectors;  // that a row can touch
  int lanes;
  int64_t tiles;
  int64_t chunk;
  int splits;
  bool single;  // one block has all of a channel, and applies the result too

  constexpr int64_t units() const { return view.outer * row_vectors; }
};

// Channels last: a matrix of vectors, whose rows are `repeat` positions put side by side where channels alone do not
// fill vectors: column c belongs to channel c % channels. A block is `width` vectors by `height` rows of threads.
// A unit is a row.
struct ColumnsPlan {
  ChannelView view;
  int values;
  int repeat;
  int64_t columns;
  int width, height;
  int64_t tiles;
  int64_t chunk;
  int splits;
  bool single;

  constexpr int64_t rows() const { return (view.numel() + columns - 1) / columns; }
  constexpr int64_t chunks() const { return (rows() + chunk - 1) / chunk; }
};

struct ReductionPlan {
  bool by_rows;
  RowsPlan rows;
  ColumnsPlan columns;

  constexpr bool single() const { return by_rows ? rows.single : columns.single; }
  constexpr int64_t tiles() const { return by_rows ? rows.tiles : columns.tiles; }
  constexpr int splits() const { return by_rows ? rows.splits : columns.splits; }
  // Columns of partial results, for each split and sum.
  constexpr int64_t results() const { return by_rows ? rows.view.channels : columns.columns; }
};

// `inputs` tensors of `itemsize` are read together; `aligned`: all of them begin on a multiple of kAccessBytes.
// `may_finish`: the kernel can apply what it reduced.
ReductionPlan plan_reduction(const ChannelView& view, int itemsize, int inputs, bool aligned, bool may_finish,
                             const DeviceLimits& limits);

// Application. Blocks go against the order of memory: what the reduction read last is still in the L2 cache.

// Channels first: the tensor as one run of vectors, of which a block takes kThreads * kFlatVectors.
struct FlatPlan {
  ChannelView view;
  int values;
  bool aligned;  // a vector lies in one row; otherwise in one or two
  int64_t blocks;
};
inline constexpr int kFlatVectors = 4;

struct ApplyPlan {
  bool by_rows;
  FlatPlan flat;
  ColumnsPlan columns;
  bool streaming;  // store past the caches
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
