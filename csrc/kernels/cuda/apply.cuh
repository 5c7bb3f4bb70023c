// Application: computes outputs per element from the inputs and from coefficients of the element's channel.
//
// An apply Op provides
//
//   T, Output, S                      types of the inputs, of the outputs and of the arithmetic
//   kInputs, kOutputs, kCoefficients  how many of each
//   kRequiredInputs                   inputs that are always present; the others may be null and then read as 0
//   kWritesMask                       whether it writes a bit per element, so that a vector must be eight values
//   kPrepares                         whether each block computes the coefficients of its channels itself
//   input(k), output(k)               the tensors; outputs but the first may be null
//   table                             the coefficients, (kCoefficients, channels); not read if kPrepares
//   operator()(x, y, coefficients_of, offset, valid)
//                                     computes the output vectors y at an offset from the input vectors x; value i uses
//                                     coefficients_of(i), and lies in the tensor if bit i of `valid` is set
//   prologue()                        other work of the launch; every thread of an application calls it first
//   prepare(channel, is_owner, k)     if kPrepares: computes the coefficients k of a channel; is_owner is true in
//                                     exactly one thread of the launch
//
// check_apply_op() verifies the contract at compile time.
#pragma once

#include "kernels/cuda/contracts.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/divider.h"
#include "kernels/cuda/iterators.cuh"
#include "kernels/cuda/stage.cuh"

namespace normfused::cuda {

// Instead of an apply Op: the reduction applies nothing.
struct NoApply {};

// The coefficients of one channel.
template <class Op>
struct Coefficients {
  typename Op::S k[Op::kCoefficients];
};

// Coefficient k of entry i is data[k * stride + i]. Entries are channels, or what the block prepared.
template <class Op>
struct CoefficientTable {
  const typename Op::S* data;
  int64_t stride;

  // Plain loads, not through the read-only cache: in a single launch the same block has just written the table.
  NF_DEVICE Coefficients<Op> operator[](int64_t i) const {
    Coefficients<Op> coefficients;
#pragma unroll
    for (int k = 0; k < Op::kCoefficients; ++k) coefficients.k[k] = data[k * stride + i];
    return coefficients;
  }
};

// Block-wide: the table that a block reads. If Op prepares its coefficients, thread i < count computes those of
// channel_of(i) into shared memory, as entry i; is_owner(i) says whether the block owns that channel. Otherwise it is
// op.table, whose entries are channels. All threads of the block must call it; with kPrepares it ends with a barrier.
template <class Op, class ChannelOf, class IsOwner>
NF_DEVICE CoefficientTable<Op> block_table(const Op& op, int64_t channels, int count, const ChannelOf& channel_of,
                                           const IsOwner& is_owner) {
  if constexpr (Op::kPrepares) {
    using S = typename Op::S;
    NF_SHARED(S, prepared, [Op::kCoefficients * kThreads]);
    const int i = threadIdx.x;
    if (i < count) {
      S coefficients[Op::kCoefficients];
      op.prepare(channel_of(i), is_owner(i), coefficients);
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

// Loads a vector of every input at an offset. The vectors must lie wholly within the tensor.
template <class Op, int kValues>
NF_DEVICE void load_inputs(const Op& op, int64_t offset, Inputs<Op, kValues>& inputs) {
  using V = Vector<typename Op::T, kValues>;
#pragma unroll
  for (int k = 0; k < Op::kInputs; ++k)
    inputs[k] = k < Op::kRequiredInputs || op.input(k) != nullptr ? V::load_streaming(op.input(k) + offset) : V{};
}

// The same for vectors that can reach past the end of the tensor.
template <class Op, int kValues>
NF_DEVICE void load_inputs_clipped(const Op& op, int64_t offset, int64_t numel, Inputs<Op, kValues>& inputs) {
  using V = Vector<typename Op::T, kValues>;
#pragma unroll
  for (int k = 0; k < Op::kInputs; ++k)
    inputs[k] = k < Op::kRequiredInputs || op.input(k) != nullptr
                    ? load_clipped<true, typename Op::T, kValues>(op.input(k), offset, numel)
                    : V{};
}

// Applies Op to a vector of every input and stores the valid values of its outputs.
template <class Op, int kValues, class CoefficientsOf>
NF_DEVICE void apply_vector(const Op& op, const Inputs<Op, kValues>& inputs, const CoefficientsOf& coefficients_of,
                            int64_t offset, uint32_t valid, bool streaming) {
  using S = typename Op::S;
  S x[Op::kInputs][kValues], y[Op::kOutputs][kValues];
#pragma unroll
  for (int k = 0; k < Op::kInputs; ++k)
#pragma unroll
    for (int i = 0; i < kValues; ++i) x[k][i] = widen<S>(inputs[k].value[i]);
  op(x, y, coefficients_of, offset, valid);
#pragma unroll
  for (int k = 0; k < Op::kOutputs; ++k) {
    if (k > 0 && op.output(k) == nullptr) continue;
    Vector<typename Op::Output, kValues> output;
#pragma unroll
    for (int i = 0; i < kValues; ++i) output.value[i] = narrow<typename Op::Output>(y[k][i]);
    store_valid(op.output(k), offset, output, valid, streaming);
  }
}

// How many vectors of each input a thread keeps in flight: as many as fit into this number of accesses, at least one.
template <class Op, int kValues>
constexpr int vectors_within(int accesses) {
  const int per_vector = Op::kInputs * Vector<typename Op::T, kValues>::kAccesses;
  return accesses > per_vector ? accesses / per_vector : 1;
}

// --- in the launch of a reduction

// How many inputs of an Op are present. The optional ones come last.
template <class Op>
NF_DEVICE int inputs_of(const Op& op) {
  int inputs = 0;
  while (inputs < Op::kInputs && op.input(inputs) != nullptr) ++inputs;
  return inputs;
}

// Loads the staged copies of the thread's vector number v of every input.
template <class Op, int kValues>
NF_DEVICE void load_staged_inputs(const Stage<typename Op::T, kValues>& stage, int v, Inputs<Op, kValues>& inputs) {
#pragma unroll
  for (int k = 0; k < Op::kInputs; ++k) inputs[k] = stage.load(v, k);
}

// Applies Op to one split of one channel, channels first. Called by the channel's plan.lanes lanes.
template <class Op, int kValues, bool kMasked>
NF_DEVICE void apply_row(const Op& op, const RowsPlan& plan, int64_t channel, int split, int lane,
                         const Stage<typename Op::T, kValues>& stage) {
  RowIterator<kValues, kMasked> it(plan, channel, split, lane);
  const Coefficients<Op> coefficients = CoefficientTable<Op>{op.table, plan.view.statistics()}[channel];
  for (int v = 0; !it.done(); ++v) {
    uint32_t valid;
    const int64_t offset = it.next(valid);
    if (valid == 0) continue;
    Inputs<Op, kValues> inputs;
    load_staged_inputs<Op, kValues>(stage, v, inputs);
    apply_vector<Op, kValues>(op, inputs, [&](int) { return coefficients; }, offset, valid, false);
  }
}

// The same for rows that consist of whole vectors, which are read from memory. All loads of an iteration come before
// all stores.
template <class Op, int kValues>
NF_DEVICE void apply_row_in_memory(const Op& op, const RowsPlan& plan, int64_t channel, int split, int lane) {
  constexpr int kVectors = vectors_within<Op, kValues>(8);
  RowIterator<kValues, false> it(plan, channel, split, lane);
  const Coefficients<Op> coefficients = CoefficientTable<Op>{op.table, plan.view.statistics()}[channel];
  const auto apply_next = [&](auto vectors) {
    constexpr int kCount = decltype(vectors)::value;
    Inputs<Op, kValues> inputs[kCount];
    int64_t offsets[kCount];
    uint32_t valid;
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      offsets[v] = it.next(valid);
      load_inputs<Op, kValues>(op, offsets[v], inputs[v]);
    }
#pragma unroll
    for (int v = 0; v < kCount; ++v)
      apply_vector<Op, kValues>(op, inputs[v], [&](int) { return coefficients; }, offsets[v], kAllValid<kValues>, true);
  };
  while (it.has(kVectors)) apply_next(std::integral_constant<int, kVectors>{});
  while (!it.done()) apply_next(std::integral_constant<int, 1>{});
}

// --- matrices

// Loads the coefficients of a thread's columns from a table whose first entry is channel `first`. If the columns are
// consecutive channels, vector loads do.
template <class Op, int kValues>
NF_DEVICE void load_coefficients(const CoefficientTable<Op>& table, int64_t first, const ColumnsPlan& plan,
                                 const ColumnIterator<kValues>& it, Coefficients<Op> (&coefficients)[kValues]) {
  using V = Vector<typename Op::S, kValues>;
  if (!Op::kPrepares && sizeof(V) <= 32 && plan.plain()) {  // more than 32 bytes exceed the registers
#pragma unroll
    for (int k = 0; k < Op::kCoefficients; ++k) {
      const V vector = V::load(table.data + k * table.stride + it.first_channel + it.column);
#pragma unroll
      for (int i = 0; i < kValues; ++i) coefficients[i].k[k] = vector.value[i];
    }
    return;
  }
  int64_t channels[kValues];
  it.channels(channels);
#pragma unroll
  for (int i = 0; i < kValues; ++i) coefficients[i] = table[channels[i] - first];
}

// Applies Op to one iteration of rows: the next kRows, or with kFull false the remaining ones, of which the first is
// the thread's row number `index`. All loads come before all stores. Returns the offset of a vector that reaches past
// the end of the tensor and is left to the caller, or numel.
template <bool kFull, int kRows, class Op, int kValues, class Staged, class CoefficientsOf>
NF_DEVICE int64_t apply_rows(const Op& op, ColumnIterator<kValues>& it, const Staged& stage, int& index,
                             const CoefficientsOf& coefficients_of, int64_t numel, bool streaming) {
  Inputs<Op, kValues> inputs[kRows];
  int64_t offsets[kRows], clipped = numel;
  bool whole[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const bool in_split = kFull || !it.done();
    offsets[r] = it.next();
    whole[r] = kFull || (in_split && offsets[r] + kValues <= numel);
    if (!kFull && in_split && !whole[r] && offsets[r] < numel) clipped = offsets[r];
    if (!whole[r]) continue;
    if constexpr (std::is_same_v<Staged, NoStage>)
      load_inputs<Op, kValues>(op, offsets[r], inputs[r]);
    else
      load_staged_inputs<Op, kValues>(stage, index + r, inputs[r]);
  }
  index += kRows;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (whole[r]) apply_vector<Op, kValues>(op, inputs[r], coefficients_of, offsets[r], kAllValid<kValues>, streaming);
  return clipped;
}

// Block-wide: applies Op to one tile and one chunk of rows of a sample's matrix. A thread loads the coefficients of its
// columns once. `stage`: the Stage that holds the inputs, or a NoStage. All threads of the block must call it.
template <class Op, int kValues, class Staged>
NF_DEVICE void apply_tile(const Op& op, const ColumnsPlan& plan, int64_t sample, int64_t tile, int64_t chunk,
                          const Staged& stage, bool streaming) {
  constexpr int kRows = vectors_within<Op, kValues>(4);
  ColumnIterator<kValues> it(plan, sample, tile, chunk);
  const int64_t numel = plan.view.numel();
  const int64_t first = Op::kPrepares ? it.first_channel + plan.first_channel(tile) : 0;
  const auto table = block_table(
      op, plan.view.statistics(), Op::kPrepares ? plan.channels_met(tile) : 0, [&](int i) { return first + i; },
      [&](int i) { return chunk == 0 && plan.begins_in(first - it.first_channel + i, tile); });
  if (it.done()) return;
  Coefficients<Op> coefficients[kValues];
  load_coefficients(table, first, plan, it, coefficients);
  const auto coefficients_of = [&](int i) -> const Coefficients<Op>& { return coefficients[i]; };

  int index = 0;
  int64_t clipped = numel;  // offset of the tensor's last vector, if it is this thread's and not whole
  // Only a repeated matrix can end inside a row. The condition is written out here and in accumulate_columns(): as a
  // function it costs 8 registers (nvcc 13.0).
  while (it.has(kRows) && (plan.repeat == 1 || it.ahead(kRows - 1) + kValues <= numel))
    apply_rows<true, kRows>(op, it, stage, index, coefficients_of, numel, streaming);
  if constexpr (kRows > 1) {
    if (!it.done()) clipped = apply_rows<false, kRows>(op, it, stage, index, coefficients_of, numel, streaming);
  } else if (!it.done()) {  // only a vector that is not whole can be left
    clipped = it.next();
  }
  if (clipped < numel) {
    Inputs<Op, kValues> inputs;
    load_inputs_clipped<Op, kValues>(op, clipped, numel, inputs);
    apply_vector<Op, kValues>(op, inputs, coefficients_of, clipped, first_bits<kValues>(numel - clipped), streaming);
  }
}

// Kernel: a block per tile and chunk of rows of a sample, in descending order of memory.
template <class Op, int kValues>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    apply_columns(const Op op, const ColumnsPlan plan, const bool streaming) {
  wait_for_previous_launch();
  op.prologue();
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const auto tiles = static_cast<unsigned>(plan.tiles), samples = static_cast<unsigned>(plan.view.samples);
  const unsigned chunk = block / tiles;  // counted over all samples
  const unsigned chunks = samples == 1 ? 0 : gridDim.x / tiles / samples, sample = samples == 1 ? 0 : chunk / chunks;
  apply_tile<Op, kValues>(op, plan, sample, block % tiles, chunk - sample * chunks, NoStage{}, streaming);
}

// --- flat tensors

// Maps offsets of a flat tensor, channels first, to rows and channels. A 64-bit division is done once per block; within
// the block, offsets are small enough for 32 bits.
class FlatRows {
 public:
  static constexpr int64_t kMaxBlockValues = int64_t{kThreads} * kFlatVectors * kMaxValues;

  explicit FlatRows(const ChannelView& view)
      : inner_(view.inner), channels_(view.channels), by_inner_(inner_), by_channels_(channels_) {}

  // The first value of a block: its place in its row, and its channel.
  struct Start {
    int64_t place, channel;
  };
  NF_DEVICE Start start(int64_t offset) const {
    const int64_t row = by_inner_.divide(offset);
    return {offset - row * inner_, row - by_channels_.divide(row) * channels_};
  }

  // A value `skip` values after the start: its row, counted from that of the start, and how many values of the row are
  // left, itself included.
  struct Place {
    int64_t row, left;
  };
  NF_DEVICE Place place(const Start& start, int skip) const {
    const int64_t offset = start.place + skip, row = by_inner_.divide_small(offset);
    return {row, (row + 1) * inner_ - offset};
  }
  // The channel of a row that is counted from that of the start.
  NF_DEVICE int64_t channel(const Start& start, int64_t row) const {
    const int64_t unwrapped = start.channel + row;
    return unwrapped - by_channels_.divide_small(unwrapped) * channels_;
  }

 private:
  // Divides by n: any i, or faster an i < n + kMaxBlockValues.
  struct Divisor {
    explicit Divisor(int64_t divisor)
        : n(divisor),
          any(static_cast<uint64_t>(n)),
          small(static_cast<uint32_t>(n < kMaxBlockValues ? n : kMaxBlockValues)) {}
    NF_DEVICE int64_t divide(int64_t i) const { return static_cast<int64_t>(any(static_cast<uint64_t>(i))); }
    NF_DEVICE int64_t divide_small(int64_t i) const {
      return n >= kMaxBlockValues ? i >= n : small(static_cast<uint32_t>(i));
    }
    int64_t n;
    Divider<uint64_t> any;
    Divider<uint32_t> small;
  };
  int64_t inner_, channels_;
  Divisor by_inner_, by_channels_;
};

// The values that a block of a flat tensor computes before its first output.
template <class Op>
struct FlatBlock {
  FlatRows::Start start;
  CoefficientTable<Op> table;
};

// Applies Op to kVectors of a thread's vectors, from vector `first` on, in the block of the flat tensor that begins at
// offset `begin`. All loads come before all stores. prepare() returns the FlatBlock; it is called after the loads have
// been issued, so that its latency overlaps with theirs. With kWithin all vectors lie wholly within the tensor; with
// kAligned every vector lies in one row, otherwise in one or two.
template <class Op, int kValues, bool kAligned, int kVectors, bool kWithin, class Prepare>
NF_DEVICE void apply_flat_vectors(const Op& op, const FlatRows& rows, int64_t begin, int first, int64_t numel,
                                  bool streaming, const Prepare& prepare) {
  const auto skip_of = [&](int v) { return ((first + v) * kThreads + static_cast<int>(threadIdx.x)) * kValues; };
  Inputs<Op, kValues> inputs[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if constexpr (kWithin)
      load_inputs<Op, kValues>(op, begin + skip_of(v), inputs[v]);
    else
      load_inputs_clipped<Op, kValues>(op, begin + skip_of(v), numel, inputs[v]);
  }
  const FlatBlock<Op>& block = prepare();
  const auto row_coefficients = [&](int64_t row) {
    return block.table[Op::kPrepares ? row : rows.channel(block.start, row)];
  };
  Coefficients<Op> current[kVectors], next[kVectors];  // of the vector's first row, and of the row after it
  int64_t left[kVectors];                              // values of the first row
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const FlatRows::Place place = rows.place(block.start, skip_of(v));
    left[v] = place.left;
    current[v] = row_coefficients(place.row);
    if constexpr (!kAligned) next[v] = row_coefficients(place.row + 1);
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t offset = begin + skip_of(v);
    const uint32_t valid = kWithin ? kAllValid<kValues> : first_bits<kValues>(numel - offset);
    if (valid == 0) continue;
    const auto coefficients_of = [&](int i) {
      Coefficients<Op> chosen = current[v];
      if constexpr (!kAligned)
#pragma unroll
        for (int k = 0; k < Op::kCoefficients; ++k) chosen.k[k] = i < left[v] ? chosen.k[k] : next[v].k[k];
      return chosen;
    };
    apply_vector<Op, kValues>(op, inputs[v], coefficients_of, offset, valid, streaming);
  }
}

// Kernel: a block per kThreads * kFlatVectors vectors of a flat tensor, in descending order of memory.
template <class Op, int kValues, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    apply_flat(const Op op, const FlatPlan plan, const FlatRows rows, const bool streaming) {
  constexpr int kFitting = vectors_within<Op, kValues>(8);
  constexpr int kVectors = kFitting < kFlatVectors ? kFitting : kFlatVectors;  // in flight together
  static_assert(kFlatVectors % kVectors == 0);
  wait_for_previous_launch();
  op.prologue();
  const int64_t numel = plan.view.numel(), inner = plan.view.inner, channels = plan.view.channels;
  const int64_t index = gridDim.x - 1 - static_cast<int64_t>(blockIdx.x);
  constexpr int64_t kBlockValues = int64_t{kThreads} * kFlatVectors * kValues;
  const int64_t begin = index * kBlockValues;
  FlatBlock<Op> block;
  const auto prepare = [&] {
    block.start = rows.start(begin);
    // The block in which a channel's first row of all begins owns it.
    const auto is_owner = [&](int row) {
      const int64_t offset = begin - block.start.place + row * inner;
      return offset >= begin && offset < begin + kBlockValues && offset < channels * inner;
    };
    block.table = block_table(
        op, channels, Op::kPrepares ? plan.rows_met() : 0, [&](int row) { return rows.channel(block.start, row); },
        is_owner);
  };
  if (begin + kBlockValues <= numel) {
    for (int v = 0; v < kFlatVectors; v += kVectors)
      apply_flat_vectors<Op, kValues, kAligned, kVectors, true>(op, rows, begin, v, numel, streaming,
                                                                [&]() -> const FlatBlock<Op>& {
                                                                  if (v == 0) prepare();
                                                                  return block;
                                                                });
  } else {  // the block with the end of the tensor
    prepare();
    for (int v = 0; v < kFlatVectors; ++v)
      apply_flat_vectors<Op, kValues, kAligned, 1, false>(op, rows, begin, v, numel, streaming,
                                                          [&]() -> const FlatBlock<Op>& { return block; });
  }
}

// --- host

// The item size that a launch is planned for: the widest operand's. An Op that writes a mask processes eight values per
// vector, so that a thread writes whole bytes of the mask.
template <class Op>
constexpr int planned_itemsize() {
  if (Op::kWritesMask) return kAccessBytes / kMaxValues;
  return sizeof(typename Op::T) > sizeof(typename Op::Output) ? sizeof(typename Op::T) : sizeof(typename Op::Output);
}

// Starts the kernel that the plan chooses. `overlaps`: it may start before the previous launch has ended.
template <class Op>
cudaError_t apply(const Op& op, const ApplyPlan& plan, cudaStream_t stream, bool overlaps) {
  static_assert(check_apply_op<Op>());
  constexpr int kValues = values_per_access(planned_itemsize<Op>());
  const auto config = [&](int64_t blocks) {
    return LaunchConfig{dim3(extent(blocks)), dim3(kThreads), stream, overlaps};
  };
  if (!plan.by_rows) {
    const ColumnsPlan& columns = plan.columns;
    const auto start = [&](auto kernel) {
      return launch(config(columns.view.samples * columns.tiles * columns.chunks()), kernel, op, columns,
                    plan.streaming);
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
