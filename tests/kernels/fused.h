// Batch norm with what follows it: an activation, a residual, a mask; and in place.
#pragma once

#include "values.h"

namespace normfused::testing {

inline double activate(const Activation& activation, double z) {
  const double sigmoid = 1 / (1 + std::exp(-z)), pi = std::acos(-1);
  switch (activation.kind) {
    case ActivationKind::kIdentity:
      return z;
    case ActivationKind::kRelu:
      return z > 0 ? z : 0;
    case ActivationKind::kRelu6:
      return std::clamp(z, 0.0, 6.0);
    case ActivationKind::kLeakyRelu:
      return z > 0 ? z : z * activation.parameter;
    case ActivationKind::kElu:
      return z > 0 ? z : std::expm1(z) * activation.parameter;
    case ActivationKind::kHardswish:
      return z * std::clamp(z + 3, 0.0, 6.0) / 6;
    case ActivationKind::kSigmoid:
      return sigmoid;
    case ActivationKind::kTanh:
      return std::tanh(z);
    case ActivationKind::kSilu:
      return z * sigmoid;
    case ActivationKind::kGelu:
      return z / 2 * (1 + std::erf(z / std::sqrt(2)));
    case ActivationKind::kGeluTanh:
      return z / 2 * (1 + std::tanh(std::sqrt(2 / pi) * (z + 0.044715 * z * z * z)));
  }
  return z;
}

// By differences, so that no formula is written twice.
inline double slope(const Activation& activation, double z) {
  const double h = 1e-5;
  return (activate(activation, z + h) - activate(activation, z - h)) / (2 * h);
}
inline bool near_a_kink(double z) {
  return std::min({std::abs(z), std::abs(z - 3), std::abs(z + 3), std::abs(z - 6)}) < 1e-3;
}

// Each call takes another activation, every other a residual; where the gradient is by sign, also a mask.
struct Fusion {
  Activation activation;
  bool residual, mask;

  static Fusion next() {
    static int turn = 0;
    const int kind = turn % 11, round = turn / 11;  // of the four dtypes in turn, each meets every kind
    ++turn;
    const auto activation = static_cast<ActivationKind>(kind);
    const bool by_sign = activation == ActivationKind::kRelu || activation == ActivationKind::kLeakyRelu;
    return {{activation, 0.3}, round % 2 == 0, by_sign && round % 4 < 2};
  }
};

// What may follow the normalization, forward and backward, given the true statistics.
template <class T, class Backend>
void run_fused(Backend& backend, const Fusion& fusion, const Case<T>& data, BatchNormForward forward, int64_t offset,
               const std::vector<double>& mean, const std::vector<double>& invstd, const std::vector<double>& weight,
               const std::vector<double>& bias, std::mt19937& random) {
  current += " activation " + std::to_string(static_cast<int>(fusion.activation.kind)) +
             (fusion.residual ? " with residual" : "") + (fusion.mask ? " with mask" : "");
  const int64_t n = data.view.numel(), channels = data.view.channels, count = data.view.positions();
  const double epsilon = Format<T>::epsilon, sums = Format<T>::dtype == DType::kFloat64 ? 6e-16 : 6e-8;
  const double difference = 1e-9;  // of the slopes that are taken by differences
  Buffer<T> residual(n, offset), output(n, offset), grad(n, offset), grad_input(n, offset), grad_residual(n, offset);
  std::vector<uint8_t> mask(static_cast<size_t>(mask_bytes(n)));
  std::uniform_int_distribution<int> eighths(-16, 16);
  std::vector<double> z(n), g(n);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = data.channel(i);
    encode(residual.data + i, eighths(random) / 8.0);
    z[i] = (data.x(i) - mean[c]) * invstd[c] * weight[c] + bias[c];
    if (fusion.residual) z[i] += decode(residual.data + i);
    encode(grad.data + i, near_a_kink(z[i]) ? 0 : data.g(i));
    g[i] = near_a_kink(z[i]) ? 0 : data.g(i) * slope(fusion.activation, z[i]);
  }
  forward.activation = fusion.activation;
  forward.output = output.data;
  if (fusion.residual) forward.residual = residual.data;
  if (fusion.mask) forward.mask = mask.data();
  for (const bool training : {true, false}) {
    std::fill(mask.begin(), mask.end(), 0xff);
    training ? backend.batch_norm_training(forward) : backend.batch_norm_inference(forward);
    for (int64_t i = 0; i < n; ++i) {
      const double want = activate(fusion.activation, z[i]);
      expect_near(training ? "output" : "inference output", i, decode(output.data + i), want,
                  1.1 * epsilon * std::abs(want) + 40 * sums * (1 + std::abs(z[i])));
      if (fusion.mask && !near_a_kink(z[i])) expect_near("mask", i, mask[i / 8] >> i % 8 & 1, z[i] > 0, 0);
    }
    for (int64_t i = n; fusion.mask && i < 8 * mask_bytes(n); ++i)
      expect_near("mask's padding", i, mask[i / 8] >> i % 8 & 1, 0, 0);
  }

  for (const bool training : {true, false}) {
    std::vector<double> grad_weight(channels), grad_bias(channels), total(channels), product(channels), size(channels);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = data.channel(i);
      const double deviation = data.x(i) - mean[c];
      total[c] += g[i];
      product[c] += g[i] * deviation;
      size[c] += std::abs(data.g(i)) * (1 + std::abs(deviation)) * (1 + std::abs(z[i]));
    }
    const auto statistics = [&](bool parameters) {
      BatchNormBackward args{};
      args.view = data.view;
      args.dtype = Format<T>::dtype;
      args.grad_output = grad.data;
      args.input = data.input.data;
      args.grad_input = grad_input.data;
      args.weight = forward.weight;
      if (parameters) args.grad_weight = {grad_weight.data(), DType::kFloat64};
      if (parameters) args.grad_bias = {grad_bias.data(), DType::kFloat64};
      args.mean = mean.data();
      args.invstd = invstd.data();
      args.training = training;
      args.activation = fusion.activation;
      args.bias = forward.bias;
      if (fusion.mask)
        args.mask = mask.data();
      else if (fusion.residual)
        args.residual = residual.data;
      if (fusion.residual) args.grad_residual = grad_residual.data;
      return args;
    };
    const auto check = [&] {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t c = data.channel(i);
        double want = g[i];
        if (training)
          want -= (total[c] + (data.x(i) - mean[c]) * invstd[c] * invstd[c] * product[c]) / static_cast<double>(count);
        want *= weight[c] * invstd[c];
        const double scale = (1 + std::abs(z[i])) * (1 + std::abs(want)) * (1 + invstd[c]);
        expect_near(training ? "grad_input" : "grad_input in inference", i, decode(grad_input.data + i), want,
                    1.1 * epsilon * std::abs(want) + (100 * sums + 10 * difference) * scale);
        if (fusion.residual)
          expect_near("grad_residual", i, decode(grad_residual.data + i), g[i],
                      1.1 * epsilon * std::abs(g[i]) + (40 * sums + difference) * (1 + std::abs(z[i])) * 2);
      }
    };
    backend.batch_norm_backward(statistics(true));
    check();
    for (int64_t c = 0; c < channels; ++c) {
      const double tolerance = (40 * sums + 10 * difference) * size[c];
      expect_near("grad_weight", c, grad_weight[c], product[c] * invstd[c], tolerance * invstd[c]);
      expect_near("grad_bias", c, grad_bias[c], total[c], tolerance);
    }
    backend.batch_norm_backward(statistics(false));
    check();
  }
}

// Forward over its own input, and backward from what that left there.
template <class T, class Backend>
void run_in_place(Backend& backend, const Activation& activation, const Case<T>& data, BatchNormForward forward,
                  int64_t offset, const std::vector<double>& mean, const std::vector<double>& invstd,
                  const std::vector<double>& weight, const std::vector<double>& bias) {
  current += " in place, activation " + std::to_string(static_cast<int>(activation.kind));
  const int64_t n = data.view.numel(), channels = data.view.channels, count = data.view.positions();
  const double epsilon = Format<T>::epsilon, sums = Format<T>::dtype == DType::kFloat64 ? 6e-16 : 6e-8;
  Buffer<T> tensor(n, offset), grad_input(n, offset);
  forward.activation = activation;
  forward.input = forward.output = tensor.data;
  for (const bool training : {true, false}) {
    std::memcpy(tensor.data, data.input.data, static_cast<size_t>(n) * sizeof(T));
    training ? backend.batch_norm_training(forward) : backend.batch_norm_inference(forward);
    std::vector<double> d(n), g(n), total(channels), product(channels), size(channels);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = data.channel(i);
      const double z = (data.x(i) - mean[c]) * invstd[c] * weight[c] + bias[c], want = activate(activation, z);
      const double y = decode(tensor.data + i);
      expect_near("output", i, y, want, 1.1 * epsilon * std::abs(want) + 40 * sums * (1 + std::abs(z)));
      const bool scaled = activation.kind == ActivationKind::kLeakyRelu && y <= 0;
      d[i] = ((scaled ? y / activation.parameter : y) - bias[c]) / weight[c];
      g[i] = scaled ? data.g(i) * activation.parameter : data.g(i);
      total[c] += g[i];
      product[c] += g[i] * d[i];
      size[c] += std::abs(g[i]) * (2 + std::abs(d[i]));
    }

    std::vector<double> grad_weight(channels), grad_bias(channels);
    BatchNormBackward args{};
    args.view = data.view;
    args.dtype = Format<T>::dtype;
    args.grad_output = data.grad.data;
    args.input = tensor.data;
    args.grad_input = grad_input.data;
    args.weight = forward.weight;
    args.grad_weight = {grad_weight.data(), DType::kFloat64};
    args.grad_bias = {grad_bias.data(), DType::kFloat64};
    args.mean = mean.data();
    args.invstd = invstd.data();
    args.training = training;
    args.activation = activation;
    args.bias = forward.bias;
    args.from_output = true;
    for (const bool parameters : {true, false}) {
      if (!parameters) args.grad_weight = args.grad_bias = {};
      backend.batch_norm_backward(args);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t c = data.channel(i);
        double want = g[i];
        if (training) want -= (total[c] + d[i] * product[c]) / static_cast<double>(count);
        want *= weight[c] * invstd[c];
        expect_near(training ? "grad_input" : "grad_input in inference", i, decode(grad_input.data + i), want,
                    1.1 * epsilon * std::abs(want) + 100 * sums * (1 + std::abs(want)) * (1 + invstd[c]));
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      expect_near("grad_weight", c, grad_weight[c], product[c], 40 * sums * size[c]);
      expect_near("grad_bias", c, grad_bias[c], total[c], 40 * sums * size[c]);
    }
  }
}

}  // namespace normfused::testing
