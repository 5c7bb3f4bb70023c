#include "kernels/cuda/plan.h"

#include <algorithm>
#include <numeric>

namespace normfused::cuda {

namespace {

// Thresholds, each with its reason. They are reasons only: none has been measured on a GPU yet.

// Blocks for each multiprocessor, where there is enough to do: twice what must be resident to keep the memory busy, so
// that some read while others merge.
constexpr int64_t kBlocksPerMultiprocessor = 4;
// What a block reads at least: below it, its start and the merging of its results cost more than the reading.
constexpr int64_t kBlockBytes = 16 << 10;
// What a channel, or a tile of columns, holds at most to be left to one block, which then also applies: the second read
// comes from L1, and one launch is enough.
constexpr int64_t kSingleChannelBytes = 8 << 10;
constexpr int64_t kSingleTileBytes = 32 << 10;
// Vectors for each thread of a channel: four loads are in flight at once, so fewer would leave some of them idle.
constexpr int64_t kVectorsPerLane = 16;
constexpr int64_t kMaxSplits = 65535;  // gridDim.y
// Vectors of a row for a block. A reduction takes a cache line: the last block of a tile merges the splits of all its
// channels alone, so tiles are narrow and splits few. An application takes half a kilobyte, beyond which wider accesses
// to DRAM gain nothing. A sector is the least that DRAM gives.
constexpr int64_t kReductionWidth = 8;
constexpr int64_t kApplicationWidth = 32;
constexpr int64_t kSectorVectors = 2;
// Rows for each thread of an application: its coefficients are loaded once.
constexpr int64_t kRowsPerThread = 8;

// What a tile writes at least of what it reads, where it does not have all channels: a quarter. Torch's own operators
// go over the tensor not much oftener.
constexpr int64_t kLeastShare = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Splits that give the device enough blocks without giving a block too little.
int64_t splits_for(int64_t tiles, int64_t tile_bytes, const DeviceLimits& limits) {
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * limits.multiprocessors, tiles);
  return std::clamp<int64_t>(wanted, 1, std::clamp<int64_t>(tile_bytes / kBlockBytes, 1, kMaxSplits));
}

RowsPlan plan_rows(const ChannelView& view, int itemsize, int inputs, bool aligned, bool may_finish,
                   const DeviceLimits& limits) {
  RowsPlan plan{};
  plan.view = view;
  const int values = values_per_access(itemsize);
  plan.values = aligned && view.inner >= values ? values : 1;
  plan.masked = view.inner % plan.values != 0;
  // A row of n values touches most vectors where it begins on the last value of one.
  plan.row_vectors = plan.masked ? (view.inner + 2 * plan.values - 2) / plan.values : view.inner / plan.values;
  plan.lanes = kWarp;
  while (plan.lanes < kThreads && plan.units() > kVectorsPerLane * plan.lanes) plan.lanes *= 2;
  const int64_t channels = kThreads / plan.lanes;
  const int64_t channel_bytes = view.positions() * itemsize * inputs;
  plan.tiles = ceil_div(view.channels, channels);
  plan.single = may_finish && channel_bytes <= kSingleChannelBytes * inputs;
  const int64_t splits = plan.single ? 1 : splits_for(plan.tiles, channels * channel_bytes, limits);
  plan.chunk = ceil_div(ceil_div(plan.units(), splits), plan.lanes) * plan.lanes;
  plan.splits = static_cast<int>(ceil_div(plan.units(), plan.chunk));
  return plan;
}

// What reductions and applications have in common: how columns are laid over threads.
ColumnsPlan columns_of(const ChannelView& view, int itemsize, bool aligned, int64_t max_width) {
  ColumnsPlan plan{};
  plan.view = view;
  const int values = values_per_access(itemsize);
  const int64_t repeat = values / std::gcd<int64_t>(view.channels, values);
  // Positions are put side by side as long as one block holds them all, and so every column of each of its channels.
  const bool vectors = aligned && (repeat == 1 || repeat * view.channels <= int64_t{kThreads} * values);
  plan.values = vectors ? values : 1;
  plan.repeat = vectors ? static_cast<int>(repeat) : 1;
  plan.columns = plan.repeat * view.channels;
  const int64_t across = plan.columns / plan.values;
  plan.tiles = plan.repeat > 1 ? 1 : ceil_div(across, max_width);
  plan.width = static_cast<int>(ceil_div(across, plan.tiles));
  plan.height = kThreads / plan.width;
  return plan;
}

ColumnsPlan plan_columns(const ChannelView& view, int itemsize, int inputs, bool aligned, bool may_finish,
                         const DeviceLimits& limits) {
  ColumnsPlan plan = columns_of(view, itemsize, aligned, kReductionWidth);
  const auto tile_bytes = [&] { return plan.rows() * plan.width * plan.values * itemsize; };
  if (may_finish && tile_bytes() > kSingleTileBytes) {
    const int64_t narrow = kSingleTileBytes * plan.width / tile_bytes();
    if (narrow >= kSectorVectors && plan.repeat == 1) plan = columns_of(view, itemsize, aligned, narrow);
  }
  plan.single = may_finish && tile_bytes() <= kSingleTileBytes;
  const int64_t splits = plan.single ? 1 : splits_for(plan.tiles, tile_bytes() * inputs, limits);
  plan.chunk = ceil_div(ceil_div(plan.rows(), splits), plan.height) * plan.height;
  plan.splits = static_cast<int>(ceil_div(plan.rows(), plan.chunk));
  return plan;
}

}  // namespace

ReductionPlan plan_reduction(const ChannelView& view, int itemsize, int inputs, bool aligned, bool may_finish,
                             const DeviceLimits& limits) {
  ReductionPlan plan{};
  plan.by_rows = view.inner > 1;
  if (plan.by_rows)
    plan.rows = plan_rows(view, itemsize, inputs, aligned, may_finish, limits);
  else
    plan.columns = plan_columns(view, itemsize, inputs, aligned, may_finish, limits);
  return plan;
}

ApplyPlan plan_apply(const ChannelView& view, int itemsize, int output_itemsize, bool aligned,
                     const DeviceLimits& limits) {
  ApplyPlan plan{};
  plan.by_rows = view.inner > 1;
  // An output that half of the cache would not hold leaves the other half to what is still to be read.
  plan.streaming = view.numel() * output_itemsize > limits.l2_bytes / 2;
  if (plan.by_rows) {
    const int values = values_per_access(itemsize);
    plan.flat.view = view;
    plan.flat.values = aligned && view.inner >= values ? values : 1;
    plan.flat.aligned = view.inner % plan.flat.values == 0;
    plan.flat.blocks = ceil_div(ceil_div(view.numel(), plan.flat.values), kThreads * kFlatVectors);
    return plan;
  }
  ColumnsPlan& columns = plan.columns;
  columns = columns_of(view, itemsize, aligned, kApplicationWidth);
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * limits.multiprocessors, columns.tiles);
  columns.chunk = std::clamp<int64_t>(ceil_div(columns.rows(), wanted * columns.height), 1, kRowsPerThread);
  columns.chunk *= columns.height;
  columns.splits = 0;  // counted in blocks: there can be more than gridDim.y holds
  return plan;
}

WindowPlan plan_windows(const LocalResponseNorm& args) {
  const int64_t held = args.dtype == DType::kFloat64 ? kTileChannels<double> : kTileChannels<float>;
  const int64_t passes = args.grad_output == nullptr ? 1 : 2;  // each of them sums over windows
  const int64_t about = passes * (args.before() + args.after()), channels = args.view.channels;
  const int64_t most = channels <= held ? channels : held - about;
  if (most < channels && most < held / kLeastShare) return {};
  const int64_t chunks = ceil_div(channels, most);
  return {ceil_div(channels, chunks), chunks, ceil_div(args.view.positions(), kWarp)};
}

}  // namespace normfused::cuda
