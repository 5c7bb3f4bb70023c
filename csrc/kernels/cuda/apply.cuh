// Application: values written for each value read, by coefficients of its channel. An Op has
//
//   S, T, Output, kInputs, kOutputs, kCoefficients, kWritesBits
//   kRequired                         how many of the inputs are always there; others may be null, and then read as 0
//   input(k), output(k), table        the tensors, and the coefficients; outputs but the first may be null
//   operator()(x, y, choose, offset, mask)
//                                     the outputs y of vectors x, by coefficients choose(i) of value i; `mask` tells
//                                     which values lie in the tensor
//   before()                          what the launch does besides
//
// Coefficients lie in a table, (kCoefficients, channels).
#pragma once

#include "kernels/cuda/walk.cuh"

namespace normfused::cuda {

struct Nothing {};

template <class Op>
struct Coefficients {
  typename Op::S k[Op::kCoefficients];
};

// Plain loads: in the single launch the same block has just written them.
template <class Op>
NF_DEVICE Coefficients<Op> coefficients_of(const Op& op, int64_t channels, int64_t channel) {
  Coefficients<Op> coefficients;
#pragma unroll
  for (int k = 0; k < Op::kCoefficients; ++k) coefficients.k[k] = op.table[k * channels + channel];
  return coefficients;
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
NF_DEVICE void apply_row_walk(const Op& op, const RowsPlan& plan, int64_t channel, int lane) {
  RowWalk<kValues, kMasked> walk(plan, channel, 0, lane);
  const Coefficients<Op> coefficients = coefficients_of(op, plan.view.channels, channel);
  while (walk.has(1)) {
    uint32_t mask;
    const int64_t offset = walk.next(mask);
    if (mask == 0) continue;
    Inputs<Op, kValues> inputs;
    load_inputs<Op, kValues>(op, offset, inputs, plan.view.numel());
    apply_vector<Op, kValues>(op, inputs, [&](int) { return coefficients; }, offset, mask, false);
  }
}

// A tile's columns in one chunk of rows, channels last. A thread keeps its channels' coefficients.
template <class Op, int kValues>
NF_DEVICE void apply_column_walk(const Op& op, const ColumnsPlan& plan, int64_t tile, int64_t chunk, bool streaming) {
  constexpr int kRows = vectors_within<Op, kValues>(4);
  ColumnWalk<kValues> walk(plan, tile, chunk);
  const int64_t numel = plan.view.numel();
  if (!walk.has(1)) return;
  Coefficients<Op> coefficients[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) coefficients[i] = coefficients_of(op, plan.view.channels, walk.channel(i));
  const auto choose = [&](int i) -> const Coefficients<Op>& { return coefficients[i]; };

  while (walk.has(kRows) && (plan.repeat == 1 || walk.ahead(kRows - 1) + kValues <= numel)) {
    Inputs<Op, kValues> inputs[kRows];
    int64_t offsets[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      offsets[r] = walk.next();
      load_inputs<Op, kValues>(op, offsets[r], inputs[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      apply_vector<Op, kValues>(op, inputs[r], choose, offsets[r], kWhole<kValues>, streaming);
  }
  while (walk.has(1)) {
    const int64_t offset = walk.next();
    if (offset >= numel) break;  // the last row can be short
    Inputs<Op, kValues> inputs;
    load_inputs<Op, kValues>(op, offset, inputs, numel);
    apply_vector<Op, kValues>(op, inputs, choose, offset, first_values<kValues>(numel - offset), streaming);
  }
}

template <class Op, int kValues>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    apply_columns(const Op op, const ColumnsPlan plan, const bool streaming) {
  op.before();
  const int64_t block = gridDim.x - 1 - static_cast<int64_t>(blockIdx.x);  // against the order of memory
  apply_column_walk<Op, kValues>(op, plan, block % plan.tiles, block / plan.tiles, streaming);
}

// Division of numbers below 2^31 by a fixed one: a multiplication and a shift (Granlund and Montgomery, 1994).
struct Divider {
  uint32_t multiplier;
  int shift;

  explicit Divider(uint32_t by) : shift(0) {
    while ((uint64_t{1} << shift) < by) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by)) / by + 1);
  }
  NF_DEVICE uint32_t operator()(uint32_t n) const {
    return static_cast<uint32_t>((((static_cast<uint64_t>(n) * multiplier) >> 32) + n) >> shift);
  }
};

// i / n for i < n + kRun, where kRun is what a block takes of the flat tensor.
class FlatDivider {
 public:
  static constexpr int64_t kRun = int64_t{kThreads} * kFlatVectors * kMaxValues;

  explicit FlatDivider(int64_t n) : n_(n), divide_(static_cast<uint32_t>(n < kRun ? n : kRun)) {}
  NF_DEVICE int64_t operator()(int64_t i) const {
    return n_ >= kRun ? i >= n_ : static_cast<int64_t>(divide_(static_cast<uint32_t>(i)));
  }

 private:
  int64_t n_;
  Divider divide_;
};

template <class Op, int kValues, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    apply_flat(const Op op, const FlatPlan plan, const FlatDivider by_inner, const FlatDivider by_channels,
               const bool streaming) {
  constexpr int kWithin = vectors_within<Op, kValues>(8);
  constexpr int kTogether = kWithin < kFlatVectors ? kWithin : kFlatVectors;
  op.before();
  const int64_t numel = plan.view.numel(), inner = plan.view.inner, channels = plan.view.channels;
  const int64_t block = gridDim.x - 1 - static_cast<int64_t>(blockIdx.x);  // against the order of memory
  const int64_t begin = block * kThreads * kFlatVectors * kValues;
  const int64_t first_row = begin / inner, at = begin % inner, first_channel = first_row % channels;

  for (int done = 0; done < kFlatVectors; done += kTogether) {
    Inputs<Op, kValues> inputs[kTogether];
#pragma unroll
    for (int v = 0; v < kTogether; ++v) {
      const int64_t offset = begin + ((done + v) * kThreads + static_cast<int>(threadIdx.x)) * kValues;
      load_inputs<Op, kValues>(op, offset, inputs[v], numel);
    }
#pragma unroll
    for (int v = 0; v < kTogether; ++v) {
      const int skip = ((done + v) * kThreads + static_cast<int>(threadIdx.x)) * kValues;
      const int64_t offset = begin + skip;
      if (offset >= numel) continue;
      const int64_t row = by_inner(at + skip), from = first_channel + row;
      const int64_t channel = from - by_channels(from) * channels;
      const Coefficients<Op> here = coefficients_of(op, channels, channel);
      const auto put = [&](const auto& choose) {
        apply_vector<Op, kValues>(op, inputs[v], choose, offset, first_values<kValues>(numel - offset), streaming);
      };
      if constexpr (kAligned) {
        put([&](int) { return here; });
      } else {
        const int64_t left = (row + 1) * inner - (at + skip);  // of this row
        const Coefficients<Op> there = coefficients_of(op, channels, channel + 1 == channels ? 0 : channel + 1);
        put([&](int i) {
          Coefficients<Op> chosen;
#pragma unroll
          for (int k = 0; k < Op::kCoefficients; ++k) chosen.k[k] = i < left ? here.k[k] : there.k[k];
          return chosen;
        });
      }
    }
  }
}

// Size of the items that a launch is planned for: that of the widest operand. Who writes a mask of bits takes eight
// values, so that a thread has a byte of it for itself.
template <class Op>
constexpr int planned_itemsize() {
  if (Op::kWritesBits) return kAccessBytes / kMaxValues;
  return sizeof(typename Op::T) > sizeof(typename Op::Output) ? sizeof(typename Op::T) : sizeof(typename Op::Output);
}

// Starts the kernel that a plan asks for.
template <class Op>
cudaError_t apply(const Op& op, const ApplyPlan& plan, cudaStream_t stream) {
  constexpr int kValues = values_per_access(planned_itemsize<Op>());
  const auto config = [&](int64_t blocks) {
    return LaunchConfig{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream};
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
    return launch(config(flat.blocks), kernel, op, flat, FlatDivider(flat.view.inner), FlatDivider(flat.view.channels),
                  plan.streaming);
  };
  if (flat.values == 1) return start(apply_flat<Op, 1, true>);
  return flat.aligned ? start(apply_flat<Op, kValues, true>) : start(apply_flat<Op, kValues, false>);
}

}  // namespace normfused::cuda
