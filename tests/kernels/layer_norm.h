// Layer norm and RMS norm against their definition in double, with positions that are rows and columns of memory.
#pragma once

#include "values.h"

namespace normfused::testing {

struct LayerNormOptions {
  int64_t samples;  // 1, or weights by sample
  bool shared_bias, subtract_mean, residual;
};

template <class T, class Backend>
class LayerNormCase {
 public:
  LayerNormCase(Backend& backend, const ChannelView& view, const LayerNormOptions& options, int64_t offset,
                std::mt19937& random)
      : backend_(backend),
        view_(view),
        options_(options),
        data_({1, 1, view.numel()}, offset, random),
        residual_(view.numel(), offset),
        sum_(view.numel(), offset),
        grad_sum_(view.numel(), offset),
        output_(view.numel(), offset),
        grad_input_(view.numel(), offset),
        mean_(static_cast<size_t>(view.positions())),
        invstd_(mean_.size()),
        x_(static_cast<size_t>(view.numel())) {
    std::uniform_int_distribution<int> eighths(-16, 16);
    for (int64_t i = 0; i < view.numel(); ++i) {
      encode(residual_.data + i, eighths(random) / 8.0);
      encode(grad_sum_.data + i, eighths(random) / 8.0);
      const double sum = data_.x(i) + (options.residual ? decode(residual_.data + i) : 0);
      T rounded;
      encode(&rounded, sum);
      x_[static_cast<size_t>(i)] = decode(&rounded);
    }
    for (std::vector<float>* parameter : {&weight_, &bias_}) {
      const bool shared = parameter == &bias_ && options.shared_bias;
      parameter->resize(static_cast<size_t>((shared ? 1 : options.samples) * view.channels));
      for (float& value : *parameter) value = static_cast<float>(eighths(random)) / 8;
    }
    grad_weight_.resize(weight_.size());
    grad_bias_.resize(bias_.size());
  }

  void run() {
    run_only_forward();
    run_backward();
  }
  void run_only_forward() {
    define();
    run_forward();
  }

 private:
  size_t position(int64_t i) const {
    return static_cast<size_t>(i / (view_.channels * view_.inner) * view_.inner + i % view_.inner);
  }
  size_t channel(int64_t i) const { return static_cast<size_t>(i / view_.inner % view_.channels); }
  size_t of_weight(int64_t i) const {
    const int64_t sample = i / (view_.channels * view_.inner) / (view_.outer / options_.samples);
    return static_cast<size_t>(sample * view_.channels) + channel(i);
  }
  size_t of_bias(int64_t i) const { return options_.shared_bias ? channel(i) : of_weight(i); }
  SampleParameter as_parameter(std::vector<float>& values) const {
    SampleParameter result;
    result.data = values.data();
    result.by_sample = options_.samples > 1 && values.size() == weight_.size();
    return result;
  }
  double deviation(int64_t i) const {
    const size_t p = position(i);
    return (x_[static_cast<size_t>(i)] - want_mean_[p]) * want_invstd_[p];
  }

  void define() {
    const auto count = static_cast<double>(view_.channels);
    std::vector<double> squares(mean_.size());
    want_mean_.assign(mean_.size(), 0);
    want_invstd_.resize(mean_.size());
    for (int64_t i = 0; i < view_.numel() && options_.subtract_mean; ++i)
      want_mean_[position(i)] += x_[static_cast<size_t>(i)] / count;
    for (int64_t i = 0; i < view_.numel(); ++i) {
      const double difference = x_[static_cast<size_t>(i)] - want_mean_[position(i)];
      squares[position(i)] += difference * difference;
    }
    for (size_t p = 0; p < squares.size(); ++p) want_invstd_[p] = 1 / std::sqrt(squares[p] / count + kEps);
  }

  void run_forward() {
    LayerNormForward args{};
    args.view = view_;
    args.samples = options_.samples;
    args.dtype = Format<T>::dtype;
    args.input = data_.input.data;
    args.output = output_.data;
    args.weight = as_parameter(weight_);
    args.bias = as_parameter(bias_);
    args.eps = kEps;
    args.subtract_mean = options_.subtract_mean;
    args.mean = mean_.data();
    args.invstd = invstd_.data();
    if (options_.residual) {
      args.residual = residual_.data;
      args.sum = sum_.data;
    }
    backend_.layer_norm(args);
    for (size_t p = 0; p < mean_.size(); ++p) {
      const auto index = static_cast<int64_t>(p);
      expect_near("mean", index, mean_[p], want_mean_[p], 1e-6);
      expect_near("invstd", index, invstd_[p], want_invstd_[p], 1e-5 * want_invstd_[p]);
    }
    for (int64_t i = 0; i < view_.numel(); ++i) {
      const double want = deviation(i) * weight_[of_weight(i)] + bias_[of_bias(i)];
      expect_near("output", i, decode(output_.data + i), want, tolerance(want));
      if (options_.residual) expect_near("sum", i, decode(sum_.data + i), x_[static_cast<size_t>(i)], 0);
    }
  }

  void run_backward() {
    LayerNormBackward args{};
    args.view = view_;
    args.samples = options_.samples;
    args.dtype = Format<T>::dtype;
    args.grad_output = data_.grad.data;
    args.input = options_.residual ? sum_.data : data_.input.data;
    args.grad_input = grad_input_.data;
    args.weight = as_parameter(weight_);
    args.grad_weight = as_parameter(grad_weight_);
    args.grad_bias = as_parameter(grad_bias_);
    args.mean = mean_.data();
    args.invstd = invstd_.data();
    args.subtract_mean = options_.subtract_mean;
    args.grad_sum = options_.residual ? grad_sum_.data : nullptr;
    backend_.layer_norm_backward(args);

    std::vector<double> sum(mean_.size()), product(mean_.size());
    std::vector<double> want_weight(weight_.size()), size_of_weight(weight_.size());
    std::vector<double> want_bias(bias_.size()), size_of_bias(bias_.size());
    for (int64_t i = 0; i < view_.numel(); ++i) {
      const size_t s = position(i), p = of_weight(i);
      if (options_.subtract_mean) sum[s] += data_.g(i) * weight_[p];
      product[s] += data_.g(i) * weight_[p] * deviation(i);
      want_weight[p] += data_.g(i) * deviation(i);
      size_of_weight[p] += std::abs(data_.g(i) * deviation(i)) + std::abs(data_.g(i));
      want_bias[of_bias(i)] += data_.g(i);
      size_of_bias[of_bias(i)] += std::abs(data_.g(i));
    }
    const auto count = static_cast<double>(view_.channels);
    for (int64_t i = 0; i < view_.numel(); ++i) {
      const size_t s = position(i);
      const double own = data_.g(i) * weight_[of_weight(i)];
      const double norms = want_invstd_[s] * (own - (sum[s] + deviation(i) * product[s]) / count);
      const double want = norms + (options_.residual ? decode(grad_sum_.data + i) : 0);
      // For a single channel the two terms cancel.
      const double size = std::max(std::abs(want), want_invstd_[s] * std::abs(own));
      expect_near("grad_input", i, decode(grad_input_.data + i), want, 2 * tolerance(size));
    }
    for (size_t p = 0; p < want_weight.size(); ++p)
      expect_near("grad_weight", static_cast<int64_t>(p), grad_weight_[p], want_weight[p],
                  1e-5 * size_of_weight[p] + 1e-5);
    for (size_t p = 0; p < want_bias.size(); ++p)
      expect_near("grad_bias", static_cast<int64_t>(p), grad_bias_[p], want_bias[p], 1e-5 * size_of_bias[p] + 1e-5);
  }

  static double tolerance(double want) { return (2 * Format<T>::epsilon + 2e-5) * (std::abs(want) + 1); }

  static constexpr double kEps = 1e-3;
  Backend& backend_;
  const ChannelView view_;
  const LayerNormOptions options_;
  const Case<T> data_;
  Buffer<T> residual_, sum_, grad_sum_, output_, grad_input_;
  std::vector<double> mean_, invstd_, want_mean_, want_invstd_, x_;
  std::vector<float> weight_, bias_, grad_weight_, grad_bias_;
};

template <class T, class Backend>
void run_layer_norm(Backend& backend, const ChannelView& view, const LayerNormOptions& options, int64_t offset,
                    std::mt19937& random) {
  current = backend.name() + (options.subtract_mean ? " layer" : " RMS") + " norm " + Format<T>::name + " outer " +
            std::to_string(view.outer) + " channels " + std::to_string(view.channels) + " inner " +
            std::to_string(view.inner) + " samples " + std::to_string(options.samples) +
            (options.residual ? " residual" : "") + " offset " + std::to_string(offset);
  LayerNormCase<T, Backend>(backend, view, options, offset, random).run();
}

}  // namespace normfused::testing
