// Synchronized batch norm: a batch that is distributed over ranks.
#pragma once

#include "kernels/math.h"
#include "values.h"

namespace normfused::testing {

// Three ranks: the first has `data`, the second has no values, the third has another tensor. The first then normalizes
// its values and computes their gradient.
template <class T, class Backend>
class RanksCase {
 public:
  RanksCase(Backend& backend, const Case<T>& data, int64_t offset, std::mt19937& random)
      : backend_(backend),
        data_(data),
        view_(data.view),
        channels_(view_.channels),
        other_({view_.outer + 1, channels_, view_.inner}, offset, random),
        count_(view_.positions() + other_.view.positions()),
        stride_(rank_words(channels_, Format<T>::dtype) + 2),
        messages_(3 * stride_ - 2),
        mean_(channels_),
        m2_(channels_),
        g_(channels_),
        gd_(channels_),
        merged_mean_(channels_),
        invstd_(channels_),
        weight_(channels_),
        bias_(channels_),
        output_(view_.numel(), offset) {
    for_each_element([&](const Case<T>& part, int64_t i, int64_t c) { mean_[c] += part.x(i); });
    for (long double& value : mean_) value /= count_;
    for_each_element([&](const Case<T>& part, int64_t i, int64_t c) {
      const long double deviation = part.x(i) - mean_[c];
      m2_[c] += deviation * deviation;
      g_[c] += part.g(i);
      gd_[c] += part.g(i) * deviation;
    });
    for (int64_t c = 0; c < channels_; ++c) {
      weight_[c] = static_cast<S>(c % 3 - 1.5);
      bias_[c] = static_cast<S>(c % 5 * 0.25);
    }
  }

  // The messages of the first and the third rank.
  void run_pack() {
    int64_t* const first = messages_.data();
    backend_.pack_moments({view_, Format<T>::dtype, data_.input.data, first, 1e-5});
    backend_.pack_moments({other_.view, Format<T>::dtype, other_.input.data, first + 2 * stride_, 1e-5});
    const auto count = static_cast<double>(view_.positions());
    expect_near("count sent", 0, static_cast<double>(first[0]), count, 0);
    const auto* const sent = reinterpret_cast<const RankMoments<S>*>(first + 1);
    std::vector<double> mean(channels_), squares(channels_);
    for (int64_t i = 0; i < view_.numel(); ++i) {
      mean[data_.channel(i)] += data_.x(i) / count;
      squares[data_.channel(i)] += data_.x(i) * data_.x(i) / count;
    }
    for (int64_t c = 0; c < channels_; ++c) {
      expect_near("mean sent", c, sent[c].mean, mean[c], 1e-6);
      const double variance = squares[c] - mean[c] * mean[c];
      expect_near("deviation sent", c, sent[c].deviation * sent[c].deviation, variance, 1e-5);
    }
  }

  // The fifth batch of a cumulative average, and the momentum with the same weight.
  void run_merge() {
    for (const double momentum : {std::numeric_limits<double>::quiet_NaN(), 0.2}) {
      const Merged got = merge(messages_, momentum, merged_mean_, invstd_);
      expect_near("count", 0, static_cast<double>(got.count), static_cast<double>(count_), 0);
      expect_near("num_batches_tracked", 0, static_cast<double>(got.batches), 5, 0);
      for (int64_t c = 0; c < channels_; ++c) {
        const double var = m2_[c] / count_, unbiased = m2_[c] / (count_ - 1), want = 1 / std::sqrt(var + 1e-5);
        expect_near("merged mean", c, merged_mean_[c], static_cast<double>(mean_[c]), 1e-6);
        expect_near("merged invstd", c, invstd_[c], want, 1e-5 * want);
        expect_near("running_mean", c, got.running_mean[c], 0.8 + 0.2 * static_cast<double>(mean_[c]), 1e-6);
        expect_near("running_var", c, got.running_var[c], 1.6 + 0.2 * unbiased, 1e-5);
      }
    }
  }

  // A batch without values updates nothing.
  void run_merge_of_nothing() {
    const std::vector<int64_t> nothing(messages_.size());
    std::vector<double> mean(channels_, 7), invstd(channels_, 7);
    const Merged got = merge(nothing, 0.7, mean, invstd);
    expect_near("count", 0, static_cast<double>(got.count), 0, 0);
    expect_near("num_batches_tracked", 0, static_cast<double>(got.batches), 4, 0);
    for (int64_t c = 0; c < channels_; ++c) {
      expect_near("merged mean", c, mean[c], 0, 0);
      expect_near("merged invstd", c, invstd[c], 0, 0);
      expect_near("running_mean", c, got.running_mean[c], 1, 1e-6);
      expect_near("running_var", c, got.running_var[c], 2, 1e-5);
    }
  }

  // With the merged statistics.
  void run_normalization() {
    BatchNormForward args{};
    args.view = view_;
    args.dtype = Format<T>::dtype;
    args.input = data_.input.data;
    args.output = output_.data;
    args.weight = {weight_.data(), kParam};
    args.bias = {bias_.data(), kParam};
    args.mean = merged_mean_.data();
    args.invstd = invstd_.data();
    backend_.batch_norm_inference(args);
    for (int64_t i = 0; i < view_.numel(); ++i) {
      const int64_t c = data_.channel(i);
      const double z = (data_.x(i) - merged_mean_[c]) * invstd_[c] * weight_[c] + bias_[c];
      expect_near("output", i, decode(output_.data + i), z,
                  1.1 * kEpsilon * std::abs(z) + 20 * kRounding * (1 + std::abs(z)));
    }
  }

  // With the parameter gradients of all ranks, which backward reads and must not change.
  void run_backward() {
    std::vector<S> grad_weight(channels_), grad_bias(channels_);
    for (int64_t c = 0; c < channels_; ++c) {
      grad_weight[c] = static_cast<S>(gd_[c] * invstd_[c]);
      grad_bias[c] = static_cast<S>(g_[c]);
    }
    const std::vector<S> given_weight = grad_weight, given_bias = grad_bias;
    BatchNormBackward args{};
    args.view = view_;
    args.dtype = Format<T>::dtype;
    args.grad_output = data_.grad.data;
    args.input = data_.input.data;
    args.grad_input = output_.data;
    args.weight = {weight_.data(), kParam};
    args.bias = {bias_.data(), kParam};
    args.grad_weight = {grad_weight.data(), kParam};
    args.grad_bias = {grad_bias.data(), kParam};
    args.mean = merged_mean_.data();
    args.invstd = invstd_.data();
    args.training = true;
    args.count = &count_;
    // A leaky ReLU with slope 1 is the identity, but runs the fused kernel.
    for (const Activation& activation : {Activation{}, Activation{ActivationKind::kLeakyRelu, 1}}) {
      args.activation = activation;
      backend_.batch_norm_backward(args);
      for (int64_t i = 0; i < view_.numel(); ++i) {
        const int64_t c = data_.channel(i);
        const long double through = g_[c] + (data_.x(i) - mean_[c]) * invstd_[c] * invstd_[c] * gd_[c];
        const double want = static_cast<double>(data_.g(i) - through / count_) * weight_[c] * invstd_[c];
        expect_near("grad_input", i, decode(output_.data + i), want,
                    1.1 * kEpsilon * std::abs(want) + 60 * kRounding * (1 + std::abs(want)) * invstd_[c]);
      }
    }
    expect_near("parameter gradients are unchanged", 0, grad_weight == given_weight && grad_bias == given_bias, 1, 0);
  }

 private:
  using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static constexpr DType kParam = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;
  static constexpr double kEpsilon = Format<T>::epsilon, kRounding = Format<T>::rounding;

  struct Merged {
    int64_t count, batches;
    std::vector<S> running_mean, running_var;
  };

  // Merges three messages into `mean` and `invstd`, after four batches with running statistics 1 and 2.
  Merged merge(const std::vector<int64_t>& messages, double momentum, std::vector<double>& mean,
               std::vector<double>& invstd) {
    Merged result{0, 4, std::vector<S>(channels_, 1), std::vector<S>(channels_, 2)};
    MergeRanks args{};
    args.running_mean = {result.running_mean.data(), kParam};
    args.running_var = {result.running_var.data(), kParam};
    args.num_batches_tracked = &result.batches;
    args.momentum = momentum;
    args.eps = 1e-5;
    args.mean = mean.data();
    args.invstd = invstd.data();
    args.ranks = 3;
    args.channels = channels_;
    args.is_double = std::is_same_v<T, double>;
    args.words = messages.data();
    args.stride = stride_;
    args.count = &result.count;
    backend_.merge_ranks(args);
    return result;
  }

  // Calls f(case, element, channel) for all elements of all ranks.
  template <class F>
  void for_each_element(const F& f) const {
    for (const Case<T>* const part : {&data_, &other_})
      for (int64_t i = 0; i < part->view.numel(); ++i) f(*part, i, part->channel(i));
  }

  Backend& backend_;
  const Case<T>& data_;
  const ChannelView view_;
  const int64_t channels_;
  const Case<T> other_;
  const int64_t count_, stride_;
  std::vector<int64_t> messages_;
  std::vector<long double> mean_, m2_, g_, gd_;  // the definition: statistics and sums of all ranks
  std::vector<double> merged_mean_, invstd_;     // computed by the kernels
  std::vector<S> weight_, bias_;
  Buffer<T> output_;
};

template <class T, class Backend>
void run_ranks(Backend& backend, const Case<T>& data, int64_t offset, std::mt19937& random) {
  const std::string name = current;
  current += " over ranks";
  RanksCase<T, Backend> ranks(backend, data, offset, random);
  ranks.run_pack();
  ranks.run_merge();
  ranks.run_merge_of_nothing();
  ranks.run_normalization();
  ranks.run_backward();
  current = name;
}

}  // namespace normfused::testing
