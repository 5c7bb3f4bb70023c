// Application: values written for each value read, by coefficients of its channel. An Op has
//
//   S, T, Output, kInputs, kOutputs, kCoefficients, kWritesBits
//   kRequired                         how many of the inputs are always there; others may be null, and then read as 0
//   input(k), output(k), table        the tensors, and the coefficients; outputs but the first may be null
//   operator()(x, y, choose, offset, mask)
//                                     the outputs y of vectors x, by coefficients choose(i) of value i; `mask` tells
//                                     which values lie in the tensor
//   prologue()                          what the launch does besides
//   kPrepares, prepare(channel, first, k)
//                                     whether blocks compute the coefficients k of their channels themselves; `first`:
//                                     no other block is told so of the channel
//
// Coefficients lie in a table, (kCoefficients, channels), or, where blocks prepare them, in shared memory.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/divider.h"
#include "kernels/cuda/walk.cuh"

namespace normfused::cuda {

struct Nothing {};

template <class Op>
struct Coefficients {
  typename Op::S k[Op::kCoefficients];
};

// Where they lie: those of entry i at data[i], data[stride + i], …
template <class Op>
struct Table {
  const typename Op::S* data;
  int64_t stride;

  // Plain loads: in the single launch the same block has just written them.
  NF_DEVICE Coefficients<Op> operator[](int64_t i) const {
    Coefficients<Op> coefficients;
#pragma unroll
    for (int k = 0; k < Op::kCoefficients; ++k) coefficients.k[k] = data[k * stride + i];
    return coefficients;
  }
};

// The table of a block. Its entries are channels, or, prepared by the block, those that come by in order: entry i of
// `count`, a thread each, is the channel channel_of(i), which begins here if begins_here(i).
template <class Op, class ChannelOf, class BeginsHere>
NF_DEVICE Table<Op> table_of(const Op& op, int64_t channels, int count, const ChannelOf& channel_of,
                             const BeginsHere& begins_here) {
  if constexpr (Op::kPrepares) {
    using S = typename Op::S;
    NF_SHARED(S, prepared, [Op::kCoefficients * kThreads]);
    const int i = threadIdx.x;
    if (i < count) {
      S coefficients[Op::kCoefficients];
      op.prepare(channel_of(i), begins_here(i), coefficients);
#pragma unroll
      for (int k = 0; k < Op::kCoefficients; ++k) prepared[k * kThreads + i] = coefficients[k];
    }
    __syncthreads();
    return {prepared, kThreads};
  } else {
    return {op.table, channels};
  }
}

template <class Op, int kValues>
using Inputs = Vector<typename Op::T, kValues>[Op::kInputs];

// Vectors of all inputs at an offset, of which all values lie within the tensor.
template <class Op, int kValues>
NF_DEVICE void load_inputs(const Op& op, int64_t offset, Inputs<Op, kValues>& inputs) {
  using V = Vector<typename Op::T, kValues>;
#pragma unroll
  for (int k = 0; k < Op::kInputs; ++k)
    inputs[k] = k < Op::kRequired || op.input(k) != nullptr ? V::load_last(op.input(k) + offset) : V{};
}

// The same where the tensor may end inside them.
template <class Op, int kValues>
NF_DEVICE void load_inputs(const Op& op, int64_t offset, Inputs<Op, kValues>& inputs, int64_t numel) {
  using V = Vector<typename Op::T, kValues>;
#pragma unroll
  for (int k = 0; k < Op::kInputs; ++k)
    inputs[k] = k < Op::kRequired || op.input(k) != nullptr
                    ? load_masked<true, typename Op::T, kValues>(op.input(k), offset, numel)
                    : V{};
}

// Writes the masked values of vectors at an offset, of which value i goes by choose(i).
template <class Op, int kValues, class Choose>
NF_DEVICE void apply_vector(const Op& op, const Inputs<Op, kValues>& inputs, const Choose& choose, int64_t offset,
                            uint32_t mask, bool streaming) {
  using S = typename Op::S;
  S x[Op::kInputs][kValues], y[Op::kOutputs][kValues];
#pragma unroll
  for (int k = 0; k < Op::kInputs; ++k)
#pragma unroll
    for (int i = 0; i < kValues; ++i) x[k][i] = widen<S>(inputs[k].value[i]);
  op(x, y, choose, offset, mask);
#pragma unroll
  for (int k = 0; k < Op::kOutputs; ++k) {
    if (k > 0 && op.output(k) == nullptr) continue;
    Vector<typename Op::Output, kValues> output;
#pragma unroll
    for (int i = 0; i < kValues; ++i) output.value[i] = narrow<typename Op::Output>(y[k][i]);
    store_masked(op.output(k), offset, output, mask, streaming);
  }
}

// Vectors of each input in flight together: as many as keep all inputs within so many accesses, but one at least.
template <class Op, int kValues>
constexpr int vectors_within(int accesses) {
  const int each = Op::kInputs * Vector<typename Op::T, kValues>::kAccesses;
  return accesses > each ? accesses / each : 1;
}

// All of one channel, channels first, by plan.lanes threads.
template <class Op, int kValues, bool kMasked>
NF_DEVICE void apply_row(const Op& op, const RowsPlan& plan, int64_t channel, int lane) {
  RowIterator<kValues, kMasked> walk(plan, channel, 0, lane);
  const Coefficients<Op> coefficients = Table<Op>{op.table, plan.view.channels}[channel];
  while (walk.has(1)) {
    uint32_t mask;
    const int64_t offset = walk.next(mask);
    if (mask == 0) continue;
    Inputs<Op, kValues> inputs;
    load_inputs<Op, kValues>(op, offset, inputs, plan.view.numel());
    apply_vector<Op, kValues>(op, inputs, [&](int) { return coefficients; }, offset, mask, false);
  }
}

// Those of a thread's channels, of which the table has entries from `first` on. Where they are neighbours, a row of the
// table gives them by few accesses.
template <class Op, int kValues>
NF_DEVICE void load_coefficients(const Table<Op>& table, int64_t first, const ColumnsPlan& plan,
                                 const ColumnIterator<kValues>& walk, Coefficients<Op> (&coefficients)[kValues]) {
  using Row = Vector<typename Op::S, kValues>;
  if (!Op::kPrepares && sizeof(Row) <= 32 && plan.plain()) {  // doubles would be more than there are registers for
#pragma unroll
    for (int k = 0; k < Op::kCoefficients; ++k) {
      const Row row = Row::load(table.data + k * table.stride + walk.column);
#pragma unroll
      for (int i = 0; i < kValues; ++i) coefficients[i].k[k] = row.value[i];
    }
    return;
  }
  int64_t channels[kValues];
  walk.channels(channels);
#pragma unroll
  for (int i = 0; i < kValues; ++i) coefficients[i] = table[channels[i] - first];
}

// A tile's columns in one chunk of rows. A thread keeps its channels' coefficients.
template <class Op, int kValues>
NF_DEVICE void apply_tile(const Op& op, const ColumnsPlan& plan, int64_t tile, int64_t chunk, bool streaming) {
  constexpr int kRows = vectors_within<Op, kValues>(4);
  ColumnIterator<kValues> walk(plan, tile, chunk);
  const int64_t numel = plan.view.numel();
  const int64_t first = Op::kPrepares ? plan.first_channel(tile) : 0;
  const auto table = table_of(
      op, plan.view.channels, Op::kPrepares ? plan.channels_met(tile) : 0, [&](int i) { return first + i; },
      [&](int i) { return chunk == 0 && plan.begins_in(first + i, tile); });
  if (!walk.has(1)) return;
  Coefficients<Op> coefficients[kValues];
  load_coefficients(table, first, plan, walk, coefficients);
  const auto choose = [&](int i) -> const Coefficients<Op>& { return coefficients[i]; };

  int64_t end = numel;  // offset of the tensor's last vector, where it is short and this thread's
  const auto round = [&](auto full) {
    constexpr bool kFull = decltype(full)::value;
    Inputs<Op, kValues> inputs[kRows];
    int64_t offsets[kRows];
    bool there[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool in_split = kFull || walk.has(1);
      offsets[r] = walk.next();
      there[r] = kFull || (in_split && offsets[r] + kValues <= numel);
      if (!kFull && in_split && !there[r] && offsets[r] < numel) end = offsets[r];
      if (there[r]) load_inputs<Op, kValues>(op, offsets[r], inputs[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (there[r]) apply_vector<Op, kValues>(op, inputs[r], choose, offsets[r], kWhole<kValues>, streaming);
  };
  while (walk.has(kRows) && (plan.repeat == 1 || walk.ahead(kRows - 1) + kValues <= numel)) round(std::true_type{});
  if constexpr (kRows > 1) {
    if (walk.has(1)) round(std::false_type{});
  } else if (walk.has(1)) {  // none is left but the last row of all, where it is short
    end = walk.next();
  }
  if (end < numel) {
    Inputs<Op, kValues> inputs;
    load_inputs<Op, kValues>(op, end, inputs, numel);
    apply_vector<Op, kValues>(op, inputs, choose, end, first_values<kValues>(numel - end), streaming);
  }
}

template <class Op, int kValues>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    apply_columns(const Op op, const ColumnsPlan plan, const bool streaming) {
  wait_for_previous_launch();
  op.prologue();
  const unsigned block = gridDim.x - 1 - blockIdx.x;  // against the order of memory
  const auto tiles = static_cast<unsigned>(plan.tiles);
  apply_tile<Op, kValues>(op, plan, block % tiles, block / tiles, streaming);
}

// To which channels the values of a flat tensor belong.
class FlatRows {
 public:
  static constexpr int64_t kRun = int64_t{kThreads} * kFlatVectors * kMaxValues;  // that a block has at most

  explicit FlatRows(const ChannelView& view)
      : inner_(view.inner), channels_(view.channels), by_inner_(inner_), by_channels_(channels_) {}

  // Of the first value of a block: its place in its row, and its channel.
  struct Start {
    int64_t at, channel;
  };
  NF_DEVICE Start start(int64_t offset) const {
    const int64_t row = by_inner_.far(offset);
    return {offset - row * inner_, row - by_channels_.far(row) * channels_};
  }

  // Of another value of that block: its row, as counted from there, and how many values of it are left.
  struct Place {
    int64_t row, left;
  };
  NF_DEVICE Place place(const Start& start, int skip) const {
    const int64_t at = start.at + skip, row = by_inner_.near(at);
    return {row, (row + 1) * inner_ - at};
  }
  // The channel of such a row.
  NF_DEVICE int64_t channel(const Start& start, int64_t row) const {
    const int64_t from = start.channel + row;
    return from - by_channels_.near(from) * channels_;
  }

 private:
  // i / n of any i, and, for less, of i < n + kRun.
  struct Extent {
    explicit Extent(int64_t extent)
        : n(extent), of_any(static_cast<uint64_t>(n)), of_few(static_cast<uint32_t>(n < kRun ? n : kRun)) {}
    NF_DEVICE int64_t far(int64_t i) const { return static_cast<int64_t>(of_any(static_cast<uint64_t>(i))); }
    NF_DEVICE int64_t near(int64_t i) const { return n >= kRun ? i >= n : of_few(static_cast<uint32_t>(i)); }
    int64_t n;
    Divider<uint64_t> of_any;
    Divider<uint32_t> of_few;
  };
  int64_t inner_, channels_;
  Extent by_inner_, by_channels_;
};

template <class Op>
struct FlatBlock {
  FlatRows::Start start;
  Table<Op> table;
};

// Some of a thread's vectors in a block of the flat tensor that begins at an offset: all loads come before all stores.
// `prepare` is called once the loads are on their way, and gives where the block starts, and its table.
template <class Op, int kValues, bool kAligned, int kTogether, bool kWithin, class Prepare>
NF_DEVICE void apply_flat_vectors(const Op& op, const FlatRows& rows, int64_t begin, int first, int64_t numel,
                                  bool streaming, const Prepare& prepare) {
  const auto skip_of = [&](int v) { return ((first + v) * kThreads + static_cast<int>(threadIdx.x)) * kValues; };
  Inputs<Op, kValues> inputs[kTogether];
#pragma unroll
  for (int v = 0; v < kTogether; ++v) {
    if constexpr (kWithin)
      load_inputs<Op, kValues>(op, begin + skip_of(v), inputs[v]);
    else
      load_inputs<Op, kValues>(op, begin + skip_of(v), inputs[v], numel);
  }
  const FlatBlock<Op>& block = prepare();
  const auto coefficients_of = [&](int64_t row) {
    return block.table[Op::kPrepares ? row : rows.channel(block.start, row)];
  };
  Coefficients<Op> here[kTogether], there[kTogether];  // a vector's values lie in one row, or in two
  int64_t left[kTogether];
#pragma unroll
  for (int v = 0; v < kTogether; ++v) {
    const FlatRows::Place place = rows.place(block.start, skip_of(v));
    left[v] = place.left;
    here[v] = coefficients_of(place.row);
    if constexpr (!kAligned) there[v] = coefficients_of(place.row + 1);
  }
#pragma unroll
  for (int v = 0; v < kTogether; ++v) {
    const int64_t offset = begin + skip_of(v);
    const uint32_t mask = kWithin ? kWhole<kValues> : first_values<kValues>(numel - offset);
    if (mask == 0) continue;
    const auto choose = [&](int i) {
      Coefficients<Op> chosen = here[v];
      if constexpr (!kAligned)
#pragma unroll
        for (int k = 0; k < Op::kCoefficients; ++k) chosen.k[k] = i < left[v] ? chosen.k[k] : there[v].k[k];
      return chosen;
    };
    apply_vector<Op, kValues>(op, inputs[v], choose, offset, mask, streaming);
  }
}

template <class Op, int kValues, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    apply_flat(const Op op, const FlatPlan plan, const FlatRows rows, const bool streaming) {
  constexpr int kMost = vectors_within<Op, kValues>(8);
  constexpr int kTogether = kMost < kFlatVectors ? kMost : kFlatVectors;
  static_assert(kFlatVectors % kTogether == 0);
  wait_for_previous_launch();
  op.prologue();
  const int64_t numel = plan.view.numel(), inner = plan.view.inner, channels = plan.view.channels;
  const int64_t block = gridDim.x - 1 - static_cast<int64_t>(blockIdx.x);  // against the order of memory
  constexpr int64_t kRun = int64_t{kThreads} * kFlatVectors * kValues;
  const int64_t begin = block * kRun;
  FlatBlock<Op> here;
  const auto prepare = [&] {
    here.start = rows.start(begin);
    const auto begins_here = [&](int row) {
      const int64_t from = begin - here.start.at + row * inner;
      return from >= begin && from < begin + kRun && from < channels * inner;
    };
    here.table = table_of(
        op, channels, Op::kPrepares ? plan.rows_met() : 0, [&](int row) { return rows.channel(here.start, row); },
        begins_here);
  };
  if (begin + kRun <= numel) {
    for (int v = 0; v < kFlatVectors; v += kTogether)
      apply_flat_vectors<Op, kValues, kAligned, kTogether, true>(op, rows, begin, v, numel, streaming,
                                                                 [&]() -> const FlatBlock<Op>& {
                                                                   if (v == 0) prepare();
                                                                   return here;
                                                                 });
  } else {  // the last block of all
    prepare();
    for (int v = 0; v < kFlatVectors; ++v)
      apply_flat_vectors<Op, kValues, kAligned, 1, false>(op, rows, begin, v, numel, streaming,
                                                          [&]() -> const FlatBlock<Op>& { return here; });
  }
}

// Size of the items that a launch is planned for: that of the widest operand. Who writes a mask of bits takes eight
// values, so that a thread has a byte of it for itself.
template <class Op>
constexpr int planned_itemsize() {
  if (Op::kWritesBits) return kAccessBytes / kMaxValues;
  return sizeof(typename Op::T) > sizeof(typename Op::Output) ? sizeof(typename Op::T) : sizeof(typename Op::Output);
}

// Starts the kernel that a plan asks for. `overlaps`: it may start before the launch before it has ended.
template <class Op>
cudaError_t apply(const Op& op, const ApplyPlan& plan, cudaStream_t stream, bool overlaps) {
  constexpr int kValues = values_per_access(planned_itemsize<Op>());
  const auto config = [&](int64_t blocks) {
    return LaunchConfig{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, overlaps};
  };
  if (!plan.by_rows) {
    const ColumnsPlan& columns = plan.columns;
    const auto start = [&](auto kernel) {
      return launch(config(columns.tiles * columns.chunks()), kernel, op, columns, plan.streaming);
    };
    return columns.values == 1 ? start(apply_columns<Op, 1>) : start(apply_columns<Op, kValues>);
  }
  const FlatPlan& flat = plan.flat;
  const auto start = [&](auto kernel) {
    return launch(config(flat.blocks), kernel, op, flat, FlatRows(flat.view), plan.streaming);
  };
  if (flat.values == 1) return start(apply_flat<Op, 1, true>);
  return flat.aligned ? start(apply_flat<Op, kValues, true>) : start(apply_flat<Op, kValues, false>);
}

}  // namespace normfused::cuda
