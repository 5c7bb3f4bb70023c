// The formulas, for host and device: everything that is computed per channel, and the activations, which are computed
// per element of a scalar or a vector type.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "kernels/types.h"

#if defined(__CUDACC__)
#define NF_FN __host__ __device__ __forceinline__
#else
// Internal linkage: each instruction set compiles its own copy, which the linker must not merge.
#define NF_FN static inline __attribute__((always_inline))
#endif

namespace normfused {

// Count, mean and M2, the sum of squared deviations from the mean: the form of statistics at every level, from a SIMD
// lane to a data set. V is a floating type, or a vector of several channels.
template <class V>
struct MomentsOf {
  int64_t count;
  V mean;
  V m2;
};
using Moments = MomentsOf<double>;

// Moments of the union: Chan, Golub and LeVeque (1983). If one count is 0, the result is the other side.
template <class V>
NF_FN MomentsOf<V> merge(const MomentsOf<V>& a, const MomentsOf<V>& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double share = static_cast<double>(b.count) / static_cast<double>(a.count + b.count);
  const V delta = b.mean - a.mean;
  return {a.count + b.count, a.mean + delta * share,
          a.m2 + b.m2 + delta * delta * (static_cast<double>(a.count) * share)};
}

// Moments from the sums of (x - pivot) and (x - pivot)^2. Exact for a constant channel whose pivot is that constant.
template <class V>
NF_FN MomentsOf<V> moments_about(const V& pivot, int64_t count, const V& sum, const V& sum_of_squares) {
  const V offset = sum / static_cast<double>(count);
  return {count, pivot + offset, sum_of_squares - sum * offset};
}

NF_FN double biased_variance(const Moments& m) {
  // Rounding can leave a tiny negative m2. A NaN passes through.
  return (m.m2 < 0 ? 0 : m.m2) / static_cast<double>(m.count);
}

// Whether squares that sum to m2 can have lost digits to underflow in S: squares below S's smallest normal value are
// rounded to few digits, or flushed to 0. A variance of at least 2^24 times that value keeps all digits of a float, and
// so does one that is added to such an eps.
template <class S>
NF_FN bool can_underflow(const Moments& m, double eps) {
  constexpr double kLeast = 0x1p-126 * 0x1p24;
  return sizeof(S) < sizeof(double) && biased_variance(m) + eps < kLeast;
}

// The moments of a channel that a rank sends. It sends the standard deviation, because M2 of floats can overflow float.
// The mean in float has at most the rounding error of the values themselves, which are float too.
template <class S>
struct RankMoments {
  S mean, deviation;
};

template <class S>
NF_FN RankMoments<S> packed(const Moments& m) {
  return {static_cast<S>(m.mean), static_cast<S>(std::sqrt(biased_variance(m)))};
}

// The moments of channel c on all ranks, merged in rank order.
template <class S>
NF_FN Moments merged(const MergeRanks& args, int64_t c) {
  Moments all{};
  for (int64_t rank = 0; rank < args.ranks; ++rank) {
    const int64_t* const words = args.words + rank * args.stride;
    const RankMoments<S> moments = reinterpret_cast<const RankMoments<S>*>(words + 1)[c];
    const double deviation = moments.deviation;
    const auto count = static_cast<double>(words[0]);
    all = merge(all, Moments{words[0], moments.mean, deviation * deviation * count});
  }
  return all;
}

NF_FN double invstd_of(double variance, double eps) { return 1 / std::sqrt(variance + eps); }

// How many parts (see IntegerSums) a value of T and its square have together: one each for up to 16 bits, one and two
// for 32 bits, two and four for 64 bits.
template <class T>
inline constexpr int kIntegerParts = sizeof(T) <= 2   ? 2
                                     : sizeof(T) == 4 ? 3
                                                      : 6;

// The row of IntegerSums that part k belongs to.
template <class T>
NF_FN constexpr int integer_row(int k) {
  return sizeof(T) == 8 || k == 0 ? k : IntegerSums::kSquares + k - 1;
}

// Writes the parts of a value, followed by those of its square: less than 2^34 each. A is unsigned; a negative value
// wraps around.
template <class T, class A>
NF_FN void split_integer(T value, A (&parts)[kIntegerParts<T>]) {
  constexpr uint64_t kDigit = 0xffffffff;
  if constexpr (sizeof(T) <= 2) {
    parts[0] = static_cast<A>(value);
    parts[1] = parts[0] * parts[0];
  } else if constexpr (sizeof(T) == 4) {
    const int64_t wide = value;
    const auto square = static_cast<uint64_t>(wide * wide);
    parts[0] = static_cast<A>(wide);
    parts[1] = square & kDigit;
    parts[2] = square >> 32;
  } else {
    const auto bits = static_cast<uint64_t>(value);
    const uint64_t magnitude = value < 0 ? 0 - bits : bits;
    // (high 2^32 + low)^2: each product is below 2^64.
    const uint64_t low = magnitude & kDigit, high = magnitude >> 32;
    const uint64_t lows = low * low, mixed = low * high, highs = high * high;
    parts[0] = bits & kDigit;
    parts[1] = static_cast<A>(value >> 32);
    parts[2] = lows & kDigit;
    parts[3] = (lows >> 32) + 2 * (mixed & kDigit);
    parts[4] = 2 * (mixed >> 32) + (highs & kDigit);
    parts[5] = highs >> 32;
  }
}

// Weight of this batch in the running statistics. `batches` includes this batch. NaN momentum: cumulative average.
NF_FN double update_factor(double momentum, int64_t batches) {
  return momentum != momentum ? 1 / static_cast<double>(batches) : momentum;
}

NF_FN double running_average(double running, double value, double factor) {
  return (1 - factor) * running + factor * value;
}

// The variance that updates running_var: unbiased with a correction of 1 (Bessel's). Precondition: count > correction.
NF_FN double corrected(double variance, int64_t count, int64_t correction) {
  return variance * static_cast<double>(count) / static_cast<double>(count - correction);
}

template <class S>
NF_FN bool is_finite(S value) {
  return value - value == 0;
}

// The statistics of one channel after a batch.
struct FinishedStatistics {
  double mean, invstd;               // of the batch, finite or not
  double running_mean, running_var;  // the new values
  bool nonfinite;                    // whether the running statistics are unchanged; counted in args.nonfinite_batches
};

// `factor` is the weight of the batch in the running statistics (see update_factor). With args.nonfinite_batches, they
// are unchanged if the batch mean or variance is not finite. invstd is no criterion: it is infinite for a constant
// channel with eps = 0, and 0 for an infinite variance.
NF_FN FinishedStatistics finish(const Moments& m, const BatchStatistics& args, double factor, double running_mean,
                                double running_var) {
  const double variance = biased_variance(m), new_var = corrected(variance, m.count, args.correction);
  const bool nonfinite = args.nonfinite_batches != nullptr && !(is_finite(m.mean) && is_finite(new_var));
  return {m.mean, invstd_of(variance, args.eps),
          nonfinite ? running_mean : running_average(running_mean, m.mean, factor),
          nonfinite ? running_var : running_average(running_var, new_var, factor), nonfinite};
}

// The normalization of a channel: z = (x - mean) * invstd * weight + bias.
struct Normalization {
  double mean, invstd, weight, bias;
};

// The normalization to use in backward if z is given instead of x: with these four values, the formulas for x applied
// to z give the same deviations and gradients.
NF_FN Normalization normalization_from_output(const Normalization& n) {
  return {n.bias, 1 / n.weight, n.weight * n.weight * n.invstd, n.bias};
}

// The normalization that backward uses in channel c.
NF_FN Normalization normalization_of(const BatchNormBackward& args, int64_t c, double weight, double bias) {
  const Normalization n{args.mean[c], args.invstd[c], weight, bias};
  return args.from_output ? normalization_from_output(n) : n;
}

NF_FN Normalization normalization_of(const Standardize& args, int64_t c) {
  return {args.mean[c] / args.scale, args.scale / args.std[c], 1, 0};
}

// output = (x - pivot) * scale + shift. The pivot is the mean rounded to S. It is subtracted first, because x * a + b
// cancels if |mean| >> std. `shift` compensates for the rounding of the mean.
template <class S>
struct ForwardCoefficients {
  S pivot, scale, shift;
};

template <class S>
NF_FN ForwardCoefficients<S> forward_coefficients(const Normalization& n) {
  const S pivot = static_cast<S>(n.mean);
  const double scale = n.invstd * n.weight;
  return {pivot, static_cast<S>(scale), static_cast<S>(n.bias + (static_cast<double>(pivot) - n.mean) * scale)};
}

template <class V, class S>
NF_FN V applied(const ForwardCoefficients<S>& c, const V& x) {
  return (x - c.pivot) * c.scale + c.shift;
}

// The same for bytes, with the accuracy of a computation in double that is rounded once: 0.501 ulp of float with fused
// multiply-add, else 1 ulp. The pivot is a multiple of 2^-15, so x - pivot is exact for |mean| <= 256. The rounding
// errors of pivot and scale are added separately. Computing in double takes 1.5 times as long, and a lookup table of
// the 256 results four times.
struct ByteCoefficients {
  float pivot, scale, rest_of_scale, shift;
};

// The coefficients for values stored as T and computed in S.
template <class T, class S>
using StandardizeCoefficients =
    std::conditional_t<std::is_same_v<T, uint8_t>, ByteCoefficients, ForwardCoefficients<S>>;

template <class V>
NF_FN V applied(const ByteCoefficients& c, const V& x) {
  const V deviation = x - c.pivot;
  return deviation * c.scale + (deviation * c.rest_of_scale + c.shift);
}

template <class S>
NF_FN void prepare(const Normalization& n, ForwardCoefficients<S>& c) {
  c = forward_coefficients<S>(n);
}
NF_FN void prepare(const Normalization& n, ByteCoefficients& c) {
  const double scale = n.invstd * n.weight;
  c.pivot = static_cast<float>(std::floor(n.mean * 32768 + 0.5) / 32768);
  c.scale = static_cast<float>(scale);
  c.rest_of_scale = static_cast<float>(scale - static_cast<double>(c.scale));
  c.shift = static_cast<float>(n.bias + (static_cast<double>(c.pivot) - n.mean) * scale);
}

// The gradient of the weight, from the sum of g and the sum of g * (x - pivot) with pivot = S(mean); g is the gradient
// of z.
template <class S>
NF_FN double grad_weight_of(const Normalization& n, double sum_g, double sum_gd) {
  const double dropped = static_cast<double>(static_cast<S>(n.mean)) - n.mean;
  return (sum_gd + dropped * sum_g) * n.invstd;
}

// grad_input = g * scale + (x - pivot) * slope + shift
template <class S>
struct BackwardCoefficients {
  S pivot, scale, slope, shift;
};

// grad_weight and grad_bias are sums over `count` values.
template <class S>
NF_FN BackwardCoefficients<S> backward_coefficients(const Normalization& n, int64_t count, double grad_weight,
                                                    double grad_bias) {
  const S pivot = static_cast<S>(n.mean);
  const double dropped = static_cast<double>(pivot) - n.mean;
  const double scale = n.weight * n.invstd;
  const double slope = -scale * n.invstd * grad_weight / static_cast<double>(count);
  const double shift = slope * dropped - scale * grad_bias / static_cast<double>(count);
  return {pivot, static_cast<S>(scale), static_cast<S>(slope), static_cast<S>(shift)};
}

// Mean and invstd of layer norm. In RMS norm, with `subtract_mean` false, the mean counts as 0; the mean of squares is
// the variance plus the squared mean.
struct LayerStatistics {
  double mean, invstd;
};

NF_FN LayerStatistics layer_statistics(const Moments& m, bool subtract_mean, double eps) {
  const double kept = subtract_mean ? 1 : 0, rest = (1 - kept) * m.mean;
  return {kept * m.mean, invstd_of(biased_variance(m) + rest * rest, eps)};
}

// Backward of layer norm, from the sum of k and of k * (x - pivot) over the `count` values of a statistic; k is
// grad_output * weight. RMS norm has no gradient through a mean.
template <class S>
NF_FN BackwardCoefficients<S> layer_backward_coefficients(const LayerStatistics& statistics, int64_t count,
                                                          bool subtract_mean, double sum_k, double sum_kd) {
  const double kept = subtract_mean ? 1 : 0;
  const Normalization plain{statistics.mean, statistics.invstd, 1, 0};
  return backward_coefficients<S>(plain, count, grad_weight_of<S>(plain, sum_k, sum_kd), kept * sum_k);
}

// ---- activations -------------------------------------------------------------------------------------------------
// V is a floating type S or a vector of S. E provides the elementary functions: exp(x), expm1(x) for x <= 0,
// quotient(a, b) for b >= 1, sigmoid(x), sigmoid_with_complement(x), and normal(x), the standard normal distribution
// function and density.

// sigmoid(x) = 1 / (1 + exp(-x)), and 1 - sigmoid(x).
template <class V>
struct Sigmoid {
  V value, complement;
};

template <class V>
struct Normal {
  V distribution, density;
};

template <class V>
NF_FN V where_positive(const V& z, const V& then, const V& otherwise) {
  return z > V{} ? then : otherwise;
}

// The tanh approximation of GELU is z * sigmoid(p), where p = sqrt(8 / pi) * (z + 0.044715 z^3). These are p and its
// derivative. For |z| > 64, where sigmoid' is 0, the derivative is that of 64, so that their product is not 0 * inf.
inline constexpr double kGeluFactor = 1.5957691216057308, kGeluCube = 0.044715;

template <class S, class V>
NF_FN V gelu_argument(const V& z) {
  return z * (S(kGeluFactor) + S(kGeluFactor * kGeluCube) * z * z);
}
template <class S, class V>
NF_FN V gelu_argument_slope(const V& z) {
  const V above = z < V{} - S(64) ? V{} - S(64) : z, bounded = above > V{} + S(64) ? V{} + S(64) : above;
  return S(kGeluFactor) + S(3 * kGeluFactor * kGeluCube) * bounded * bounded;
}

template <class S, class V>
NF_FN V within_six(const V& z) {
  const V t = z < V{} ? V{} : z;
  return t > V{} + S(6) ? V{} + S(6) : t;
}

// Identity, ReLU, ReLU6 and leaky ReLU: slope `below` for negative z, slope 1 up to the ceiling, 0 above. The ceiling
// is NaN if there is none.
template <class S>
struct PiecewiseLinear {
  S below, ceiling;
};

template <class S>
NF_FN PiecewiseLinear<S> piecewise_linear(const Activation& activation) {
  const S none = std::numeric_limits<S>::quiet_NaN();
  switch (activation.kind) {
    case ActivationKind::kRelu:
      return {0, none};
    case ActivationKind::kRelu6:
      return {0, 6};
    case ActivationKind::kLeakyRelu:
      return {static_cast<S>(activation.parameter), none};
    default:
      return {1, none};
  }
}

// a * below; 0 if the slope is 0, even for an infinite a.
template <class S, class V>
NF_FN V sloped(const PiecewiseLinear<S>& pieces, const V& a) {
  return pieces.below == 0 ? V{} : V(a * pieces.below);
}
template <class E, class S, class V>
NF_FN V activated(const PiecewiseLinear<S>& pieces, const V& z) {
  return z < V{} ? sloped(pieces, z) : (z > V{} + pieces.ceiling ? V{} + pieces.ceiling : z);  // NaN passes
}
template <class E, class S, class V>
NF_FN V activation_gradient(const PiecewiseLinear<S>& pieces, const V& z, const V& grad) {
  return z <= V{} ? sloped(pieces, grad) : (z >= V{} + pieces.ceiling ? V{} : grad);
}

template <class E, class S, class V>
NF_FN V activated(const Activation& activation, const V& z) {
  const S parameter = static_cast<S>(activation.parameter);
  switch (activation.kind) {
    case ActivationKind::kIdentity:
    case ActivationKind::kRelu:
    case ActivationKind::kRelu6:
    case ActivationKind::kLeakyRelu:
      return activated<E, S>(piecewise_linear<S>(activation), z);
    case ActivationKind::kElu:
      return where_positive(z, z, V(E::expm1(z > V{} ? V{} : z) * parameter));
    case ActivationKind::kHardswish:
      return z * (within_six<S>(V(z + S(3))) * S(1. / 6));  // in this order z * 6 cannot overflow
    case ActivationKind::kSigmoid:
      return E::sigmoid(z);
    case ActivationKind::kTanh: {
      const V e = E::expm1(z > V{} ? V(z * S(-2)) : V(z * S(2)));  // tanh |z| = -e / (2 + e), without cancellation
      const V t = E::quotient(e, V(S(2) + e));
      return where_positive(z, V(-t), t);
    }
    case ActivationKind::kSilu:
      return z * E::sigmoid(z);
    case ActivationKind::kGelu:
      return z * E::normal(z).distribution;
    case ActivationKind::kGeluTanh:
      return z * E::sigmoid(gelu_argument<S>(z));
  }
  return z;
}

// The inverse of the activation. Precondition: it is invertible, that is, identity or leaky ReLU with a positive slope.
template <class S, class V>
NF_FN V deactivated(const PiecewiseLinear<S>& pieces, const V& y) {
  return y < V{} ? V(y * (1 / pieces.below)) : y;
}

// The gradient of z, from the gradient of activated(z).
template <class E, class S, class V>
NF_FN V activation_gradient(const Activation& activation, const V& z, const V& grad) {
  const S parameter = static_cast<S>(activation.parameter);
  switch (activation.kind) {
    case ActivationKind::kIdentity:
    case ActivationKind::kRelu:
    case ActivationKind::kRelu6:
    case ActivationKind::kLeakyRelu:
      return activation_gradient<E, S>(piecewise_linear<S>(activation), z, grad);
    case ActivationKind::kElu:
      return where_positive(z, grad, V(grad * (E::exp(z > V{} ? V{} : z) * parameter)));
    case ActivationKind::kHardswish: {
      const V inside = grad * (z * S(1. / 3) + S(0.5));
      return z <= V{} - S(3) ? V{} : (z >= V{} + S(3) ? grad : inside);
    }
    case ActivationKind::kSigmoid: {
      const Sigmoid<V> s = E::sigmoid_with_complement(z);
      return grad * (s.value * s.complement);
    }
    case ActivationKind::kTanh: {
      const V t = activated<E, S>(activation, z);
      return grad * (S(1) - t * t);
    }
    case ActivationKind::kSilu: {
      const Sigmoid<V> s = E::sigmoid_with_complement(z);
      return grad * (s.value + z * (s.value * s.complement));
    }
    case ActivationKind::kGelu: {
      const Normal<V> normal = E::normal(z);
      return grad * (normal.distribution + z * normal.density);
    }
    case ActivationKind::kGeluTanh: {
      const Sigmoid<V> s = E::sigmoid_with_complement(gelu_argument<S>(z));
      return grad * (s.value + z * (s.value * s.complement) * gelu_argument_slope<S>(z));
    }
  }
  return grad;
}

// ---- local response normalization --------------------------------------------------------------------------------
// With b = k + alpha / size * (sum of squares over the window of x), the output is x b^-beta, and the gradient of x is
//   g b^-beta - 2 alpha / size * beta * x * (sum of g x b^(-beta - 1) over the channels whose windows contain x).
// S, V and E as above; E also provides sqrt(x) and power(x, y).

template <class S>
struct Response {
  S scale, k;  // b = k + scale * sum
  S slope;     // 2 * scale * beta
  double beta;
};

template <class S>
NF_FN Response<S> response_of(const LocalResponseNorm& args) {
  const double scale = args.alpha / static_cast<double>(args.size);
  return {static_cast<S>(scale), static_cast<S>(args.k), static_cast<S>(2 * scale * args.beta), args.beta};
}

template <class S, class V>
NF_FN V response_base(const Response<S>& response, const V& sum_of_squares) {
  return sum_of_squares * response.scale + response.k;
}

// b^-beta. The common values of beta use square roots, which take 0.55 to 0.75 of the time of power() (AVX-512).
template <class E, class S, class V>
NF_FN V response_factor(const Response<S>& response, const V& base) {
  if (response.beta == 0.75) {
    const V root = E::sqrt(base);
    return S(1) / (root * E::sqrt(root));
  }
  if (response.beta == 0.5) return S(1) / E::sqrt(base);
  if (response.beta == 1) return S(1) / base;
  return E::power(base, -response.beta);
}

// The share of channel x: the term that it adds to the sum in the gradients of its neighbours.
template <class V>
NF_FN V response_share(const V& grad, const V& x, const V& base, const V& factor) {
  return grad * x * factor / base;
}

template <class S, class V>
NF_FN V response_gradient(const Response<S>& response, const V& direct, const V& x, const V& sum_of_shares) {
  return direct - x * sum_of_shares * response.slope;
}

}  // namespace normfused
