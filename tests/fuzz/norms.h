// Batch, group, layer and RMS norm with any combination of options against one definition in double: a normalization by
// statistics to which each element belongs, with parameters to which it belongs.
//
// Some elements can be any bits, also NaN, infinite or very large. A statistic of such elements is not compared, except
// that NaN must stay NaN. All others must be as exact as without those elements.
#pragma once

#include <utility>

#include "bytes.h"
#include "fused.h"
#include "kernels/cpu/table.h"
#include "values.h"

namespace normfused::fuzz {

using namespace normfused::testing;

enum class Kind { kBatch, kFrozenBatch, kGroup, kLayer, kRms };

// To which statistic and to which parameter an element belongs.
struct Shape {
  Kind kind;
  ChannelView view;  // unless kGroup
  GroupView groups;  // if kGroup
  int64_t samples;   // of parameters by sample; 1 for batch norm

  bool is_batch() const { return kind <= Kind::kFrozenBatch; }
  bool is_layer() const { return kind >= Kind::kLayer; }
  int64_t numel() const { return kind == Kind::kGroup ? groups.numel() : view.numel(); }
  int64_t channels() const { return kind == Kind::kGroup ? groups.channels : view.channels; }
  int64_t statistics() const {
    return kind == Kind::kGroup ? groups.statistics() : is_batch() ? view.channels : view.positions();
  }
  int64_t count() const { return numel() / statistics(); }
  int64_t channel(int64_t i) const {
    if (kind != Kind::kGroup) return i / view.inner % view.channels;
    return groups.channels_last ? i % groups.channels : i / groups.inner % groups.channels;
  }
  int64_t sample(int64_t i) const { return i / (numel() / samples); }
  int64_t statistic(int64_t i) const {
    if (is_batch()) return channel(i);
    if (kind == Kind::kGroup) return sample(i) * groups.groups + channel(i) / groups.width();
    return i / (view.channels * view.inner) * view.inner + i % view.inner;
  }
  int64_t parameter(int64_t i, bool by_sample) const { return (by_sample ? sample(i) * channels() : 0) + channel(i); }
};

inline Shape any_shape(Bytes& bytes) {
  Shape shape{bytes.pick({Kind::kBatch, Kind::kFrozenBatch, Kind::kGroup, Kind::kLayer, Kind::kRms}), {}, {}, 1};
  const int64_t most = int64_t{1} << bytes.between(3, 16);
  const int64_t outer = bytes.extent(most), channels = bytes.extent(most / outer);
  const int64_t inner = bytes.flag() ? 1 : bytes.extent(most / outer / channels);
  shape.view = {outer, channels, inner};
  if (!shape.is_batch()) shape.samples = outer;
  if (shape.kind == Kind::kGroup) {
    const int64_t groups = bytes.extent(channels);
    shape.groups = {outer, groups, std::max<int64_t>(1, channels / groups) * groups, inner, bytes.flag()};
  } else if (shape.is_layer()) {
    const int64_t rows = bytes.extent(std::max<int64_t>(1, most / shape.view.numel()));
    shape.view.outer *= rows;  // of a sample
  } else if (shape.kind == Kind::kBatch && shape.view.positions() < 2) {
    shape.view.outer = 2;  // a precondition
  }
  return shape;
}

// A vector of one value per channel, of any floating dtype, in memory of its exact size. The values are not 0.
class Parameter {
 public:
  Parameter(Bytes& bytes, int64_t size, std::mt19937& random)
      : dtype_(bytes.pick({DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16})),
        size_(size),
        memory_(new uint8_t[static_cast<size_t>(size * item_bytes())]) {
    std::uniform_int_distribution<int> eighths(4, 16);
    for (int64_t i = 0; i < size; ++i)
      visit(i, [&](auto* p) { encode(p, (random() & 1 ? -1 : 1) * eighths(random) / 8.0); });
  }
  double operator[](int64_t i) const {
    double value = 0;
    visit(i, [&](auto* p) { value = decode(p); });
    return value;
  }
  ChannelVector vector() const { return {memory_.get(), dtype_}; }
  SampleParameter by_sample(bool is_by_sample) const {
    SampleParameter result;
    static_cast<ChannelVector&>(result) = vector();
    result.by_sample = is_by_sample;
    return result;
  }
  int64_t size() const { return size_; }
  // Half a unit in the last place of a value of magnitude 1.
  double epsilon() const {
    double value = 0;
    visit(0, [&](auto* p) { value = Format<std::remove_pointer_t<decltype(p)>>::epsilon; });
    return value;
  }

 private:
  int64_t item_bytes() const { return dtype_ == DType::kFloat64 ? 8 : dtype_ == DType::kFloat32 ? 4 : 2; }
  template <class F>
  void visit(int64_t i, const F& f) const {
    void* const p = memory_.get() + i * item_bytes();
    if (dtype_ == DType::kFloat32) return f(static_cast<float*>(p));
    if (dtype_ == DType::kFloat64) return f(static_cast<double*>(p));
    if (dtype_ == DType::kFloat16) return f(static_cast<Half*>(p));
    f(static_cast<BFloat16*>(p));
  }

  DType dtype_;
  int64_t size_;
  std::unique_ptr<uint8_t[]> memory_;
};

// Multiples of an eighth of a power of two, which every dtype represents.
template <class T>
void fill(T* values, int64_t n, int base, int spread, int exponent, std::mt19937& random) {
  std::uniform_int_distribution<int> eighths(-spread, spread);
  for (int64_t i = 0; i < n; ++i) encode(values + i, std::ldexp(base + eighths(random), exponent - 3));
}

// Overwrites a few elements by any bits.
template <class T>
void plant(Bytes& bytes, T* values, int64_t n, std::vector<int64_t>& planted) {
  for (int64_t left = bytes.between(0, 15) - 12; left > 0; --left) {
    const int64_t i = bytes.between(0, n - 1);
    const uint64_t bits = bytes.number(sizeof(T));
    std::memcpy(static_cast<void*>(values + i), &bits, sizeof(T));
    planted.push_back(i);
  }
}

template <class T>
class NormCase {
 public:
  NormCase(Bytes& bytes, const cpu::DTypeKernels& kernels, const cpu::Parallel& parallel, const Shape& shape)
      : kernels_(kernels),
        parallel_(parallel),
        shape_(shape),
        n_(shape.numel()),
        random_(static_cast<uint32_t>(bytes.number(2))),
        offset_(bytes.between(0, 3)),
        input_(n_, offset_),
        grad_(n_, offset_),
        residual_(n_, offset_),
        grad_sum_(n_, offset_),
        output_(n_, offset_),
        grad_input_(n_, offset_),
        grad_residual_(n_, offset_),
        mask_(new uint8_t[static_cast<size_t>(mask_bytes(n_))]),
        weight_by_sample_(!shape.is_batch() && bytes.flag()),
        bias_by_sample_(!shape.is_batch() && bytes.flag()),
        weight_(bytes, shape.channels() * (weight_by_sample_ ? shape.samples : 1), random_),
        bias_(bytes, shape.channels() * (bias_by_sample_ ? shape.samples : 1), random_),
        grad_weight_(bytes, weight_.size(), random_),
        grad_bias_(bytes, bias_.size(), random_),
        running_mean_(bytes, shape.channels(), random_),
        running_var_(bytes, shape.channels(), random_),
        has_weight_(bytes.flag()),
        has_bias_(bytes.flag()),
        has_residual_(bytes.flag()),
        has_running_(bytes.flag()),
        eps_(bytes.pick({1e-5, 1e-3, 1e-12, 0.0, 1.0})),
        exponent_(static_cast<int>(bytes.between(-6, 6))),
        mean_(static_cast<size_t>(shape.statistics())),
        var_(mean_.size()),
        invstd_(mean_.size()),
        mean_error_(mean_.size()),
        relative_(mean_.size()),
        wild_(mean_.size()),
        x_(static_cast<size_t>(n_)),
        z_(x_.size()),
        z_error_(x_.size()) {
    if (!shape.is_layer()) {
      activation_ = {static_cast<ActivationKind>(bytes.between(0, 10)), 0.3};
      const bool by_sign = activation_.kind == ActivationKind::kRelu || activation_.kind == ActivationKind::kLeakyRelu;
      has_mask_ = by_sign && bytes.flag();
      const bool invertible =
          activation_.kind == ActivationKind::kIdentity || activation_.kind == ActivationKind::kLeakyRelu;
      in_place_ = shape.is_batch() && invertible && !has_mask_ && !has_residual_ && bytes.flag();
    }
    fill(input_.data, n_, bytes.pick({0, 24, -64}), bytes.pick({16, 4, 1, 0}), exponent_, random_);
    fill(residual_.data, n_, 0, 16, shape.is_layer() ? exponent_ : 0, random_);
    for (Buffer<T>* const gradient : {&grad_, &grad_sum_}) fill(gradient->data, n_, 0, 16, 0, random_);
    plant(bytes, input_.data, n_, planted_);
    plant(bytes, grad_.data, n_, planted_gradients_);
    wants_grad_input_ = bytes.flag();
    wants_grad_weight_ = bytes.flag();
    wants_grad_bias_ = bytes.flag();
  }

  void run(Bytes& bytes) {
    current = "kind " + std::to_string(static_cast<int>(shape_.kind)) + " " + Format<T>::name + " outer " +
              std::to_string(shape_.view.outer) + " channels " + std::to_string(shape_.view.channels) + " inner " +
              std::to_string(shape_.view.inner) + " groups " + std::to_string(shape_.groups.groups) +
              (shape_.groups.channels_last ? " last" : "") + " activation " +
              std::to_string(static_cast<int>(activation_.kind)) + (in_place_ ? " in place" : "") +
              (has_residual_ ? " residual" : "") + (has_mask_ ? " mask" : "");
    define();
    shape_.is_batch() ? run_batch_norm(bytes) : shape_.is_layer() ? run_layer_norm() : run_group_norm();
  }

 private:
  static constexpr double kEpsilon = 1.5 * Format<T>::epsilon, kRounding = Format<T>::rounding;
  // Of a subnormal result.
  static constexpr double kTiny = std::is_same_v<T, Half> ? 6e-8 : 1e-37;
  static size_t at(int64_t i) { return static_cast<size_t>(i); }

  double weight(int64_t i) const { return has_weight_ ? weight_[shape_.parameter(i, weight_by_sample_)] : 1; }
  double bias(int64_t i) const { return has_bias_ ? bias_[shape_.parameter(i, bias_by_sample_)] : 0; }
  double deviation(int64_t i) const {
    const size_t s = at(shape_.statistic(i));
    return (x_[at(i)] - mean_[s]) * invstd_[s];
  }
  bool is_wild(int64_t i) const { return wild_[at(shape_.statistic(i))]; }

  void define() {
    for (int64_t i = 0; i < n_; ++i) {
      x_[at(i)] = decode(input_.data + i);
      if (shape_.is_layer() && has_residual_) x_[at(i)] += decode(residual_.data + i);  // representable
    }
    for (const int64_t i : planted_) wild_[at(shape_.statistic(i))] = true;
    if (shape_.kind == Kind::kFrozenBatch)
      take_given_statistics();
    else
      define_statistics();
    for (int64_t i = 0; i < n_; ++i) {
      const size_t s = at(shape_.statistic(i));
      const double residual = has_residual_ && !shape_.is_layer() ? decode(residual_.data + i) : 0;
      const double d = deviation(i), product = std::abs(d * weight(i));
      z_[at(i)] = d * weight(i) + bias(i) + residual;
      z_error_[at(i)] = 16 * kRounding * (product + std::abs(bias(i)) + std::abs(residual)) + product * relative_[s] +
                        std::abs(weight(i)) * invstd_[s] * mean_error_[s];
      if (is_near_a_kink(i)) encode(grad_.data + i, 0);  // the gradient is either of two
    }
    for (const int64_t i : planted_gradients_) wild_gradients_.push_back(shape_.statistic(i));
  }

  void take_given_statistics() {
    for (int64_t c = 0; c < shape_.channels(); ++c) {
      mean_[at(c)] = running_mean_[c];
      var_[at(c)] = std::abs(running_var_[c]);
      invstd_[at(c)] = 1 / std::sqrt(var_[at(c)] + eps_);
    }
  }

  void define_statistics() {
    const auto count = static_cast<double>(shape_.count());
    std::vector<long double> sum(mean_.size()), squares(mean_.size());
    std::vector<double> largest(mean_.size());
    for (int64_t i = 0; i < n_; ++i) {
      sum[at(shape_.statistic(i))] += x_[at(i)];
      largest[at(shape_.statistic(i))] = std::max(largest[at(shape_.statistic(i))], std::abs(x_[at(i)]));
    }
    for (size_t s = 0; s < mean_.size(); ++s)
      mean_[s] = shape_.kind == Kind::kRms ? 0 : static_cast<double>(sum[s] / count);
    for (int64_t i = 0; i < n_; ++i) {
      const long double difference = x_[at(i)] - static_cast<long double>(mean_[at(shape_.statistic(i))]);
      squares[at(shape_.statistic(i))] += difference * difference;
    }
    for (size_t s = 0; s < mean_.size(); ++s) {
      var_[s] = static_cast<double>(squares[s] / count);
      invstd_[s] = 1 / std::sqrt(var_[s] + eps_);
      const double lost = kRounding * largest[s];
      mean_error_[s] = shape_.kind == Kind::kRms ? 0 : 100 * kRounding * std::sqrt(var_[s]) + 2 * lost;
      const double error = 100 * kRounding * var_[s] + 16 * lost * lost;
      relative_[s] = error / (var_[s] + eps_);
      if (!(relative_[s] < 0.01)) wild_[s] = true;  // constant, with an eps that is 0 or too small
    }
  }

  bool is_near_a_kink(int64_t i) const {
    const double z = z_[at(i)], near = std::max(1e-3, 4 * z_error_[at(i)]);
    return activation_.kind != ActivationKind::kIdentity &&
           std::min({std::abs(z), std::abs(z - 3), std::abs(z + 3), std::abs(z - 6)}) < near;
  }

  // Compares a value in memory, unless it is beyond the range of float16.
  static void expect_value(const char* what, int64_t i, const T* got, double want, double tolerance) {
    if (std::is_same_v<T, Half> && std::abs(want) > 6e4) return;
    expect_near(what, i, decode(got + i), want, tolerance + kTiny);
  }

  // --- forward

  void check_statistics(const double* mean, const double* invstd) const {
    for (size_t s = 0; s < mean_.size(); ++s) {
      const auto index = static_cast<int64_t>(s);
      if (wild_[s]) {
        if (std::isnan(mean_[s])) expect_near("mean", index, mean[s], mean_[s], 0);
        continue;
      }
      expect_near("mean", index, mean[s], mean_[s], mean_error_[s]);
      expect_near("invstd", index, invstd[s], invstd_[s], invstd_[s] * (relative_[s] + 1e-14));
    }
  }

  void check_output() const {
    for (int64_t i = 0; i < n_; ++i) {
      const double z = z_[at(i)], want = activate(activation_, z);
      if (is_wild(i)) {
        if (std::isnan(z)) expect_near("output of NaN", i, decode(output_.data + i), z, 0);
        continue;
      }
      expect_value("output", i, output_.data, want,
                   kEpsilon * std::abs(want) + 1.6 * z_error_[at(i)] + 40 * kRounding * (1 + std::abs(z)));
      if (has_mask_ && !is_near_a_kink(i)) expect_near("mask", i, mask_bit(i), z_[at(i)] > 0, 0);
    }
    for (int64_t i = n_; has_mask_ && i < 8 * mask_bytes(n_); ++i) expect_near("mask's padding", i, mask_bit(i), 0, 0);
  }
  int mask_bit(int64_t i) const { return mask_[at(i / 8)] >> i % 8 & 1; }

  // --- backward

  struct Sums {
    double sum = 0, error = 0;
    void add(double value, double value_error) {
      sum += value;
      error += value_error + 40 * kRounding * std::abs(value);
    }
  };

  // `d` are the normalized deviations that backward reads. `through`: whether the statistics depend on the input.
  void check_gradients(const std::vector<double>& d, bool through) {
    for (const int64_t s : wild_gradients_) wild_[at(s)] = true;
    const auto count = static_cast<double>(shape_.count());
    std::vector<Sums> first(mean_.size()), second(mean_.size()), of_weight(at(weight_.size())),
        of_bias(at(bias_.size()));
    std::vector<bool> wild_weight(of_weight.size()), wild_bias(of_bias.size());
    std::vector<double> g(x_.size()), g_error(x_.size()), d_error(x_.size());
    for (int64_t i = 0; i < n_; ++i) {
      const size_t k = at(i), s = at(shape_.statistic(i));
      const size_t p = at(shape_.parameter(i, weight_by_sample_)), q = at(shape_.parameter(i, bias_by_sample_));
      if (wild_[s]) wild_weight[p] = wild_bias[q] = true;
      const double incoming = decode(grad_.data + i), w = weight(i), z = z_[k];
      g[k] = incoming * slope(activation_, z);
      const double approximation = activation_.is_piecewise_linear()
                                       ? 0
                                       : 2 * z_error_[k] + 1e-6 + 40 * kRounding * (1 + std::abs(z)) + kEpsilon;
      g_error[k] = std::abs(incoming) * (approximation + 1e-10 * (1 + std::abs(z)) + 4 * kRounding);
      d_error[k] = 16 * kRounding * (std::abs(d[k]) + 1 + std::abs(mean_[s]) * invstd_[s] + std::abs(bias(i) / w));
      if (shape_.kind != Kind::kRms) first[s].add(g[k] * w, g_error[k] * std::abs(w));
      second[s].add(g[k] * w * d[k], std::abs(w) * (g_error[k] * std::abs(d[k]) + std::abs(g[k]) * d_error[k]));
      of_weight[p].add(g[k] * d[k], g_error[k] * std::abs(d[k]) + std::abs(g[k]) * d_error[k]);
      of_bias[q].add(g[k], g_error[k]);
    }
    for (int64_t i = 0; i < n_ && wants_grad_input_; ++i) {
      const size_t k = at(i), s = at(shape_.statistic(i));
      if (wild_[s]) continue;
      const double own = g[k] * weight(i), of_d = std::abs(d[k]);
      double want = own, error = g_error[k] * std::abs(weight(i)) + 16 * kRounding * std::abs(own);
      if (through) {
        want -= (first[s].sum + d[k] * second[s].sum) / count;
        error += (first[s].error + of_d * second[s].error + d_error[k] * std::abs(second[s].sum) +
                  16 * kRounding * (std::abs(first[s].sum) + of_d * std::abs(second[s].sum))) /
                 count;
      }
      want *= invstd_[s];
      error *= invstd_[s];
      const double added = shape_.is_layer() && has_residual_ ? decode(grad_sum_.data + i) : 0;
      expect_value("grad_input", i, grad_input_.data, want + added,
                   error + (kEpsilon + 16 * kRounding) * (std::abs(want) + std::abs(added)));
      if (has_residual_ && !shape_.is_layer())
        expect_value("grad_residual", i, grad_residual_.data, g[k], g_error[k] + kEpsilon * std::abs(g[k]));
    }
    if (wants_grad_weight_) check_sums("grad_weight", grad_weight_, of_weight, wild_weight);
    if (wants_grad_bias_) check_sums("grad_bias", grad_bias_, of_bias, wild_bias);
  }

  static void check_sums(const char* what, const Parameter& got, const std::vector<Sums>& want,
                         const std::vector<bool>& wild) {
    for (int64_t p = 0; p < got.size(); ++p) {
      const auto& [sum, error] = want[at(p)];
      if (wild[at(p)] || std::abs(sum) > 6e4) continue;  // float16 ends at 65504
      expect_near(what, p, got[p], sum, error + 1.5 * got.epsilon() * std::abs(sum) + 1e-7);
    }
  }

  std::vector<double> deviations() const {
    std::vector<double> d(x_.size());
    for (int64_t i = 0; i < n_; ++i) d[at(i)] = deviation(i);
    return d;
  }

  // --- the kernels

  struct Saved {
    explicit Saved(size_t size) : mean(new double[size]), invstd(new double[size]) {}
    std::unique_ptr<double[]> mean, invstd;
  };

  // The members that batch and group norm have in common, and those that all backward passes do.
  template <class Args>
  void set_fusion(Args& args) {
    args.dtype = Format<T>::dtype;
    args.activation = activation_;
    args.residual = has_residual_ ? residual_.data : nullptr;
    args.mask = has_mask_ ? mask_.get() : nullptr;
  }
  template <class Args>
  void set_gradients(Args& args) {
    args.dtype = Format<T>::dtype;
    args.grad_output = grad_.data;
    args.grad_input = wants_grad_input_ ? grad_input_.data : nullptr;
    args.mean = mean_.data();
    args.invstd = invstd_.data();
  }
  template <class Args>
  void set_parameters(Args& args) {
    if (has_weight_) args.weight = weight_.by_sample(weight_by_sample_);
    if (has_bias_) args.bias = bias_.by_sample(bias_by_sample_);
  }
  template <class Args>
  void set_parameter_gradients(Args& args) {
    if (wants_grad_weight_) args.grad_weight = grad_weight_.by_sample(weight_by_sample_);
    if (wants_grad_bias_) args.grad_bias = grad_bias_.by_sample(bias_by_sample_);
  }

  void run_batch_norm(Bytes& bytes) {
    const bool training = shape_.kind == Kind::kBatch;
    BatchNormForward args{};
    set_fusion(args);
    set_parameters(args);
    args.view = shape_.view;
    args.input = in_place_ ? output_.data : input_.data;
    args.output = output_.data;
    if (in_place_) std::memcpy(static_cast<void*>(output_.data), input_.data, at(n_) * sizeof(T));
    args.eps = eps_;
    args.correction = bytes.between(0, 1);
    args.momentum = bytes.flag() ? 0.25 : std::numeric_limits<double>::quiet_NaN();
    int64_t batches = 3;
    std::unique_ptr<int64_t[]> nonfinite(new int64_t[mean_.size()]());
    if (training && (bytes.flag() || std::isnan(args.momentum))) args.num_batches_tracked = &batches;
    if (training && bytes.flag()) args.nonfinite_batches = nonfinite.get();
    const Saved saved(mean_.size());
    args.mean = saved.mean.get();
    args.invstd = saved.invstd.get();
    std::vector<double> old_mean(mean_.size()), old_var(mean_.size());
    for (int64_t c = 0; c < shape_.channels(); ++c) {
      old_mean[at(c)] = running_mean_[c];
      old_var[at(c)] = running_var_[c];
    }
    set_statistics(args, training);
    training ? kernels_.batch_norm_training(args, parallel_) : kernels_.batch_norm_inference(args, parallel_);
    check_statistics(args.mean, args.invstd);
    check_output();
    if (training) {
      if (has_running_) check_running(args, old_mean, old_var);
      expect_near("num_batches_tracked", 0, static_cast<double>(batches), args.num_batches_tracked ? 4 : 3, 0);
    }
    run_batch_norm_backward(training && bytes.flag());
  }

  // Inference reads running statistics, which must not be negative, or the statistics themselves.
  void set_statistics(BatchNormForward& args, bool training) {
    if (!training) {
      std::copy(mean_.begin(), mean_.end(), args.mean);
      std::copy(invstd_.begin(), invstd_.end(), args.invstd);
      if (has_running_)
        args.running_mean = {mean_.data(), DType::kFloat64}, args.running_var = {var_.data(), DType::kFloat64};
    } else if (has_running_) {
      args.running_mean = running_mean_.vector();
      args.running_var = running_var_.vector();
    }
  }

  void check_running(const BatchNormForward& args, const std::vector<double>& old_mean,
                     const std::vector<double>& old_var) const {
    const auto count = static_cast<double>(shape_.count());
    for (int64_t c = 0; c < shape_.channels(); ++c) {
      const size_t s = at(c);
      if (wild_[s]) {
        if (args.nonfinite_batches && std::isnan(mean_[s])) {
          expect_near("running_mean of NaN", c, running_mean_[c], old_mean[s], 0);
          expect_near("nonfinite_batches", c, static_cast<double>(args.nonfinite_batches[s]), 1, 0);
        }
        continue;
      }
      if (args.nonfinite_batches)
        expect_near("nonfinite_batches", c, static_cast<double>(args.nonfinite_batches[s]), 0, 0);
      const double mean = 0.75 * old_mean[s] + 0.25 * mean_[s];
      const double var = 0.75 * old_var[s] + 0.25 * var_[s] * count / (count - static_cast<double>(args.correction));
      const double error = 0.25 * relative_[s] * 2 * (var_[s] + eps_);
      expect_near("running_mean", c, running_mean_[c], mean,
                  mean_error_[s] + 1.5 * running_mean_.epsilon() * std::abs(mean) + 1e-7);
      expect_near("running_var", c, running_var_[c], var, error + 1.5 * running_var_.epsilon() * std::abs(var) + 1e-7);
    }
  }

  void run_batch_norm_backward(bool through) {
    std::vector<double> d = deviations();
    for (int64_t i = 0; i < n_ && in_place_; ++i) {
      const double y = decode(output_.data + i);
      z_[at(i)] = activation_.kind == ActivationKind::kLeakyRelu && y <= 0 ? y / activation_.parameter : y;
      d[at(i)] = (z_[at(i)] - bias(i)) / weight(i);
    }
    BatchNormBackward args{};
    set_fusion(args);
    set_gradients(args);
    set_parameters(args);
    set_parameter_gradients(args);
    args.view = shape_.view;
    args.input = in_place_ ? output_.data : input_.data;
    args.from_output = in_place_;
    args.training = through;
    args.grad_residual = has_residual_ && wants_grad_input_ ? grad_residual_.data : nullptr;
    if (!(wants_grad_input_ || wants_grad_weight_ || wants_grad_bias_)) return;
    kernels_.batch_norm_backward(args, parallel_);
    check_gradients(d, through);
  }

  void run_group_norm() {
    const Saved saved(mean_.size());
    GroupNormForward forward{};
    set_fusion(forward);
    set_parameters(forward);
    forward.view = shape_.groups;
    forward.input = input_.data;
    forward.output = output_.data;
    forward.eps = eps_;
    forward.mean = saved.mean.get();
    forward.invstd = saved.invstd.get();
    kernels_.group_norm(forward, parallel_);
    check_statistics(forward.mean, forward.invstd);
    check_output();
    if (!(wants_grad_input_ || wants_grad_weight_ || wants_grad_bias_)) return;
    GroupNormBackward backward{};
    set_fusion(backward);
    set_gradients(backward);
    set_parameters(backward);
    set_parameter_gradients(backward);
    backward.view = shape_.groups;
    backward.input = input_.data;
    backward.grad_residual = has_residual_ && wants_grad_input_ ? grad_residual_.data : nullptr;
    kernels_.group_norm_backward(backward, parallel_);
    check_gradients(deviations(), true);
  }

  void run_layer_norm() {
    const Saved saved(mean_.size());
    Buffer<T> sum(n_, offset_);
    LayerNormForward forward{};
    set_parameters(forward);
    forward.view = shape_.view;
    forward.samples = weight_by_sample_ || bias_by_sample_ ? shape_.samples : 1;
    forward.dtype = Format<T>::dtype;
    forward.input = input_.data;
    forward.output = output_.data;
    forward.eps = eps_;
    forward.subtract_mean = shape_.kind == Kind::kLayer;
    forward.mean = saved.mean.get();
    forward.invstd = saved.invstd.get();
    if (has_residual_) forward.residual = residual_.data, forward.sum = sum.data;
    kernels_.layer_norm(forward, parallel_);
    check_statistics(forward.mean, forward.invstd);
    check_output();
    for (int64_t i = 0; i < n_ && has_residual_; ++i)
      if (!is_wild(i)) expect_near("sum", i, decode(sum.data + i), x_[at(i)], 0);
    if (!(wants_grad_input_ || wants_grad_weight_ || wants_grad_bias_)) return;
    LayerNormBackward backward{};
    set_gradients(backward);
    if (has_weight_) backward.weight = weight_.by_sample(weight_by_sample_);
    set_parameter_gradients(backward);
    backward.view = shape_.view;
    backward.samples = forward.samples;
    backward.input = has_residual_ ? sum.data : input_.data;
    backward.subtract_mean = forward.subtract_mean;
    backward.grad_sum = has_residual_ ? grad_sum_.data : nullptr;
    kernels_.layer_norm_backward(backward, parallel_);
    check_gradients(deviations(), true);
  }

  const cpu::DTypeKernels& kernels_;
  const cpu::Parallel& parallel_;
  const Shape shape_;
  const int64_t n_;
  std::mt19937 random_;
  const int64_t offset_;
  Buffer<T> input_, grad_, residual_, grad_sum_, output_, grad_input_, grad_residual_;
  std::unique_ptr<uint8_t[]> mask_;
  const bool weight_by_sample_, bias_by_sample_;
  const Parameter weight_, bias_, grad_weight_, grad_bias_, running_mean_, running_var_;
  const bool has_weight_, has_bias_, has_residual_, has_running_;
  const double eps_;
  const int exponent_;  // of the input
  Activation activation_{};
  bool has_mask_ = false, in_place_ = false;
  bool wants_grad_input_, wants_grad_weight_, wants_grad_bias_;
  std::vector<double> mean_, var_, invstd_;    // the definition's
  std::vector<double> mean_error_, relative_;  // bounds: of the mean, and of invstd relative to it
  std::vector<bool> wild_;                     // which statistics are not compared
  std::vector<double> x_, z_, z_error_;        // what is normalized, and the input of the activation
  std::vector<int64_t> planted_, planted_gradients_, wild_gradients_;
};

}  // namespace normfused::fuzz
