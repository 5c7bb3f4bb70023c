// Layer norm and RMS norm over the channels of channels-first tensors: a statistic is a column of a matrix (channels,
// inner) for each outer index.
//
// Forward is a reduction (see reduce.cuh) of the columns, whose apply Op finds the weight of a value from its offset.
// In backward a block reads all channels of a tile of columns twice: first for the sums of the columns, then to write
// their gradient and to sum over the columns for the gradients of weight and bias. The tile is in the caches then.
#pragma once

#include "kernels/cuda/channel_stats.cuh"
#include "kernels/cuda/layer_norm.cuh"

namespace normfused::cuda {

// --- forward

// The view in which each position is a channel.
NF_FN ChannelView columns_of_positions(const ChannelView& view) { return {view.channels, view.inner, 1, view.outer}; }

// Finish: mean, invstd and the coefficients of LayerNormalizeOp of a position.
template <class S>
struct FinishLayers {
  LayerNormForward args;
  S* table;  // (3, positions)

  using Preloaded = NoPreload;
  static constexpr bool kColumnsOnly = true;
  NF_DEVICE Preloaded preload(int64_t) const { return {}; }
  NF_DEVICE void prefetch(int64_t) const {}
  NF_DEVICE void operator()(int64_t position, const double (&results)[2], const Preloaded&) const {
    const LayerStatistics statistics =
        layer_statistics({args.view.channels, results[0], results[1]}, args.subtract_mean, args.eps);
    args.mean[position] = statistics.mean;
    args.invstd[position] = statistics.invstd;
    const auto c = forward_coefficients<S>({statistics.mean, statistics.invstd, 1, 0});
    const int64_t positions = args.view.positions();
    table[position] = c.pivot;
    table[positions + position] = c.scale;
    table[2 * positions + position] = c.shift;
  }
};

// Apply Op: output = d * weight + bias, with weight and bias of the channel that the offset is in.
template <class T_>
struct LayerNormalizeOp {
  using T = T_;
  using Output = T;
  using S = compute_t<T>;
  static constexpr int kInputs = 1, kRequiredInputs = 1, kOutputs = 1, kCoefficients = 3;
  static constexpr bool kWritesMask = false, kPrepares = false, kColumnsOnly = true;

  LayerNormForward args;
  const T* tensor;
  Output* target;
  const S* table;
  int64_t outers;  // outer indices of a sample
  Divider<uint64_t> by_inner, by_channels;

  NF_DEVICE const T* input(int) const { return tensor; }
  NF_DEVICE Output* output(int) const { return target; }

  template <int n, class CoefficientsOf>
  NF_DEVICE void operator()(const S (&x)[1][n], S (&y)[1][n], const CoefficientsOf& coefficients_of, int64_t offset,
                            uint32_t) const {
    const int64_t inner = args.view.inner, channels = args.view.channels;
    int64_t row = static_cast<int64_t>(by_inner(static_cast<uint64_t>(offset))), place = offset - row * inner;
    S weight = weight_of(row), bias = bias_of(row);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const auto& c = coefficients_of(i);
      y[0][i] = ((x[0][i] - c.k[0]) * c.k[1] + c.k[2]) * weight + bias;
      if (++place < inner || i + 1 == n || row + 1 == args.view.outer * channels) continue;
      place = 0;
      ++row;
      weight = weight_of(row);
      bias = bias_of(row);
    }
  }
  NF_DEVICE void prologue() const {}

 private:
  // A row is a channel of an outer index.
  NF_DEVICE int64_t index_of(const SampleParameter& parameter, int64_t row) const {
    const auto outer = static_cast<int64_t>(by_channels(static_cast<uint64_t>(row)));
    const int64_t channel = row - outer * args.view.channels;
    return parameter.by_sample ? outer / outers * args.view.channels + channel : channel;
  }
  NF_DEVICE S weight_of(int64_t row) const { return static_cast<S>(read(args.weight, index_of(args.weight, row), 1)); }
  NF_DEVICE S bias_of(int64_t row) const { return static_cast<S>(read(args.bias, index_of(args.bias, row), 0)); }
};

// Kernel: sum = input + residual, a vector per thread.
template <class T, int kValues>
__global__ void __launch_bounds__(kThreads, kMinBlocks) add_residuals(const LayerNormForward args) {
  using V = Vector<T, kValues>;
  allow_next_launch();
  const int64_t offset = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * kValues;
  if (offset >= args.view.numel()) return;
  const V input = V::load(static_cast<const T*>(args.input) + offset);
  const V residual = V::load(static_cast<const T*>(args.residual) + offset);
  add_residual(input, residual).store(static_cast<T*>(args.sum) + offset, false);
}

// --- backward

// One tile of columns, and the thread's vector of columns in it. Thread x of y reads every height-th row.
template <int kValues>
struct LayerTile {
  const LayerColumnsPlan& plan;
  int x, y;
  int64_t column, position;  // the thread's first column, and its position
  int64_t first;             // the offset of that column in the first row
  bool is_present;           // whether the thread has columns

  NF_DEVICE LayerTile(const LayerColumnsPlan& plan, const ChannelView& view, int64_t outer, int64_t tile)
      : plan(plan), x(static_cast<int>(threadIdx.x) % plan.width), y(static_cast<int>(threadIdx.x) / plan.width) {
    column = (tile * plan.width + x) * kValues;
    position = outer * view.inner + column;
    first = outer * view.channels * view.inner + column;
    is_present = column < view.inner;
  }
};

// Block-wide: the sums of k and of k * (x - pivot) of the thread's columns over all rows. All threads of the block must
// call it; it begins with a barrier.
template <class T, int kValues>
NF_DEVICE void sum_columns(const LayerNormBackward& args, const LayerTile<kValues>& tile, int64_t weights,
                           const double (&mean)[kValues], double (&totals)[kValues][2]) {
  using S = compute_t<T>;
  using V = Vector<T, kValues>;
  NF_SHARED(S, shared_sums, [2 * kThreads * kValues]);  // (sums, height, columns)
  S sums[2][kValues]{}, pivot[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) pivot[i] = static_cast<S>(mean[i]);
#pragma unroll 4
  for (int64_t row = tile.y; row < args.view.channels; row += tile.plan.height) {
    if (!tile.is_present) break;
    const int64_t offset = tile.first + row * args.view.inner;
    const V x = V::load(static_cast<const T*>(args.input) + offset);
    const V grad = V::load(static_cast<const T*>(args.grad_output) + offset);
    const S weight = static_cast<S>(read(args.weight, weights + row, 1));
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const S k = widen<S>(grad.value[i]) * weight;
      sums[0][i] += k;
      sums[1][i] += k * (widen<S>(x.value[i]) - pivot[i]);
    }
  }
  __syncthreads();  // the sums of the previous tile have been read
  const int width = tile.plan.width * kValues;
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int i = 0; i < kValues; ++i)
      shared_sums[(k * tile.plan.height + tile.y) * width + tile.x * kValues + i] = sums[k][i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i)
    for (int k = 0; k < 2; ++k) {
      totals[i][k] = 0;
      for (int y = 0; y < tile.plan.height; ++y)
        totals[i][k] += static_cast<double>(shared_sums[(k * tile.plan.height + y) * width + tile.x * kValues + i]);
    }
}

// Writes grad_input of the thread's columns, and adds the sums over the tile's columns of grad_output and of
// grad_output * d to `target`, (2, channels), or writes them there if `is_first`. A row of `target` is accessed by one
// thread of the block, in every tile.
template <class T, int kValues>
NF_DEVICE void write_columns(const LayerNormBackward& args, const LayerTile<kValues>& tile, int64_t weights,
                             const LayerCoefficients<compute_t<T>> (&c)[kValues], bool is_first, compute_t<T>* target) {
  using S = compute_t<T>;
  using V = Vector<T, kValues>;
  const int64_t channels = args.view.channels, rounds = (channels + tile.plan.height - 1) / tile.plan.height;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t row = round * tile.plan.height + tile.y;
    S sums[2] = {};
    if (tile.is_present && row < channels) {
      const int64_t offset = tile.first + row * args.view.inner;
      const V x = V::load(static_cast<const T*>(args.input) + offset);
      const V grad = V::load(static_cast<const T*>(args.grad_output) + offset);
      V grad_sum{}, result;
      if (args.grad_sum != nullptr) grad_sum = V::load(static_cast<const T*>(args.grad_sum) + offset);
      const S weight = static_cast<S>(read(args.weight, weights + row, 1));
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const S value = widen<S>(x.value[i]), g = widen<S>(grad.value[i]);
        sums[0] += g;
        sums[1] += g * layer_deviation(c[i], value);
        result.value[i] = narrow<T>(layer_gradient(c[i], value, g, weight) + widen<S>(grad_sum.value[i]));
      }
      if (args.grad_input != nullptr) result.store(static_cast<T*>(args.grad_input) + offset, tile.plan.streaming);
    }
    if (target == nullptr) continue;
    for (int step = tile.plan.width / 2; step > 0; step /= 2)
      for (S& sum : sums) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (tile.x != 0 || row >= channels) continue;
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
  const int64_t weights = first_parameter(args.weight, sample, args.view.channels);
  S* const target = parameter_sums == nullptr ? nullptr : parameter_sums + blockIdx.x * 2 * args.view.channels;
  for (int64_t i = block; i < plan.outers * plan.tiles; i += plan.blocks) {
    const int64_t outer = static_cast<int64_t>(plan.by_tiles(static_cast<uint64_t>(i)));
    const LayerTile<kValues> tile(plan, args.view, sample * plan.outers + outer, i - outer * plan.tiles);
    double mean[kValues]{}, invstd[kValues]{}, totals[kValues][2];
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      if (!tile.is_present) continue;
      mean[j] = args.mean[tile.position + j];
      invstd[j] = args.invstd[tile.position + j];
    }
    sum_columns<T>(args, tile, weights, mean, totals);
    LayerCoefficients<S> c[kValues];
#pragma unroll
    for (int j = 0; j < kValues; ++j) c[j] = layer_coefficients<S>(args, {mean[j], invstd[j]}, totals[j]);
    write_columns<T>(args, tile, weights, c, i == block, target);
  }
}

}  // namespace normfused::cuda
