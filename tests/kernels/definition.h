// What kernels compute, by definition and in double, for values that every format holds exactly; and the comparison
// with it. The CPU kernels and the CUDA kernels are held against the same.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/types.h"

namespace normfused::testing {

inline std::string current;
inline int64_t checks = 0;

inline void expect_near(const char* what, int64_t index, double got, double want, double tolerance) {
  ++checks;
  if (std::abs(got - want) <= tolerance || (std::isnan(got) && std::isnan(want)) || got == want) return;
  std::printf("FAILED %s: %s[%lld] is %.17g, expected %.17g within %.3g\n", current.c_str(), what,
              static_cast<long long>(index), got, want, tolerance);
  std::exit(1);
}

inline double decode(const float* p) { return *p; }
inline double decode(const double* p) { return *p; }
inline double decode(const uint8_t* p) { return *p; }
inline double decode(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline double decode(const Half* p) {
  const int exponent = (p->bits >> 10) & 31, mantissa = p->bits & 1023;
  const double sign = p->bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}

// Values that every format holds exactly.
inline void encode(float* p, double value) { *p = static_cast<float>(value); }
inline void encode(double* p, double value) { *p = value; }
inline void encode(uint8_t* p, double value) { *p = static_cast<uint8_t>(value); }
inline void encode(BFloat16* p, double value) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  p->bits = static_cast<uint16_t>(bits >> 16);
}
inline void encode(Half* p, double value) {
  if (value == 0) return void(p->bits = 0);
  int exponent;
  const double fraction = std::frexp(std::abs(value), &exponent);
  p->bits = static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) |
                                  static_cast<int>(std::ldexp(fraction, 11) - 1024));
}

template <class T>
struct Format;
template <>
struct Format<float> {
  static constexpr DType dtype = DType::kFloat32;
  static constexpr double epsilon = 6e-8;
  static constexpr const char* name = "float32";
};
template <>
struct Format<double> {
  static constexpr DType dtype = DType::kFloat64;
  static constexpr double epsilon = 1.2e-16;
  static constexpr const char* name = "float64";
};
template <>
struct Format<Half> {
  static constexpr DType dtype = DType::kFloat16;
  static constexpr double epsilon = 5e-4;
  static constexpr const char* name = "float16";
};
template <>
struct Format<BFloat16> {
  static constexpr DType dtype = DType::kBFloat16;
  static constexpr double epsilon = 4e-3;
  static constexpr const char* name = "bfloat16";
};

// Exactly n values, `offset` of them in from an allocation's start, so that the end is the allocation's end.
template <class T>
struct Buffer {
  Buffer(int64_t n, int64_t offset) : memory(new T[static_cast<size_t>(n + offset)]), data(memory.get() + offset) {}
  std::unique_ptr<T[]> memory;
  T* data;
};

template <class T>
struct Case {
  ChannelView view;
  Buffer<T> input, grad;

  Case(ChannelView v, int64_t offset, std::mt19937& random)
      : view(v), input(v.numel(), offset), grad(v.numel(), offset) {
    std::uniform_int_distribution<int> eighths(-16, 16);
    for (int64_t i = 0; i < v.numel(); ++i) {
      encode(input.data + i, 3 + eighths(random) / 8.0);
      encode(grad.data + i, eighths(random) / 8.0);
    }
  }
  double x(int64_t i) const { return decode(input.data + i); }
  double g(int64_t i) const { return decode(grad.data + i); }
  int64_t channel(int64_t i) const { return i / view.inner % view.channels; }
};

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
  std::vector<uint8_t> mask(static_cast<size_t>((n + 7) / 8 + 8), 0xff);
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
    training ? backend.batch_norm_training(forward) : backend.batch_norm_inference(forward);
    for (int64_t i = 0; i < n; ++i) {
      const double want = activate(fusion.activation, z[i]);
      expect_near(training ? "output" : "inference output", i, decode(output.data + i), want,
                  1.1 * epsilon * std::abs(want) + 40 * sums * (1 + std::abs(z[i])));
      if (fusion.mask && !near_a_kink(z[i])) expect_near("mask", i, mask[i / 8] >> i % 8 & 1, z[i] > 0, 0);
    }
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

// Local response normalization, forward and backward. Each call takes another window and another power.
template <class T, class Backend>
void run_local_response_norm(Backend& backend, const Case<T>& data, int64_t offset) {
  static int turn = 0;
  const ChannelView& view = data.view;
  const int64_t n = view.numel(), sizes[] = {5, 1, 2, 9, 4, view.channels < 20 ? 2 * view.channels + 3 : 3};
  const double betas[] = {0.75, 0.6, 0.5, 1, 2.3};
  const int64_t size = sizes[turn % 6];
  const double alpha = 1.5, beta = betas[turn % 5], k = 0.5, scale = alpha / static_cast<double>(size);
  ++turn;
  current += " window " + std::to_string(size) + " beta " + std::to_string(beta);
  const auto channel = [&](int64_t i, int64_t by) { return i + by * view.inner; };  // the value so many channels on
  // Sums f over the channels from `before` before to `after` after that of value i.
  const auto window_sum = [&](int64_t i, int64_t before, int64_t after, const auto& f) {
    double sum = 0;
    for (int64_t by = -before; by <= after; ++by)
      if (data.channel(i) + by >= 0 && data.channel(i) + by < view.channels) sum += f(channel(i, by));
    return sum;
  };
  const int64_t before = size / 2, after = (size - 1) / 2;
  std::vector<double> base(n);
  for (int64_t i = 0; i < n; ++i)
    base[i] = k + scale * window_sum(i, before, after, [&](int64_t j) { return data.x(j) * data.x(j); });
  const auto share = [&](int64_t j) { return data.g(j) * data.x(j) * std::pow(base[j], -beta - 1); };

  const double epsilon = Format<T>::epsilon, rounding = Format<T>::dtype == DType::kFloat64 ? 6e-16 : 6e-8;
  Buffer<T> output(n, offset);
  for (const bool backward : {false, true}) {
    backend.local_response_norm({view, Format<T>::dtype, data.input.data, backward ? data.grad.data : nullptr,
                                 output.data, size, alpha, beta, k});
    for (int64_t i = 0; i < n; ++i) {
      const double factor = std::pow(base[i], -beta), direct = (backward ? data.g(i) : data.x(i)) * factor;
      double want = direct, magnitude = std::abs(direct);
      if (backward) {
        const double times = 2 * scale * beta * data.x(i);
        want -= times * window_sum(i, after, before, share);
        magnitude += times * window_sum(i, after, before, [&](int64_t j) { return std::abs(share(j)); });
      }
      expect_near(backward ? "gradient" : "output", i, decode(output.data + i), want,
                  1.1 * epsilon * std::abs(want) + rounding * (1 + 6 * magnitude));
    }
  }
}

// Sums of integers of the whole range of T, or of 16 bits where T is wider, and exactly; all of them at the upper end
// if `extreme`, which is where narrow sums overflow first.
template <class T, class Backend>
void run_integer_sums(Backend& backend, DType dtype, const ChannelView& view, int64_t offset, bool extreme,
                      std::mt19937& random) {
  current = backend.name() + " sums of integers of " + std::to_string(sizeof(T)) + " bytes, outer " +
            std::to_string(view.outer) + " channels " + std::to_string(view.channels) + " inner " +
            std::to_string(view.inner) + " offset " + std::to_string(offset);
  const int64_t channels = view.channels;
  Buffer<T> input(view.numel(), offset);
  constexpr bool kWide = sizeof(T) > 2;
  const int64_t lowest = kWide ? -(1 << 15) : std::numeric_limits<T>::min();
  const int64_t highest = kWide ? 1 << 15 : std::numeric_limits<T>::max();
  std::uniform_int_distribution<int64_t> values(extreme ? highest : lowest, highest);
  std::vector<int64_t> want[4];
  want[0].resize(channels), want[1].resize(channels);
  want[2].assign(channels, std::numeric_limits<int64_t>::max());
  want[3].assign(channels, std::numeric_limits<int64_t>::min());
  for (int64_t i = 0; i < view.numel(); ++i) {
    const int64_t value = values(random), c = i / view.inner % channels;
    input.data[i] = static_cast<T>(value);
    want[0][c] += value;
    want[1][c] += value * value;
    want[2][c] = std::min(want[2][c], value);
    want[3][c] = std::max(want[3][c], value);
  }
  std::vector<int64_t> got[4];
  for (auto& r : got) r.resize(channels);
  backend.channel_sums({view, dtype, input.data, {got[0].data(), got[1].data(), got[2].data(), got[3].data()}});
  const char* const names[] = {"sum", "sum_of_squares", "min", "max"};
  for (int k = 0; k < 4; ++k)
    for (int64_t c = 0; c < channels; ++c) expect_near(names[k], c, static_cast<double>(got[k][c] - want[k][c]), 0, 0);
}

template <class T, class Output, class Backend>
void run_standardize(Backend& backend, DType dtype, const ChannelView& view, int64_t offset, bool input_is_last,
                     bool output_is_last, std::mt19937& random) {
  current = backend.name() + " standardize " + std::to_string(static_cast<int>(dtype)) + " to " + Format<Output>::name +
            ", images " + std::to_string(view.outer) + " channels " + std::to_string(view.channels) + " pixels " +
            std::to_string(view.inner) + " offset " + std::to_string(offset) + (input_is_last ? " from" : "") +
            (output_is_last ? " to" : "") + " channels last";
  constexpr bool kBytes = std::is_same_v<T, uint8_t>;
  const int64_t channels = view.channels;
  Buffer<T> input(view.numel(), offset);
  Buffer<Output> output(view.numel(), offset);
  std::uniform_int_distribution<int> values(0, kBytes ? 255 : 64);
  for (int64_t i = 0; i < view.numel(); ++i) encode(input.data + i, values(random));
  const double scale = kBytes ? 1 / 255.0 : 0.25;
  std::vector<double> mean(channels), std(channels);
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = 0.1 * static_cast<double>(c % 7);
    std[c] = 0.3 + 0.1 * static_cast<double>(c % 3);
  }
  Standardize args{view.outer, channels,    view.inner,    dtype,          Format<Output>::dtype,
                   input.data, output.data, input_is_last, output_is_last, mean.data(),
                   std.data(), scale};
  const auto place = [&](int64_t image, int64_t c, int64_t p, bool last) {
    return last ? (image * view.inner + p) * channels + c : (image * channels + c) * view.inner + p;
  };
  const auto check = [&](const Output* got) {
    for (int64_t image = 0; image < view.outer; ++image)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t p = 0; p < view.inner; ++p) {
          const double want = (decode(input.data + place(image, c, p, input_is_last)) * scale - mean[c]) / std[c];
          // Bytes are off by one unit in the last place at most, without fused products; what is tiny, by its scale's.
          const double arithmetic = std::is_same_v<T, double> ? 4e-16 : kBytes ? 1e-12 : 2.4e-7;
          const double float_rounding = kBytes ? 6e-8 * std::abs(want) : 0;
          const double bound =
              Format<Output>::epsilon * std::abs(want) + float_rounding + (sizeof(Output) == 2 ? 3e-8 : 1e-15);
          expect_near("output", c, decode(got + place(image, c, p, output_is_last)), want,
                      bound + arithmetic * (std::abs(want) + mean[c] / std[c]));
        }
  };
  backend.standardize(args);
  check(output.data);
  if constexpr (std::is_same_v<T, Output>) {
    if (input_is_last != output_is_last) return;
    Buffer<T> in_place(view.numel(), offset);
    std::memcpy(static_cast<void*>(in_place.data), input.data, static_cast<size_t>(view.numel()) * sizeof(T));
    args.input = args.output = in_place.data;
    backend.standardize(args);
    check(in_place.data);
  }
}

// Every pair of dtypes and of layouts, of images (outer) of channels by pixels (inner).
template <class Backend>
void run_standardize(Backend& backend, const ChannelView& view, int64_t offset, std::mt19937& random) {
  for (const int layouts : {0, 1, 2, 3}) {
    const bool from = layouts & 1, to = layouts & 2;
    run_standardize<uint8_t, float>(backend, DType::kUInt8, view, offset, from, to, random);
    run_standardize<uint8_t, Half>(backend, DType::kUInt8, view, offset, from, to, random);
    run_standardize<uint8_t, BFloat16>(backend, DType::kUInt8, view, offset, from, to, random);
    run_standardize<float, float>(backend, DType::kFloat32, view, offset, from, to, random);
    run_standardize<float, Half>(backend, DType::kFloat32, view, offset, from, to, random);
    run_standardize<float, BFloat16>(backend, DType::kFloat32, view, offset, from, to, random);
    run_standardize<double, double>(backend, DType::kFloat64, view, offset, from, to, random);
    run_standardize<Half, Half>(backend, DType::kFloat16, view, offset, from, to, random);
    run_standardize<BFloat16, BFloat16>(backend, DType::kBFloat16, view, offset, from, to, random);
  }
}

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
  if (count < 2) return;

  std::vector<Param> weight(channels), bias(channels), running_mean(channels), running_var(channels);
  for (int64_t c = 0; c < channels; ++c) {
    weight[c] = static_cast<Param>(c % 3 - 1.5);
    bias[c] = static_cast<Param>(c % 5 * 0.25);
  }
  std::vector<double> saved_mean(channels), saved_invstd(channels);
  Buffer<T> output(n, offset), grad_input(n, offset);
  int64_t batches;
  BatchNormForward forward{view,
                           Format<T>::dtype,
                           data.input.data,
                           output.data,
                           {weight.data(), kParam},
                           {bias.data(), kParam},
                           {running_mean.data(), kParam},
                           {running_var.data(), kParam},
                           &batches,
                           0,
                           1e-5,
                           saved_mean.data(),
                           saved_invstd.data()};
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
