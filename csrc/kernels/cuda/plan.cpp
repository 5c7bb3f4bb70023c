#include "kernels/cuda/plan.h"

#include <algorithm>
#include <numeric>

namespace normfused::cuda {

namespace {

// Thresholds, each with its reason. None has been measured on a GPU yet.

// The maximum number of waves of resident blocks. More waves than one are used if fewer leave more than 1 / kEmptyShare
// of the last wave empty.
constexpr int64_t kMaxWaves = 4;
constexpr int64_t kEmptyShare = 8;
// Blocks of an application per multiprocessor, if the tensor is large enough.
constexpr int64_t kBlocksPerMultiprocessor = 4;
// The minimum a block reads. Below it, starting the block and merging its results cost more than reading.
constexpr int64_t kBlockBytes = 16 << 10;
// One launch reduces and applies if the device has at most this many multiprocessors for each of its blocks. Each of
// them then reads up to three times its share of the memory's bandwidth, about a third of what L2 can give it.
constexpr int64_t kMultiprocessorsPerBlock = 3;
// The maximum size of a channel, or of a tile of columns, for which one launch needs no minimum number of blocks: a
// second launch costs more than a block's time.
constexpr int64_t kSingleChannelBytes = 8 << 10;
constexpr int64_t kSingleTileBytes = 32 << 10;
// A launch is pipelined if its inputs are at least this many times as large as the L2 cache. A second launch would find
// up to the whole cache of them there.
constexpr int64_t kPipelinedCaches = 2;
// What a block of a pipelined launch reads in a step, if the tiles are large enough, and at least what a block of a
// persistent launch keeps: several times what it reads in the time that it takes to start a step.
constexpr int64_t kStepBytes = 48 << 10;
// A launch is persistent if its inputs are larger than this share of the L2 cache, in which a second launch would find
// most of smaller ones; and if a block takes at most this many splits, of which it keeps one.
constexpr int64_t kCachedShare = 2;
constexpr int64_t kSplitsPerBlock = 4;
// Shared memory that the system reserves for each block.
constexpr int64_t kReservedBytes = 1 << 10;
// The share of the L2 cache that the window of a pipelined launch and the tile that is being applied may take, as a
// fraction. The rest is for outputs and for what the cache evicts too early.
constexpr int64_t kWindowShare = 3, kWindowShares = 4;
// The maximum shared memory that a reduction's kernel declares itself, without the states of columns.
constexpr int64_t kDeclaredBytes = 4 << 10;
// Vectors per lane of a channel. Four loads are in flight together, so fewer vectors would leave lanes idle.
constexpr int64_t kVectorsPerLane = 16;
constexpr int64_t kMaxSplits = 65535;  // gridDim.y
// The maximum number of splits that one block merges alone. A thread merges four at a time, and up to 64 channels share
// a block: with 32 splits it waits twice for the L2 cache.
constexpr int kMergedSplits = 32;
// Chunks of at least this many iterations are rounded up to whole iterations. Rounding smaller chunks would leave the
// splits out of balance.
constexpr int64_t kWholeIterations = 8;
// Vectors per row of a tile. A reduction reads a cache line: the last block of a tile merges the splits of all channels
// of the tile, so tiles are narrow. An application accesses half a kilobyte; more does not make DRAM faster. A sector
// is the smallest access to DRAM.
constexpr int64_t kReductionWidth = 8;
constexpr int64_t kApplicationWidth = 32;
constexpr int64_t kSectorBytes = 32;
// Rows per thread of an application, which loads its coefficients once.
constexpr int64_t kRowsPerThread = 8;

// Layer norm, backward: the maximum number of rows, or of tiles of columns, whose sums a block adds up in S.
constexpr int64_t kSummedInS = 64;
// Vectors of a tile of columns: two sectors, so that there are enough tiles; of single values a warp.
constexpr int kLayerWidth = 4;

// A tile of local response normalization with fewer than all channels writes at least 1 / kMinShare of the channels it
// reads. Torch's own operators read the tensor about as often.
constexpr int64_t kMinShare = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many splits fill the device with resident blocks, with at least kBlockBytes per block. If one wave of blocks
// would leave the device partly empty, the splits of a few waves that fill it best.
int64_t splits_for(int64_t tiles, int64_t tile_bytes, int resident, const DeviceLimits& limits) {
  const int64_t slots = int64_t{limits.multiprocessors} * resident;
  const int64_t max_splits = std::clamp<int64_t>(tile_bytes / kBlockBytes, 1, kMaxSplits);
  int64_t best = 1;
  double best_share = 0;
  for (int64_t waves = 1; waves <= kMaxWaves; ++waves) {
    const int64_t splits = std::clamp<int64_t>(waves * slots / tiles, 1, max_splits), blocks = splits * tiles;
    const double share = static_cast<double>(blocks) / static_cast<double>(ceil_div(blocks, slots) * slots);
    if (share > best_share) best = splits, best_share = share;
    if (share >= 1 - 1. / kEmptyShare) break;
  }
  return best;
}

// Units per split: a multiple of `step`, the units that a block reads together, or of a whole iteration of
// `steps_in_flight` steps if there are many.
int64_t chunk_of(int64_t units, int64_t splits, int64_t step, int64_t steps_in_flight) {
  const int64_t per_split = ceil_div(units, splits), iteration = step * steps_in_flight;
  const int64_t multiple = per_split >= kWholeIterations * iteration ? iteration : step;
  return ceil_div(per_split, multiple) * multiple;
}

// Whether the tiles, with the maximum number of splits, are fewer blocks than the device holds.
bool too_few(int64_t tiles, int64_t tile_bytes, const DeviceLimits& limits) {
  const int64_t splits = std::max<int64_t>(tile_bytes / kBlockBytes, 1);
  return tiles * splits < int64_t{kMinBlocks} * limits.multiprocessors;
}

// The copies of a single launch whose threads read at most this many vectors of each input.
Staged staged_of(const Reduced& reduced, int64_t vectors, int threads = kThreads) {
  return {vectors, threads, vectors * threads * reduced.vector_bytes() * reduced.inputs};
}

// Tries to make `plan`, of rows or columns, a single launch whose splits are the smallest cluster of blocks that holds
// a tile. Returns whether that is possible; if not, only `single` changes, to false. `units`: of a tile, of which a
// block reads `step` at once with `threads` threads; `declared`: the shared memory that the kernel declares;
// `is_small`: whatever the number of tiles.
template <class Plan>
bool make_single(Plan& plan, const Reduced& reduced, int64_t units, int64_t step, int threads, int64_t declared,
                 bool is_small, const DeviceLimits& limits) {
  plan.single = false;
  if (!reduced.may_apply || plan.values == 1) return false;
  for (int cluster = 1; cluster <= limits.max_cluster; cluster *= 2) {
    const int64_t chunk = ceil_div(ceil_div(units, cluster), step) * step;
    const Staged staged = staged_of(reduced, chunk / step, threads);
    if (staged.bytes + declared > limits.shared_bytes) continue;
    const bool fills = plan.tiles * cluster * kMultiprocessorsPerBlock >= limits.multiprocessors;
    if (ceil_div(units, chunk) != cluster || !(is_small || fills)) return false;
    plan.single = true;
    plan.staged = staged;
    plan.chunk = chunk;
    plan.splits = cluster;
    return true;
  }
  return false;
}

// Tries to make `plan` a pipelined launch. Returns whether that is possible; if not, nothing changes. `tile_bytes`: of
// all inputs.
bool make_pipelined(RowsPlan& plan, const Reduced& reduced, int64_t tile_bytes, int resident,
                    const DeviceLimits& limits) {
  if (!reduced.may_apply || !limits.pipelines || reduced.together > 0 || plan.masked || plan.values == 1) return false;
  const int64_t bytes = plan.view.numel() * reduced.itemsize * reduced.inputs;
  if (bytes < kPipelinedCaches * limits.l2_bytes) return false;
  const int64_t blocks = int64_t{limits.multiprocessors} * resident;
  const int64_t window = std::max<int64_t>(ceil_div(blocks * kStepBytes, tile_bytes), 2);
  if ((window + 1) * tile_bytes > limits.l2_bytes / kWindowShares * kWindowShare || window > plan.tiles) return false;
  const int64_t splits =
      std::clamp<int64_t>(ceil_div(blocks, window), 1, std::max<int64_t>(tile_bytes / kBlockBytes, 1));
  const int64_t chunk = chunk_of(plan.units(), splits, plan.lanes, row_vectors_in_flight(reduced.inputs));
  if (2 * plan.tiles * ceil_div(plan.units(), chunk) + blocks > INT32_MAX) return false;  // a number has 32 bits
  plan.window = window;
  plan.blocks = blocks;
  plan.chunk = chunk;
  plan.splits = static_cast<int>(ceil_div(plan.units(), chunk));
  return true;
}

// Tries to make `plan` a persistent launch, with as many blocks as share the multiprocessors. Returns whether that is
// possible; if not, nothing changes.
bool make_persistent(ColumnsPlan& plan, const Reduced& reduced, const DeviceLimits& limits) {
  const ChannelView& view = plan.view;
  if (!reduced.may_apply || !limits.pipelines || reduced.together > 0 || plan.values == 1) return false;
  if (view.samples > 1 || view.alike) return false;  // a sample would be summed otherwise than alone
  if (view.numel() * reduced.itemsize * reduced.inputs <= limits.l2_bytes / kCachedShare) return false;
  const int64_t declared = kDeclaredBytes + column_state_bytes(reduced.values, reduced.itemsize);
  const int64_t shared = limits.shared_bytes / kMinBlocks - kReservedBytes - declared;
  const int64_t vectors = shared / staged_of(reduced, 1).bytes;
  if (shared < kStepBytes) return false;
  const int64_t blocks = int64_t{limits.multiprocessors} * kMinBlocks, held = vectors * plan.height;
  const int64_t splits_each = ceil_div(plan.tiles * plan.rows, blocks * held);
  if (splits_each > kSplitsPerBlock) return false;
  const int64_t splits = std::max<int64_t>(splits_each * blocks / plan.tiles, 1);
  plan.chunk = std::min(ceil_div(ceil_div(plan.rows, splits), plan.height) * plan.height, held);
  plan.staged = staged_of(reduced, plan.chunk / plan.height);
  plan.splits = static_cast<int>(ceil_div(plan.rows, plan.chunk));
  plan.blocks = std::min(blocks, plan.tiles * plan.splits);
  return true;
}

// The channels of several samples as those of one. Precondition: the outer extent is 1 if there are several.
ChannelView flattened(const ChannelView& view) {
  return view.samples == 1 ? view : ChannelView{1, view.statistics(), view.inner};
}

RowsPlan plan_rows(const ChannelView& view, const Reduced& reduced, const DeviceLimits& limits,
                   const Residency& resident) {
  RowsPlan plan{};
  plan.view = flattened(view);
  const int values = reduced.values;
  // Sums depend on where in a vector a row begins, which must be the same in every sample.
  const bool alike = !view.alike || view.channels * view.inner % values == 0;
  plan.values = reduced.aligned && alike && view.inner >= values ? values : 1;
  plan.masked = view.inner % plan.values != 0;
  // A row touches the maximum number of vectors if it begins on the last value of one.
  plan.row_vectors = plan.masked ? (view.inner + 2 * plan.values - 2) / plan.values : view.inner / plan.values;
  plan.by_row_vectors = Divider<uint64_t>(static_cast<uint64_t>(plan.row_vectors));
  const int64_t channel_bytes = view.positions() * reduced.itemsize * reduced.inputs;
  const auto channels = [&] {
    const int64_t all = kThreads / plan.lanes;
    return all > reduced.together && reduced.together > 0 ? all / reduced.together * reduced.together : all;
  };
  const auto sample_tiles = [&] { return ceil_div(view.channels, channels()); };
  const auto few = [&] {
    return plan.units() > plan.lanes && too_few(sample_tiles(), channels() * channel_bytes, limits);
  };
  plan.lanes = kWarp;
  while (plan.lanes < kThreads && (plan.units() > kVectorsPerLane * plan.lanes || few())) plan.lanes *= 2;
  while (plan.lanes > 1 && plan.lanes * reduced.together > kThreads) plan.lanes /= 2;
  plan.channels = static_cast<int>(channels());
  plan.outer_step = plan.lanes / plan.row_vectors;
  plan.vector_step = plan.lanes % plan.row_vectors;
  plan.tiles = ceil_div(plan.view.channels, plan.channels);
  const bool is_together = reduced.together == 0 || plan.channels % reduced.together == 0;
  // How a sample is summed must not depend on the number of samples, and so of tiles.
  const bool is_small = view.alike || channel_bytes <= kSingleChannelBytes * reduced.inputs;
  // A byte of a mask belongs to two threads if two channels share a vector.
  if (is_together && !(plan.masked && reduced.writes_mask) &&
      make_single(plan, reduced, plan.units(), plan.lanes, plan.lanes * plan.channels, kDeclaredBytes, is_small,
                  limits))
    return plan;
  // Whether a launch is pipelined depends on the number of samples.
  if (!view.alike && make_pipelined(plan, reduced, channels() * channel_bytes, resident.rows, limits)) return plan;
  const int64_t splits = splits_for(sample_tiles(), channels() * channel_bytes,
                                    plan.masked ? resident.masked_rows : resident.rows, limits);
  plan.chunk = chunk_of(plan.units(), splits, plan.lanes, row_vectors_in_flight(reduced.inputs));
  plan.splits = static_cast<int>(ceil_div(plan.units(), plan.chunk));
  return plan;
}

// Channels first: how many channels together fill whole vectors, the granularity of a folded matrix. 0 if the tensor is
// not folded: a single channel fills whole vectors, or all channels together do not, or a block is too narrow.
int64_t folded_channels(const ChannelView& view, int values, bool aligned) {
  const int64_t channels = values / std::gcd<int64_t>(view.inner, values), columns = view.channels * view.inner;
  const bool fits = channels * view.inner <= int64_t{kThreads} * values && columns < INT32_MAX;
  return view.inner > 1 && channels > 1 && aligned && columns % values == 0 && fits ? channels : 0;
}

// The width of a tile: `min_width` vectors, or more if there are so few rows that threads would have no work.
int64_t width_for(int64_t rows, int64_t min_width) { return std::max(min_width, kThreads / rows); }

// Common to reductions and applications: the form of the matrix and its tiles. The width of a tile is a multiple of
// `multiple` vectors, and at most `max_width` if that allows it.
ColumnsPlan columns_of(const ChannelView& view, int values, bool aligned, int64_t max_width, int64_t multiple = 1) {
  ColumnsPlan plan{};
  plan.view = view;
  const int64_t repeat = view.inner > 1 ? 1 : values / std::gcd<int64_t>(view.channels, values);
  // Positions are repeated in a row only if one tile holds the whole row, and so all columns of its channels. The
  // samples, if there are several, must then end with a row.
  const bool repeats = repeat * view.channels <= int64_t{kThreads} * values &&
                       ((view.samples == 1 && !view.alike) || view.outer % repeat == 0);
  const bool vectors = aligned && (repeat == 1 || repeats);
  plan.values = vectors ? values : 1;
  plan.repeat = vectors ? static_cast<int>(repeat) : 1;
  plan.columns = plan.repeat * view.channels * view.inner;
  plan.rows = ceil_div(view.numel() / view.samples, plan.columns);
  const int64_t multiples = plan.columns / plan.values / multiple;
  plan.tiles = plan.repeat > 1 ? 1 : ceil_div(multiples, std::max<int64_t>(max_width / multiple, 1));
  plan.width = static_cast<int>(ceil_div(multiples, plan.tiles) * multiple);
  plan.height = kThreads / plan.width;
  return plan;
}

// Channels last: how many vectors hold `together` neighbouring channels, or a multiple of them. 1 if that does not
// matter, or if no tile can be a multiple of these channels.
int64_t vectors_together(const ChannelView& view, int values, int64_t together) {
  if (view.inner > 1 || together == 0 || view.channels % values != 0) return 1;
  const int64_t vectors = together / std::gcd<int64_t>(together, values);
  return vectors <= kThreads ? vectors : 1;
}

// A plan starts with the width of a cache line. Narrower tiles allow a single launch, or give more blocks to a device
// that would not be full.
ColumnsPlan plan_columns(const ChannelView& view, const Reduced& reduced, const DeviceLimits& limits,
                         const Residency& resident) {
  const int values = reduced.values;
  const int64_t sector = std::max<int64_t>(kSectorBytes / reduced.vector_bytes(), 1);
  const int64_t folded = folded_channels(view, values, reduced.aligned);
  const int64_t multiple = folded > 0 ? folded * view.inner / values : vectors_together(view, values, reduced.together);
  ColumnsPlan plan = columns_of(view, values, reduced.aligned,
                                folded > 0 ? width_for(view.outer, multiple) : kReductionWidth, multiple);
  const auto tile_bytes = [&] { return plan.rows * plan.width * plan.values * reduced.itemsize * reduced.inputs; };
  // Halves the width of a tile. Returns whether it has become narrower.
  const auto narrow = [&] {
    const int width = plan.width;
    if (width / 2 >= std::max(sector, multiple) && plan.repeat == 1)
      plan = columns_of(view, values, reduced.aligned, width / 2, multiple);
    return plan.width < width;
  };
  // How a sample is summed must not depend on the number of samples, and so of tiles.
  const auto is_small = [&] { return view.alike || tile_bytes() <= kSingleTileBytes * reduced.inputs; };
  const auto make = [&] {
    const int64_t declared = kDeclaredBytes + column_state_bytes(values, reduced.itemsize);
    const bool is_together = reduced.together == 0 || (plan.plain() && plan.tile_channels() % reduced.together == 0);
    plan.single = false;
    return is_together && make_single(plan, reduced, plan.rows, plan.height, kThreads, declared, is_small(), limits);
  };
  const ColumnsPlan widest = plan;
  while (!make() && reduced.may_apply && narrow()) {
  }
  if (!plan.single) plan = widest;
  while (plan.width > sector && too_few(plan.tiles * (plan.single ? plan.splits : 1), tile_bytes(), limits) &&
         narrow()) {
  }
  if (make() || make_persistent(plan, reduced, limits)) return plan;
  const int64_t splits = splits_for(plan.tiles, tile_bytes(), resident.columns, limits);
  plan.chunk =
      chunk_of(plan.rows, splits, plan.height, column_vectors_in_flight(reduced.inputs, reduced.itemsize == 8));
  plan.splits = static_cast<int>(ceil_div(plan.rows, plan.chunk));
  return plan;
}

// Splits per group: all of them, or if there are many their square root, so that there are about as many groups as
// splits per group.
int merge_group(int splits) {
  if (splits <= kMergedSplits) return splits;
  int group = 1;
  while (group * group < splits) ++group;
  return group;
}

}  // namespace

ReductionPlan plan_reduction(const ChannelView& view, const Reduced& reduced, const DeviceLimits& limits,
                             const Residency& resident) {
  ReductionPlan plan{};
  plan.by_rows =
      view.inner > 1 && (reduced.together > 0 || folded_channels(view, reduced.values, reduced.aligned) == 0);
  if (!plan.by_rows) {
    plan.columns = plan_columns(view, reduced, limits, resident);
    // The tiles of a folded matrix have several channels. A single launch may need fewer blocks for tiles of one.
    if (reduced.may_apply && view.inner > 1 && !(plan.columns.single && plan.columns.splits == 1)) {
      plan.rows = plan_rows(view, reduced, limits, resident);
      plan.by_rows = plan.rows.single && (!plan.columns.single || plan.rows.splits < plan.columns.splits);
    }
  } else {
    plan.rows = plan_rows(view, reduced, limits, resident);
  }
  plan.group = merge_group(plan.splits());
  return plan;
}

ApplyPlan plan_apply(const ChannelView& view, int itemsize, int output_itemsize, bool aligned,
                     const DeviceLimits& limits) {
  ApplyPlan plan{};
  const int values = values_per_access(itemsize);
  const bool folded = folded_channels(view, values, aligned) > 0;
  plan.by_rows = view.inner > 1 && !folded;
  // An output larger than half of the L2 cache is streamed, so that the inputs still to be read stay cached.
  plan.streaming = view.numel() * output_itemsize > limits.l2_bytes / 2;
  if (plan.by_rows) {
    plan.flat.view = flattened(view);
    plan.flat.values = aligned && view.inner >= values ? values : 1;
    plan.flat.aligned = view.inner % plan.flat.values == 0;
    plan.flat.blocks = ceil_div(ceil_div(view.numel(), plan.flat.values), kThreads * kFlatVectors);
    return plan;
  }
  ColumnsPlan& columns = plan.columns;
  columns = columns_of(view, values, aligned, folded ? width_for(view.outer, kApplicationWidth) : kApplicationWidth);
  const int64_t chunks = ceil_div(kBlocksPerMultiprocessor * limits.multiprocessors, view.samples * columns.tiles);
  columns.chunk = std::clamp<int64_t>(ceil_div(columns.rows, chunks * columns.height), 1, kRowsPerThread);
  columns.chunk *= columns.height;
  columns.splits = 0;  // the kernel counts chunks along gridDim.x: there can be more than gridDim.y holds
  return plan;
}

namespace {

// Blocks of one sample that process `tiles` tiles: a wave of blocks, or more if a block would sum too many tiles in S.
int64_t layer_blocks(int64_t tiles, int64_t samples, int resident, const DeviceLimits& limits) {
  const int64_t wave = std::max<int64_t>(int64_t{limits.multiprocessors} * resident / samples, 1);
  return std::min(std::max(wave, ceil_div(tiles, kSummedInS)), tiles);
}

int power_of_two(int64_t at_least, int most) {
  int power = 1;
  while (power < most && power < at_least) power *= 2;
  return power;
}

// Tries to make the plan one of rows that the smallest possible cluster of blocks stages. Returns whether that is
// possible; if not, nothing changes.
bool make_staged(ResidentRowsPlan& plan, const ResidentRows& rows, const DeviceLimits& limits) {
  const Reduced row{rows.itemsize, 1, rows.aligned, true, false, plan.values};
  for (int cluster = 1; cluster <= limits.max_cluster; cluster *= 2) {
    const Staged staged = staged_of(row, ceil_div(ceil_div(rows.row_values / plan.values, cluster), kThreads));
    if (staged.bytes + kDeclaredBytes > limits.shared_bytes) continue;
    plan.staged = staged;
    plan.chunks = cluster;
    plan.lanes = plan.threads = kThreads;
    return true;
  }
  return false;
}

}  // namespace

ResidentRowsPlan plan_resident_rows(const ResidentRows& rows, bool is_backward, const DeviceLimits& limits) {
  ResidentRowsPlan plan{};
  const int64_t length = rows.row_values;
  const int computed = std::max(rows.itemsize, 4);  // bytes of a value in registers
  plan.values = rows.aligned && length % rows.values == 0 ? rows.values : 1;
  const auto lanes_of = [&](int vectors) { return ceil_div(ceil_div(length, plan.values), vectors); };
  const int few = resident_vectors(computed, plan.values, is_backward, true);
  const int many = resident_vectors(computed, plan.values, is_backward, false);
  const bool is_short = lanes_of(few) <= kWarp;
  plan.vectors = is_short ? few : many;
  plan.lanes = power_of_two(is_short ? lanes_of(few) : std::max<int64_t>(lanes_of(many), kWarp), kResidentThreads);
  plan.threads = std::max(plan.lanes, kThreads);
  const int64_t held = int64_t{plan.lanes} * plan.vectors * plan.values;
  plan.chunks = static_cast<int>(ceil_div(length, held));
  plan.is_staged = rows.may_stage && plan.chunks > 1 && plan.values > 1 && make_staged(plan, rows, limits);
  plan.chunk = ceil_div(ceil_div(length, plan.chunks), plan.values) * plan.values;
  plan.rows = rows.rows / rows.samples;
  const int resident = plan.threads > kThreads ? 1 : kMinBlocks;
  plan.blocks = is_backward
                    ? layer_blocks(ceil_div(plan.rows, plan.slots()), rows.samples * plan.chunks, resident, limits)
                    : ceil_div(rows.rows, plan.slots());
  plan.streaming = rows.rows * length * rows.itemsize > limits.l2_bytes / 2;
  return plan;
}

LayerColumnsPlan plan_layer_columns(const ChannelView& view, int64_t samples, int itemsize, bool aligned,
                                    const DeviceLimits& limits) {
  LayerColumnsPlan plan{};
  const int values = layer_column_values(itemsize);
  plan.values = aligned && view.inner % values == 0 ? values : 1;
  plan.width = power_of_two(ceil_div(view.inner, plan.values), plan.values == 1 ? kWarp : kLayerWidth);
  plan.height = kThreads / plan.width;
  plan.tiles = ceil_div(view.inner, int64_t{plan.width} * plan.values);
  plan.by_tiles = Divider<uint64_t>(static_cast<uint64_t>(plan.tiles));
  plan.outers = view.outer / samples;
  plan.blocks = layer_blocks(plan.tiles * plan.outers, samples, kMinBlocks, limits);
  plan.streaming = view.numel() * itemsize > limits.l2_bytes / 2;
  return plan;
}

WindowPlan plan_windows(const LocalResponseNorm& args) {
  const int64_t held = args.dtype == DType::kFloat64 ? kTileChannels<double> : kTileChannels<float>;
  const int64_t passes = args.grad_output == nullptr ? 1 : 2;  // each sums over windows
  const int64_t neighbours = passes * (args.left() + args.right()), channels = args.view.channels;
  const int64_t max_chunk = channels <= held ? channels : held - neighbours;
  if (max_chunk < channels && max_chunk < held / kMinShare) return {};
  const int64_t chunks = ceil_div(channels, max_chunk);
  return {ceil_div(channels, chunks), chunks, ceil_div(args.view.positions(), kWarp)};
}

}  // namespace normfused::cuda
