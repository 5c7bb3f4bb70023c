// Elementary functions of vectors, for the activations and local response normalization (see math.h).
//
// float: polynomials. The maximum errors in ulp are measured against the C library in double, over every
// 211th float of the stated range; docs/ulp.md has those of the activations. double: the C library's functions, lane by
// lane.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/vec.inl"

namespace normfused::cpu::NF_ISA {
namespace {

template <class F>
NF_FN Vec<double> map_lanes(const Vec<double>& x, const F& f) {
  Vec<double> result{};
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) result[lane] = f(x[lane]);
  return result;
}

NF_FN Vec<float> magnitude(Vec<float> x) {
  const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(x) & 0x7fffffffu;
  return bit_cast<Vec<float>>(bits);
}

NF_FN Vec<double> magnitude(Vec<double> x) {
  const Vec<uint64_t> bits = bit_cast<Vec<uint64_t>>(x) & 0x7fffffffffffffffu;
  return bit_cast<Vec<double>>(bits);
}

// x * x - square, exact, where `square` is x * x rounded to float.
NF_FN Vec<float> rest_of_square(Vec<float> x, Vec<float> square) {
#if NF_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_fmsub_ps((__m512)x, (__m512)x, (__m512)square);
#elif NF_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_fmsub_ps((__m256)x, (__m256)x, (__m256)square);
#else
  // The products of parts of 12 bits are exact.
  const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(x) & 0xfffff000u;
  const Vec<float> high = bit_cast<Vec<float>>(bits), low = x - high;
  return ((high * high - square) + high * low * 2.f) + low * low;
#endif
}

// 2^n for integers n in [-126, 127]; any value for a NaN, whose bits may overflow.
NF_FN Vec<float> exp2_integer(Vec<float> n) {
  const Vec<float> shifted = n + 12582912.f;  // 1.5 * 2^23: moves the integer to the low bits
  const Vec<uint32_t> bits = (bit_cast<Vec<uint32_t>>(shifted) << 23) + (127u << 23);
  return bit_cast<Vec<float>>(bits);
}

// Argument reduction: x = n ln 2 + r with an integer n and |r| < 0.35. expm1 is exp(r) - 1 by a minimax polynomial,
// whose error is below 4e-9 relative to exp(r).
struct ReducedExp {
  Vec<float> n, expm1;
};
NF_FN ReducedExp reduce_exp_argument(Vec<float> x) {
  const Vec<float> n = (x * 1.44269504f + 12582912.f) - 12582912.f;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = r * 0.001381388f + 0.008369063f;
  p = p * r + 0.041668423f;
  p = p * r + 0.16666518f;
  p = p * r + 0.49999994f;
  return {n, p * (r * r) + r};
}

// x * 2^n for integers n.
NF_FN Vec<float> multiply_by_exp2(Vec<float> x, Vec<float> n) {
#if NF_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  // Two factors, because 2^n itself may overflow or be subnormal.
  n = n > 252.f ? Vec<float>{} + 252.f : (n < -252.f ? Vec<float>{} - 252.f : n);
  const Vec<float> half = (n * 0.5f + 12582912.f) - 12582912.f;
  return x * exp2_integer(half) * exp2_integer(n - half);
#endif
}

// log(m) for m in [sqrt(1/2), sqrt(2)], by a minimax polynomial whose error is below 5e-9 relative.
NF_FN Vec<float> log_mantissa(Vec<float> m) {
  const Vec<float> r = m - 1.f;
  Vec<float> p = r * -0.0762211f + 0.12904692f;
  p = p * r - 0.13242976f;
  p = p * r + 0.1418178f;
  p = p * r - 0.16609078f;
  p = p * r + 0.20001976f;
  p = p * r - 0.25001583f;
  p = p * r + 0.33333325f;
  p = p * r - 0.49999988f;
  return p * (r * r) + r;
}

// 1 / b with a relative error below 2^-14.
NF_FN Vec<float> approximate_reciprocal(Vec<float> b) {
#if NF_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_rcp14_ps((__m512)b);
#else
  return 1.f / b;
#endif
}

// From e = exp(-|x|), which does not overflow, and 1 / (1 + e). A complement 1 - sigmoid(x) would cancel.
template <class V>
NF_FN Sigmoid<V> sigmoid_from(const V& x, const V& e, const V& reciprocal) {
  const V smaller = e * reciprocal;
  return {where_positive(x, reciprocal, smaller), where_positive(x, smaller, reciprocal)};
}

struct Elementary {
  // 1 <= b <= 2^126
  static NF_INLINE Vec<float> quotient(Vec<float> a, Vec<float> b) {
#if NF_VECTOR_BYTES == 64
    // One Newton step makes the reciprocal exact to rounding. A division takes longer.
    const Vec<float> estimate = approximate_reciprocal(b);
    return a * (estimate + estimate * (1.f - b * estimate));
#else
    return a / b;
#endif
  }
  // 1.01 ulp, including subnormal results.
  static NF_INLINE Vec<float> exp(Vec<float> x) {
    x = maximum(Vec<float>{} - 104.f, minimum(Vec<float>{} + 89.f, x));
    const ReducedExp e = reduce_exp_argument(x);
    return multiply_by_exp2(e.expm1 + 1.f, e.n);
  }

  // 2.7 ulp for both, including subnormal results.
  static NF_INLINE Sigmoid<Vec<float>> sigmoid_with_complement(Vec<float> x) {
    const ReducedExp reduced = reduce_exp_argument(maximum(Vec<float>{} - 104.f, -magnitude(x)));
    const Vec<float> e = multiply_by_exp2(reduced.expm1 + 1.f, reduced.n);
    return sigmoid_from(x, e, quotient(Vec<float>{} + 1.f, e + 1.f));
  }
  static NF_INLINE Vec<float> sigmoid(Vec<float> x) { return sigmoid_with_complement(x).value; }

  // x <= 0: 0.94 ulp.
  static NF_INLINE Vec<float> expm1(Vec<float> x) {
    x = x < -20.f ? Vec<float>{} - 20.f : x;
    const ReducedExp e = reduce_exp_argument(x);
    const Vec<float> power = exp2_integer(e.n);
    return e.expm1 * power + (power - 1.f);
  }

  // Standard normal distribution and density. With u = |x|, the probability above u is exp(-u^2 / 2) t P(t), where
  // t = 1 / (1 + 0.35 u) and P is a minimax polynomial up to u = 14.5, with a relative error below 5e-8. Above 14.5
  // that probability is 0 in float. Distribution: 7 ulp for x > -13.
  // Both for 0 <= u <= 16.
  static NF_INLINE Vec<float> normal_argument(Vec<float> u) { return quotient(Vec<float>{} + 1.f, u * 0.35f + 1.f); }
  // exp(-u^2 / 2). The rounding of u * u alone would change it by a factor of up to 1 + 4e-6.
  static NF_INLINE Vec<float> gaussian(Vec<float> u) {
    const Vec<float> square = u * u, power = exp(square * -0.5f);
    return power - power * (rest_of_square(u, square) * 0.5f);
  }
  static NF_INLINE Normal<Vec<float>> normal(Vec<float> x) {
    const Vec<float> u = minimum(Vec<float>{} + 16.f, magnitude(x)), t = normal_argument(u);
    Vec<float> p = t * -0.029158112f + 0.14403266f;
    p = p * t - 0.25584397f;
    p = p * t + 0.1593269f;
    p = p * t - 0.023218188f;
    p = p * t + 0.10555522f;
    p = p * t + 0.11982057f;
    p = p * t + 0.13986361f;
    p = p * t + 0.1396213f;
    const Vec<float> e = gaussian(u), tail = e * (p * t);
    return {x > 0.f ? 1.f - tail : tail, e * 0.39894228f};
  }

  static NF_INLINE Vec<float> sqrt(Vec<float> x) {
#if NF_VECTOR_BYTES == 64
    return (Vec<float>)_mm512_sqrt_ps((__m512)x);
#elif NF_VECTOR_BYTES == 32
    return (Vec<float>)_mm256_sqrt_ps((__m256)x);
#else
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) x[lane] = std::sqrt(x[lane]);
    return x;
#endif
  }

  // |x|^y = 2^(y e) exp(y log m) for |x| = 2^e m. exp(y log |x|) would lose digits for large |x|, so y is split into
  // high + low: high has 12 bits, e * high is exact, its integer part n is the exponent of the result, and only the
  // fraction goes through exp. For normal |x|: 1.4 ulp for -1 <= y <= -0.5, 2.5 ulp
  // for |y| = 2.3.
  static NF_INLINE Vec<float> power(Vec<float> x, double y) {
    const float scaled_y = static_cast<float>(y) * 4097.f, high = scaled_y - (scaled_y - static_cast<float>(y));
    const float low = static_cast<float>(y - static_cast<double>(high));
    const Vec<float> a = magnitude(x), normal = a < 0x1p-126f ? a * 0x1p24f : a;
    // Unsigned where the bits of a negative number or a NaN would overflow; the shift to the right keeps the sign.
    const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(normal);
    const Vec<int32_t> exponent = bit_cast<Vec<int32_t>>(bits - 0x3f3504f3u) >> 23;  // relative to sqrt(1/2)
    const Vec<uint32_t> mantissa = bits - (bit_cast<Vec<uint32_t>>(exponent) << 23);
    const Vec<float> e =
        __builtin_convertvector(exponent, Vec<float>) - (a < 0x1p-126f ? Vec<float>{} + 24.f : Vec<float>{});
    const Vec<float> n = (e * high + 12582912.f) - 12582912.f;
    const Vec<float> log = log_mantissa(bit_cast<Vec<float>>(mantissa)) * (high + low);
    const ReducedExp fraction = reduce_exp_argument((e * high - n) * 0.69314718f + (e * (low * 0.69314718f) + log));
    const Vec<float> result = multiply_by_exp2(fraction.expm1 + 1.f, fraction.n + n);

    constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();
    const float at_zero = y < 0 ? kInfinity : y > 0 ? 0.f : 1.f;
    const float sign = std::floor(y) != y ? kNaN : std::floor(y / 2) * 2 == y ? 1.f : -1.f;
    const Vec<float> power = a == 0.f         ? Vec<float>{} + at_zero
                             : a == kInfinity ? Vec<float>{} + 1 / at_zero
                             : a < kInfinity  ? result
                                              : a;
    return x < 0.f ? power * sign : power;
  }

  static NF_INLINE Vec<double> sqrt(Vec<double> x) {
#if NF_VECTOR_BYTES == 64
    return (Vec<double>)_mm512_sqrt_pd((__m512d)x);
#elif NF_VECTOR_BYTES == 32
    return (Vec<double>)_mm256_sqrt_pd((__m256d)x);
#else
    return map_lanes(x, [](double v) { return std::sqrt(v); });
#endif
  }
  static NF_INLINE Vec<double> power(Vec<double> x, double y) {
    return map_lanes(x, [y](double v) { return std::pow(v, y); });
  }
  static NF_INLINE Vec<double> quotient(Vec<double> a, Vec<double> b) { return a / b; }
  static NF_INLINE Vec<double> sigmoid(Vec<double> x) { return 1 / (1 + exp(-x)); }
  static NF_INLINE Sigmoid<Vec<double>> sigmoid_with_complement(Vec<double> x) {
    const Vec<double> e = exp(-magnitude(x));
    return sigmoid_from(x, e, 1 / (e + 1));
  }
  static NF_INLINE Vec<double> exp(Vec<double> x) {
    return map_lanes(x, [](double v) { return std::exp(v); });
  }
  static NF_INLINE Vec<double> expm1(Vec<double> x) {
    return map_lanes(x, [](double v) { return std::expm1(v); });
  }
  static NF_INLINE Normal<Vec<double>> normal(Vec<double> x) {
    return {map_lanes(x, [](double v) { return 0.5 * std::erfc(v * -0.70710678118654752); }),
            exp(x * x * -0.5) * 0.3989422804014327};
  }
};

// 2^x, where the relative error of the polynomial is below 8e-8. Results below 2^-126 may be 0, those above 2^127
// infinite.
NF_FN Vec<float> approximate_exp2(Vec<float> x) {
#if NF_VECTOR_BYTES == 64
  const Vec<float> fraction = (Vec<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
#else
  x = maximum(Vec<float>{} - 126.5f, minimum(Vec<float>{} + 128.5f, x));
  const Vec<float> n = ((x - 0.5f) + 12582912.f) - 12582912.f, fraction = x - n;
#endif
  // A minimax polynomial for 0 <= fraction <= 1.
  Vec<float> p = fraction * 0.0018775767f + 0.00898934f;
  p = p * fraction + 0.055826318f;
  p = p * fraction + 0.24015361f;
  p = p * fraction + 0.6931531f;
  p = p * fraction + 0.99999994f;
#if NF_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  return p * exp2_integer(n);
#endif
}

// For activations of 16-bit data: SiLU takes half of the time of Elementary, its slope three quarters (AVX-512). The
// errors are below a fourth of half a unit in the last place of the 16-bit result.
struct Approximate : Elementary {
  static NF_INLINE Vec<float> exp(Vec<float> x) { return approximate_exp2(x * 1.44269504f); }

  static NF_INLINE Vec<float> sigmoid(Vec<float> x) {
    return approximate_reciprocal(approximate_exp2(x * -1.44269504f) + 1.f);
  }
  // More exact than sigmoid(): the gradients of float32 parameters are sums of slopes.
  static NF_INLINE Sigmoid<Vec<float>> sigmoid_with_complement(Vec<float> x) {
    const Vec<float> e = approximate_exp2(magnitude(x) * -1.44269504f);
    return sigmoid_from(x, e, quotient(Vec<float>{} + 1.f, e + 1.f));
  }

  // As in Elementary, with a polynomial whose relative error is below 2e-6.
  static NF_INLINE Normal<Vec<float>> normal(Vec<float> x) {
    const Vec<float> u = magnitude(x), t = normal_argument(minimum(Vec<float>{} + 16.f, u));
    Vec<float> p = t * 0.04203085f - 0.17598434f;
    p = p * t + 0.20035163f;
    p = p * t + 0.015617011f;
    p = p * t + 0.14103365f;
    p = p * t + 0.13719164f;
    p = p * t + 0.13975868f;
    const Vec<float> e = approximate_exp2(u * u * -0.72134752f), tail = e * (p * t);
    return {x > 0.f ? 1.f - tail : tail, e * 0.39894228f};
  }
};

template <class T>
using elementary_t = std::conditional_t<sizeof(T) == 2, Approximate, Elementary>;

}  // namespace
}  // namespace normfused::cpu::NF_ISA
