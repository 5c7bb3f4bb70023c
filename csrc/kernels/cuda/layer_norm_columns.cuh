// Layer norm and RMS norm over the channels of channels-first tensors: a statistic is a column of a matrix (channels,
// inner) for each outer index.
//
// A block reads all channels of a tile of columns several times: for the statistics or the sums of the columns, and
// then to write them. Only the first time is the tile not in the caches.
#pragma once

#include "kernels/cuda/layer_norm.cuh"

namespace normfused::cuda {

// A tile of columns, and the thread's vector of columns in it. The threads with the same y read every height-th row,
// which is a channel, from row y on.
template <int kValues>
struct LayerTile {
  const LayerColumnsPlan& plan;
  const ChannelView& view;
  int x, y;
  int64_t position;  // of the thread's first column
  int64_t first;     // the offset of that column in row 0
  bool is_present;   // whether the thread has columns

  NF_DEVICE LayerTile(const LayerColumnsPlan& plan, const ChannelView& view, int64_t outer, int64_t tile)
      : plan(plan),
        view(view),
        x(static_cast<int>(threadIdx.x) % plan.width),
        y(static_cast<int>(threadIdx.x) / plan.width) {
    const int64_t column = (tile * plan.width + x) * kValues;
    position = outer * view.inner + column;
    first = outer * view.channels * view.inner + column;
    is_present = column < view.inner;
  }

  template <class T>
  NF_DEVICE Vector<T, kValues> load(const void* tensor, int64_t row) const {
    return Vector<T, kValues>::load(static_cast<const T*>(tensor) + first + row * view.inner);
  }
  template <class T>
  NF_DEVICE void store(void* tensor, int64_t row, const Vector<T, kValues>& vector, bool streaming) const {
    vector.store(static_cast<T*>(tensor) + first + row * view.inner, streaming);
  }
  // Calls f(row) for every row that the thread reads.
  template <class F>
  NF_DEVICE void for_each_row(const F& f) const {
    if (!is_present) return;
#pragma unroll 4
    for (int64_t row = y; row < view.channels; row += plan.height) f(row);
  }
};

// Block-wide: adds up n sums of the thread's columns over all threads of the same columns, in double. All threads of
// the block must call it; it begins with a barrier.
template <class S, int n, int kValues>
NF_DEVICE void total_columns(const LayerTile<kValues>& tile, const S (&sums)[n][kValues],
                             double (&totals)[n][kValues]) {
  NF_SHARED(S, shared_sums, [n * kThreads * kValues]);  // (sums, height, columns)
  const int width = tile.plan.width * kValues, height = tile.plan.height;
  __syncthreads();  // the sums of the previous call have been read
#pragma unroll
  for (int k = 0; k < n; ++k)
#pragma unroll
    for (int i = 0; i < kValues; ++i) shared_sums[(k * height + tile.y) * width + tile.x * kValues + i] = sums[k][i];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < n; ++k)
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      totals[k][i] = 0;
      for (int y = 0; y < height; ++y)
        totals[k][i] += static_cast<double>(shared_sums[(k * height + y) * width + tile.x * kValues + i]);
    }
}

// --- forward

// Block-wide: n sums over all channels of each of the thread's columns, computed in R. f(x, i, add) calls add(k, value)
// for value x of column i.
template <class R, int n, class T, int kValues, class F>
NF_DEVICE void sum_columns(const LayerTile<kValues>& tile, const void* tensor, const F& f,
                           double (&totals)[n][kValues]) {
  R sums[n][kValues]{};
  tile.for_each_row([&](int64_t row) {
    const auto x = tile.template load<T>(tensor, row);
#pragma unroll
    for (int i = 0; i < kValues; ++i) f(widen<R>(x.value[i]), i, [&](int k, R value) { sums[k][i] += value; });
  });
  total_columns(tile, sums, totals);
}

// Block-wide: the moments of the thread's columns, computed in R. The pivot is the mean in R, whose sum cannot
// overflow, because every value is divided by the count first. Returns whether no square of these columns overflowed or
// underflowed R; a NaN is a valid result.
template <class R, class T, int kValues>
NF_DEVICE bool moments_in(const LayerTile<kValues>& tile, const void* tensor, double eps, Moments (&moments)[kValues]) {
  const int64_t count = tile.view.channels;
  const R share = 1 / static_cast<R>(count);
  double mean[1][kValues], sums[2][kValues];
  R pivot[kValues];
  sum_columns<R, 1, T>(tile, tensor, [&](R x, int, const auto& add) { add(0, x * share); }, mean);
#pragma unroll
  for (int i = 0; i < kValues; ++i) pivot[i] = is_finite(static_cast<R>(mean[0][i])) ? static_cast<R>(mean[0][i]) : 0;
  const auto add_deviation = [&](R x, int i, const auto& add) {
    const R deviation = x - pivot[i];
    add(0, deviation);
    add(1, deviation * deviation);
  };
  sum_columns<R, 2, T>(tile, tensor, add_deviation, sums);
  bool is_valid = true;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    moments[i] = moments_about(static_cast<double>(pivot[i]), count, sums[0][i], sums[1][i]);
    is_valid = is_valid && sums[1][i] != HUGE_VAL && !can_underflow<R>(moments[i], eps);
  }
  return is_valid || !tile.is_present;
}

// Writes sum = input + residual, rounded to T, for the values that the thread reads.
template <class T, int kValues>
NF_DEVICE void add_residuals(const LayerNormForward& args, const LayerTile<kValues>& tile) {
  tile.for_each_row([&](int64_t row) {
    const auto sum = add_residual(tile.template load<T>(args.input, row), tile.template load<T>(args.residual, row));
    tile.store(args.sum, row, sum, false);
  });
}

// Kernel: a block per tile of an outer index.
template <class T, int kValues>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    layer_norm_columns(const LayerNormForward args, const LayerColumnsPlan plan) {
  using S = compute_t<T>;
  const auto outer = static_cast<int64_t>(plan.by_tiles(blockIdx.x));
  const LayerTile<kValues> tile(plan, args.view, outer, blockIdx.x - outer * plan.tiles);
  if (args.residual != nullptr) add_residuals<T>(args, tile);
  const void* const x = args.residual == nullptr ? args.input : args.sum;
  Moments moments[kValues];
  const bool is_valid = moments_in<S, T>(tile, x, args.eps, moments);
  if (__syncthreads_or(!is_valid)) moments_in<double, T>(tile, x, args.eps, moments);

  ForwardCoefficients<S> c[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const LayerStatistics statistics = layer_statistics(moments[i], args.subtract_mean, args.eps);
    c[i] = forward_coefficients<S>({statistics.mean, statistics.invstd, 1, 0});
    if (tile.y != 0 || !tile.is_present) continue;
    args.mean[tile.position + i] = statistics.mean;
    args.invstd[tile.position + i] = statistics.invstd;
  }
  const int64_t sample = args.samples > 1 ? outer / plan.outers : 0;
  const int64_t weights = args.weight.first(sample, args.view.channels);
  const int64_t biases = args.bias.first(sample, args.view.channels);
  tile.for_each_row([&](int64_t row) {
    const S weight = static_cast<S>(read(args.weight, weights + row, 1));
    const S bias = static_cast<S>(read(args.bias, biases + row, 0));
    auto y = tile.template load<T>(x, row);
#pragma unroll
    for (int i = 0; i < kValues; ++i) y.value[i] = narrow<T>(applied(c[i], widen<S>(y.value[i])) * weight + bias);
    tile.store(args.output, row, y, plan.streaming);
  });
}

// --- backward

// Block-wide: the sums of k and of k * (x - pivot) of the thread's columns over all channels. All threads of the block
// must call it; it begins with a barrier.
template <class T, int kValues>
NF_DEVICE void sum_column_gradients(const LayerNormBackward& args, const LayerTile<kValues>& tile, int64_t weights,
                                    const double (&mean)[kValues], double (&totals)[2][kValues]) {
  using S = compute_t<T>;
  S sums[2][kValues]{}, pivot[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) pivot[i] = static_cast<S>(mean[i]);
  tile.for_each_row([&](int64_t row) {
    const auto x = tile.template load<T>(args.input, row), grad = tile.template load<T>(args.grad_output, row);
    const S weight = static_cast<S>(read(args.weight, weights + row, 1));
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const S k = widen<S>(grad.value[i]) * weight;
      sums[0][i] += k;
      sums[1][i] += k * (widen<S>(x.value[i]) - pivot[i]);
    }
  });
  total_columns(tile, sums, totals);
}

// Writes grad_input of the thread's columns in one row, if it is requested. Returns the sums over these columns of
// grad_output and of grad_output * d.
template <class T, int kValues>
NF_DEVICE void write_column_gradients(const LayerNormBackward& args, const LayerTile<kValues>& tile, int64_t weights,
                                      int64_t row, const LayerCoefficients<compute_t<T>> (&c)[kValues],
                                      compute_t<T> (&sums)[2]) {
  using S = compute_t<T>;
  const auto x = tile.template load<T>(args.input, row), grad = tile.template load<T>(args.grad_output, row);
  Vector<T, kValues> grad_sum{}, result;
  if (args.grad_sum != nullptr) grad_sum = tile.template load<T>(args.grad_sum, row);
  const S weight = static_cast<S>(read(args.weight, weights + row, 1));
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const S value = widen<S>(x.value[i]), g = widen<S>(grad.value[i]);
    sums[0] += g;
    sums[1] += g * layer_deviation(c[i], value);
    result.value[i] = narrow<T>(layer_gradient(c[i], value, g, weight) + widen<S>(grad_sum.value[i]));
  }
  if (args.grad_input != nullptr) tile.store(args.grad_input, row, result, tile.plan.streaming);
}

// Writes grad_input of a tile, and adds the sums of its rows to `target`, (2, channels), or writes them there if
// `is_first`; `target` may be null. An entry of `target` is accessed by one thread of the block, for every tile.
template <class T, int kValues>
NF_DEVICE void write_tile_gradients(const LayerNormBackward& args, const LayerTile<kValues>& tile, int64_t weights,
                                    const LayerCoefficients<compute_t<T>> (&c)[kValues], bool is_first,
                                    compute_t<T>* target) {
  using S = compute_t<T>;
  const int64_t channels = args.view.channels;
  // All threads of a warp take part in the shuffles of each round.
  for (int64_t first = 0; first < channels; first += tile.plan.height) {
    const int64_t row = first + tile.y;
    S sums[2] = {};
    if (tile.is_present && row < channels) write_column_gradients<T>(args, tile, weights, row, c, sums);
    if (target == nullptr) continue;
    for (int step = tile.plan.width / 2; step > 0; step /= 2)
      for (S& sum : sums) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (tile.x != 0 || row >= channels) continue;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      S& total = target[k * channels + row];
      total = is_first ? sums[k] : total + sums[k];
    }
  }
}

// Kernel: a block per share of the tiles of a sample. `parameter_sums`: (samples * plan.blocks, 2, channels), written
// unless it is null: the sums of grad_output and of grad_output * d over the columns of each block.
template <class T, int kValues>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    layer_norm_backward_columns(const LayerNormBackward args, const LayerColumnsPlan plan,
                                compute_t<T>* const parameter_sums) {
  using S = compute_t<T>;
  const int64_t sample = blockIdx.x / static_cast<unsigned>(plan.blocks), block = blockIdx.x - sample * plan.blocks;
  const int64_t weights = args.weight.first(sample, args.view.channels);
  S* const target = parameter_sums == nullptr ? nullptr : parameter_sums + blockIdx.x * 2 * args.view.channels;
  for (int64_t i = block; i < plan.outers * plan.tiles; i += plan.blocks) {
    const auto outer = static_cast<int64_t>(plan.by_tiles(static_cast<uint64_t>(i)));
    const LayerTile<kValues> tile(plan, args.view, sample * plan.outers + outer, i - outer * plan.tiles);
    double mean[kValues]{}, invstd[kValues]{}, totals[2][kValues]{};
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      if (!tile.is_present) continue;
      mean[j] = args.mean[tile.position + j];
      invstd[j] = args.invstd[tile.position + j];
    }
    if (args.grad_input != nullptr) sum_column_gradients<T>(args, tile, weights, mean, totals);
    LayerCoefficients<S> c[kValues];
#pragma unroll
    for (int j = 0; j < kValues; ++j)
      c[j] = layer_coefficients<S>(args, {mean[j], invstd[j]}, {totals[0][j], totals[1][j]});
    write_tile_gradients<T>(args, tile, weights, c, i == block, target);
  }
}

}  // namespace normfused::cuda
