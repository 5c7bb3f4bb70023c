// Group norm against its definition in double, in both memory layouts, with an activation, a residual and a sign mask.
#pragma once

#include "fused.h"
#include "values.h"

namespace normfused::testing {

template <class T, class Backend>
class GroupNormCase {
 public:
  GroupNormCase(Backend& backend, const GroupView& view, const Fusion& fusion, bool by_sample, int64_t offset,
                std::mt19937& random)
      : backend_(backend),
        view_(view),
        fusion_(fusion),
        by_sample_(by_sample),
        columns_(view.samples * view.channels),
        data_({1, 1, view.numel()}, offset, random),
        residual_(view.numel(), offset),
        output_(view.numel(), offset),
        grad_input_(view.numel(), offset),
        grad_residual_(view.numel(), offset),
        mask_(static_cast<size_t>(mask_bytes(view.numel()))),
        mean_(static_cast<size_t>(view.statistics())),
        invstd_(mean_.size()) {
    std::uniform_int_distribution<int> eighths(-16, 16);
    for (int64_t i = 0; i < view.numel(); ++i) encode(residual_.data + i, eighths(random) / 8.0);
    for (std::vector<float>* parameter : {&weight_, &bias_}) {
      parameter->resize(static_cast<size_t>(by_sample ? columns_ : view.channels));
      for (float& value : *parameter) value = static_cast<float>(eighths(random)) / 8;
    }
    grad_weight_.resize(weight_.size());
    grad_bias_.resize(bias_.size());
  }

  void run() {
    define();
    run_forward();
    run_backward();
  }

 private:
  int64_t sample(int64_t i) const { return i / (view_.channels * view_.inner); }
  int64_t channel(int64_t i) const {
    return view_.channels_last ? i % view_.channels : i / view_.inner % view_.channels;
  }
  int64_t statistic(int64_t i) const { return sample(i) * view_.groups + channel(i) / view_.width(); }
  size_t parameter(int64_t i) const {
    return static_cast<size_t>((by_sample_ ? sample(i) * view_.channels : 0) + channel(i));
  }
  SampleParameter as_parameter(std::vector<float>& values) const {
    SampleParameter result;
    result.data = values.data();
    result.by_sample = by_sample_;
    return result;
  }
  double deviation(int64_t i) const {
    const auto s = static_cast<size_t>(statistic(i));
    return (data_.x(i) - want_mean_[s]) * want_invstd_[s];
  }
  // The argument of the activation.
  double z(int64_t i) const {
    const double normalized = deviation(i) * weight_[parameter(i)] + bias_[parameter(i)];
    return normalized + (fusion_.residual ? decode(residual_.data + i) : 0);
  }

  void define() {
    const auto count = static_cast<double>(view_.count());
    std::vector<double> squares(mean_.size());
    want_mean_.assign(mean_.size(), 0);
    want_invstd_.resize(mean_.size());
    for (int64_t i = 0; i < view_.numel(); ++i) want_mean_[static_cast<size_t>(statistic(i))] += data_.x(i) / count;
    for (int64_t i = 0; i < view_.numel(); ++i) {
      const auto s = static_cast<size_t>(statistic(i));
      squares[s] += (data_.x(i) - want_mean_[s]) * (data_.x(i) - want_mean_[s]);
    }
    for (size_t s = 0; s < squares.size(); ++s) want_invstd_[s] = 1 / std::sqrt(squares[s] / count + kEps);
  }

  void run_forward() {
    GroupNormForward args{};
    args.view = view_;
    args.dtype = Format<T>::dtype;
    args.input = data_.input.data;
    args.output = output_.data;
    args.weight = as_parameter(weight_);
    args.bias = as_parameter(bias_);
    args.eps = kEps;
    args.mean = mean_.data();
    args.invstd = invstd_.data();
    args.activation = fusion_.activation;
    args.residual = fusion_.residual ? residual_.data : nullptr;
    args.mask = fusion_.mask ? mask_.data() : nullptr;
    backend_.group_norm(args);
    for (size_t s = 0; s < mean_.size(); ++s) {
      const auto index = static_cast<int64_t>(s);
      expect_near("mean", index, mean_[s], want_mean_[s], 1e-6);
      expect_near("invstd", index, invstd_[s], want_invstd_[s], 1e-5 * want_invstd_[s]);
    }
    for (int64_t i = 0; i < view_.numel(); ++i) {
      const double want = activate(fusion_.activation, z(i));
      expect_near("output", i, decode(output_.data + i), want, tolerance(want));
      const bool bit = mask_[static_cast<size_t>(i / 8)] >> (i % 8) & 1;
      if (fusion_.mask && std::abs(z(i)) > 1e-4) expect_near("mask", i, bit, z(i) > 0, 0);
    }
  }

  void run_backward() {
    GroupNormBackward args{};
    args.view = view_;
    args.dtype = Format<T>::dtype;
    args.grad_output = data_.grad.data;
    args.input = data_.input.data;
    args.grad_input = grad_input_.data;
    args.weight = as_parameter(weight_);
    args.bias = as_parameter(bias_);
    args.grad_weight = as_parameter(grad_weight_);
    args.grad_bias = as_parameter(grad_bias_);
    args.mean = mean_.data();
    args.invstd = invstd_.data();
    args.activation = fusion_.activation;
    args.residual = fusion_.residual ? residual_.data : nullptr;
    args.mask = fusion_.mask ? mask_.data() : nullptr;
    args.grad_residual = fusion_.residual ? grad_residual_.data : nullptr;
    backend_.group_norm_backward(args);

    std::vector<double> grad(static_cast<size_t>(view_.numel())), sum(mean_.size()), product(mean_.size());
    std::vector<double> of_weight(weight_.size()), of_bias(bias_.size()), size_of_weight(weight_.size());
    std::vector<bool> kinked(mean_.size());  // where the slope by differences has no meaning
    bool any_kink = false;
    for (int64_t i = 0; i < view_.numel(); ++i) {
      const auto s = static_cast<size_t>(statistic(i));
      const size_t p = parameter(i);
      const bool smooth = fusion_.activation.kind == ActivationKind::kIdentity || !near_a_kink(z(i));
      if (!smooth) kinked[s] = any_kink = true;
      const double g = data_.g(i) * slope(fusion_.activation, z(i));
      grad[static_cast<size_t>(i)] = g;
      sum[s] += g * weight_[p];
      product[s] += g * weight_[p] * deviation(i);
      of_bias[p] += g;
      of_weight[p] += g * deviation(i);
      size_of_weight[p] += std::abs(g * deviation(i)) + std::abs(g);
    }
    const auto count = static_cast<double>(view_.count());
    for (int64_t i = 0; i < view_.numel(); ++i) {
      const auto s = static_cast<size_t>(statistic(i));
      if (kinked[s]) continue;
      const double own = grad[static_cast<size_t>(i)] * weight_[parameter(i)];
      const double want = want_invstd_[s] * (own - (sum[s] + deviation(i) * product[s]) / count);
      expect_near("grad_input", i, decode(grad_input_.data + i), want, 2 * tolerance(want));
      if (fusion_.residual) {
        const double residual = grad[static_cast<size_t>(i)];
        expect_near("grad_residual", i, decode(grad_residual_.data + i), residual, tolerance(residual));
      }
    }
    for (size_t p = 0; p < of_weight.size() && !any_kink; ++p) {
      const auto index = static_cast<int64_t>(p);
      expect_near("grad_weight", index, grad_weight_[p], of_weight[p], 1e-5 * size_of_weight[p] + 1e-5);
      expect_near("grad_bias", index, grad_bias_[p], of_bias[p], 1e-5 * size_of_weight[p] + 1e-5);
    }
  }

  static double tolerance(double want) { return (2 * Format<T>::epsilon + 2e-5) * (std::abs(want) + 1); }

  static constexpr double kEps = 1e-3;
  Backend& backend_;
  const GroupView view_;
  const Fusion fusion_;
  const bool by_sample_;
  const int64_t columns_;
  const Case<T> data_;
  Buffer<T> residual_, output_, grad_input_, grad_residual_;
  std::vector<uint8_t> mask_;
  std::vector<double> mean_, invstd_, want_mean_, want_invstd_;
  std::vector<float> weight_, bias_, grad_weight_, grad_bias_;
};

template <class T, class Backend>
void run_group_norm(Backend& backend, const GroupView& view, int64_t offset, std::mt19937& random) {
  const Fusion fusion = Fusion::next();
  const bool by_sample = offset == 1;
  current = backend.name() + " group norm " + Format<T>::name + " samples " + std::to_string(view.samples) +
            " groups " + std::to_string(view.groups) + " channels " + std::to_string(view.channels) + " inner " +
            std::to_string(view.inner) + (view.channels_last ? " channels last" : "") + " offset " +
            std::to_string(offset) + " activation " + std::to_string(static_cast<int>(fusion.activation.kind));
  GroupNormCase<T, Backend>(backend, view, fusion, by_sample, offset, random).run();
  if (view.numel() <= 100000)
    GroupNormCase<T, Backend>(backend, view, {{}, false, false}, by_sample, offset, random).run();
}

}  // namespace normfused::testing
