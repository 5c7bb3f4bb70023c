// The numerics, once, for host and device: everything that is computed per channel rather than per value.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define NF_FN __host__ __device__ __forceinline__
#else
// Internal linkage: each instruction set compiles its own copy, and the linker must never merge them.
#define NF_FN static inline __attribute__((always_inline))
#endif

namespace normfused {

// Count, mean and sum of squared deviations: the one currency of statistics, from a vector lane to a dataset. V is a
// floating type, or a vector of one: several channels at once.
template <class V>
struct MomentsOf {
  int64_t count;
  V mean;
  V m2;
};
using Moments = MomentsOf<double>;

// Chan, Golub and LeVeque (1983). A zero count merges to the other side.
template <class V>
NF_FN MomentsOf<V> merge(const MomentsOf<V>& a, const MomentsOf<V>& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double share = static_cast<double>(b.count) / static_cast<double>(a.count + b.count);
  const V delta = b.mean - a.mean;
  return {a.count + b.count, a.mean + delta * share,
          a.m2 + b.m2 + delta * delta * (static_cast<double>(a.count) * share)};
}

// Moments from sums about a pivot. Exact for a constant channel whose pivot is that constant.
template <class V>
NF_FN MomentsOf<V> moments_about(const V& pivot, int64_t count, const V& sum, const V& sum_of_squares) {
  const V offset = sum / static_cast<double>(count);
  return {count, pivot + offset, sum_of_squares - sum * offset};
}

NF_FN double biased_variance(const Moments& m) {
  // Rounding can leave a tiny negative m2; a NaN passes through.
  return (m.m2 < 0 ? 0 : m.m2) / static_cast<double>(m.count);
}

NF_FN double invstd_of(double variance, double eps) { return 1 / std::sqrt(variance + eps); }

// Share of the new value in a running average; `batches` already counts this batch. NaN momentum: cumulative average.
NF_FN double update_factor(double momentum, int64_t batches) {
  return momentum != momentum ? 1 / static_cast<double>(batches) : momentum;
}

NF_FN double running_average(double running, double value, double factor) {
  return (1 - factor) * running + factor * value;
}

// Bessel's correction for running_var. One value has no unbiased variance; callers refuse that case in training.
NF_FN double unbiased(double variance, int64_t count) {
  return variance * static_cast<double>(count) / static_cast<double>(count - 1);
}

// output = (x - pivot) * scale + shift. The pivot is the mean rounded to S and subtracted first, because x * a + b
// cancels where |mean| >> std; what the rounding dropped is put back through `shift`.
template <class S>
struct ForwardCoefficients {
  S pivot, scale, shift;
};

template <class S>
NF_FN ForwardCoefficients<S> forward_coefficients(double mean, double invstd, double weight, double bias) {
  const S pivot = static_cast<S>(mean);
  const double scale = invstd * weight;
  return {pivot, static_cast<S>(scale), static_cast<S>(bias + (static_cast<double>(pivot) - mean) * scale)};
}

// grad_input = grad_output * scale + (x - pivot) * slope + shift, and the parameters' gradients.
template <class S>
struct BackwardCoefficients {
  S pivot, scale, slope, shift;
  double grad_weight, grad_bias;
};

// `sum_g` is the sum of grad_output, `sum_gd` that of grad_output * (x - pivot) with pivot = S(mean).
template <class S>
NF_FN BackwardCoefficients<S> backward_coefficients(double mean, double invstd, double weight, int64_t count,
                                                    double sum_g, double sum_gd) {
  const S pivot = static_cast<S>(mean);
  const double dropped = static_cast<double>(pivot) - mean;
  const double centred = sum_gd + dropped * sum_g;  // sum of grad_output * (x - mean)
  const double scale = weight * invstd;
  const double n = static_cast<double>(count);
  const double slope = -scale * invstd * invstd * centred / n;
  const double shift = slope * dropped - scale * sum_g / n;
  return {pivot, static_cast<S>(scale), static_cast<S>(slope), static_cast<S>(shift), centred * invstd, sum_g};
}

}  // namespace normfused
