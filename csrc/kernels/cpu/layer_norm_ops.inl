// Layer norm and RMS norm: the ops, the constants of statistics and parameters, and the passes over blocks of rows. The
// kernels that combine them are in layer_norm.inl.
//
// With d = (x - mean) * invstd, the output is d * weight + bias. k = grad_output * weight is the gradient of d.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/group_norm.inl"
#include "kernels/cpu/sweep.inl"

namespace normfused::cpu::NF_ISA {
namespace {

// ---- ops ---------------------------------------------------------------------------------------------------------

// Constants of a statistic: d = (x - pivot) * scale + forward_shift, and in backward
// grad_input = k * scale + (x - pivot) * slope + shift.
struct LayerTable {
  static constexpr int64_t kPivot = 0, kScale = 1, kForwardShift = 2, kSlope = 3, kShift = 4;
  static constexpr int64_t kForwardRows = 3, kRows = 5;
};
// Constants of a parameter.
struct LayerAffine {
  static constexpr int64_t kWeight = 0, kBias = 1, kRows = 2;
};

template <class T_>
struct LayerNormalizeOp : LayerTable {
  using T = T_;
  using V = Pack<compute_t<T>, T>;
  static constexpr int64_t kStatistic = kForwardRows, kParameter = LayerAffine::kRows;
  static constexpr int64_t kStatisticSums = 0, kParameterSums = 0;

  const T* input;
  T* output;
  int64_t ahead;  // distance to the values that are read next

  NF_INLINE void prefetch(int64_t offset) const { __builtin_prefetch(input + offset + ahead); }
  template <class Width, class StoreFn>
  NF_INLINE void operator()(int64_t offset, Width width, const V* statistic, const V* parameter, V*, V*,
                            const StoreFn& store) const {
    const V deviation = load_pack<V>(input + offset, width) - statistic[kPivot];
    const V d = deviation * statistic[kScale] + statistic[kForwardShift];
    store(output + offset, d * parameter[LayerAffine::kWeight] + parameter[LayerAffine::kBias], width);
  }
};

// The sum of x - pivot over the values of a statistic; with kSquares also that of its square.
template <class T_, bool kSquares>
struct LayerMomentsOp : LayerTable {
  using T = T_;
  using V = Pack<compute_t<T>, T>;
  static constexpr int64_t kStatistic = 1, kParameter = 0, kStatisticSums = kSquares ? 2 : 1, kParameterSums = 0;

  const T* input;

  NF_INLINE void prefetch(int64_t offset) const { __builtin_prefetch(input + offset); }
  template <class Width, class StoreFn>
  NF_INLINE void operator()(int64_t offset, Width width, const V* statistic, const V*, V* sums, V*,
                            const StoreFn&) const {
    const V deviation = load_pack(input + offset, width, statistic[kPivot]) - statistic[kPivot];
    sums[0] = sums[0] + deviation;
    if constexpr (kSquares) sums[1] = sums[1] + deviation * deviation;
  }
};

// The sums of k and of k * (x - pivot) over the values of a statistic.
template <class T_>
struct LayerGradSumsOp : LayerTable {
  using T = T_;
  using V = Pack<compute_t<T>, T>;
  static constexpr int64_t kStatistic = 1, kParameter = 1, kStatisticSums = 2, kParameterSums = 0;

  const T* grad_output;
  const T* input;

  NF_INLINE void prefetch(int64_t offset) const {
    __builtin_prefetch(input + offset);
    __builtin_prefetch(grad_output + offset);
  }
  template <class Width, class StoreFn>
  NF_INLINE void operator()(int64_t offset, Width width, const V* statistic, const V* parameter, V* sums, V*,
                            const StoreFn&) const {
    const V deviation = load_pack(input + offset, width, statistic[kPivot]) - statistic[kPivot];
    const V k = load_pack<V>(grad_output + offset, width) * parameter[LayerAffine::kWeight];
    sums[0] = sums[0] + k;
    sums[1] = sums[1] + k * deviation;
  }
};

// grad_input, and the sums of grad_output and of grad_output * d over the values of a parameter.
template <class T_>
struct LayerGradInputOp : LayerTable {
  using T = T_;
  using V = Pack<compute_t<T>, T>;
  static constexpr int64_t kStatistic = kRows, kParameter = 1, kStatisticSums = 0, kParameterSums = 2;

  const T* grad_output;
  const T* input;
  const T* grad_sum;  // or null
  T* output;          // grad_input, or null
  int64_t ahead;      // distance to the values that are read next

  NF_INLINE void prefetch(int64_t offset) const {
    __builtin_prefetch(input + offset + ahead);
    __builtin_prefetch(grad_output + offset + ahead);
  }
  template <class Width, class StoreFn>
  NF_INLINE void operator()(int64_t offset, Width width, const V* statistic, const V* parameter, V*, V* sums,
                            const StoreFn& store) const {
    const V deviation = load_pack(input + offset, width, statistic[kPivot]) - statistic[kPivot];
    const V grad = load_pack<V>(grad_output + offset, width);
    sums[0] = sums[0] + grad;
    sums[1] = sums[1] + grad * (deviation * statistic[kScale] + statistic[kForwardShift]);
    if (output == nullptr) return;
    V result = grad * parameter[LayerAffine::kWeight] * statistic[kScale] +
               (deviation * statistic[kSlope] + statistic[kShift]);
    if (grad_sum != nullptr) result = result + load_pack<V>(grad_sum + offset, width);
    store(output + offset, result, width);
  }
};

// ---- constants ---------------------------------------------------------------------------------------------------

// Weight and bias of each sample in S, one row each, with zeros past the last channel.
template <class S>
struct LayerParameters {
  S* data;
  int64_t stride;

  static int64_t stride_of(int64_t channels) { return (channels + kChannelChunk - 1) / kChannelChunk * kChannelChunk; }
  static int64_t bytes(int64_t samples, int64_t channels) {
    return samples * LayerAffine::kRows * stride_of(channels) * static_cast<int64_t>(sizeof(S));
  }
  Entries<S> of(int64_t sample) const { return {data + sample * LayerAffine::kRows * stride, stride}; }

  void fill(const SampleParameter& weight, const SampleParameter& bias, int64_t samples, int64_t channels,
            const Parallel& parallel) const {
    const int64_t chunks = stride / kChannelChunk;
    parallel(samples * chunks, kChannelGrain, [&](int64_t task) {
      const int64_t sample = task / chunks, c0 = task % chunks * kChannelChunk;
      const int64_t n = minimum(kChannelChunk, channels - c0);
      double values[LayerAffine::kRows][kChannelChunk] = {};
      read_channels(weight, weight.first(sample, channels) + c0, n, 1, values[LayerAffine::kWeight]);
      read_channels(bias, bias.first(sample, channels) + c0, n, 0, values[LayerAffine::kBias]);
      for (int64_t k = 0; k < LayerAffine::kRows; ++k)
        for (int64_t i = 0; i < kChannelChunk; ++i) of(sample)(k, c0 + i) = static_cast<S>(values[k][i]);
    });
  }
};

// Each of the following three functions processes `n` statistics. Their constants are the first entries of the table.

// The constants of d.
template <class S>
void begin_layers(const double* mean, const double* invstd, int64_t n, const Entries<S>& table) {
  NF_NO_ALIASES
  for (int64_t i = 0; i < n; ++i) {
    const auto k = forward_coefficients<S>({mean[i], invstd[i], 1, 0});
    table(LayerTable::kPivot, i) = k.pivot;
    table(LayerTable::kScale, i) = k.scale;
    table(LayerTable::kForwardShift, i) = k.shift;
  }
}

// Writes mean and invstd, from mean and M2, and the constants of d.
template <class S>
void finish_layers(const LayerNormForward& args, int64_t first, int64_t n, const Entries<double>& moments,
                   const Entries<S>& table) {
  double* const mean = args.mean + first;
  double* const invstd = args.invstd + first;
  NF_NO_ALIASES
  for (int64_t i = 0; i < n; ++i) {
    const LayerStatistics finished =
        layer_statistics({args.view.channels, moments(0, i), moments(1, i)}, args.subtract_mean, args.eps);
    mean[i] = finished.mean;
    invstd[i] = finished.invstd;
  }
  begin_layers(mean, invstd, n, table);
}

// The rest of the constants, from the sums of LayerGradSumsOp.
template <class S>
void finish_layers_backward(const LayerNormBackward& args, int64_t first, int64_t n, const Entries<double>& sums,
                            const Entries<S>& table) {
  NF_NO_ALIASES
  for (int64_t i = 0; i < n; ++i) {
    const auto k = layer_backward_coefficients<S>({args.mean[first + i], args.invstd[first + i]}, args.view.channels,
                                                  args.subtract_mean, sums(0, i), sums(1, i));
    table(LayerTable::kSlope, i) = k.slope;
    table(LayerTable::kShift, i) = k.shift;
  }
}

// Writes the sums of all chunks, in order, to the gradients of bias (0) and weight (1): of each sample, or of all of
// them. The sums of a chunk are (2, stride) doubles; those of the chunks of a sample follow each other.
void write_layer_gradients(const LayerNormBackward& args, const double* sums, int64_t stride, int64_t chunks,
                           const Parallel& parallel) {
  const int64_t channels = args.view.channels, tasks = (channels + kChannelChunk - 1) / kChannelChunk;
  for (int64_t k = 0; k < 2; ++k) {
    const SampleParameter& output = k == 0 ? args.grad_bias : args.grad_weight;
    if (!output) continue;
    const int64_t groups = output.by_sample ? args.samples : 1, of_group = args.samples / groups * chunks;
    parallel(groups * tasks, 1, [&](int64_t task) {
      const int64_t group = task / tasks, c0 = task % tasks * kChannelChunk;
      const int64_t n = minimum(kChannelChunk, channels - c0);
      double total[kChannelChunk] = {};
      for (int64_t chunk = group * of_group; chunk < (group + 1) * of_group; ++chunk) {
        const double* const of_chunk = sums + (chunk * 2 + k) * stride + c0;
        for (int64_t i = 0; i < n; ++i) total[i] += of_chunk[i];
      }
      write_channels(output, group * channels + c0, n, total);
    });
  }
}

// ---- passes ------------------------------------------------------------------------------------------------------

// sum = input + residual, rounded to T. Does nothing without a residual.
template <class T>
void add_residual(const LayerNormForward& args, const Block& block) {
  using V = Pack<compute_t<T>, T>;
  if (args.residual == nullptr) return;
  for (int64_t row = 0; row < block.rows; ++row)
    for_each_pack<V>(block.columns, [&](int64_t i, auto width) {
      const int64_t offset = block.offset + row * block.stride + i;
      store_pack(static_cast<T*>(args.sum) + offset,
                 load_pack<V>(static_cast<const T*>(args.input) + offset, width) +
                     load_pack<V>(static_cast<const T*>(args.residual) + offset, width),
                 width);
    });
}

// Whether stores bypass the caches: see use_nontemporal_stores(). Every row must be aligned.
template <class T>
bool rows_are_nontemporal(const void* output, int64_t numel, int64_t row) {
  constexpr auto kItemBytes = static_cast<int64_t>(sizeof(T));
  return kVectorBytes > 16 && output != nullptr && row * kItemBytes % kVectorBytes == 0 &&
         numel * kItemBytes >= nontemporal_threshold(kTrainingCachePart) &&
         bytes_to_alignment(output, kVectorBytes) == 0;
}

template <bool kStatisticIsRow, class Op>
void sweep_outputs(const Op& op, const Block& block, const SweepOperands<Op>& operands, bool nontemporal) {
  if (nontemporal)
    sweep<kStatisticIsRow, true>(op, block, operands);
  else
    sweep<kStatisticIsRow, false>(op, block, operands);
}

// Adds the sums of each row of a block. The operands are those of its first column.
template <class Op>
void sum_rows(const Op& op, const Block& block, const SweepOperands<Op>& operands) {
  constexpr int64_t kStep = kMaxSweepColumns<typename Op::V>;
  for (int64_t c = 0; c < block.columns; c += kStep)
    sweep<true, false>(op, Block{block.offset + c, block.rows, minimum(kStep, block.columns - c), block.stride},
                       {operands.statistic, operands.parameter.from(c), operands.row_sums});
}

// Sums of columns of up to kMaxSweepRows rows in S, and of all rows in double.
template <class V, int64_t kSums>
struct ColumnSums {
  using S = typename V::S;

  Entries<S> partial;  // in pack order
  Entries<double> total;
  int64_t columns;
  int64_t rows = 0;  // in `partial`

  void clear() {
    std::fill_n(partial.data, kSums * partial.stride, S(0));
    std::fill_n(total.data, kSums * total.stride, 0.0);
  }
  // Call after each `n` rows. The next call must not be for more.
  void add_rows(int64_t n) {
    rows += n;
    if (rows + n > kMaxSweepRows) fold();
  }
  void fold() {
    for (int64_t k = 0; k < kSums; ++k) fold_column_sums<V>(partial, total, k, columns);
    rows = 0;
  }
};

// Calls f(sample, r0, r1) for the rows of each sample in [r0, r1).
template <class F>
void for_each_sample(int64_t r0, int64_t r1, int64_t rows_per_sample, const F& f) {
  for (int64_t end; r0 < r1; r0 = end) {
    const int64_t sample = r0 / rows_per_sample;
    end = minimum(r1, (sample + 1) * rows_per_sample);
    f(sample, r0, end);
  }
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
