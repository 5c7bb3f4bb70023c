// Layer norm and RMS norm whose statistics are rows of memory (see resident_rows.cuh).
#pragma once

#include "kernels/cuda/layer_norm.cuh"
#include "kernels/cuda/resident_rows.cuh"

namespace normfused::cuda {

// Op of normalize_rows().
template <class T_>
struct LayerRowsOp {
  using T = T_;

  LayerNormForward args;
  Divider<uint64_t> by_sample{static_cast<uint64_t>(args.view.outer / args.samples)};

  NF_DEVICE int64_t rows() const { return args.view.outer; }
  NF_DEVICE int64_t channels() const { return args.view.channels; }
  NF_DEVICE double eps() const { return args.eps; }
  NF_DEVICE const T* input() const { return static_cast<const T*>(args.input); }
  NF_DEVICE double* mean() const { return args.mean; }
  NF_DEVICE double* invstd() const { return args.invstd; }
  NF_DEVICE void prologue() const {}

  // With a residual, the normalized values are its sum with the input, which the first launch writes.
  template <int kValues, int kVectors>
  NF_DEVICE void load(const RowPart<kValues>& part, bool is_first, Vector<T, kValues> (&x)[kVectors]) const {
    const int64_t channels = args.view.channels;
    if (args.residual == nullptr) return load_row(args.input, channels, part, x);
    if (!is_first) return load_row(args.sum, channels, part, x);
    Vector<T, kValues> residual[kVectors];
    load_row(args.input, channels, part, x);
    load_row(args.residual, channels, part, residual);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!part.has(v)) continue;
      x[v] = add_residual(x[v], residual[v]);
      x[v].store(static_cast<T*>(args.sum) + part.row * channels + part.channel(v), false);
    }
  }

  NF_DEVICE LayerStatistics finish(const Moments& moments) const {
    return layer_statistics(moments, args.subtract_mean, args.eps);
  }
  template <int kValues, int kVectors>
  NF_DEVICE void write(const RowPart<kValues>& part, const LayerStatistics& statistics, bool streaming,
                       const Vector<T, kValues> (&x)[kVectors]) const {
    using S = compute_t<T>;
    const int64_t channels = args.view.channels;
    const int64_t sample = args.samples > 1 ? static_cast<int64_t>(by_sample(static_cast<uint64_t>(part.row))) : 0;
    const auto c = forward_coefficients<S>({statistics.mean, statistics.invstd, 1, 0});
    const int64_t weights = args.weight.first(sample, channels);
    const int64_t biases = args.bias.first(sample, channels);
    T* const target = static_cast<T*>(args.output) + part.row * channels;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!part.has(v)) continue;
      S weight[kValues], bias[kValues];
      read_entries<S>(args.weight, weights + part.channel(v), 1, weight);
      read_entries<S>(args.bias, biases + part.channel(v), 0, bias);
      Vector<T, kValues> y;
#pragma unroll
      for (int i = 0; i < kValues; ++i)
        y.value[i] = narrow<T>(applied(c, widen<S>(x[v].value[i])) * weight[i] + bias[i]);
      y.store(target + part.channel(v), streaming);
    }
  }
};

// The sums of a thread's channels over rows: of grad_output, and of grad_output * d.
template <class S, int kValues, int kVectors>
using RowSums = S[2][kVectors][kValues];

// Block-wide: adds up the sums of the rows that a block processes at once, and writes them to `target`, (2, channels).
// All threads of the block must call it.
template <class S, int kValues, int kVectors>
NF_DEVICE void write_row_sums(const RowSums<S, kValues, kVectors>& sums, const RowPart<kValues>& part, int64_t channels,
                              int slots, S* target) {
  NF_SHARED(S, shared_sums, [kResidentThreads * kValues]);  // (slots, lanes, values)
  const int width = part.lanes * kValues;
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) shared_sums[threadIdx.x * kValues + i] = sums[k][v][i];
      __syncthreads();
      for (int j = threadIdx.x; j < width; j += slots * part.lanes) {
        S total = 0;
        for (int slot = 0; slot < slots; ++slot) total += shared_sums[slot * width + j];
        if (v * width + j < part.count) target[k * channels + part.begin + v * width + j] = total;
      }
      __syncthreads();  // before the next sums are written
    }
}

// Block-wide: the sums of k and of k * (x - pivot) over a chunk of a row. `weights`: the index of the first weight. All
// threads of the block must call it.
template <class T, int kValues, int kVectors>
NF_DEVICE void sum_row_gradients(const LayerNormBackward& args, const RowPart<kValues>& part, int64_t weights,
                                 const Vector<T, kValues> (&x)[kVectors], const Vector<T, kValues> (&grad)[kVectors],
                                 compute_t<T> pivot, double (&totals)[2]) {
  using S = compute_t<T>;
  S sum = 0, product = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (!part.has(v)) continue;
    S weight[kValues];
    read_entries<S>(args.weight, weights + part.channel(v), 1, weight);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const S k = widen<S>(grad[v].value[i]) * weight[i];
      sum += k;
      product += k * (widen<S>(x[v].value[i]) - pivot);
    }
  }
  totals[0] = static_cast<double>(sum);
  totals[1] = static_cast<double>(product);
  sum_lanes(totals, part.lanes);
}

// Writes grad_input of a chunk of a row, if it is requested, and adds the row to the sums of its channels.
template <class T, int kValues, int kVectors>
NF_DEVICE void write_row_gradient(const LayerNormBackward& args, const RowPart<kValues>& part, int64_t weights,
                                  const Vector<T, kValues> (&x)[kVectors], const Vector<T, kValues> (&grad)[kVectors],
                                  const LayerCoefficients<compute_t<T>>& c, bool streaming,
                                  RowSums<compute_t<T>, kValues, kVectors>& sums) {
  using S = compute_t<T>;
  using V = Vector<T, kValues>;
  V grad_sum[kVectors]{};
  if (args.grad_sum != nullptr) load_row(args.grad_sum, args.view.channels, part, grad_sum);
  T* const target = static_cast<T*>(args.grad_input) + part.row * args.view.channels;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (!part.has(v)) continue;
    S weight[kValues];
    read_entries<S>(args.weight, weights + part.channel(v), 1, weight);
    V result;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const S value = widen<S>(x[v].value[i]), g = widen<S>(grad[v].value[i]);
      sums[0][v][i] += g;
      sums[1][v][i] += g * layer_deviation(c, value);
      result.value[i] = narrow<T>(layer_gradient(c, value, g, weight[i]) + widen<S>(grad_sum[v].value[i]));
    }
    if (args.grad_input != nullptr) result.store(target + part.channel(v), streaming);
  }
}

// Kernel: a block per share of the rows of a sample (blockIdx.x) and chunk (blockIdx.y). `chunk_sums`: (rows, chunks,
// 2), the sums of k and of k * (x - pivot) of the chunks of rows that have several. `parameter_sums`: (samples *
// plan.blocks, 2, channels), written unless it is null: the sums of grad_output and of grad_output * d over the rows of
// each block.
template <class T, int kValues, int kVectors>
__global__ void __launch_bounds__(kResidentThreads, 1)
    layer_norm_backward_rows(const LayerNormBackward args, const ResidentRowsPlan plan, const RowPhase phase,
                             double* const chunk_sums, compute_t<T>* const parameter_sums) {
  using S = compute_t<T>;
  const int64_t channels = args.view.channels, blocks = plan.blocks;
  const int64_t sample = blockIdx.x / static_cast<unsigned>(blocks), block = blockIdx.x - sample * blocks;
  const int64_t weights = args.weight.first(sample, channels);
  const int slots = plan.slots(), slot = threadIdx.x / plan.lanes;
  RowSums<S, kValues, kVectors> sums{};

  const int64_t end = (sample + 1) * plan.rows;
  for (int64_t row = sample * plan.rows + block * slots + slot; row - slot < end; row += blocks * slots) {
    const bool is_present = row < end;
    const RowPart<kValues> part(plan, row, blockIdx.y, is_present, channels);
    Vector<T, kValues> x[kVectors], grad[kVectors];
    load_row(args.input, channels, part, x);
    load_row(args.grad_output, channels, part, grad);
    LayerStatistics statistics{0, 1};
    if (is_present) statistics = {args.mean[row], args.invstd[row]};
    double totals[2] = {};
    if (phase != RowPhase::kApply && args.grad_input != nullptr)
      sum_row_gradients(args, part, weights, x, grad, static_cast<S>(statistics.mean), totals);
    if (!is_present) continue;
    double* const of_row = chunk_sums + row * plan.chunks * 2;
    if (phase == RowPhase::kSum) {
      if (part.lane == 0) {
        of_row[2 * blockIdx.y] = totals[0];
        of_row[2 * blockIdx.y + 1] = totals[1];
      }
      continue;
    }
    if (phase == RowPhase::kApply)
      for (int chunk = 0; chunk < plan.chunks; ++chunk) {
        totals[0] += of_row[2 * chunk];
        totals[1] += of_row[2 * chunk + 1];
      }
    write_row_gradient(args, part, weights, x, grad, layer_coefficients<S>(args, statistics, totals), plan.streaming,
                       sums);
  }
  if (phase == RowPhase::kSum || parameter_sums == nullptr) return;
  const RowPart<kValues> part(plan, 0, blockIdx.y, true, channels);
  write_row_sums<S, kValues, kVectors>(sums, part, channels, slots, parameter_sums + blockIdx.x * 2 * channels);
}

}  // namespace normfused::cuda
