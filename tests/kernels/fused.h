// Batch norm with an activation, a residual and a sign mask; and in place.
#pragma once

#include "values.h"

namespace normfused::testing {

inline double activate(const Activation& activation, double z) {
  constexpr double kTwoOverPi = 0.63661977236758134308;
  const auto sigmoid = [&] { return 1 / (1 + std::exp(-z)); };
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
      return sigmoid();
    case ActivationKind::kTanh:
      return std::tanh(z);
    case ActivationKind::kSilu:
      return z * sigmoid();
    case ActivationKind::kGelu:
      return z / 2 * (1 + std::erf(z / std::sqrt(2)));
    case ActivationKind::kGeluTanh:
      return z / 2 * (1 + std::tanh(std::sqrt(kTwoOverPi) * (z + 0.044715 * z * z * z)));
  }
  return z;
}

// The derivative by central differences, so that it does not repeat the kernels' formulas.
inline double slope(const Activation& activation, double z) {
  const double h = 1e-5;
  return (activate(activation, z + h) - activate(activation, z - h)) / (2 * h);
}
inline bool near_a_kink(double z) {
  return std::min({std::abs(z), std::abs(z - 3), std::abs(z + 3), std::abs(z - 6)}) < 1e-3;
}

// next() cycles through the activations, with and without a residual, and with a mask if the gradient depends only on
// the sign of the input.
struct Fusion {
  Activation activation;
  bool residual, mask;

  static Fusion next() {
    static int turn = 0;
    const int kind = turn % 11,
              round = turn / 11;  // 11 is coprime to the number of dtypes, so each dtype gets every activation
    ++turn;
    const auto activation = static_cast<ActivationKind>(kind);
    const bool by_sign = activation == ActivationKind::kRelu || activation == ActivationKind::kLeakyRelu;
    return {{activation, 0.3}, round % 2 == 0, by_sign && round % 4 < 2};
  }
};

template <class T, class Backend>
class FusedCase {
 public:
  FusedCase(Backend& backend, const Fusion& fusion, const Case<T>& data, int64_t offset,
            const AffineStatistics& statistics, std::mt19937& random)
      : backend_(backend),
        fusion_(fusion),
        data_(data),
        statistics_(statistics),
        n_(data.view.numel()),
        residual_(n_, offset),
        output_(n_, offset),
        grad_(n_, offset),
        grad_input_(n_, offset),
        grad_residual_(n_, offset),
        mask_(static_cast<size_t>(mask_bytes(n_))),
        z_(n_),
        g_(n_) {
    std::uniform_int_distribution<int> eighths(-16, 16);
    for (int64_t i = 0; i < n_; ++i) {
      encode(residual_.data + i, eighths(random) / 8.0);
      z_[i] = statistics.z(data.x(i), data.channel(i));
      if (fusion.residual) z_[i] += decode(residual_.data + i);
      encode(grad_.data + i, near_a_kink(z_[i]) ? 0 : data.g(i));
      g_[i] = near_a_kink(z_[i]) ? 0 : data.g(i) * slope(fusion.activation, z_[i]);
    }
  }

  void run_forward(BatchNormForward args) {
    args.activation = fusion_.activation;
    args.output = output_.data;
    if (fusion_.residual) args.residual = residual_.data;
    if (fusion_.mask) args.mask = mask_.data();
    for (const bool training : {true, false}) {
      std::fill(mask_.begin(), mask_.end(), 0xff);
      training ? backend_.batch_norm_training(args) : backend_.batch_norm_inference(args);
      for (int64_t i = 0; i < n_; ++i) {
        const double want = activate(fusion_.activation, z_[i]);
        expect_near(training ? "output" : "inference output", i, decode(output_.data + i), want,
                    1.1 * kEpsilon * std::abs(want) + 40 * kRounding * (1 + std::abs(z_[i])));
        if (fusion_.mask && !near_a_kink(z_[i])) expect_near("mask", i, mask_[i / 8] >> i % 8 & 1, z_[i] > 0, 0);
      }
      for (int64_t i = n_; fusion_.mask && i < 8 * mask_bytes(n_); ++i)
        expect_near("mask's padding", i, mask_[i / 8] >> i % 8 & 1, 0, 0);
    }
  }

  void run_backward(const BatchNormForward& forward) {
    const int64_t channels = data_.view.channels;
    for (const bool training : {true, false}) {
      std::vector<double> grad_weight(channels), grad_bias(channels), total(channels), product(channels),
          magnitude(channels);
      for (int64_t i = 0; i < n_; ++i) {
        const int64_t c = data_.channel(i);
        const double deviation = data_.x(i) - statistics_.mean[c];
        total[c] += g_[i];
        product[c] += g_[i] * deviation;
        magnitude[c] += std::abs(data_.g(i)) * (1 + std::abs(deviation)) * (1 + std::abs(z_[i]));
      }
      BatchNormBackward args = backward(forward, training);
      args.grad_weight = {grad_weight.data(), DType::kFloat64};
      args.grad_bias = {grad_bias.data(), DType::kFloat64};
      backend_.batch_norm_backward(args);
      check_grad_input(training, total, product);
      for (int64_t c = 0; c < channels; ++c) {
        const double tolerance = (40 * kRounding + 10 * kDifference) * magnitude[c];
        expect_near("grad_weight", c, grad_weight[c], product[c] * statistics_.invstd[c],
                    tolerance * statistics_.invstd[c]);
        expect_near("grad_bias", c, grad_bias[c], total[c], tolerance);
      }
      backend_.batch_norm_backward(backward(forward, training));
      check_grad_input(training, total, product);
    }
  }

 private:
  static constexpr double kEpsilon = Format<T>::epsilon, kRounding = Format<T>::rounding;
  static constexpr double kDifference = 1e-9;  // error of slope()

  BatchNormBackward backward(const BatchNormForward& forward, bool training) {
    BatchNormBackward args{};
    args.view = data_.view;
    args.dtype = Format<T>::dtype;
    args.grad_output = grad_.data;
    args.input = data_.input.data;
    args.grad_input = grad_input_.data;
    args.weight = forward.weight;
    args.mean = statistics_.mean.data();
    args.invstd = statistics_.invstd.data();
    args.training = training;
    args.activation = fusion_.activation;
    args.bias = forward.bias;
    if (fusion_.mask)
      args.mask = mask_.data();
    else if (fusion_.residual)
      args.residual = residual_.data;
    if (fusion_.residual) args.grad_residual = grad_residual_.data;
    return args;
  }

  // `total` and `product` are the sums of g and of g * deviation per channel.
  void check_grad_input(bool training, const std::vector<double>& total, const std::vector<double>& product) const {
    const auto count = static_cast<double>(data_.view.positions());
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t c = data_.channel(i);
      const double invstd = statistics_.invstd[c];
      double want = g_[i];
      if (training) want -= (total[c] + (data_.x(i) - statistics_.mean[c]) * invstd * invstd * product[c]) / count;
      want *= statistics_.weight[c] * invstd;
      const double scale = (1 + std::abs(z_[i])) * (1 + std::abs(want)) * (1 + invstd);
      expect_near(training ? "grad_input" : "grad_input in inference", i, decode(grad_input_.data + i), want,
                  1.1 * kEpsilon * std::abs(want) + (100 * kRounding + 10 * kDifference) * scale);
      if (fusion_.residual)
        expect_near("grad_residual", i, decode(grad_residual_.data + i), g_[i],
                    1.1 * kEpsilon * std::abs(g_[i]) + (40 * kRounding + kDifference) * (1 + std::abs(z_[i])) * 2);
    }
  }

  Backend& backend_;
  const Fusion fusion_;
  const Case<T>& data_;
  const AffineStatistics& statistics_;
  const int64_t n_;
  Buffer<T> residual_, output_, grad_, grad_input_, grad_residual_;
  std::vector<uint8_t> mask_;
  std::vector<double> z_, g_;  // the input of the activation, and its gradient
};

// `forward` normalizes with `statistics` in training and in inference.
template <class T, class Backend>
void run_fused(Backend& backend, const Fusion& fusion, const Case<T>& data, const BatchNormForward& forward,
               int64_t offset, const AffineStatistics& statistics, std::mt19937& random) {
  current += " activation " + std::to_string(static_cast<int>(fusion.activation.kind)) +
             (fusion.residual ? " with residual" : "") + (fusion.mask ? " with mask" : "");
  FusedCase<T, Backend> fused(backend, fusion, data, offset, statistics, random);
  fused.run_forward(forward);
  fused.run_backward(forward);
}

// In place: forward overwrites its input, and backward reads the output.
template <class T, class Backend>
class InPlaceCase {
 public:
  InPlaceCase(Backend& backend, const Activation& activation, const Case<T>& data, int64_t offset,
              const AffineStatistics& statistics)
      : backend_(backend),
        activation_(activation),
        data_(data),
        statistics_(statistics),
        n_(data.view.numel()),
        tensor_(n_, offset),
        grad_input_(n_, offset),
        deviation_(n_),
        g_(n_) {}

  void run_forward(BatchNormForward args, bool training) {
    args.activation = activation_;
    args.input = args.output = tensor_.data;
    std::memcpy(tensor_.data, data_.input.data, static_cast<size_t>(n_) * sizeof(T));
    training ? backend_.batch_norm_training(args) : backend_.batch_norm_inference(args);
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t c = data_.channel(i);
      const double z = statistics_.z(data_.x(i), c), want = activate(activation_, z), y = decode(tensor_.data + i);
      expect_near("output", i, y, want, 1.1 * kEpsilon * std::abs(want) + 40 * kRounding * (1 + std::abs(z)));
      const bool scaled = activation_.kind == ActivationKind::kLeakyRelu && y <= 0;
      deviation_[i] = ((scaled ? y / activation_.parameter : y) - statistics_.bias[c]) / statistics_.weight[c];
      g_[i] = scaled ? data_.g(i) * activation_.parameter : data_.g(i);
    }
  }

  // From the output that run_forward() left.
  void run_backward(const BatchNormForward& forward, bool training) {
    const int64_t channels = data_.view.channels;
    std::vector<double> total(channels), product(channels), magnitude(channels);
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t c = data_.channel(i);
      total[c] += g_[i];
      product[c] += g_[i] * deviation_[i];
      magnitude[c] += std::abs(g_[i]) * (2 + std::abs(deviation_[i]));
    }
    std::vector<double> grad_weight(channels), grad_bias(channels);
    BatchNormBackward args = backward(forward, training);
    args.grad_weight = {grad_weight.data(), DType::kFloat64};
    args.grad_bias = {grad_bias.data(), DType::kFloat64};
    for (const bool parameters : {true, false}) {
      if (!parameters) args.grad_weight = args.grad_bias = {};
      backend_.batch_norm_backward(args);
      check_grad_input(training, total, product);
    }
    for (int64_t c = 0; c < channels; ++c) {
      expect_near("grad_weight", c, grad_weight[c], product[c], 40 * kRounding * magnitude[c]);
      expect_near("grad_bias", c, grad_bias[c], total[c], 40 * kRounding * magnitude[c]);
    }
  }

 private:
  static constexpr double kEpsilon = Format<T>::epsilon, kRounding = Format<T>::rounding;

  BatchNormBackward backward(const BatchNormForward& forward, bool training) {
    BatchNormBackward args{};
    args.view = data_.view;
    args.dtype = Format<T>::dtype;
    args.grad_output = data_.grad.data;
    args.input = tensor_.data;
    args.grad_input = grad_input_.data;
    args.weight = forward.weight;
    args.mean = statistics_.mean.data();
    args.invstd = statistics_.invstd.data();
    args.training = training;
    args.activation = activation_;
    args.bias = forward.bias;
    args.from_output = true;
    return args;
  }

  void check_grad_input(bool training, const std::vector<double>& total, const std::vector<double>& product) const {
    const auto count = static_cast<double>(data_.view.positions());
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t c = data_.channel(i);
      double want = g_[i];
      if (training) want -= (total[c] + deviation_[i] * product[c]) / count;
      want *= statistics_.weight[c] * statistics_.invstd[c];
      expect_near(
          training ? "grad_input" : "grad_input in inference", i, decode(grad_input_.data + i), want,
          1.1 * kEpsilon * std::abs(want) + 100 * kRounding * (1 + std::abs(want)) * (1 + statistics_.invstd[c]));
    }
  }

  Backend& backend_;
  const Activation activation_;
  const Case<T>& data_;
  const AffineStatistics& statistics_;
  const int64_t n_;
  Buffer<T> tensor_, grad_input_;
  std::vector<double> deviation_, g_;  // (x - mean) * invstd from the output, and the gradient of z
};

template <class T, class Backend>
void run_in_place(Backend& backend, const Activation& activation, const Case<T>& data, const BatchNormForward& forward,
                  int64_t offset, const AffineStatistics& statistics) {
  current += " in place, activation " + std::to_string(static_cast<int>(activation.kind));
  InPlaceCase<T, Backend> in_place(backend, activation, data, offset, statistics);
  for (const bool training : {true, false}) {
    in_place.run_forward(forward, training);
    in_place.run_backward(forward, training);
  }
}

}  // namespace normfused::testing
