// Application: one value written for each, by coefficients of its channel. An Op has
//
//   S, T, kInputs, kCoefficients, Output
//   input(k), output, table           the tensors, and the coefficients
//   operator()(values, coefficients)  one value, of one value of each input
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

template <class Op>
NF_DEVICE typename Op::Output apply_one(const Op& op, const typename Op::T (&values)[Op::kInputs],
                                        const Coefficients<Op>& coefficients) {
  typename Op::S wide[Op::kInputs];
#pragma unroll
  for (int k = 0; k < Op::kInputs; ++k) wide[k] = widen<typename Op::S>(values[k]);
  return narrow<typename Op::Output>(op(wide, coefficients.k));
}

// A vector, of which value i goes by choose(i).
template <class Op, int kValues, class Choose>
NF_DEVICE Vector<typename Op::Output, kValues> apply_vector(
    const Op& op, const Vector<typename Op::T, kValues> (&inputs)[Op::kInputs], const Choose& choose) {
  Vector<typename Op::Output, kValues> output;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    typename Op::T values[Op::kInputs];
#pragma unroll
    for (int k = 0; k < Op::kInputs; ++k) values[k] = inputs[k].value[i];
    output.value[i] = apply_one(op, values, choose(i));
  }
  return output;
}

// All of one channel, channels first, by plan.lanes threads.
template <class Op, int kValues, bool kMasked>
NF_DEVICE void apply_row_walk(const Op& op, const RowsPlan& plan, int64_t channel, int lane) {
  using V = Vector<typename Op::T, kValues>;
  RowWalk<kValues, kMasked> walk(plan, channel, 0, lane);
  const Coefficients<Op> coefficients = coefficients_of(op, plan.view.channels, channel);
  while (walk.has(1)) {
    uint32_t mask;
    const int64_t offset = walk.next(mask);
    if (mask == 0) continue;
    V inputs[Op::kInputs];
#pragma unroll
    for (int k = 0; k < Op::kInputs; ++k)
      inputs[k] = load_masked<true, typename Op::T, kValues>(op.input(k), offset, plan.view.numel());
    const auto output = apply_vector<Op, kValues>(op, inputs, [&](int) { return coefficients; });
    store_masked(op.output, offset, output, mask, false);
  }
}

// A tile's columns in one chunk of rows, channels last. A thread keeps its channels' coefficients.
template <class Op, int kValues>
NF_DEVICE void apply_column_walk(const Op& op, const ColumnsPlan& plan, int64_t tile, int64_t chunk, bool streaming) {
  using V = Vector<typename Op::T, kValues>;
  constexpr int kRows = 4 / Op::kInputs;
  ColumnWalk<kValues> walk(plan, tile, chunk);
  const int64_t numel = plan.view.numel();
  if (!walk.has(1)) return;
  Coefficients<Op> coefficients[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) coefficients[i] = coefficients_of(op, plan.view.channels, walk.channel(i));
  const auto choose = [&](int i) -> const Coefficients<Op>& { return coefficients[i]; };

  while (walk.has(kRows) && (plan.repeat == 1 || walk.ahead(kRows - 1) + kValues <= numel)) {
    V inputs[kRows][Op::kInputs];
    int64_t offsets[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      offsets[r] = walk.next();
#pragma unroll
      for (int k = 0; k < Op::kInputs; ++k) inputs[r][k] = V::load_last(op.input(k) + offsets[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      apply_vector<Op, kValues>(op, inputs[r], choose).store(op.output + offsets[r], streaming);
  }
  while (walk.has(1)) {
    const int64_t offset = walk.next();
    V inputs[Op::kInputs];
#pragma unroll
    for (int k = 0; k < Op::kInputs; ++k)
      inputs[k] = load_masked<true, typename Op::T, kValues>(op.input(k), offset, numel);
    const uint32_t mask = first_values<kValues>(numel - offset);
    store_masked(op.output, offset, apply_vector<Op, kValues>(op, inputs, choose), mask, streaming);
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
  using V = Vector<typename Op::T, kValues>;
  op.before();
  const int64_t numel = plan.view.numel(), inner = plan.view.inner, channels = plan.view.channels;
  const int64_t block = gridDim.x - 1 - static_cast<int64_t>(blockIdx.x);  // against the order of memory
  const int64_t begin = block * kThreads * kFlatVectors * kValues;
  const int64_t first_row = begin / inner, at = begin % inner, first_channel = first_row % channels;

  V inputs[kFlatVectors][Op::kInputs];
#pragma unroll
  for (int v = 0; v < kFlatVectors; ++v) {
    const int64_t offset = begin + (v * kThreads + static_cast<int>(threadIdx.x)) * kValues;
#pragma unroll
    for (int k = 0; k < Op::kInputs; ++k)
      inputs[v][k] = load_masked<true, typename Op::T, kValues>(op.input(k), offset, numel);
  }
#pragma unroll
  for (int v = 0; v < kFlatVectors; ++v) {
    const int skip = (v * kThreads + static_cast<int>(threadIdx.x)) * kValues;
    const int64_t offset = begin + skip;
    if (offset >= numel) continue;
    const int64_t row = by_inner(at + skip), from = first_channel + row;
    const int64_t channel = from - by_channels(from) * channels;
    const Coefficients<Op> here = coefficients_of(op, channels, channel);
    const auto put = [&](const auto& choose) {
      const uint32_t mask = first_values<kValues>(numel - offset);
      store_masked(op.output, offset, apply_vector<Op, kValues>(op, inputs[v], choose), mask, streaming);
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

// Starts the kernel that a plan asks for.
template <class Op>
cudaError_t apply(const Op& op, const ApplyPlan& plan, cudaStream_t stream) {
  constexpr int kSize =
      sizeof(typename Op::T) > sizeof(typename Op::Output) ? sizeof(typename Op::T) : sizeof(typename Op::Output);
  constexpr int kValues = values_per_access(kSize);
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
