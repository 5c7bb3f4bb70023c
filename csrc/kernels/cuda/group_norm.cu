#include "kernels/cuda/group_norm.cuh"

#include "kernels/cuda/batch_norm_dtype.h"
#include "kernels/cuda/group_norm_single.h"
#include "kernels/cuda/launch.cuh"

namespace normfused::cuda {

namespace {

double* doubles(int64_t count, Resources& resources) {
  return static_cast<double*>(resources.scratch(count * static_cast<int64_t>(sizeof(double))));
}

template <class T>
compute_t<T>* table_of(int rows, const GroupView& view, Resources& resources) {
  using S = compute_t<T>;
  return static_cast<S*>(resources.scratch(rows * view.samples * view.channels * static_cast<int64_t>(sizeof(S))));
}

// The first error of calls, none of which is made after it.
template <class... F>
cudaError_t in_turn(const F&... calls) {
  cudaError_t error = cudaSuccess;
  (void)(((error = calls()) == cudaSuccess) && ...);
  return error;
}

// Channels first, the values of a statistic are contiguous, and are reduced together. Channels last, each channel of a
// sample is reduced.
template <class T>
cudaError_t forward(const GroupNormForward& args, Resources& resources) {
  using S = compute_t<T>;
  const GroupView& view = args.view;
  const ChannelView reduced = view.reduced();
  const int64_t count = reduced.statistics();
  double* const results = doubles(4 * count, resources);
  S* const table = table_of<T>(BatchNormOf<T>::kForwardRows, view, resources);
  const ChannelStats stats{
      reduced, args.dtype, args.input, {results, results + count, results + 2 * count, results + 3 * count}};
  const FinishGroups<S> finish{args, results, results + count, count / view.statistics(), reduced.positions(), table};

  const BatchNormForward normalize = by_channel_of(args);
  return in_turn([&] { return channel_moments(stats, resources); },
                 [&] { return for_each_statistic(finish, view.statistics(), view.width(), resources.stream); },
                 [&] { return BatchNormOf<T>::normalize(normalize, table, resources); });
}

template <class T>
cudaError_t backward(const GroupNormBackward& args, Resources& resources) {
  using S = compute_t<T>;
  const GroupView& view = args.view;
  const int64_t count = view.samples * view.channels;
  double* const arrays = doubles(6 * count, resources);
  double *const grad_weight = arrays + 4 * count, *const grad_bias = arrays + 5 * count;
  const auto sum_over_samples = [&](const SampleParameter& output, const double* gradients) {
    if (!output) return cudaSuccess;
    return for_each_channel(WriteParameterGradient{gradients, view.channels, output, view.samples, view.channels},
                            output.by_sample ? count : view.channels, resources.stream);
  };
  bool is_done = false;
  if (args.grad_input != nullptr) {
    const cudaError_t error = group_norm_backward_single(args, grad_weight, grad_bias, resources, is_done);
    if (error != cudaSuccess) return error;
  }
  if (is_done)
    return in_turn([&] { return sum_over_samples(args.grad_weight, grad_weight); },
                   [&] { return sum_over_samples(args.grad_bias, grad_bias); });

  S* const table = table_of<T>(BatchNormOf<T>::kBackwardRows, view, resources);
  const ChannelsOfGroups channels{args, arrays, arrays + count, arrays + 2 * count, arrays + 3 * count};
  const FinishGroupsBackward<S> finish{args, grad_weight, grad_bias, table};
  BatchNormBackward by_channel = by_channel_of(args, grad_weight, grad_bias);
  by_channel.weight = vector_of(channels.weight);
  by_channel.bias = vector_of(channels.bias);
  by_channel.mean = channels.mean;
  by_channel.invstd = channels.invstd;
  const auto apply = [&] {
    if (args.grad_input == nullptr) return cudaSuccess;
    return in_turn([&] { return for_each_statistic(finish, view.statistics(), view.width(), resources.stream); },
                   [&] { return BatchNormOf<T>::grad_input(by_channel, table, resources); });
  };
  return in_turn([&] { return for_each_channel(channels, count, resources.stream); },
                 [&] { return BatchNormOf<T>::grad_sums(by_channel, table, resources); },
                 [&] { return sum_over_samples(args.grad_weight, grad_weight); },
                 [&] { return sum_over_samples(args.grad_bias, grad_bias); }, apply);
}

}  // namespace

cudaError_t group_norm(const GroupNormForward& args, Resources& resources) {
  bool is_done = false;
  const cudaError_t error = args.view.channels_last ? group_norm_columns(args, resources, is_done)
                                                    : group_norm_rows(args, resources, is_done);
  if (is_done || error != cudaSuccess) return error;
  return for_floating(args.dtype, [&](auto type) { return forward<typename decltype(type)::type>(args, resources); });
}

cudaError_t group_norm_backward(const GroupNormBackward& args, Resources& resources) {
  return for_floating(args.dtype, [&](auto type) { return backward<typename decltype(type)::type>(args, resources); });
}

}  // namespace normfused::cuda
