#include "kernels/cpu/plan.h"

#include <algorithm>
#include <numeric>

namespace normfused::cpu {

namespace {

// About half of a 1.25 MiB L2 cache: the values that a unit reduces are still in cache when it applies.
constexpr int64_t kCacheBytes = 512 << 10;
// Enough units to balance many threads, few enough for a cheap merge.
constexpr int64_t kUnits = 64;
// In a smaller unit, per-unit overhead dominates.
constexpr int64_t kMinUnitBytes = 16 << 10;
constexpr int64_t kMinSplitBytes = 64 << 10;
// Minimum number of channels-last rows in a split: fewer do not amortize the merge of its result.
constexpr int64_t kMinSplitRows = 256;
// Size of a task of the apply phase after such a split.
constexpr int64_t kApplyBytes = 128 << 10;
// Size of a part of a group that does not fit the cache, and its minimum number of channels-last rows.
constexpr int64_t kPartBytes = 128 << 10, kMinPartRows = 32;
// Channels last, the least contiguous bytes of a range of groups.
constexpr int64_t kMinRangeBytes = 256;
// Blocks of columns are read twice, in short pieces if they are narrow: on an EPYC with 1 MiB of L2 cache, backward of
// (32, 384, 14, 14) in float32 took 1.5 times as long with half of this.
constexpr int64_t kColumnCacheBytes = 1 << 20;
// Rows of layer norm that are processed together.
constexpr int64_t kLayerRows = 4;
// A multiple of this many channels, or of rows of any length, fills whole cache lines in every dtype.
constexpr int64_t kMultiple = 64;
constexpr int64_t kCacheLine = 64;
// Positions of a row of scratch memory: a multiple of the vector size in every dtype. A window of ten rows of 480
// floats fits L1. 480 is not a power of two: rows at a distance of a power of two map to few sets of the cache.
constexpr int64_t kRowMultiple = 32, kLongestRow = 480;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Number of rows that fill whole cache lines, and a multiple of the four rows that kernels process together.
int64_t aligned_rows(int64_t row_bytes) { return std::max<int64_t>(4, kCacheLine / std::gcd(row_bytes, kCacheLine)); }

int64_t grain_of(int64_t task_bytes) { return std::max<int64_t>(1, (32 << 10) / std::max<int64_t>(1, task_bytes)); }

Plan make_plan(const ChannelView& view, int64_t channel_block, int64_t position_block, int64_t item_bytes) {
  return {channel_block,
          ceil_div(view.channels, channel_block),
          position_block,
          ceil_div(view.positions(), position_block),
          channel_block * position_block * item_bytes,
          position_block};
}

}  // namespace

Plan plan_reduction(const ChannelView& view, int64_t itemsize, int64_t operands) {
  const int64_t item_bytes = itemsize * operands;
  const int64_t positions = view.positions();
  const int64_t channel_bytes = std::max<int64_t>(1, positions * item_bytes);
  const int64_t bytes = channel_bytes * view.channels;
  if (view.inner > 1) {
    const int64_t splits = std::min(ceil_div(kUnits, view.channels), channel_bytes / kMinSplitBytes);
    if (view.channels < kUnits / 2 && splits > 1) return make_plan(view, 1, ceil_div(positions, splits), item_bytes);
    const int64_t fair = std::max(view.channels / (kUnits / 2), kMinUnitBytes / channel_bytes);
    const int64_t block = std::min({kCacheBytes / channel_bytes, fair, kMaxChannelsFirst});
    return make_plan(view, std::clamp<int64_t>(block, 1, view.channels), positions, item_bytes);
  }
  // Channels last. A range of rows is contiguous in memory; a range of channels is not: 64 of 2048 channels are two
  // cache lines of every page, and a stride of a power of two maps to few sets of the cache. So positions are split if
  // there are enough of them. The number of splits is a power of two, which the usual thread counts divide evenly.
  const int64_t most = std::min({bytes / kMinSplitBytes, positions / kMinSplitRows, kUnits});
  if (most > 1) {
    int64_t splits = kUnits;
    while (splits > most) splits /= 2;
    const int64_t aligned = aligned_rows(view.channels * itemsize);
    const int64_t block = round_up(ceil_div(positions, splits), aligned);
    Plan plan = make_plan(view, std::min(view.channels, kMaxLanes), block, item_bytes);
    plan.apply_block = round_up(ceil_div(block, ceil_div(plan.unit_bytes, kApplyBytes)), aligned);
    return plan;
  }
  const int64_t fair = std::max(view.channels / (kUnits / 2), kMinUnitBytes / channel_bytes);
  const int64_t wide = std::min({kCacheBytes / channel_bytes, fair, kMaxLanes});
  const int64_t block = std::max(kMultiple, wide / kMultiple * kMultiple);
  return make_plan(view, std::min(block, view.channels), positions, item_bytes);
}

Plan plan_elementwise(const ChannelView& view, int64_t itemsize, int64_t operands) {
  const int64_t item_bytes = itemsize * operands;
  const auto fitting = [&](int64_t bytes) { return std::max<int64_t>(1, kMinSplitBytes / bytes); };
  const int64_t row_bytes = view.inner * item_bytes;
  // A unit is as many outer indices as fit, else as many rows of one outer index, else a part of one row.
  if (view.channels * row_bytes <= kMinSplitBytes) {
    const int64_t outer = fitting(view.channels * row_bytes);
    return make_plan(view, view.channels, (outer < kMultiple ? outer : outer / kMultiple * kMultiple) * view.inner,
                     item_bytes);
  }
  if (view.inner == 1 || row_bytes <= kMinSplitBytes)
    return make_plan(view, std::min(view.channels, fitting(row_bytes)), view.inner, item_bytes);
  return make_plan(view, 1, fitting(item_bytes), item_bytes);
}

GroupPlan plan_rows(int64_t rows, int64_t positions, int64_t item_bytes) {
  const int64_t row_bytes = std::max<int64_t>(1, positions * item_bytes), bytes = rows * row_bytes;
  if (bytes <= kCacheBytes) {
    const int64_t statistics = std::clamp<int64_t>(kMinUnitBytes / bytes, 1, kMaxChannelsFirst);
    return {statistics, rows, 1, positions, 1, statistics * bytes};
  }
  const int64_t row_block = std::clamp<int64_t>(kPartBytes / row_bytes, 1, std::min(rows, kMaxChannelsFirst));
  const int64_t splits = std::clamp<int64_t>(row_bytes / kPartBytes, 1, kUnits);
  const int64_t block = round_up(ceil_div(positions, splits), kMultiple);
  return {1, row_block, ceil_div(rows, row_block), block, ceil_div(positions, block), row_block * block * item_bytes};
}

GroupPlan plan_columns(int64_t positions, int64_t groups, int64_t group_bytes, int64_t operands) {
  const int64_t lines = kCacheLine / std::gcd(group_bytes, kCacheLine);  // groups that fill whole cache lines
  const int64_t narrow = std::min(groups, round_up(ceil_div(kMinRangeBytes, group_bytes), lines));
  const int64_t range_bytes = positions * narrow * group_bytes * operands;
  if (range_bytes <= kColumnCacheBytes) return {narrow, 1, 1, positions, 1, range_bytes};
  const int64_t position_bytes = groups * group_bytes * operands, bytes = positions * position_bytes;
  const int64_t most = std::min({bytes / kPartBytes, positions / kMinPartRows, kUnits / 2});
  const int64_t block = round_up(ceil_div(positions, std::max<int64_t>(1, most)), 4);
  return {groups, 1, 1, block, ceil_div(positions, block), block * position_bytes};
}

GroupPlan plan_layer_rows(int64_t columns, int64_t item_bytes) {
  GroupPlan plan = plan_rows(1, columns, item_bytes);
  const int64_t row_bytes = std::max<int64_t>(1, columns * item_bytes);
  if (plan.parts() == 1 && row_bytes * kLayerRows <= kCacheBytes)
    plan.statistics = round_up(plan.statistics, kLayerRows);
  plan.part_bytes = plan.statistics * plan.position_block * item_bytes;
  return plan;
}

bool divides_layer_rows(int64_t columns, int64_t item_bytes) { return columns * item_bytes > kPartBytes; }

int64_t layer_column_block(int64_t rows, int64_t columns, int64_t item_bytes) {
  const int64_t most =
      std::clamp(kColumnCacheBytes / (rows * item_bytes) / kMultiple * kMultiple, kMultiple, kMaxLanes);
  return round_up(ceil_div(columns, ceil_div(columns, most)), kMultiple);
}

ChunkPlan plan_chunks(int64_t items, int64_t item_bytes, int64_t least_items) {
  const int64_t least = std::max(least_items, kMinSplitBytes / std::max<int64_t>(1, item_bytes));
  const int64_t block = std::max(ceil_div(items, kUnits), std::min(least, items));
  return {block, ceil_div(items, block)};
}

BlockPlan plan_blocks(const ChannelView& view, int64_t position_bytes) {
  const int64_t fitting = kCacheBytes / position_bytes;
  BlockPlan plan{};
  if (view.inner > 1) {
    const int64_t most = std::clamp(fitting / kRowMultiple * kRowMultiple, kRowMultiple, kLongestRow);
    plan.positions = round_up(ceil_div(view.inner, ceil_div(view.inner, most)), kRowMultiple);
    plan.blocks = view.outer * ceil_div(view.inner, plan.positions);
  } else {
    const int64_t fair = std::max(ceil_div(view.outer, kUnits), kMinSplitBytes / position_bytes);
    plan.positions = std::clamp<int64_t>(std::min(fair, fitting), 1, view.outer);
    plan.blocks = ceil_div(view.outer, plan.positions);
  }
  plan.tasks = std::min(plan.blocks, kUnits);
  plan.task_bytes = plan.blocks / plan.tasks * plan.positions * position_bytes;
  return plan;
}

int64_t grain(const Plan& plan) { return grain_of(plan.unit_bytes); }
int64_t grain(const BlockPlan& plan) { return grain_of(plan.task_bytes); }
int64_t grain(const GroupPlan& plan) { return grain_of(plan.part_bytes); }

}  // namespace normfused::cpu
