// Layer norm and RMS norm: normalization of each position by statistics over its channels.
//
// With d = (x - mean) * invstd, the output is d * weight + bias. k = grad_output * weight is the gradient of d.
//
// If the channels of a position are contiguous, a position is a row in memory and a channel a column; otherwise the
// rows are the channels of a sample. The moments of long rows and of columns come from the engine. All other passes are
// sweeps over blocks of rows.
//
// The results of a position depend on its values only, except for the gradients of weight and bias, which are sums over
// positions: of each chunk of positions, and then over the chunks, in order.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/layer_norm_ops.inl"

namespace normfused::cpu::NF_ISA {
namespace {

// ---- a position is a row -----------------------------------------------------------------------------------------

// The ops and constants of one call of forward.
template <class T>
struct LayerForward {
  using S = compute_t<T>;

  const LayerNormForward& args;
  const T* input;  // that is normalized
  LayerParameters<S> parameters;
  LayerNormalizeOp<T> normalize;
  bool nontemporal;

  // `row` is the length of a row in memory.
  LayerForward(const LayerNormForward& args, void* table, int64_t row, const Parallel& parallel, int64_t ahead = 0)
      : args(args),
        input(static_cast<const T*>(args.residual == nullptr ? args.input : args.sum)),
        parameters{static_cast<S*>(table), LayerParameters<S>::stride_of(args.view.channels)},
        normalize{{}, input, static_cast<T*>(args.output), ahead},
        nontemporal(rows_are_nontemporal<T>(args.output, args.view.numel(), row)) {
    parameters.fill(args.weight, args.bias, args.samples, args.view.channels, parallel);
  }

  // Normalizes the columns of `block` that start at `column`, of rows that start at `row`.
  void normalize_rows(const Block& block, int64_t row, int64_t column, const Entries<S>& table) const {
    for_each_sample(row, row + block.rows, args.view.outer / args.samples, [&](int64_t sample, int64_t r0, int64_t r1) {
      sweep_outputs<true>(normalize,
                          Block{block.offset + (r0 - row) * block.stride, r1 - r0, block.columns, block.stride},
                          {table.from(r0 - row), parameters.of(sample).from(column)}, nontemporal);
    });
  }
};

// Mean and M2 of each row of a block. The pivot is the mean of the first values. The sums of RMS norm need none.
template <class T>
void moments_of_rows(const LayerForward<T>& call, const Block& block, const Entries<compute_t<T>>& table,
                     const Entries<double>& moments) {
  using S = compute_t<T>;
  const T* const input = call.input;
  const Entries<S> none = call.parameters.of(0);
  const auto clear = [&] {
    for (int64_t k = 0; k < 2; ++k) std::fill_n(&moments(k, 0), block.rows, 0.0);
  };
  const auto pivot = [&](int64_t row) -> S& { return table(LayerTable::kPivot, row); };
  for (int64_t row = 0; row < block.rows; ++row)
    pivot(row) = call.args.subtract_mean ? load<S>(input + block.offset + row * block.stride, Tail{1})[0] : S(0);
  if (call.args.subtract_mean) {
    const int64_t sample = minimum(kPivotSample, block.columns);
    clear();
    sum_rows(LayerMomentsOp<T, false>{{}, input}, {block.offset, block.rows, sample, block.stride},
             {table, none, moments});
    for (int64_t row = 0; row < block.rows; ++row)
      pivot(row) = static_cast<S>(static_cast<double>(pivot(row)) + moments(0, row) / static_cast<double>(sample));
  }
  clear();
  sum_rows(LayerMomentsOp<T, true>{{}, input}, block, {table, none, moments});
  NF_NO_ALIASES
  for (int64_t row = 0; row < block.rows; ++row) {
    const Moments of_row =
        moments_about(static_cast<double>(pivot(row)), block.columns, moments(0, row), moments(1, row));
    moments(0, row) = of_row.mean;
    moments(1, row) = of_row.m2;
  }
  recompute_moments(MomentsOp<T, false>{input + block.offset, call.args.eps}, {1, block.rows, block.columns},
                    {moments.data, moments.stride}, 0, block.rows);
}

template <class T>
void layer_norm_rows(const LayerNormForward& args, const GroupPlan& plan, const Parallel& parallel) {
  using S = compute_t<T>;
  const int64_t rows = args.view.outer, columns = args.view.channels;
  const Workspace workspace(0, LayerParameters<S>::bytes(args.samples, columns));
  const LayerForward<T> call(args, workspace.table, columns, parallel,
                             (plan.statistics - kSweepRows<LayerNormalizeOp<T>, true>)*columns);
  parallel((rows + plan.statistics - 1) / plan.statistics, grain(plan), [&](int64_t task) {
    const int64_t first = task * plan.statistics, n = minimum(plan.statistics, rows - first);
    const Block block{first * columns, n, columns, columns};
    S constants[LayerTable::kForwardRows * kMaxChannelsFirst];
    double values[2 * kMaxChannelsFirst];
    const Entries<S> table{constants, kMaxChannelsFirst};
    const Entries<double> moments{values, kMaxChannelsFirst};
    add_residual<T>(args, block);
    moments_of_rows(call, block, table, moments);
    finish_layers(args, first, n, moments, table);
    call.normalize_rows(block, first, 0, table);
  });
}

// Rows that do not fit the cache, in parts, with moments from the engine.
template <class T>
void layer_norm_long_rows(const LayerNormForward& args, const GroupPlan& plan, const Parallel& parallel) {
  using S = compute_t<T>;
  using Reduce = MomentsOp<T, false>;
  const int64_t rows = args.view.outer, columns = args.view.channels;
  const ChannelView by_row{1, rows, columns};
  const GroupView groups{1, rows, rows, columns, false};
  const GroupUnits units{groups, plan};
  const Workspace workspace(plan.splits * Reduce::kSums * rows,
                            LayerParameters<S>::bytes(args.samples, columns) +
                                LayerTable::kForwardRows * rows * static_cast<int64_t>(sizeof(S)));
  const LayerForward<T> call(args, workspace.table, columns, parallel);
  const ResultTable results{workspace.results, rows};
  const Entries<S> table{call.parameters.of(args.samples).data, rows};
  const Reduce moments{call.input, args.eps};
  const auto block_of = [&](const Unit& unit) {
    return Block{unit.c0 * columns + unit.m0, unit.c1 - unit.c0, unit.m1 - unit.m0, columns};
  };
  run_phases(
      plan, units.tasks(), parallel,
      [&](int64_t row, int64_t part) {
        const Unit unit = units(row, part);
        add_residual<T>(args, block_of(unit));
        reduce(moments, by_row, unit, {&results(part * Reduce::kSums, 0), rows});
      },
      [&](int64_t row) {
        merge_ranges(moments, columns, plan, results, row, row + 1);
        recompute_moments(moments, by_row, results, row, row + 1);
        finish_layers(args, row, 1, {&results(0, row), rows}, table.from(row));
      },
      [&](int64_t row, int64_t part) {
        const Unit unit = units(row, part);
        call.normalize_rows(block_of(unit), row, unit.m0, table.from(row));
      });
}

// The ops and constants of one call of backward.
template <class T>
struct LayerBackward {
  using S = compute_t<T>;
  using Sums = LayerGradSumsOp<T>;
  using Gradient = LayerGradInputOp<T>;
  using V = typename Gradient::V;

  const LayerNormBackward& args;
  LayerParameters<S> parameters;
  Sums sums;
  Gradient gradient;
  bool nontemporal;

  // `row` is the length of a row in memory.
  LayerBackward(const LayerNormBackward& args, void* table, int64_t row, const Parallel& parallel, int64_t ahead = 0)
      : args(args),
        parameters{static_cast<S*>(table), LayerParameters<S>::stride_of(args.view.channels)},
        sums{{}, static_cast<const T*>(args.grad_output), static_cast<const T*>(args.input)},
        gradient{
            {},   sums.grad_output, sums.input, static_cast<const T*>(args.grad_sum), static_cast<T*>(args.grad_input),
            ahead},
        nontemporal(rows_are_nontemporal<T>(args.grad_input, args.view.numel(), row)) {
    parameters.fill(args.weight, {}, args.samples, args.view.channels, parallel);
  }
};

// Rows [r0, r1) of a sample, a few at a time, which stay in cache between the two passes.
template <class T>
void layer_norm_backward_rows(const LayerBackward<T>& call, int64_t sample, int64_t r0, int64_t r1,
                              ColumnSums<typename LayerBackward<T>::V, 2> of_chunk) {
  using S = compute_t<T>;
  const LayerNormBackward& args = call.args;
  const int64_t columns = args.view.channels;
  const int64_t most = plan_layer_rows(columns, 2 * sizeof(T)).statistics;
  S constants[LayerTable::kRows * kMaxChannelsFirst];
  const Entries<S> table{constants, kMaxChannelsFirst}, parameter = call.parameters.of(sample);
  for (int64_t r = r0; r < r1; r += most) {
    const int64_t n = minimum(most, r1 - r);
    const Block block{r * columns, n, columns, columns};
    double row_sums[2 * kMaxChannelsFirst] = {};
    begin_layers(args.mean + r, args.invstd + r, n, table);
    sum_rows(call.sums, block, {table, parameter, {row_sums, kMaxChannelsFirst}});
    finish_layers_backward(args, r, n, {row_sums, kMaxChannelsFirst}, table);
    sweep_outputs<true>(call.gradient, block, {table, parameter, {}, of_chunk.partial}, call.nontemporal);
    of_chunk.add_rows(n);
  }
  of_chunk.fold();
}

// Minimum number of rows of a chunk: writing and reading its sums moves as many bytes as three rows of float.
inline constexpr int64_t kLeastChunkRows = 16;

template <class T>
void layer_norm_backward_chunks_of_rows(const LayerNormBackward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  using V = typename LayerBackward<T>::V;
  const int64_t columns = args.view.channels, rows = args.view.outer / args.samples;
  const ChunkPlan plan = plan_chunks(rows, columns * 2 * static_cast<int64_t>(sizeof(T)), kLeastChunkRows);
  const int64_t stride = LayerParameters<S>::stride_of(columns), tasks = args.samples * plan.chunks;
  const Workspace workspace(2 * stride * tasks, LayerParameters<S>::bytes(args.samples + tasks, columns));
  const int64_t together = plan_layer_rows(columns, 2 * sizeof(T)).statistics;
  const LayerBackward<T> call(args, workspace.table, columns, parallel,
                              (together - kSweepRows<LayerGradInputOp<T>, true>)*columns);
  parallel(tasks, 1, [&](int64_t task) {
    const int64_t sample = task / plan.chunks, first = sample * rows;
    const int64_t r0 = first + task % plan.chunks * plan.block;
    ColumnSums<V, 2> sums{
        call.parameters.of(args.samples + task), {workspace.results + 2 * stride * task, stride}, columns};
    sums.clear();
    layer_norm_backward_rows(call, sample, r0, minimum(r0 + plan.block, first + rows), sums);
  });
  write_layer_gradients(args, workspace.results, stride, plan.chunks, parallel);
}

// Long rows: first the sums of all rows, in parts, then all columns of a block of columns.
template <class T>
void layer_norm_backward_long_rows(const LayerNormBackward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  using V = typename LayerBackward<T>::V;
  const int64_t columns = args.view.channels, all = args.view.outer, rows = all / args.samples;
  const GroupPlan plan = plan_rows(1, columns, 2 * sizeof(T));
  const int64_t stride = LayerParameters<S>::stride_of(columns);
  const Workspace workspace(
      2 * (plan.splits * all + args.samples * stride),
      LayerParameters<S>::bytes(args.samples, columns) + LayerTable::kRows * all * static_cast<int64_t>(sizeof(S)));
  const LayerBackward<T> call(args, workspace.table, columns, parallel);
  const Entries<S> table{call.parameters.of(args.samples).data, all};
  const Entries<double> sums{workspace.results, all};
  double* const totals = workspace.results + 2 * plan.splits * all;
  begin_layers(args.mean, args.invstd, all, table);
  parallel(all * plan.splits, 1, [&](int64_t task) {
    const int64_t row = task / plan.splits, split = task % plan.splits, c0 = split * plan.position_block;
    const Entries<double> of_part{&sums(2 * split, row), all};
    of_part(0, 0) = of_part(1, 0) = 0;
    sum_rows(call.sums, Block{row * columns + c0, 1, minimum(plan.position_block, columns - c0), columns},
             {table.from(row), call.parameters.of(row / rows).from(c0), of_part});
  });
  for (int64_t split = 1; split < plan.splits; ++split)
    for (int64_t i = 0; i < 2 * all; ++i) sums(0, i) += sums(2 * split, i);
  finish_layers_backward(args, 0, all, sums, table);
  const int64_t blocks = (columns + kMaxLanes - 1) / kMaxLanes;
  parallel(args.samples * blocks, 1, [&](int64_t task) {
    const int64_t sample = task / blocks, c0 = task % blocks * kMaxLanes, n = minimum(kMaxLanes, columns - c0);
    alignas(64) S partial[2 * kMaxLanes];
    alignas(64) double total[2 * kMaxLanes];
    ColumnSums<V, 2> of_block{{partial, kMaxLanes}, {total, kMaxLanes}, n};
    of_block.clear();
    for (int64_t r = 0; r < rows; r += kMaxSweepRows) {
      const int64_t row = sample * rows + r;
      sweep_outputs<true>(call.gradient, Block{row * columns + c0, minimum(kMaxSweepRows, rows - r), n, columns},
                          {table.from(row), call.parameters.of(sample).from(c0), {}, of_block.partial},
                          call.nontemporal);
      of_block.fold();
    }
    for (int64_t k = 0; k < 2; ++k) std::copy_n(total + k * kMaxLanes, n, totals + (2 * sample + k) * stride + c0);
  });
  write_layer_gradients(args, totals, stride, 1, parallel);
}

// ---- a position is a column --------------------------------------------------------------------------------------

// The blocks of columns of all outer indices.
struct ColumnBlocks {
  const ChannelView& view;
  int64_t width, count;  // columns of a block, blocks of an outer index

  ColumnBlocks(const ChannelView& view, int64_t item_bytes)
      : view(view),
        width(layer_column_block(view.channels, view.inner, item_bytes)),
        count((view.inner + width - 1) / width) {}
  // All channels of the block's positions.
  Block operator()(int64_t index) const {
    const int64_t first = index % count * width;
    return {index / count * view.channels * view.inner + first, view.channels, minimum(width, view.inner - first),
            view.inner};
  }
  // Its first position, which is the index of its first statistic.
  int64_t position(int64_t index) const { return index / count * view.inner + index % count * width; }
};

// A table on the stack with a column for each position of a block. The sweep reads a pack past the last one.
template <class S, int64_t kRows>
struct BlockTable {
  alignas(64) S data[kRows * kMaxLanes];

  Entries<S> entries() { return {data, kMaxLanes}; }
  explicit BlockTable(int64_t columns) {
    const int64_t end = minimum(kMaxLanes, columns + 2 * kLanes<S>);  // a pack has at most two vectors
    for (int64_t k = 0; k < kRows; ++k) std::fill(data + k * kMaxLanes + columns, data + k * kMaxLanes + end, S(0));
  }
};

template <class T>
void layer_norm_columns(const LayerNormForward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  const ChannelView& view = args.view;
  const ColumnBlocks blocks(view, sizeof(T));
  const Workspace workspace(0, LayerParameters<S>::bytes(args.samples, view.channels));
  const LayerForward<T> call(args, workspace.table, view.inner, parallel);
  parallel(view.outer * blocks.count, 1, [&](int64_t index) {
    const Block block = blocks(index);
    add_residual<T>(args, block);
    double values[2 * kMaxLanes];
    const ResultTable results{values, kMaxLanes};
    const MomentsOp<T, false> moments{call.input + block.offset, args.eps};
    const ChannelView by_column{view.channels, view.inner, 1};
    reduce(moments, by_column, {0, block.columns, 0, view.channels}, results);
    recompute_moments(moments, by_column, results, 0, block.columns);
    BlockTable<S, LayerTable::kForwardRows> table(block.columns);
    finish_layers(args, blocks.position(index), block.columns, {values, kMaxLanes}, table.entries());
    const int64_t sample = index / blocks.count / (view.outer / args.samples);
    sweep_outputs<false>(call.normalize, block, {table.entries(), call.parameters.of(sample)}, call.nontemporal);
  });
}

// One block of columns. `of_rows` are the sums of the chunk that the block belongs to: one row per channel.
template <class T>
void layer_norm_backward_columns(const LayerBackward<T>& call, int64_t sample, const Block& block, int64_t position,
                                 const Entries<double>& of_rows) {
  using S = compute_t<T>;
  using V = typename LayerBackward<T>::V;
  const LayerNormBackward& args = call.args;
  const Entries<S> parameter = call.parameters.of(sample);
  BlockTable<S, LayerTable::kRows> constants(block.columns);
  const Entries<S> table = constants.entries();
  begin_layers(args.mean + position, args.invstd + position, block.columns, table);
  alignas(64) S partial[2 * kMaxLanes];
  alignas(64) double total[2 * kMaxLanes];
  ColumnSums<V, 2> sums{{partial, kMaxLanes}, {total, kMaxLanes}, block.columns};
  sums.clear();
  for (int64_t c = 0; c < block.rows; c += kMaxSweepRows) {
    sweep<false, false>(
        call.sums,
        Block{block.offset + c * block.stride, minimum(kMaxSweepRows, block.rows - c), block.columns, block.stride},
        {table, parameter.from(c), {}, sums.partial});
    sums.fold();
  }
  finish_layers_backward(args, position, block.columns, sums.total, table);
  constexpr int64_t kStep = kMaxSweepColumns<V>;
  for (int64_t i = 0; i < block.columns; i += kStep)
    sweep_outputs<false>(call.gradient,
                         Block{block.offset + i, block.rows, minimum(kStep, block.columns - i), block.stride},
                         {table.from(i), parameter, of_rows}, call.nontemporal);
}

template <class T>
void layer_norm_backward_chunks_of_columns(const LayerNormBackward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  const ChannelView& view = args.view;
  const ColumnBlocks blocks(view, 2 * sizeof(T));
  const int64_t of_sample = view.outer / args.samples * blocks.count;
  const ChunkPlan plan = plan_chunks(of_sample, view.channels * blocks.width * 2 * static_cast<int64_t>(sizeof(T)), 1);
  const int64_t stride = LayerParameters<S>::stride_of(view.channels), tasks = args.samples * plan.chunks;
  const Workspace workspace(2 * stride * tasks, LayerParameters<S>::bytes(args.samples, view.channels));
  const LayerBackward<T> call(args, workspace.table, view.inner, parallel);
  parallel(tasks, 1, [&](int64_t task) {
    const int64_t sample = task / plan.chunks, first = task % plan.chunks * plan.block;
    double* const sums = workspace.results + 2 * stride * task;
    std::fill_n(sums, 2 * stride, 0.0);
    for (int64_t i = first; i < minimum(first + plan.block, of_sample); ++i) {
      const int64_t index = sample * of_sample + i;
      layer_norm_backward_columns(call, sample, blocks(index), blocks.position(index), {sums, stride});
    }
  });
  write_layer_gradients(args, workspace.results, stride, plan.chunks, parallel);
}

// ---- kernels -----------------------------------------------------------------------------------------------------

template <class T>
void layer_norm(const LayerNormForward& args, const Parallel& parallel) {
  if (args.view.inner > 1) return layer_norm_columns<T>(args, parallel);
  const GroupPlan plan = plan_layer_rows(args.view.channels, sizeof(T));
  if (plan.parts() == 1)
    layer_norm_rows<T>(args, plan, parallel);
  else
    layer_norm_long_rows<T>(args, plan, parallel);
}

template <class T>
void layer_norm_backward(const LayerNormBackward& args, const Parallel& parallel) {
  if (args.view.inner > 1)
    layer_norm_backward_chunks_of_columns<T>(args, parallel);
  else if (divides_layer_rows(args.view.channels, 2 * sizeof(T)))
    layer_norm_backward_long_rows<T>(args, parallel);
  else
    layer_norm_backward_chunks_of_rows<T>(args, parallel);
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
