// Every kernel against its definition. A Backend is a class with the functions of kernels/cpu/kernels.h.
#pragma once

#include "batch_norm.h"
#include "finish.h"
#include "fused.h"
#include "integer_sums.h"
#include "local_response_norm.h"
#include "nonfinite.h"
#include "ranks.h"
#include "standardize.h"

namespace normfused::testing {

template <class T, class Backend>
void run_statistics(Backend& backend, const Case<T>& data, const Statistics<T>& want) {
  const int64_t channels = data.view.channels;
  std::vector<double> results[4];
  for (auto& r : results) r.resize(channels);
  ChannelStats args{data.view,
                    Format<T>::dtype,
                    data.input.data,
                    {results[0].data(), results[1].data(), results[2].data(), results[3].data()}};
  backend.channel_moments(args);
  for (int64_t c = 0; c < channels; ++c) {
    expect_near("mean", c, results[0][c], want.mean[c], 1e-6);
    expect_near("m2", c, results[1][c], want.m2[c], 1e-5 * want.m2[c] + 1e-9);
    expect_near("min", c, results[2][c], want.low[c], 0);
    expect_near("max", c, results[3][c], want.high[c], 0);
  }
  backend.channel_sums(args);
  for (int64_t c = 0; c < channels; ++c) {
    expect_near("sum", c, results[0][c], want.sum[c], 1e-12 * std::abs(static_cast<double>(want.sum[c])));
    expect_near("sum_of_squares", c, results[1][c], want.squares[c], 1e-12 * want.squares[c]);
    expect_near("min of sums", c, results[2][c], want.low[c], 0);
    expect_near("max of sums", c, results[3][c], want.high[c], 0);
  }
}

// Runs all kernels of a backend for one dtype, shape and alignment.
template <class T, class Backend>
void run(Backend& backend, ChannelView view, int64_t offset, std::mt19937& random) {
  current = backend.name() + " " + Format<T>::name + " outer " + std::to_string(view.outer) + " channels " +
            std::to_string(view.channels) + " inner " + std::to_string(view.inner) + " offset " +
            std::to_string(offset);
  const Case<T> data(view, offset, random);
  const Statistics<T> statistics(data);
  run_statistics(backend, data, statistics);
  const std::string name = current;
  run_local_response_norm(backend, Window::next(view.channels), data, offset);
  current = name;
  // For every third case, which reaches all dtypes: it repeats most of what follows, and sanitizers are slow.
  static int64_t cases = 0;
  if (cases++ % 3 == 0) run_ranks(backend, data, offset, random);
  if (view.positions() < 2) return;

  BatchNormCase<T, Backend> batch_norm(backend, data, statistics, offset);
  batch_norm.run_training();
  batch_norm.run_backward();
  batch_norm.run_inference();
  batch_norm.run_backward_without_reduction();

  const BatchNormForward forward = batch_norm.forward_with_batch_statistics();
  const AffineStatistics channels{batch_norm.mean, batch_norm.invstd, batch_norm.weight(), batch_norm.bias()};
  run_fused(backend, Fusion::next(), data, forward, offset, channels, random);
  for (const ActivationKind kind : {ActivationKind::kIdentity, ActivationKind::kLeakyRelu})
    run_in_place(backend, {kind, 0.3}, data, forward, offset, channels);
}

}  // namespace normfused::testing
