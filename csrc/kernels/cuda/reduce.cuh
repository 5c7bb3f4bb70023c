// Reduction: reduces every channel to a few sums and finishes it, in one launch. The phases of a block are
//
//   accumulate   each thread reads its vectors and updates a state in registers
//   fold         the states become sums, which are merged across the channel's lanes: the split's partial sums
//   merge        the last block to arrive merges the partial sums of all splits
//   finish       that block turns the sums into results and hands them to Finish
//   apply        optional: the block applies the results to its channels (see apply.cuh)
//
// A single launch, which applies, first copies the vectors of all inputs of the apply Op to shared memory (see
// stage.cuh), from which both accumulation and application read them. Of these inputs, the first kInputs are those of
// the reduce Op. The splits of a tile are then a cluster of blocks, in which the first one merges and finishes while
// the others wait. In a pipelined launch, which applies too, the blocks take steps (see RowsPlan): a step is all phases
// of a split but the last, or only the last. In a persistent launch (see ColumnsPlan) the blocks take splits, of which
// they stage the first, and apply them when no split is left.
//
// The phases and the contracts of Op and Finish are in reduce_phases.cuh.
#pragma once

#include "kernels/cuda/apply.cuh"
#include "kernels/cuda/reduce_phases.cuh"

namespace normfused::cuda {

// The tile and the split of a block. In a launch that applies, the splits of a tile are neighbours.
template <class Apply>
NF_DEVICE BlockPlace block_place(int splits) {
  if constexpr (std::is_same_v<Apply, NoApply>) return {blockIdx.x, static_cast<int>(blockIdx.y)};
  const unsigned tile = blockIdx.x / static_cast<unsigned>(splits);
  return {tile, static_cast<int>(blockIdx.x - tile * static_cast<unsigned>(splits))};
}

// Starts the copies of a thread's vectors of one channel.
template <class Apply, int kValues, bool kMasked>
NF_DEVICE void copy_row(const Apply& apply, const RowsPlan& plan, int64_t channel, int split, int lane,
                        Stage<typename Apply::T, kValues>& stage) {
  const int64_t numel = plan.view.numel();
  for (RowIterator<kValues, kMasked> it(plan, channel, split, lane); !it.done();) {
    uint32_t valid;
    const int64_t offset = it.next(valid);
    stage.copy([&](int k) { return apply.input(k); }, offset, valid == 0 ? 0 : numel - offset);
  }
}

// The same for one tile of a matrix.
template <class Apply, int kValues>
NF_DEVICE void copy_tile(const Apply& apply, const ColumnsPlan& plan, int64_t sample, int64_t tile, int split,
                         Stage<typename Apply::T, kValues>& stage) {
  const int64_t numel = plan.view.numel();
  for (ColumnIterator<kValues> it(plan, sample, tile, split); !it.done();) {
    const int64_t offset = it.next();
    stage.copy([&](int k) { return apply.input(k); }, offset, numel - offset);
  }
}

// The stage of a kernel that applies, and otherwise a NoStage.
template <class Apply, int kValues>
NF_DEVICE auto stage_for([[maybe_unused]] const Apply& apply, [[maybe_unused]] const Staged& plan) {
  if constexpr (std::is_same_v<Apply, NoApply>) {
    return NoStage{};
  } else {
    NF_DYNAMIC_SHARED(uint4, staged);
    return Stage<typename Apply::T, kValues>(staged, inputs_of(apply), plan);
  }
}

// Channels first: the partial sums of one split.
template <int kValues, bool kMasked, class Op, class Staged>
NF_DEVICE void reduce_split(const Op& op, const RowsPlan& plan, const RowPlace& place, int split, Staged& stage,
                            const Partials<typename Op::Sum>& partials) {
  typename Op::Sum sums[Op::kSums];
  set_identity<Op>(sums);
  if (place.has_channel()) {
    int64_t count = 0;
    const auto state = accumulate_row<Op, kValues, kMasked>(op, plan, place.channel, split, place.lane, stage, count);
    if (count > 0) op.fold(state, count, place.channel, sums);
  }
  merge_lanes<Op>(sums, plan.lanes);
  if (place.has_channel() && place.lane == 0) store_partial<Op>(partials, split, place.channel, sums);
}

// Channels first: plan.lanes threads per channel. A block per tile of plan.channels channels (blockIdx.x) and split
// (blockIdx.y).
template <class Op, class Finish, class Apply, int kValues, bool kMasked>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    reduce_rows(const Op op, const Finish finish, const Apply apply, const RowsPlan plan,
                const Partials<typename Op::Sum> partials) {
  allow_next_launch();
  const BlockPlace block = block_place<Apply>(plan.splits);
  const RowPlace place(plan, block.tile);
  if (place.has_channel() && place.lane == 0) finish.prefetch(place.channel);
  auto stage = stage_for<Apply, kValues>(apply, plan.staged);
  if constexpr (!std::is_same_v<Apply, NoApply>) {
    if (place.has_channel())
      copy_row<Apply, kValues, kMasked>(apply, plan, place.channel, block.split, place.lane, stage);
    stage.end();
  }
  reduce_split<kValues, kMasked>(op, plan, place, block.split, stage, partials);
  if constexpr (std::is_same_v<Apply, NoApply>) {
    if (arrive<Op>(partials, place.range, block)) finish_channels(op, finish, partials, place.range);
  } else {
    finish_in_cluster(op, finish, partials, place.range, block.split);
    apply.prologue();
    if (place.has_channel())
      apply_row<Apply, kValues, kMasked>(apply, plan, place.channel, block.split, place.lane, stage);
  }
}

// The same in a pipelined launch: the block takes steps until none is left. A step reads its vectors from memory.
// `applicable`: a flag for each tile, which is released when the tile is finished; `steps`: the counter of steps.
template <class Op, class Finish, class Apply, int kValues>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    pipeline_rows(const Op op, const Finish finish, const Apply apply, const RowsPlan plan,
                  const Partials<typename Op::Sum> partials, unsigned* const applicable, unsigned* const steps) {
  apply.prologue();
  const auto end = static_cast<unsigned>(plan.steps());
  for (unsigned number; (number = next_number(steps, end)) < end;) {
    const PipelineStep step = plan.step(number);
    const RowPlace place(plan, step.tile);
    if (step.applies) {
      wait_for(applicable + step.tile);
      if (place.has_channel()) apply_row_in_memory<Apply, kValues>(apply, plan, place.channel, step.split, place.lane);
      continue;
    }
    if (place.has_channel() && place.lane == 0) finish.prefetch(place.channel);
    NoStage stage;
    reduce_split<kValues, false>(op, plan, place, step.split, stage, partials);
    if (arrive<Op>(partials, place.range, {static_cast<unsigned>(step.tile), step.split}))
      finish_and_release(op, finish, partials, place.range, applicable + step.tile);
  }
}

// The channels of a tile of a sample's matrix. A thread starts to fetch what Finish will read for one of them.
template <class Finish>
NF_DEVICE ChannelRange start_tile(const Finish& finish, const ColumnsPlan& plan, int64_t sample, int64_t tile) {
  const int64_t first_channel = sample * plan.view.channels, end = first_channel + plan.view.channels;
  const int64_t first = first_channel + tile * plan.tile_channels(), last = first + plan.tile_channels();
  const ChannelRange range{first, last < end ? last : end};
  if (first + threadIdx.x < range.last) finish.prefetch(first + threadIdx.x);
  return range;
}

// Matrices: the partial sums of one split of a tile. `states`: shared memory for kThreads * kValues states, which a
// barrier must separate from their use by another call.
template <int kValues, class Op, class Staged>
NF_DEVICE void reduce_tile(const Op& op, const ColumnsPlan& plan, int64_t sample, int64_t tile, int split,
                           const ChannelRange& range, Staged& stage, typename Op::State* states,
                           const Partials<typename Op::Sum>& partials) {
  ColumnIterator<kValues> it(plan, sample, tile, split);
  const int channels = plan.tile_channels(), tile_columns = plan.width * kValues;
  typename Op::State state[kValues];
  start_columns(op, it, range, states, state);
  accumulate_columns(op, plan, it, stage, state);

  if (it.y < plan.height)
#pragma unroll
    for (int i = 0; i < kValues; ++i) states[it.y * tile_columns + it.x * kValues + i] = state[i];
  __syncthreads();
  const ColumnStates<Op, kValues> column_states{plan, it, states};
  const int lanes = lanes_for(channels), lane = threadIdx.x % lanes;
  for (int c0 = 0; c0 < channels; c0 += kThreads / lanes) {
    const int c = c0 + static_cast<int>(threadIdx.x) / lanes;
    typename Op::Sum sums[Op::kSums];
    set_identity<Op>(sums);
    if (range.first + c < range.last) column_states.fold(op, range.first, c, lane, lanes, sums);
    merge_lanes<Op>(sums, lanes);
    if (lane == 0 && range.first + c < range.last) store_partial<Op>(partials, split, range.first + c, sums);
  }
}

// Matrices: a thread per vector of columns and row. A block per tile of columns of a sample (blockIdx.x) and split
// (blockIdx.y).
template <class Op, class Finish, class Apply, int kValues>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    reduce_columns(const Op op, const Finish finish, const Apply apply, const ColumnsPlan plan,
                   const Partials<typename Op::Sum> partials) {
  allow_next_launch();
  NF_SHARED(typename Op::State, states, [kThreads * kValues]);
  const BlockPlace place = block_place<Apply>(plan.splits);
  const auto sample = place.tile / static_cast<unsigned>(plan.tiles);
  const int64_t tile = place.tile - sample * plan.tiles;
  const ChannelRange range = start_tile(finish, plan, sample, tile);
  auto stage = stage_for<Apply, kValues>(apply, plan.staged);
  if constexpr (!std::is_same_v<Apply, NoApply>) {
    copy_tile<Apply, kValues>(apply, plan, sample, tile, place.split, stage);
    stage.end();
  }
  reduce_tile<kValues>(op, plan, sample, tile, place.split, range, stage, states, partials);
  if constexpr (std::is_same_v<Apply, NoApply>) {
    if (arrive<Op>(partials, range, place)) finish_channels(op, finish, partials, range);
  } else {
    finish_in_cluster(op, finish, partials, range, place.split);
    apply.prologue();
    apply_tile<Apply, kValues>(apply, plan, sample, tile, place.split, stage, false);
  }
}

// The same in a persistent launch. `applicable`: as in pipeline_rows(); `numbers`: the counter of splits; `before`:
// memory for a number per split, the one that the block took before it.
template <class Op, class Finish, class Apply, int kValues>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    persist_columns(const Op op, const Finish finish, const Apply apply, const ColumnsPlan plan,
                    const Partials<typename Op::Sum> partials, unsigned* const applicable, unsigned* const numbers,
                    unsigned* const before) {
  NF_SHARED(typename Op::State, states, [kThreads * kValues]);
  apply.prologue();
  const auto tiles = static_cast<unsigned>(plan.tiles), end = tiles * static_cast<unsigned>(plan.splits);
  unsigned last = end;  // the number that the block took last; end: none
  for (unsigned number; (number = next_number(numbers, end)) < end; last = number) {
    const BlockPlace place{number % tiles, static_cast<int>(number / tiles)};
    const ChannelRange range = start_tile(finish, plan, 0, place.tile);
    if (last == end) {
      auto stage = stage_for<Apply, kValues>(apply, plan.staged);
      copy_tile<Apply, kValues>(apply, plan, 0, place.tile, place.split, stage);
      stage.end();
      reduce_tile<kValues>(op, plan, 0, place.tile, place.split, range, stage, states, partials);
    } else {
      NoStage memory;
      reduce_tile<kValues>(op, plan, 0, place.tile, place.split, range, memory, states, partials);
    }
    if (threadIdx.x == 0) before[number] = last;
    if (arrive<Op>(partials, range, place)) finish_and_release(op, finish, partials, range, applicable + place.tile);
  }
  if (last == end) return;
  const auto apply_last = [&](const auto& stage) {
    wait_for(applicable + last % tiles);
    apply_tile<Apply, kValues>(apply, plan, 0, last % tiles, last / tiles, stage, true);
  };
  for (unsigned next; (next = before[last]) != end; last = next) apply_last(NoStage{});
  apply_last(stage_for<Apply, kValues>(apply, plan.staged));
}

// --- host

// Values per vector of a reduction whose launch applies an Apply, or a NoApply.
template <class Op, class Apply>
constexpr int reduced_values() {
  if constexpr (std::is_same_v<Apply, NoApply>)
    return values_per_access(sizeof(typename Op::T));
  else
    return values_per_access(planned_itemsize<Apply>());
}

// Starts a persistent launch. `counters`: a flag for each tile and the counter of splits, which are zero; `before`: see
// persist_columns().
template <class Op, class Finish, class Apply>
cudaError_t reduce_persistent(const Op& op, const Finish& finish, const Apply& apply, const ColumnsPlan& plan,
                              const Partials<typename Op::Sum>& partials, unsigned* counters, unsigned* before,
                              cudaStream_t stream) {
  constexpr int kValues = reduced_values<Op, Apply>();
  if (plan.values != kValues) return cudaErrorInvalidValue;
  return launch(LaunchConfig{dim3(extent(plan.blocks)), dim3(kThreads), stream, false, plan.staged.bytes},
                persist_columns<Op, Finish, Apply, kValues>, op, finish, apply, plan, partials, counters,
                counters + plan.tiles, before);
}

// Starts a pipelined launch. `counters`: a flag for each tile and the counter of steps, which are zero.
template <class Op, class Finish, class Apply>
cudaError_t reduce_pipelined(const Op& op, const Finish& finish, const Apply& apply, const RowsPlan& plan,
                             const Partials<typename Op::Sum>& partials, unsigned* counters, cudaStream_t stream) {
  constexpr int kValues = reduced_values<Op, Apply>();
  if (plan.values != kValues) return cudaErrorInvalidValue;
  const int64_t blocks = plan.blocks < plan.steps() ? plan.blocks : plan.steps();
  return launch(LaunchConfig{dim3(extent(blocks)), dim3(kThreads), stream}, pipeline_rows<Op, Finish, Apply, kValues>,
                op, finish, apply, plan, partials, counters, counters + plan.tiles);
}

// Starts the kernel that the plan chooses. With an Apply the plan must be single, for the inputs of the Apply.
template <class Op, class Finish, class Apply>
cudaError_t reduce(const Op& op, const Finish& finish, const Apply& apply, const ReductionPlan& plan,
                   const Partials<typename Op::Sum>& partials, cudaStream_t stream) {
  static_assert(check_reduce_op<Op, Finish>());
  constexpr bool kApplies = !std::is_same_v<Apply, NoApply>;
  if constexpr (kApplies) {
    static_assert(check_apply_op<Apply>());
    static_assert(int64_t{sizeof(typename Op::State)} * kThreads <= column_state_bytes(1, sizeof(typename Op::S)));
  }
  constexpr int kValues = reduced_values<Op, Apply>();
  if (plan.values() != kValues && (kApplies || plan.values() != 1)) return cudaErrorInvalidValue;
  const dim3 grid =
      kApplies ? dim3(extent(plan.tiles() * plan.splits())) : dim3(extent(plan.tiles()), extent(plan.splits()));
  const LaunchConfig config =
      kApplies ? LaunchConfig{grid, dim3(kThreads), stream, false, plan.staged().bytes, plan.splits()}
               : LaunchConfig{grid, dim3(kThreads), stream};
  const auto start = [&](auto kernel, const auto& details) {
    return launch(config, kernel, op, finish, apply, details, partials);
  };
  if constexpr (!kApplies) {  // a plan of single values is not single
    if (!plan.by_rows && plan.columns.values == 1) return start(reduce_columns<Op, Finish, Apply, 1>, plan.columns);
    if (plan.by_rows && plan.rows.values == 1) return start(reduce_rows<Op, Finish, Apply, 1, false>, plan.rows);
  }
  if constexpr (!kApplies || declares_states(kValues, sizeof(typename Op::S)))
    if (!plan.by_rows) return start(reduce_columns<Op, Finish, Apply, kValues>, plan.columns);
  return plan.rows.masked ? start(reduce_rows<Op, Finish, Apply, kValues, true>, plan.rows)
                          : start(reduce_rows<Op, Finish, Apply, kValues, false>, plan.rows);
}

}  // namespace normfused::cuda
