// Every kernel against its definition.
#pragma once

#include "finish.h"
#include "fused.h"
#include "integer_sums.h"
#include "local_response_norm.h"
#include "nonfinite.h"
#include "ranks.h"
#include "standardize.h"

namespace normfused::testing {

// Runs all kernels of a backend, a class with the functions of kernels/cpu/kernels.h.
template <class T, class Backend>
void run(Backend& backend, ChannelView view, int64_t offset, std::mt19937& random) {
  current = backend.name() + " " + Format<T>::name + " outer " + std::to_string(view.outer) + " channels " +
            std::to_string(view.channels) + " inner " + std::to_string(view.inner) + " offset " +
            std::to_string(offset);
  const Case<T> data(view, offset, random);
  const int64_t channels = view.channels, count = view.positions(), n = view.numel();
  const double epsilon = Format<T>::epsilon;
  const double sums = Format<T>::dtype == DType::kFloat64 ? 6e-16 : 6e-8;  // rounding of the arithmetic
  using Param = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr DType kParam = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;

  std::vector<long double> mean(channels), m2(channels), sum(channels), squares(channels);
  std::vector<double> low(channels, 1e9), high(channels, -1e9);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = data.channel(i);
    sum[c] += data.x(i);
    squares[c] += data.x(i) * data.x(i);
    low[c] = std::min(low[c], data.x(i));
    high[c] = std::max(high[c], data.x(i));
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] = sum[c] / count;
  for (int64_t i = 0; i < n; ++i) {
    const long double deviation = data.x(i) - mean[data.channel(i)];
    m2[data.channel(i)] += deviation * deviation;
  }

  std::vector<double> results[4];
  for (auto& r : results) r.resize(channels);
  ChannelStats stats{view,
                     Format<T>::dtype,
                     data.input.data,
                     {results[0].data(), results[1].data(), results[2].data(), results[3].data()}};
  backend.channel_moments(stats);
  for (int64_t c = 0; c < channels; ++c) {
    expect_near("mean", c, results[0][c], mean[c], 1e-6);
    expect_near("m2", c, results[1][c], m2[c], 1e-5 * m2[c] + 1e-9);
    expect_near("min", c, results[2][c], low[c], 0);
    expect_near("max", c, results[3][c], high[c], 0);
  }
  backend.channel_sums(stats);
  for (int64_t c = 0; c < channels; ++c) {
    expect_near("sum", c, results[0][c], sum[c], 1e-12 * std::abs(static_cast<double>(sum[c])));
    expect_near("sum_of_squares", c, results[1][c], squares[c], 1e-12 * squares[c]);
    expect_near("min of sums", c, results[2][c], low[c], 0);
    expect_near("max of sums", c, results[3][c], high[c], 0);
  }
  const std::string here = current;
  run_local_response_norm(backend, data, offset);
  current = here;
  // Of every third case, in each dtype by turns: most of what runs there runs below too, and sanitizers are slow.
  static int64_t cases = 0;
  if (cases++ % 3 == 0) run_ranks(backend, data, offset, random);
  if (count < 2) return;

  std::vector<Param> weight(channels), bias(channels), running_mean(channels), running_var(channels);
  for (int64_t c = 0; c < channels; ++c) {
    weight[c] = static_cast<Param>(c % 3 - 1.5);
    bias[c] = static_cast<Param>(c % 5 * 0.25);
  }
  std::vector<double> saved_mean(channels), saved_invstd(channels);
  Buffer<T> output(n, offset), grad_input(n, offset);
  int64_t batches;
  BatchNormForward forward{{{running_mean.data(), kParam},
                            {running_var.data(), kParam},
                            &batches,
                            0,
                            1e-5,
                            saved_mean.data(),
                            saved_invstd.data()},
                           view,
                           Format<T>::dtype,
                           data.input.data,
                           output.data,
                           {weight.data(), kParam},
                           {bias.data(), kParam}};
  const auto check_output = [&](const char* what, const std::vector<double>& mu, const std::vector<double>& r) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = data.channel(i);
      const double z = (data.x(i) - mu[c]) * r[c] * weight[c] + bias[c];
      expect_near(what, i, decode(output.data + i), z, 1.1 * epsilon * std::abs(z) + 20 * sums * (1 + std::abs(z)));
    }
  };
  std::vector<double> invstd(channels), centre(mean.begin(), mean.end());
  for (int64_t c = 0; c < channels; ++c) invstd[c] = 1 / std::sqrt(static_cast<double>(m2[c] / count) + 1e-5);
  // The fifth batch of a cumulative average, and the momentum of the same weight.
  for (const double momentum : {std::numeric_limits<double>::quiet_NaN(), 0.2}) {
    forward.momentum = momentum;
    batches = 4;
    std::fill(running_mean.begin(), running_mean.end(), static_cast<Param>(1));
    std::fill(running_var.begin(), running_var.end(), static_cast<Param>(2));
    backend.batch_norm_training(forward);
    expect_near("num_batches_tracked", 0, static_cast<double>(batches), 5, 0);
    for (int64_t c = 0; c < channels; ++c) {
      expect_near("saved mean", c, saved_mean[c], mean[c], 1e-6);
      expect_near("saved invstd", c, saved_invstd[c], invstd[c], 1e-5 * invstd[c]);
      expect_near("running_mean", c, running_mean[c], 0.8 + 0.2 * mean[c], 1e-6);
      expect_near("running_var", c, running_var[c], 1.6 + 0.2 * static_cast<double>(m2[c] / (count - 1)), 1e-5);
    }
    check_output("training output", centre, invstd);
  }

  for (const bool training : {true, false}) {
    std::vector<Param> grad_weight(channels), grad_bias(channels);
    backend.batch_norm_backward({view,
                                 Format<T>::dtype,
                                 data.grad.data,
                                 data.input.data,
                                 grad_input.data,
                                 {weight.data(), kParam},
                                 {grad_weight.data(), kParam},
                                 {grad_bias.data(), kParam},
                                 centre.data(),
                                 invstd.data(),
                                 training});
    std::vector<long double> g(channels), gd(channels);
    std::vector<double> size(channels);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = data.channel(i);
      g[c] += data.g(i);
      gd[c] += data.g(i) * (data.x(i) - mean[c]);
      size[c] += std::abs(data.g(i)) * (1 + std::abs(data.x(i) - mean[c]));
    }
    for (int64_t c = 0; c < channels; ++c) {
      expect_near("grad_weight", c, grad_weight[c], gd[c] * invstd[c], 10 * sums * size[c] * invstd[c]);
      expect_near("grad_bias", c, grad_bias[c], g[c], 10 * sums * size[c]);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = data.channel(i);
      double want = data.g(i);
      if (training) want -= static_cast<double>((g[c] + (data.x(i) - mean[c]) * invstd[c] * invstd[c] * gd[c]) / count);
      want *= weight[c] * invstd[c];
      expect_near(training ? "grad_input" : "grad_input in inference", i, decode(grad_input.data + i), want,
                  1.1 * epsilon * std::abs(want) + 40 * sums * (1 + std::abs(want)) * invstd[c]);
    }
  }

  std::fill(running_mean.begin(), running_mean.end(), static_cast<Param>(2.5));
  std::fill(running_var.begin(), running_var.end(), static_cast<Param>(4));
  backend.batch_norm_inference(forward);
  check_output("inference output", std::vector<double>(channels, 2.5),
               std::vector<double>(channels, 1 / std::sqrt(4 + 1e-5)));
  expect_near("num_batches_tracked", 0, static_cast<double>(batches), 5, 0);

  // The gradient of inference alone takes another way.
  backend.batch_norm_backward({view,
                               Format<T>::dtype,
                               data.grad.data,
                               data.input.data,
                               grad_input.data,
                               {weight.data(), kParam},
                               {},
                               {},
                               centre.data(),
                               invstd.data(),
                               false});
  for (int64_t i = 0; i < n; ++i) {
    const double want = data.g(i) * weight[data.channel(i)] * invstd[data.channel(i)];
    expect_near("grad_input alone", i, decode(grad_input.data + i), want,
                1.1 * epsilon * std::abs(want) + 10 * sums * (1 + std::abs(want)));
  }

  // Running statistics that are the batch's, so that inference gives what training does.
  std::vector<double> var(channels), wide_weight(weight.begin(), weight.end()), wide_bias(bias.begin(), bias.end());
  for (int64_t c = 0; c < channels; ++c) var[c] = static_cast<double>(m2[c] / count);
  BatchNormForward fused = forward;
  fused.num_batches_tracked = nullptr;
  fused.momentum = 0;
  fused.running_mean = {centre.data(), DType::kFloat64};
  fused.running_var = {var.data(), DType::kFloat64};
  run_fused(backend, Fusion::next(), data, fused, offset, centre, invstd, wide_weight, wide_bias, random);
  for (const ActivationKind kind : {ActivationKind::kIdentity, ActivationKind::kLeakyRelu})
    run_in_place(backend, {kind, 0.3}, data, fused, offset, centre, invstd, wide_weight, wide_bias);
}

}  // namespace normfused::testing
