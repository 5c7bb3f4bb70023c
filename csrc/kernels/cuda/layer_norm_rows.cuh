// Layer norm and RMS norm whose statistics are rows of memory. Neighbouring lanes read a row, or a chunk of a long row,
// into registers once: they sum it, compute its statistics, and apply them.
//
// A row with several chunks takes two launches: one with the phase kSum, which writes the results of every chunk, and
// one with kApply, which merges them. A row with one chunk takes one, with the phase kBoth.
#pragma once

#include "kernels/cuda/layer_norm.cuh"

namespace normfused::cuda {

enum class LayerPhase : uint8_t { kBoth, kSum, kApply };

// The values that a thread holds: kVectors vectors of kValues values each, at offsets from the first value of a row.
template <int kValues>
struct RowPart {
  int64_t row;         // whose first value is at row * channels
  int64_t begin, end;  // the channels of the chunk; none for a slot without a row
  int lane, lanes;

  NF_DEVICE RowPart(const LayerRowsPlan& plan, int64_t row, bool is_present, int64_t channels)
      : row(row), lane(static_cast<int>(threadIdx.x) % plan.lanes), lanes(plan.lanes) {
    begin = blockIdx.y * plan.chunk;
    const int64_t chunk_end = begin + plan.chunk;
    end = !is_present ? begin : chunk_end < channels ? chunk_end : channels;
  }
  // The first channel of vector v, and whether the thread has this vector.
  NF_DEVICE int64_t channel(int v) const { return begin + (v * lanes + lane) * kValues; }
  NF_DEVICE bool has(int v) const { return channel(v) < end; }
  NF_DEVICE int64_t count() const { return end - begin; }
};

// Loads a thread's vectors of a row. All loads are independent of each other.
template <class T, int kValues, int kVectors>
NF_DEVICE void load_row(const void* tensor, int64_t channels, const RowPart<kValues>& part,
                        Vector<T, kValues> (&vectors)[kVectors]) {
  const T* const first = static_cast<const T*>(tensor) + part.row * channels;
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    vectors[v] = part.has(v) ? Vector<T, kValues>::load(first + part.channel(v)) : Vector<T, kValues>{};
}

// Calls f(x) for every value that the thread holds, in S.
template <class S, class T, int kValues, int kVectors, class F>
NF_DEVICE void for_each_value(const RowPart<kValues>& part, const Vector<T, kValues> (&vectors)[kVectors], const F& f) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (!part.has(v)) continue;
#pragma unroll
    for (int i = 0; i < kValues; ++i) f(widen<S>(vectors[v].value[i]));
  }
}

// Block-wide: the moments of a chunk. The pivot is the mean in S, whose sum cannot overflow, because every value is
// divided by the count first. If squares overflow or underflow S, they are summed in double. All threads of the block
// must call it.
template <class T, int kValues, int kVectors>
NF_DEVICE Moments moments_of(const RowPart<kValues>& part, const Vector<T, kValues> (&x)[kVectors], double eps) {
  using S = compute_t<T>;
  const int64_t count = part.count();
  const S share = 1 / static_cast<S>(count > 0 ? count : 1);
  S mean = 0;
  for_each_value<S>(part, x, [&](S value) { mean += value * share; });
  double total[1] = {static_cast<double>(mean)};
  sum_lanes(total, part.lanes);
  const S pivot = is_finite(static_cast<S>(total[0])) ? static_cast<S>(total[0]) : 0;

  S sum = 0, square = 0;
  for_each_value<S>(part, x, [&](S value) {
    const S deviation = value - pivot;
    sum += deviation;
    square += deviation * deviation;
  });
  double sums[2] = {static_cast<double>(sum), static_cast<double>(square)};
  sum_lanes(sums, part.lanes);
  Moments moments{count, 0, 0};
  if (count > 0) moments = moments_about(static_cast<double>(pivot), count, sums[0], sums[1]);
  // A NaN is a valid result.
  const bool is_valid = count == 0 || (sums[1] != HUGE_VAL && !can_underflow<S>(moments, eps));
  if (!__syncthreads_or(!is_valid)) return moments;

  const auto total_of = [&](const auto& f) {
    double exact[1] = {};
    for_each_value<double>(part, x, [&](double value) { exact[0] += f(value); });
    sum_lanes(exact, part.lanes);
    return exact[0];
  };
  const double exact_mean = total_of([&](double value) { return value / static_cast<double>(count); });
  const double m2 = total_of([&](double value) { return (value - exact_mean) * (value - exact_mean); });
  return is_valid ? moments : Moments{count, exact_mean, m2};
}

// Loads a thread's vectors of the values that are normalized. With a residual, they are its sum with the input, which
// is written if `adds`, otherwise read.
template <class T, int kValues, int kVectors>
NF_DEVICE void load_summed(const LayerNormForward& args, const RowPart<kValues>& part, bool adds,
                           Vector<T, kValues> (&x)[kVectors]) {
  const int64_t channels = args.view.channels;
  if (args.residual == nullptr) return load_row(args.input, channels, part, x);
  if (!adds) return load_row(args.sum, channels, part, x);
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

// Writes the output of a chunk of a row.
template <class T, int kValues, int kVectors>
NF_DEVICE void write_row(const LayerNormForward& args, const RowPart<kValues>& part, int64_t sample,
                         const LayerStatistics& statistics, bool streaming, const Vector<T, kValues> (&x)[kVectors]) {
  using S = compute_t<T>;
  const int64_t channels = args.view.channels;
  const auto c = forward_coefficients<S>({statistics.mean, statistics.invstd, 1, 0});
  const int64_t weights = first_parameter(args.weight, sample, channels);
  const int64_t biases = first_parameter(args.bias, sample, channels);
  T* const target = static_cast<T*>(args.output) + part.row * channels;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (!part.has(v)) continue;
    S weight[kValues], bias[kValues];
    read_entries<S>(args.weight, weights + part.channel(v), 1, weight);
    read_entries<S>(args.bias, biases + part.channel(v), 0, bias);
    Vector<T, kValues> y;
#pragma unroll
    for (int i = 0; i < kValues; ++i) y.value[i] = narrow<T>(applied(c, widen<S>(x[v].value[i])) * weight[i] + bias[i]);
    y.store(target + part.channel(v), streaming);
  }
}

// Kernel: a block per plan.slots() rows (blockIdx.x) and chunk (blockIdx.y). `parts`: (rows, chunks), the moments of
// the chunks of rows that have several.
template <class T, int kValues, int kVectors>
__global__ void __launch_bounds__(kLayerThreads, 1)
    layer_norm_rows(const LayerNormForward args, const LayerRowsPlan plan, const LayerPhase phase,
                    Moments* const parts) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(plan.slots()) + threadIdx.x / plan.lanes;
  const bool is_present = row < args.view.outer;
  const RowPart<kValues> part(plan, row, is_present, args.view.channels);

  Vector<T, kValues> x[kVectors];
  load_summed(args, part, phase != LayerPhase::kApply, x);
  Moments moments{};
  if (phase != LayerPhase::kApply) moments = moments_of(part, x, args.eps);
  if (phase == LayerPhase::kSum) {
    if (is_present && part.lane == 0) parts[row * plan.chunks + blockIdx.y] = moments;
    return;
  }
  if (!is_present) return;
  if (phase == LayerPhase::kApply)
    for (int chunk = 0; chunk < plan.chunks; ++chunk) moments = merge(moments, parts[row * plan.chunks + chunk]);
  const LayerStatistics statistics = layer_statistics(moments, args.subtract_mean, args.eps);
  if (part.lane == 0 && blockIdx.y == 0) {
    args.mean[row] = statistics.mean;
    args.invstd[row] = statistics.invstd;
  }
  write_row(args, part, args.samples > 1 ? row / plan.rows : 0, statistics, plan.streaming, x);
}

// The sums of a thread's channels over rows: of grad_output, and of grad_output * d.
template <class S, int kValues, int kVectors>
using RowSums = S[2][kVectors][kValues];

// Block-wide: adds up the sums of the rows that a block processes at once, and writes them to `target`, (2, channels).
// All threads of the block must call it.
template <class S, int kValues, int kVectors>
NF_DEVICE void write_row_sums(const RowSums<S, kValues, kVectors>& sums, const RowPart<kValues>& part, int64_t channels,
                              int slots, S* target) {
  NF_SHARED(S, shared_sums, [kLayerThreads * kValues]);  // (slots, lanes, values)
  const int width = part.lanes * kValues;
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) shared_sums[threadIdx.x * kValues + i] = sums[k][v][i];
      __syncthreads();
      for (int j = threadIdx.x; j < width; j += slots * part.lanes) {
        const int64_t channel = part.begin + v * width + j;
        S total = 0;
        for (int slot = 0; slot < slots; ++slot) total += shared_sums[slot * width + j];
        if (channel < part.end) target[k * channels + channel] = total;
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
__global__ void __launch_bounds__(kLayerThreads, 1)
    layer_norm_backward_rows(const LayerNormBackward args, const LayerRowsPlan plan, const LayerPhase phase,
                             double* const chunk_sums, compute_t<T>* const parameter_sums) {
  using S = compute_t<T>;
  const int64_t channels = args.view.channels, blocks = plan.blocks;
  const int64_t sample = blockIdx.x / static_cast<unsigned>(blocks), block = blockIdx.x - sample * blocks;
  const int64_t weights = first_parameter(args.weight, sample, channels);
  const int slots = plan.slots(), slot = threadIdx.x / plan.lanes;
  RowSums<S, kValues, kVectors> sums{};

  for (int64_t first = block * slots; first < plan.rows; first += blocks * slots) {
    const bool is_present = first + slot < plan.rows;
    const int64_t row = sample * plan.rows + first + slot;
    const RowPart<kValues> part(plan, row, is_present, channels);
    Vector<T, kValues> x[kVectors], grad[kVectors];
    load_row(args.input, channels, part, x);
    load_row(args.grad_output, channels, part, grad);
    LayerStatistics statistics{0, 1};
    if (is_present) statistics = {args.mean[row], args.invstd[row]};
    double totals[2] = {};
    if (phase != LayerPhase::kApply && args.grad_input != nullptr)
      sum_row_gradients(args, part, weights, x, grad, static_cast<S>(statistics.mean), totals);
    if (!is_present) continue;
    double* const of_row = chunk_sums + row * plan.chunks * 2;
    if (phase == LayerPhase::kSum) {
      if (part.lane == 0) {
        of_row[2 * blockIdx.y] = totals[0];
        of_row[2 * blockIdx.y + 1] = totals[1];
      }
      continue;
    }
    if (phase == LayerPhase::kApply)
      for (int chunk = 0; chunk < plan.chunks; ++chunk) {
        totals[0] += of_row[2 * chunk];
        totals[1] += of_row[2 * chunk + 1];
      }
    write_row_gradient(args, part, weights, x, grad, layer_coefficients<S>(args, statistics, totals), plan.streaming,
                       sums);
  }
  if (phase == LayerPhase::kSum || parameter_sums == nullptr) return;
  const RowPart<kValues> part(plan, 0, true, channels);
  write_row_sums<S, kValues, kVectors>(sums, part, channels, slots, parameter_sums + blockIdx.x * 2 * channels);
}

// --- host

// Calls start(kValues, kVectors) with the plan's numbers, as std::integral_constant.
template <class T, bool kBackward, class F>
cudaError_t for_layer_vectors(const LayerRowsPlan& plan, const F& start) {
  constexpr int kValues = values_per_access(sizeof(T)), kBytes = sizeof(compute_t<T>);
  const auto with_values = [&](auto values) {
    constexpr int kFew = layer_vectors(kBytes, values(), kBackward, true);
    constexpr int kMany = layer_vectors(kBytes, values(), kBackward, false);
    return plan.vectors == kFew ? start(values, std::integral_constant<int, kFew>{})
                                : start(values, std::integral_constant<int, kMany>{});
  };
  return plan.values == 1 ? with_values(std::integral_constant<int, 1>{})
                          : with_values(std::integral_constant<int, kValues>{});
}

}  // namespace normfused::cuda
