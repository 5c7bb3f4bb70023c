// Plans of the CPU and CUDA kernels for any shape and device: every element belongs to exactly one unit or block, and
// no limit is exceeded. UndefinedBehaviorSanitizer reports overflow, libFuzzer's timeout a plan that does not end.
#include "bytes.h"
#include "kernels/cpu/plan.h"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/traffic.h"

using namespace normfused;

namespace {

void check(bool right, const char* what, int line) {
  if (right) return;
  std::fprintf(stderr, "FAILED line %d: %s\n", line, what);
  std::abort();
}
#define CHECK(condition) check(condition, #condition, __LINE__)

// Whether `parts` ranges of `size` cover `all` items, and none of them is empty.
bool covers(int64_t parts, int64_t size, int64_t all) {
  return parts >= 1 && size >= 1 && (parts - 1) * size < all && all - (parts - 1) * size <= size;
}

bool is_power_of_two(int64_t value) { return value > 0 && (value & (value - 1)) == 0; }

// A launch has fewer than 2^31 blocks, of which each statistic may need one. CUDA refuses larger launches.
constexpr int64_t kMostValues = int64_t{1} << 38, kMostStatistics = int64_t{1} << 30;

// At least one value of each extent, and at most kMostValues values.
ChannelView any_view(fuzz::Bytes& bytes) {
  ChannelView view{};
  view.channels = bytes.extent(int64_t{1} << 20);
  view.outer = bytes.extent(std::min(kMostValues / view.channels, int64_t{1} << 32));
  view.inner = bytes.flag() ? 1 : bytes.extent(std::min(kMostValues / view.channels / view.outer, int64_t{1} << 30));
  return view;
}

void check_cpu_units(const ChannelView& view, const cpu::Plan& plan) {
  CHECK(covers(plan.channel_units, plan.channel_block, view.channels));
  CHECK(covers(plan.position_units, plan.position_block, view.positions()));
  CHECK(covers(plan.apply_blocks(), plan.apply_block, plan.position_block));
  CHECK(plan.unit_bytes > 0 && cpu::grain(plan) >= 1);
}

void check_cpu_group(const cpu::GroupPlan& plan, int64_t statistics, int64_t rows, int64_t positions) {
  CHECK(plan.statistics >= 1 && plan.statistics <= statistics);
  CHECK(covers(plan.row_parts, plan.row_block, rows));
  CHECK(covers(plan.splits, plan.position_block, positions) || plan.position_block >= positions);
  CHECK(plan.statistics == 1 || plan.parts() == 1 || rows == 1);
  CHECK(plan.part_bytes > 0 && cpu::grain(plan) >= 1);
}

void run_cpu(fuzz::Bytes& bytes) {
  const ChannelView view = any_view(bytes);
  const int64_t itemsize = bytes.pick({1, 2, 4, 8}), operands = bytes.between(1, 3);
  const cpu::Plan reduction = cpu::plan_reduction(view, itemsize, operands);
  check_cpu_units(view, reduction);
  CHECK(reduction.channel_block <= (view.inner > 1 ? cpu::kMaxChannelsFirst : cpu::kMaxLanes));
  CHECK(reduction.position_units <= 64);
  check_cpu_units(view, cpu::plan_elementwise(view, itemsize, operands));

  const int64_t item_bytes = itemsize * operands;
  check_cpu_group(cpu::plan_rows(view.channels, view.positions(), item_bytes), cpu::kMaxChannelsFirst, view.channels,
                  view.positions());
  check_cpu_group(cpu::plan_columns(view.positions(), view.channels, itemsize, operands), view.channels, 1,
                  view.positions());
  check_cpu_group(cpu::plan_layer_rows(view.channels, item_bytes), cpu::kMaxChannelsFirst, 1, view.channels);

  const int64_t columns = cpu::layer_column_block(view.channels, view.positions(), item_bytes);
  CHECK(columns >= 64 && columns <= cpu::kMaxLanes && columns % 64 == 0);
  const cpu::ChunkPlan chunks = cpu::plan_chunks(view.positions(), item_bytes, bytes.extent(1 << 12));
  CHECK(covers(chunks.chunks, chunks.block, view.positions()) && chunks.chunks <= 64);

  const cpu::BlockPlan blocks = cpu::plan_blocks(view, bytes.extent(1 << 24));
  const int64_t per_outer = view.inner > 1 ? blocks.blocks / view.outer : blocks.blocks;
  CHECK(covers(per_outer, blocks.positions, view.inner > 1 ? view.inner : view.outer));
  CHECK(blocks.blocks == per_outer * (view.inner > 1 ? view.outer : 1));
  CHECK(blocks.tasks >= 1 && blocks.tasks <= blocks.blocks && blocks.task_bytes > 0 && cpu::grain(blocks) >= 1);
}

cuda::DeviceLimits any_device(fuzz::Bytes& bytes) {
  cuda::DeviceLimits limits{};
  limits.multiprocessors = static_cast<int>(bytes.extent(300));
  limits.l2_bytes = bytes.extent(int64_t{1} << 28);
  limits.overlap = bytes.flag();
  limits.shared_bytes = (48 << 10) + 1024 * bytes.between(0, 192);
  limits.max_cluster = bytes.pick({1, 2, 4, 8});
  return limits;
}

template <class Plan>
void check_single(const Plan& plan, const cuda::Reduced& reduced, int64_t units, int64_t step,
                  const cuda::DeviceLimits& limits) {
  CHECK(covers(plan.splits, plan.chunk, units));
  CHECK(plan.splits <= 65535);
  if (!plan.single) return;
  CHECK(reduced.may_apply && plan.values == reduced.values);
  CHECK(plan.splits <= limits.max_cluster);
  CHECK(plan.staged.vectors * step >= std::min(plan.chunk, units));
  CHECK(plan.staged.bytes >= plan.staged.vectors * plan.staged.threads * reduced.vector_bytes() * reduced.inputs);
  CHECK(plan.staged.bytes <= limits.shared_bytes);
}

void check_rows(const cuda::RowsPlan& plan, const ChannelView& view, const cuda::Reduced& reduced,
                const cuda::DeviceLimits& limits, fuzz::Bytes& bytes) {
  CHECK(plan.values == 1 || plan.values == reduced.values);
  CHECK(is_power_of_two(plan.lanes) && plan.lanes * plan.channels <= cuda::kThreads);
  CHECK(covers(plan.tiles, plan.channels, view.statistics()));
  CHECK(reduced.together == 0 || !plan.single || plan.channels % reduced.together == 0);
  CHECK(plan.outer_step * plan.row_vectors + plan.vector_step == plan.lanes && plan.vector_step < plan.row_vectors);
  // A row of `inner` values that begins anywhere in a vector.
  CHECK(plan.row_vectors * plan.values >= view.inner + (plan.masked ? plan.values - 1 : 0));
  const auto unit = static_cast<uint64_t>(bytes.between(0, plan.units() - 1));
  CHECK(plan.by_row_vectors(unit) == unit / static_cast<uint64_t>(plan.row_vectors));
  CHECK(!(plan.single && plan.masked && reduced.writes_mask));
  check_single(plan, reduced, plan.units(), plan.lanes, limits);
}

void check_columns(const cuda::ColumnsPlan& plan, const ChannelView& view) {
  CHECK(plan.width >= 1 && plan.height >= 1 && plan.width * plan.height <= cuda::kThreads);
  CHECK(plan.columns == plan.repeat * view.channels * view.inner && plan.columns % plan.values == 0);
  CHECK(covers(plan.rows, plan.columns, view.outer * view.channels * view.inner));
  CHECK(covers(plan.tiles, int64_t{plan.width} * plan.values, plan.columns));
  CHECK(plan.repeat == 1 || (plan.tiles == 1 && view.inner == 1));
}

// In a reduction, a tile has all columns of its channels, and each belongs to one channel.
void check_tile(const cuda::ColumnsPlan& plan) {
  if (plan.plain()) return;
  CHECK(plan.tile_channels() * plan.columns_each() <= plan.width * plan.values);
  const int last = plan.tile_column(plan.tile_channels() - 1, plan.columns_each() - 1);
  CHECK(last < plan.width * plan.values);
  CHECK(plan.folded() ? plan.width * plan.values % plan.view.inner == 0 : last == plan.columns - 1);
}

void run_reduction(fuzz::Bytes& bytes) {
  ChannelView view = any_view(bytes);
  if (bytes.flag()) {
    view.alike = bytes.flag();
    if (view.inner > 1) view.outer = 1;  // a precondition of several samples
    const int64_t most = std::min(kMostValues / view.numel(), kMostStatistics / view.channels);
    view.samples = bytes.extent(std::max<int64_t>(1, most));
  }
  cuda::Reduced reduced{bytes.pick({2, 4, 8}), static_cast<int>(bytes.between(1, 2)), bytes.flag()};
  reduced.may_apply = bytes.flag();
  reduced.writes_mask = reduced.may_apply && bytes.flag();
  if (reduced.writes_mask || bytes.flag()) reduced.values = cuda::kMaxValues;
  if (reduced.may_apply && !cuda::declares_states(reduced.values, reduced.itemsize) && view.inner == 1) return;
  if (view.inner > 1 && bytes.flag()) reduced.together = bytes.extent(view.channels);
  const cuda::DeviceLimits limits = any_device(bytes);
  const auto blocks = [&] { return static_cast<int>(bytes.between(1, 8)); };
  const cuda::ReductionPlan plan = cuda::plan_reduction(view, reduced, limits, {blocks(), blocks(), blocks()});
  if (plan.by_rows) {
    check_rows(plan.rows, view, reduced, limits, bytes);
  } else {
    check_columns(plan.columns, view);
    check_tile(plan.columns);
    check_single(plan.columns, reduced, plan.columns.rows, plan.columns.height, limits);
  }
  CHECK(plan.tiles() * plan.splits() < int64_t{1} << 40 && plan.tiles() <= INT32_MAX);
  CHECK(plan.group >= 1 && plan.group <= plan.splits());
  CHECK(covers(plan.groups(), plan.group, plan.splits()));
}

void run_apply(fuzz::Bytes& bytes) {
  ChannelView view = any_view(bytes);
  const int itemsize = bytes.pick({2, 4, 8});
  const bool aligned = bytes.flag();
  const cuda::ApplyPlan plan = cuda::plan_apply(view, itemsize, itemsize, aligned, any_device(bytes));
  if (plan.by_rows) {
    CHECK(covers(plan.flat.blocks, int64_t{cuda::kThreads} * cuda::kFlatVectors * plan.flat.values, view.numel()));
    CHECK(plan.flat.blocks <= INT32_MAX);
    return;
  }
  const cuda::ColumnsPlan& columns = plan.columns;
  check_columns(columns, view);
  CHECK(covers(columns.chunks(), columns.chunk, columns.rows) && columns.chunk % columns.height == 0);
  const int64_t tile = bytes.between(0, columns.tiles - 1), first = columns.first_channel(tile);
  CHECK(first >= 0 && columns.channels_met(tile) >= 1 && first + columns.channels_met(tile) <= view.channels);
  if (plan.may_prepare()) CHECK(columns.channels_met(tile) <= cuda::kThreads);
}

void run_resident(fuzz::Bytes& bytes) {
  const int64_t length = bytes.extent(int64_t{1} << 22), samples = bytes.extent(1 << 16);
  const int64_t rows = samples * bytes.extent(kMostValues / length / samples);
  const int itemsize = bytes.pick({2, 4, 8});
  const bool is_backward = bytes.flag(), aligned = bytes.flag();
  const cuda::ResidentRows of{rows,
                              length,
                              is_backward ? samples : 1,
                              itemsize,
                              cuda::values_per_access(itemsize),
                              aligned,
                              !is_backward && bytes.flag()};
  const cuda::DeviceLimits limits = any_device(bytes);
  const cuda::ResidentRowsPlan plan = cuda::plan_resident_rows(of, is_backward, limits);
  CHECK(covers(plan.chunks, plan.chunk, length) && plan.chunk % plan.values == 0);
  CHECK(is_power_of_two(plan.lanes) && plan.threads % plan.lanes == 0 && plan.threads <= cuda::kResidentThreads);
  if (plan.is_staged)
    CHECK(plan.staged.vectors * plan.staged.threads * plan.values >= plan.chunk &&
          plan.staged.bytes <= limits.shared_bytes && plan.chunks <= limits.max_cluster);
  else
    CHECK(int64_t{plan.lanes} * plan.vectors * plan.values >= plan.chunk);
  if (is_backward)
    CHECK(plan.blocks >= 1 && (plan.blocks - 1) * plan.slots() < plan.rows);
  else
    CHECK(covers(plan.blocks, plan.slots(), rows));
}

void run_layer_columns(fuzz::Bytes& bytes) {
  const int64_t samples = bytes.extent(1 << 12);
  ChannelView view = any_view(bytes);
  if (view.numel() > kMostValues / samples) return;
  view.outer *= samples;
  const auto plan = cuda::plan_layer_columns(view, samples, bytes.pick({2, 4, 8}), bytes.flag(), any_device(bytes));
  CHECK(plan.width * plan.height <= cuda::kThreads && is_power_of_two(plan.width) && plan.height >= 1);
  CHECK(covers(plan.tiles, int64_t{plan.width} * plan.values, view.inner));
  CHECK(plan.blocks >= 1 && plan.blocks <= plan.tiles * plan.outers);
  const auto tile = static_cast<uint64_t>(bytes.between(0, plan.tiles * plan.outers - 1));
  CHECK(plan.by_tiles(tile) == tile / static_cast<uint64_t>(plan.tiles));
}

void run_windows(fuzz::Bytes& bytes) {
  LocalResponseNorm args{};
  args.view = any_view(bytes);
  args.dtype = bytes.pick({DType::kFloat32, DType::kFloat64});
  args.size = bytes.flag() ? bytes.extent(64) : bytes.extent(int64_t{1} << 40);
  if (bytes.flag()) args.grad_output = &args;
  const cuda::WindowPlan plan = cuda::plan_windows(args);
  CHECK(args.left() >= 0 && args.left() < args.view.channels && args.right() < args.view.channels);
  if (plan.chunk == 0) return;
  CHECK(covers(plan.chunks, plan.chunk, args.view.channels));
  const int64_t held = args.dtype == DType::kFloat64 ? cuda::kTileChannels<double> : cuda::kTileChannels<float>;
  const int64_t passes = args.grad_output == nullptr ? 1 : 2;
  const int64_t needed = plan.chunk + passes * (args.left() + args.right());
  CHECK(std::min(needed, args.view.channels) <= held);
  CHECK(covers(plan.tiles, cuda::kWarp, args.view.positions()));
}

template <class Word>
void run_divider(fuzz::Bytes& bytes) {
  constexpr Word kHalf = static_cast<Word>(~Word{0}) / 2;
  const auto divisor =
      static_cast<Word>(std::max<uint64_t>(1, bytes.number(sizeof(Word)) >> bytes.between(0, 63) & kHalf));
  const cuda::Divider<Word> divide(divisor);
  const auto some = static_cast<Word>(bytes.number(sizeof(Word)) & kHalf);
  const auto multiple = static_cast<Word>(some / divisor * divisor);
  for (const Word n : {some, multiple, static_cast<Word>(multiple == 0 ? 0 : multiple - 1), kHalf})
    CHECK(divide(n) == n / divisor);
}

void run_traffic(fuzz::Bytes& bytes) {
  ChannelView view = any_view(bytes);
  const int itemsize = bytes.pick({2, 4, 8});
  const bool fused = bytes.flag(), is_backward = bytes.flag();
  const cuda::DeviceLimits limits = any_device(bytes);
  const auto operation = static_cast<cuda::Operation>(bytes.between(0, 5));
  const int64_t tensor = view.numel() * itemsize;
  const cuda::Traffic result = cuda::traffic(operation, view, itemsize, fused, limits);
  const bool applies = operation < cuda::Operation::kMoments;
  CHECK(result.launches >= 1 && result.read >= tensor && result.written >= (applies ? tensor : 0));
  const GroupView groups{view.outer, bytes.extent(view.channels), view.channels, view.inner, bytes.flag()};
  if (view.channels % groups.groups == 0) {
    const auto of_groups = cuda::group_norm_traffic(groups, itemsize, is_backward, limits);
    CHECK(of_groups.launches >= 1 && of_groups.read >= tensor && of_groups.written >= tensor);
  }
  const auto of_layers = cuda::layer_norm_traffic(view, itemsize, is_backward, limits);
  CHECK(of_layers.launches >= 1 && of_layers.read >= tensor && of_layers.written >= tensor);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Bytes bytes(data, size);
  using Run = void (*)(fuzz::Bytes&);
  constexpr Run kRuns[] = {run_cpu,      run_reduction,         run_apply,
                           run_resident, run_traffic,           run_layer_columns,
                           run_windows,  run_divider<uint32_t>, run_divider<uint64_t>};
  bytes.pick(kRuns)(bytes);
  return 0;
}
