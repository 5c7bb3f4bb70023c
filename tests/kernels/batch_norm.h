// Batch norm without fusion, forward and backward, against its definition.
#pragma once

#include "values.h"

namespace normfused::testing {

// The per-channel statistics of a case, in long double.
template <class T>
struct Statistics {
  std::vector<long double> mean, m2, sum, squares;
  std::vector<double> low, high;

  explicit Statistics(const Case<T>& data)
      : mean(data.view.channels),
        m2(data.view.channels),
        sum(data.view.channels),
        squares(data.view.channels),
        low(data.view.channels, 1e9),
        high(data.view.channels, -1e9) {
    for (int64_t i = 0; i < data.view.numel(); ++i) {
      const int64_t c = data.channel(i);
      sum[c] += data.x(i);
      squares[c] += data.x(i) * data.x(i);
      low[c] = std::min(low[c], data.x(i));
      high[c] = std::max(high[c], data.x(i));
    }
    for (int64_t c = 0; c < data.view.channels; ++c) mean[c] = sum[c] / data.view.positions();
    for (int64_t i = 0; i < data.view.numel(); ++i) {
      const long double deviation = data.x(i) - mean[data.channel(i)];
      m2[data.channel(i)] += deviation * deviation;
    }
  }
};

template <class T, class Backend>
class BatchNormCase {
 public:
  BatchNormCase(Backend& backend, const Case<T>& data, const Statistics<T>& statistics, int64_t offset)
      : mean(statistics.mean.begin(), statistics.mean.end()),
        invstd(data.view.channels),
        var(data.view.channels),
        backend_(backend),
        data_(data),
        view_(data.view),
        weight_(view_.channels),
        bias_(view_.channels),
        running_mean_(view_.channels),
        running_var_(view_.channels),
        saved_mean_(view_.channels),
        saved_invstd_(view_.channels),
        output_(view_.numel(), offset),
        grad_input_(view_.numel(), offset) {
    for (int64_t c = 0; c < view_.channels; ++c) {
      weight_[c] = static_cast<Param>(c % 3 - 1.5);
      bias_[c] = static_cast<Param>(c % 5 * 0.25);
      var[c] = static_cast<double>(statistics.m2[c] / view_.positions());
      invstd[c] = 1 / std::sqrt(var[c] + 1e-5);
    }
  }

  // The fifth batch of a cumulative average, and the momentum with the same weight.
  void run_training() {
    const auto count = static_cast<double>(view_.positions());
    BatchNormForward args = forward();
    for (const double momentum : {std::numeric_limits<double>::quiet_NaN(), 0.2}) {
      args.momentum = momentum;
      batches_ = 4;
      fill_running(1, 2);
      backend_.batch_norm_training(args);
      expect_near("num_batches_tracked", 0, static_cast<double>(batches_), 5, 0);
      for (int64_t c = 0; c < view_.channels; ++c) {
        expect_near("saved mean", c, saved_mean_[c], mean[c], 1e-6);
        expect_near("saved invstd", c, saved_invstd_[c], invstd[c], 1e-5 * invstd[c]);
        expect_near("running_mean", c, running_mean_[c], 0.8 + 0.2 * mean[c], 1e-6);
        expect_near("running_var", c, running_var_[c], 1.6 + 0.2 * var[c] * count / (count - 1), 1e-5);
      }
      check_output("training output", mean, invstd);
    }
  }

  // All gradients, with and without a gradient through the statistics.
  void run_backward() {
    const auto count = static_cast<double>(view_.positions());
    std::vector<long double> g(view_.channels), gd(view_.channels);
    std::vector<double> magnitude(view_.channels);
    for (int64_t i = 0; i < view_.numel(); ++i) {
      const int64_t c = data_.channel(i);
      g[c] += data_.g(i);
      gd[c] += data_.g(i) * (data_.x(i) - mean[c]);
      magnitude[c] += std::abs(data_.g(i)) * (1 + std::abs(data_.x(i) - mean[c]));
    }
    for (const bool training : {true, false}) {
      std::vector<Param> grad_weight(view_.channels), grad_bias(view_.channels);
      BatchNormBackward args = backward(training);
      args.grad_weight = {grad_weight.data(), kParam};
      args.grad_bias = {grad_bias.data(), kParam};
      backend_.batch_norm_backward(args);
      for (int64_t c = 0; c < view_.channels; ++c) {
        const double tolerance = 10 * kRounding * magnitude[c];
        expect_near("grad_weight", c, grad_weight[c], gd[c] * invstd[c], tolerance * invstd[c]);
        expect_near("grad_bias", c, grad_bias[c], g[c], tolerance);
      }
      for (int64_t i = 0; i < view_.numel(); ++i) {
        const int64_t c = data_.channel(i);
        const long double through = g[c] + (data_.x(i) - mean[c]) * invstd[c] * invstd[c] * gd[c];
        double want = data_.g(i);
        if (training) want -= static_cast<double>(through / count);
        want *= weight_[c] * invstd[c];
        expect_near(training ? "grad_input" : "grad_input in inference", i, decode(grad_input_.data + i), want,
                    1.1 * kEpsilon * std::abs(want) + 40 * kRounding * (1 + std::abs(want)) * invstd[c]);
      }
    }
  }

  // With frozen statistics and no parameter gradients, backward needs no reduction.
  void run_backward_without_reduction() {
    backend_.batch_norm_backward(backward(false));
    for (int64_t i = 0; i < view_.numel(); ++i) {
      const double want = data_.g(i) * weight_[data_.channel(i)] * invstd[data_.channel(i)];
      expect_near("grad_input alone", i, decode(grad_input_.data + i), want,
                  1.1 * kEpsilon * std::abs(want) + 10 * kRounding * (1 + std::abs(want)));
    }
  }

  void run_inference() {
    fill_running(2.5, 4);
    batches_ = 5;
    backend_.batch_norm_inference(forward());
    check_output("inference output", std::vector<double>(view_.channels, 2.5),
                 std::vector<double>(view_.channels, 1 / std::sqrt(4 + 1e-5)));
    expect_near("num_batches_tracked", 0, static_cast<double>(batches_), 5, 0);
  }

  // Arguments whose running statistics are those of the batch, so that inference computes the same as training.
  BatchNormForward forward_with_batch_statistics() {
    BatchNormForward args = forward();
    args.num_batches_tracked = nullptr;
    args.momentum = 0;
    args.running_mean = {mean.data(), DType::kFloat64};
    args.running_var = {var.data(), DType::kFloat64};
    return args;
  }
  std::vector<double> weight() const { return {weight_.begin(), weight_.end()}; }
  std::vector<double> bias() const { return {bias_.begin(), bias_.end()}; }

  std::vector<double> mean, invstd, var;  // the true statistics

 private:
  using Param = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static constexpr DType kParam = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;
  static constexpr double kEpsilon = Format<T>::epsilon, kRounding = Format<T>::rounding;

  BatchNormForward forward() {
    return {{{running_mean_.data(), kParam},
             {running_var_.data(), kParam},
             &batches_,
             0.2,
             1e-5,
             saved_mean_.data(),
             saved_invstd_.data()},
            view_,
            Format<T>::dtype,
            data_.input.data,
            output_.data,
            {weight_.data(), kParam},
            {bias_.data(), kParam}};
  }

  BatchNormBackward backward(bool training) {
    return {view_, Format<T>::dtype, data_.grad.data, data_.input.data, grad_input_.data, {weight_.data(), kParam}, {},
            {},    mean.data(),      invstd.data(),   training};
  }

  void fill_running(double running_mean, double running_var) {
    std::fill(running_mean_.begin(), running_mean_.end(), static_cast<Param>(running_mean));
    std::fill(running_var_.begin(), running_var_.end(), static_cast<Param>(running_var));
  }

  void check_output(const char* what, const std::vector<double>& mu, const std::vector<double>& r) const {
    for (int64_t i = 0; i < view_.numel(); ++i) {
      const int64_t c = data_.channel(i);
      const double z = (data_.x(i) - mu[c]) * r[c] * weight_[c] + bias_[c];
      expect_near(what, i, decode(output_.data + i), z,
                  1.1 * kEpsilon * std::abs(z) + 20 * kRounding * (1 + std::abs(z)));
    }
  }

  Backend& backend_;
  const Case<T>& data_;
  const ChannelView view_;
  std::vector<Param> weight_, bias_, running_mean_, running_var_;
  std::vector<double> saved_mean_, saved_invstd_;
  Buffer<T> output_, grad_input_;
  int64_t batches_ = 0;
};

}  // namespace normfused::testing
