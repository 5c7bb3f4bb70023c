// A batch that is shared out over ranks.
#pragma once

#include "kernels/math.h"
#include "values.h"

namespace normfused::testing {

// Three ranks: one has `data`, one nothing, one another share. `data`'s rank goes on to normalize its own, and to its
// gradient.
template <class T, class Backend>
void run_ranks(Backend& backend, const Case<T>& data, int64_t offset, std::mt19937& random) {
  using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr DType kParam = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;
  const std::string here = current;
  current += " over ranks";
  const ChannelView& view = data.view;
  const int64_t channels = view.channels, n = view.numel();
  const Case<T> other({view.outer + 1, channels, view.inner}, offset, random);
  const int64_t count = view.positions() + other.view.positions();
  const double epsilon = Format<T>::epsilon, sums = std::is_same_v<T, double> ? 6e-16 : 6e-8;

  std::vector<long double> mean(channels), m2(channels), g(channels), gd(channels);
  const auto each = [&](const auto& f) {
    for (const Case<T>* const part : {&data, &other})
      for (int64_t i = 0; i < part->view.numel(); ++i) f(*part, i, part->channel(i));
  };
  each([&](const Case<T>& part, int64_t i, int64_t c) { mean[c] += part.x(i); });
  for (long double& value : mean) value /= count;
  each([&](const Case<T>& part, int64_t i, int64_t c) {
    const long double deviation = part.x(i) - mean[c];
    m2[c] += deviation * deviation;
    g[c] += part.g(i);
    gd[c] += part.g(i) * deviation;
  });

  const int64_t words = rank_words(channels, Format<T>::dtype), stride = words + 2;
  std::vector<int64_t> gathered(3 * stride - 2);
  int64_t* const rows[] = {gathered.data(), gathered.data() + stride, gathered.data() + 2 * stride};
  backend.pack_moments({view, Format<T>::dtype, data.input.data, rows[0]});
  backend.pack_moments({other.view, Format<T>::dtype, other.input.data, rows[2]});
  expect_near("count sent", 0, static_cast<double>(rows[0][0]), static_cast<double>(view.positions()), 0);
  const auto* const sent = reinterpret_cast<const RankMoments<S>*>(rows[0] + 1);
  std::vector<double> own(channels), squares(channels);
  const auto share = static_cast<double>(view.positions());
  for (int64_t i = 0; i < n; ++i) {
    own[data.channel(i)] += data.x(i) / share;
    squares[data.channel(i)] += data.x(i) * data.x(i) / share;
  }
  for (int64_t c = 0; c < channels; ++c) {
    expect_near("mean sent", c, sent[c].mean, own[c], 1e-6);
    const double variance = squares[c] - own[c] * own[c];
    expect_near("deviation sent", c, sent[c].deviation * sent[c].deviation, variance, 1e-5);
  }

  std::vector<double> merged_mean(channels), invstd(channels);
  std::vector<S> running_mean(channels), running_var(channels), weight(channels), bias(channels);
  int64_t batches, total;
  MergeRanks merge{{{running_mean.data(), kParam},
                    {running_var.data(), kParam},
                    &batches,
                    0,
                    1e-5,
                    merged_mean.data(),
                    invstd.data()},
                   3,
                   channels,
                   std::is_same_v<T, double>,
                   gathered.data(),
                   stride,
                   &total};
  // The fifth batch of a cumulative average, and the momentum of the same weight; at last a batch without values.
  const std::vector<int64_t> nothing(gathered.size());
  for (const double momentum : {std::numeric_limits<double>::quiet_NaN(), 0.2, 0.7}) {
    const bool empty = momentum == 0.7;
    merge.momentum = momentum;
    merge.words = empty ? nothing.data() : gathered.data();
    batches = 4;
    std::fill(running_mean.begin(), running_mean.end(), static_cast<S>(1));
    std::fill(running_var.begin(), running_var.end(), static_cast<S>(2));
    std::vector<double> unused_mean(channels, 7), unused_invstd(channels, 7);
    merge.mean = empty ? unused_mean.data() : merged_mean.data();
    merge.invstd = empty ? unused_invstd.data() : invstd.data();
    backend.merge_ranks(merge);
    expect_near("count", 0, static_cast<double>(total), empty ? 0. : static_cast<double>(count), 0);
    expect_near("num_batches_tracked", 0, static_cast<double>(batches), empty ? 4 : 5, 0);
    for (int64_t c = 0; c < channels; ++c) {
      const double var = m2[c] / count, unbiased = m2[c] / (count - 1);
      expect_near("merged mean", c, merge.mean[c], empty ? 0 : static_cast<double>(mean[c]), 1e-6);
      expect_near("merged invstd", c, merge.invstd[c], empty ? 0 : 1 / std::sqrt(var + 1e-5),
                  empty ? 0 : 1e-5 / std::sqrt(var + 1e-5));
      expect_near("running_mean", c, running_mean[c], empty ? 1 : 0.8 + 0.2 * static_cast<double>(mean[c]), 1e-6);
      expect_near("running_var", c, running_var[c], empty ? 2 : 1.6 + 0.2 * unbiased, 1e-5);
    }
  }

  for (int64_t c = 0; c < channels; ++c) {
    weight[c] = static_cast<S>(c % 3 - 1.5);
    bias[c] = static_cast<S>(c % 5 * 0.25);
  }
  Buffer<T> output(n, offset);
  BatchNormForward forward{};
  forward.view = view;
  forward.dtype = Format<T>::dtype;
  forward.input = data.input.data;
  forward.output = output.data;
  forward.weight = {weight.data(), kParam};
  forward.bias = {bias.data(), kParam};
  forward.mean = merged_mean.data();
  forward.invstd = invstd.data();
  backend.batch_norm_inference(forward);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = data.channel(i);
    const double z = (data.x(i) - merged_mean[c]) * invstd[c] * weight[c] + bias[c];
    expect_near("output", i, decode(output.data + i), z, 1.1 * epsilon * std::abs(z) + 20 * sums * (1 + std::abs(z)));
  }

  std::vector<S> grad_weight(channels), grad_bias(channels);
  for (int64_t c = 0; c < channels; ++c) {
    grad_weight[c] = static_cast<S>(gd[c] * invstd[c]);
    grad_bias[c] = static_cast<S>(g[c]);
  }
  const std::vector<S> given_weight = grad_weight, given_bias = grad_bias;
  BatchNormBackward backward{};
  backward.view = view;
  backward.dtype = Format<T>::dtype;
  backward.grad_output = data.grad.data;
  backward.input = data.input.data;
  backward.grad_input = output.data;
  backward.weight = {weight.data(), kParam};
  backward.grad_weight = {grad_weight.data(), kParam};
  backward.grad_bias = {grad_bias.data(), kParam};
  backward.mean = merged_mean.data();
  backward.invstd = invstd.data();
  backward.training = true;
  backward.count = &total;
  total = count;
  // Fused with an identity too: by way of a leaky ReLU whose slope is 1.
  for (const Activation& activation : {Activation{}, Activation{ActivationKind::kLeakyRelu, 1}}) {
    backward.activation = activation;
    backward.bias = {bias.data(), kParam};
    backend.batch_norm_backward(backward);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = data.channel(i);
      const long double through = g[c] + (data.x(i) - mean[c]) * invstd[c] * invstd[c] * gd[c];
      const double want = static_cast<double>(data.g(i) - through / count) * weight[c] * invstd[c];
      expect_near("grad_input", i, decode(output.data + i), want,
                  1.1 * epsilon * std::abs(want) + 60 * sums * (1 + std::abs(want)) * invstd[c]);
    }
  }
  expect_near("sums are left as they are", 0, grad_weight == given_weight && grad_bias == given_bias, 1, 0);
  current = here;
}

}  // namespace normfused::testing
