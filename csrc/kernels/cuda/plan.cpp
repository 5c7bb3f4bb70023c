#include "kernels/cuda/plan.h"

#include <algorithm>
#include <numeric>

namespace normfused::cuda {

namespace {

// Thresholds, each with its reason. They are reasons only: none has been measured on a GPU yet.

// Waves of resident blocks at most, where fewer leave much of the last one empty; an eighth is little.
constexpr int64_t kMostWaves = 4;
constexpr int64_t kEmptyShare = 8;
// Blocks of an application for each multiprocessor, where there is enough to do.
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
// Splits that one block merges alone. A thread joins four at a time, and up to 64 channels share a block: with 32 it
// waits twice for the L2 cache.
constexpr int kMergedSplits = 32;
// Chunks of so many rounds are cut to whole ones: to less would leave splits out of balance.
constexpr int64_t kWholeRounds = 8;
// Vectors of a row for a block. A reduction takes a cache line: the last block of a tile merges the splits of all its
// channels, so tiles are narrow. An application takes half a kilobyte, beyond which wider accesses
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

// Splits that fill the device with its resident blocks, without giving a block too little: no more blocks than that,
// or, where it would be left half empty, than a few times that.
int64_t splits_for(int64_t tiles, int64_t tile_bytes, int resident, const DeviceLimits& limits) {
  const int64_t slots = int64_t{limits.multiprocessors} * resident;
  const int64_t most = std::clamp<int64_t>(tile_bytes / kBlockBytes, 1, kMaxSplits);
  int64_t best = 1;
  double best_share = 0;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    const int64_t splits = std::clamp<int64_t>(waves * slots / tiles, 1, most), blocks = splits * tiles;
    const double share = static_cast<double>(blocks) / static_cast<double>(ceil_div(blocks, slots) * slots);
    if (share > best_share) best = splits, best_share = share;
    if (share >= 1 - 1. / kEmptyShare) break;
  }
  return best;
}

// Units of a split: whole steps of a block, or whole rounds where there are many.
int64_t chunk_of(int64_t units, int64_t splits, int64_t step, int64_t steps_in_flight) {
  const int64_t each = ceil_div(units, splits), round = step * steps_in_flight;
  const int64_t whole = each >= kWholeRounds * round ? round : step;
  return ceil_div(each, whole) * whole;
}

// Whether tiles, cut as finely as they may be, are too few for the device.
bool too_few(int64_t tiles, int64_t tile_bytes, const DeviceLimits& limits) {
  const int64_t splits = std::max<int64_t>(tile_bytes / kBlockBytes, 1);
  return tiles * splits < int64_t{kMinBlocks} * limits.multiprocessors;
}

RowsPlan plan_rows(const ChannelView& view, int itemsize, int inputs, bool aligned, bool may_finish,
                   const DeviceLimits& limits, const Residency& resident) {
  RowsPlan plan{};
  plan.view = view;
  const int values = values_per_access(itemsize);
  plan.values = aligned && view.inner >= values ? values : 1;
  plan.masked = view.inner % plan.values != 0;
  // A row of n values touches most vectors where it begins on the last value of one.
  plan.row_vectors = plan.masked ? (view.inner + 2 * plan.values - 2) / plan.values : view.inner / plan.values;
  plan.by_row_vectors = Divider<uint64_t>(static_cast<uint64_t>(plan.row_vectors));
  const int64_t channel_bytes = view.positions() * itemsize * inputs;
  const auto channels = [&] { return int64_t{kThreads} / plan.lanes; };
  const auto few = [&] {
    return plan.units() > plan.lanes &&
           too_few(ceil_div(view.channels, channels()), channels() * channel_bytes, limits);
  };
  plan.lanes = kWarp;
  while (plan.lanes < kThreads && (plan.units() > kVectorsPerLane * plan.lanes || few())) plan.lanes *= 2;
  plan.outer_step = plan.lanes / plan.row_vectors;
  plan.vector_step = plan.lanes % plan.row_vectors;
  plan.tiles = ceil_div(view.channels, channels());
  plan.single = may_finish && channel_bytes <= kSingleChannelBytes * inputs;
  const int64_t splits = plan.single ? 1
                                     : splits_for(plan.tiles, channels() * channel_bytes,
                                                  plan.masked ? resident.masked_rows : resident.rows, limits);
  plan.chunk = chunk_of(plan.units(), splits, plan.lanes, row_vectors_in_flight(inputs));
  plan.splits = static_cast<int>(ceil_div(plan.units(), plan.chunk));
  return plan;
}

// Channels of which all rows together are whole vectors, channels first, or 0 where channels are to be taken one by
// one: their rows are whole vectors already, or a row of all channels is not, or a block is too narrow for them.
int64_t folded_channels(const ChannelView& view, int itemsize, bool aligned) {
  const int values = values_per_access(itemsize);
  const int64_t channels = values / std::gcd<int64_t>(view.inner, values), columns = view.channels * view.inner;
  const bool fits = channels * view.inner <= int64_t{kThreads} * values && columns < INT32_MAX;
  return view.inner > 1 && channels > 1 && aligned && columns % values == 0 && fits ? channels : 0;
}

// Vectors of a tile of so many rows: wider than `least` where rows are so few that threads would have none.
int64_t width_for(int64_t rows, int64_t least) { return std::max(least, kThreads / rows); }

// What reductions and applications have in common: how columns are laid over threads. A tile's width is a multiple of
// `group`.
ColumnsPlan columns_of(const ChannelView& view, int itemsize, bool aligned, int64_t max_width, int64_t group = 1) {
  ColumnsPlan plan{};
  plan.view = view;
  const int values = values_per_access(itemsize);
  const int64_t repeat = view.inner > 1 ? 1 : values / std::gcd<int64_t>(view.channels, values);
  // Positions are put side by side as long as one block holds them all, and so every column of each of its channels.
  const bool vectors = aligned && (repeat == 1 || repeat * view.channels <= int64_t{kThreads} * values);
  plan.values = vectors ? values : 1;
  plan.repeat = vectors ? static_cast<int>(repeat) : 1;
  plan.columns = plan.repeat * view.channels * view.inner;
  plan.rows = ceil_div(view.numel(), plan.columns);
  const int64_t groups = plan.columns / plan.values / group;
  plan.tiles = plan.repeat > 1 ? 1 : ceil_div(groups, std::max<int64_t>(max_width / group, 1));
  plan.width = static_cast<int>(ceil_div(groups, plan.tiles) * group);
  plan.height = kThreads / plan.width;
  return plan;
}

// `folded`: the channels of the narrowest tile, channels first.
ColumnsPlan plan_columns(const ChannelView& view, int itemsize, int inputs, bool aligned, bool may_finish,
                         int64_t folded, const DeviceLimits& limits, const Residency& resident) {
  const int64_t group = folded > 0 ? folded * view.inner / values_per_access(itemsize) : 1;
  ColumnsPlan plan =
      columns_of(view, itemsize, aligned, folded > 0 ? width_for(view.outer, group) : kReductionWidth, group);
  const auto tile_bytes = [&] { return plan.rows * plan.width * plan.values * itemsize; };
  const auto narrow = [&](int64_t most) {
    if (most >= std::max(kSectorVectors, group) && most < plan.width && plan.repeat == 1)
      plan = columns_of(view, itemsize, aligned, most, group);
  };
  if (may_finish && tile_bytes() > kSingleTileBytes) narrow(kSingleTileBytes * plan.width / tile_bytes());
  while (plan.width > kSectorVectors && too_few(plan.tiles, tile_bytes() * inputs, limits)) {
    const int before = plan.width;
    narrow(before / 2);
    if (plan.width == before) break;
  }
  plan.single = may_finish && tile_bytes() <= kSingleTileBytes;
  const int64_t splits = plan.single ? 1 : splits_for(plan.tiles, tile_bytes() * inputs, resident.columns, limits);
  plan.chunk = chunk_of(plan.rows, splits, plan.height, column_vectors_in_flight(inputs, itemsize == 8));
  plan.splits = static_cast<int>(ceil_div(plan.rows, plan.chunk));
  return plan;
}

// Of splits that are merged at once: all, or the square root of that.
int merge_group(int splits) {
  if (splits <= kMergedSplits) return splits;
  int group = 1;
  while (group * group < splits) ++group;
  return group;
}

}  // namespace

ReductionPlan plan_reduction(const ChannelView& view, int itemsize, int inputs, bool aligned, bool may_finish,
                             const DeviceLimits& limits, const Residency& resident) {
  ReductionPlan plan{};
  const int64_t folded = folded_channels(view, itemsize, aligned);
  plan.by_rows = view.inner > 1 && folded == 0;
  if (plan.by_rows)
    plan.rows = plan_rows(view, itemsize, inputs, aligned, may_finish, limits, resident);
  else
    plan.columns = plan_columns(view, itemsize, inputs, aligned, may_finish, folded, limits, resident);
  plan.group = merge_group(plan.splits());
  return plan;
}

ApplyPlan plan_apply(const ChannelView& view, int itemsize, int output_itemsize, bool aligned,
                     const DeviceLimits& limits) {
  ApplyPlan plan{};
  const bool folded = folded_channels(view, itemsize, aligned) > 0;
  plan.by_rows = view.inner > 1 && !folded;
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
  columns = columns_of(view, itemsize, aligned, folded ? width_for(view.outer, kApplicationWidth) : kApplicationWidth);
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * limits.multiprocessors, columns.tiles);
  columns.chunk = std::clamp<int64_t>(ceil_div(columns.rows, wanted * columns.height), 1, kRowsPerThread);
  columns.chunk *= columns.height;
  columns.splits = 0;  // counted in blocks: there can be more than gridDim.y holds
  return plan;
}

WindowPlan plan_windows(const LocalResponseNorm& args) {
  const int64_t held = args.dtype == DType::kFloat64 ? kTileChannels<double> : kTileChannels<float>;
  const int64_t passes = args.grad_output == nullptr ? 1 : 2;  // each of them sums over windows
  const int64_t about = passes * (args.left() + args.right()), channels = args.view.channels;
  const int64_t most = channels <= held ? channels : held - about;
  if (most < channels && most < held / kLeastShare) return {};
  const int64_t chunks = ceil_div(channels, most);
  return {ceil_div(channels, chunks), chunks, ceil_div(args.view.positions(), kWarp)};
}

}  // namespace normfused::cuda
