// Group norm, of which instance norm is the case of one channel per group: what is computed per statistic, between
// launches of the kernels of batch norm.
//
// A tensor is a ChannelView in which each channel of each sample has coefficients of its own (GroupView::by_sample).
// Such a channel has the index statistic * width + j, where j counts the channels of its group. Neighbouring lanes of a
// warp compute one statistic together.
#pragma once

#include "kernels/cuda/batch_norm.cuh"

namespace normfused::cuda {

// Kernel: calls function(statistic, lane, lanes, is_present) in `lanes` neighbouring threads for every statistic. The
// lanes of the last warp that have no statistic are called with the last one and is_present = false: they must take
// part in shuffles, and write nothing.
template <class F>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    each_statistic(const F function, const int64_t statistics, const int lanes) {
  allow_next_launch();
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads / lanes) + threadIdx.x / lanes;
  const bool is_present = i < statistics;
  function(is_present ? i : statistics - 1, static_cast<int>(threadIdx.x) % lanes, lanes, is_present);
}

// Lanes for statistics of this many channels each: a power of two, at most a warp.
constexpr int lanes_of_statistic(int64_t width) {
  int lanes = 1;
  while (lanes < kWarp && lanes < width) lanes *= 2;
  return lanes;
}

template <class F>
cudaError_t for_each_statistic(const F& function, int64_t statistics, int64_t width, cudaStream_t stream) {
  const int lanes = lanes_of_statistic(width);
  const int64_t blocks = (statistics * lanes + kThreads - 1) / kThreads;
  return launch(LaunchConfig{dim3(extent(blocks)), dim3(kThreads), stream}, each_statistic<F>, function, statistics,
                lanes);
}

// The parameters' entry of a channel of a sample.
NF_DEVICE double read_parameter(const SampleParameter& parameter, int64_t index, int64_t channels, double absent) {
  return read(parameter, parameter.by_sample ? index : index % channels, absent);
}

// Merges the moments of `parts` parts of each statistic, `count` values each, and writes mean and invstd of the
// statistic and the coefficients of NormalizeOp of its channels.
template <class S>
struct FinishGroups {
  GroupNormForward args;
  const double *mean, *m2;  // (statistics, parts)
  int64_t parts, count;
  S* table;

  NF_DEVICE void operator()(int64_t statistic, int lane, int lanes, bool is_present) const {
    const GroupView& view = args.view;
    const double *const means = mean + statistic * parts, *const m2s = m2 + statistic * parts;
    // Deviations from the first mean: a constant statistic has exact moments.
    double offset[1] = {}, squares[1] = {};
    for (int64_t i = lane; i < parts; i += lanes) offset[0] += means[i] - means[0];
    sum_lanes(offset, lanes);
    const double merged_mean = means[0] + offset[0] / static_cast<double>(parts);
    for (int64_t i = lane; i < parts; i += lanes) {
      const double deviation = means[i] - merged_mean;
      squares[0] += m2s[i] + deviation * deviation * static_cast<double>(count);
    }
    sum_lanes(squares, lanes);
    const Moments moments{view.count(), merged_mean, squares[0]};
    const double invstd = invstd_of(biased_variance(moments), args.eps);
    if (!is_present) return;
    if (lane == 0) {
      args.mean[statistic] = moments.mean;
      args.invstd[statistic] = invstd;
    }
    for (int64_t j = lane; j < view.width(); j += lanes) {
      const int64_t c = statistic * view.width() + j;
      const double weight = read_parameter(args.weight, c, view.channels, 1);
      const double bias = read_parameter(args.bias, c, view.channels, 0);
      store_coefficients(table, view.samples * view.channels, c,
                         forward_coefficients<S>({moments.mean, invstd, weight, bias}));
    }
  }
};

// Block-wide: calls function(statistic, lane, lanes, is_present) for the statistics of channels [first, last) of
// samples, as each_statistic() does. All threads of the block must call it.
template <class F>
NF_DEVICE void for_statistics_of(const F& function, const Divider<uint64_t>& by_width, int64_t width, int64_t first,
                                 int64_t last) {
  const int lanes = lanes_of_statistic(width);
  const auto end = static_cast<int64_t>(by_width(static_cast<uint64_t>(last)));
  auto statistic = static_cast<int64_t>(by_width(static_cast<uint64_t>(first)));
  for (; statistic < end; statistic += kThreads / lanes) {
    const int64_t i = statistic + threadIdx.x / lanes;
    function(i < end ? i : end - 1, static_cast<int>(threadIdx.x) % lanes, lanes, i < end);
  }
}

// The normalization of each channel of a sample, without statistics and parameters.
inline BatchNormForward by_channel_of(const GroupNormForward& args) {
  BatchNormForward by_channel{};
  by_channel.view = args.view.by_sample();
  by_channel.dtype = args.dtype;
  by_channel.input = args.input;
  by_channel.output = args.output;
  by_channel.activation = args.activation;
  by_channel.residual = args.residual;
  by_channel.mask = args.mask;
  return by_channel;
}

// The view of a double array with an entry for each channel of each sample.
inline ChannelVector vector_of(double* data) { return {data, DType::kFloat64}; }

// Backward by channels of samples, without what GradSumsOp reads of a channel.
inline BatchNormBackward by_channel_of(const GroupNormBackward& args, double* grad_weight, double* grad_bias) {
  BatchNormBackward by_channel{};
  by_channel.view = args.view.by_sample();
  by_channel.dtype = args.dtype;
  by_channel.grad_output = args.grad_output;
  by_channel.input = args.input;
  by_channel.grad_input = args.grad_input;
  by_channel.grad_weight = vector_of(grad_weight);
  by_channel.grad_bias = vector_of(grad_bias);
  by_channel.training = true;
  by_channel.activation = args.activation;
  by_channel.residual = args.residual;
  by_channel.mask = args.mask;
  by_channel.grad_residual = args.grad_residual;
  return by_channel;
}

// What GradSumsOp reads of a channel of a sample. Arrays have an entry for each.
struct ChannelsOfGroups {
  GroupNormBackward args;
  double *mean, *invstd, *weight, *bias;  // written

  NF_DEVICE void operator()(int64_t c) const {
    const int64_t statistic = c / args.view.width();
    mean[c] = args.mean[statistic];
    invstd[c] = args.invstd[statistic];
    weight[c] = read_parameter(args.weight, c, args.view.channels, 1);
    bias[c] = read_parameter(args.bias, c, args.view.channels, 0);
  }
};

// Replaces the coefficients of GradInputOp that depend on sums, which those of the channels of a group share. With
// gradients of z weighted by the weight, the statistic is that of a batch norm without parameters.
template <class S>
struct FinishGroupsBackward {
  GroupNormBackward args;
  const double *grad_weight, *grad_bias;  // of each channel of each sample
  S* table;

  NF_DEVICE void operator()(int64_t statistic, int lane, int lanes, bool is_present) const {
    const GroupView& view = args.view;
    const int64_t first = statistic * view.width(), channels = view.samples * view.channels;
    double sums[2] = {};
    for (int64_t j = lane; j < view.width(); j += lanes) {
      const double weight = read_parameter(args.weight, first + j, view.channels, 1);
      sums[0] += weight * grad_weight[first + j];
      sums[1] += weight * grad_bias[first + j];
    }
    sum_lanes(sums, lanes);
    if (!is_present) return;
    const Normalization plain{args.mean[statistic], args.invstd[statistic], 1, 0};
    const auto k = backward_coefficients<S>(plain, view.count(), sums[0], sums[1]);
    for (int64_t c = first + lane; c < first + view.width(); c += lanes) {
      table[GradCoefficient::kSlope * channels + c] = k.slope;
      table[GradCoefficient::kShift * channels + c] = k.shift;
    }
  }
};

}  // namespace normfused::cuda
