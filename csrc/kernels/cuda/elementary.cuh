// Elementary functions of one value, for the activations of math.h (its parameter E): exact to a few units in the last
// place, or approximate for 16-bit data.
#pragma once

#include "kernels/cuda/prelude.h"
#include "kernels/math.h"

namespace normfused::cuda {

// The functions of CUDA's math library, for float and double.
struct Elementary {
  static NF_DEVICE float exp(float x) { return ::expf(x); }
  static NF_DEVICE double exp(double x) { return ::exp(x); }
  static NF_DEVICE float expm1(float x) { return ::expm1f(x); }
  static NF_DEVICE double expm1(double x) { return ::expm1(x); }
  static NF_DEVICE Normal<float> normal(float x) {
    return {0.5f * ::erfcf(x * -0.70710678f), 0.39894228f * ::expf(x * x * -0.5f)};
  }
  static NF_DEVICE Normal<double> normal(double x) {
    return {0.5 * ::erfc(x * -0.70710678118654752), 0.3989422804014327 * ::exp(x * x * -0.5)};
  }
  template <class S>
  static NF_DEVICE S quotient(S a, S b) {
    return a / b;
  }
  template <class S>
  static NF_DEVICE S sigmoid(S x) {
    return 1 / (1 + exp(-x));
  }
  template <class S>
  static NF_DEVICE Sigmoid<S> sigmoid_with_complement(S x) {
    const S value = sigmoid(x);
    return {value, 1 - value};
  }
  static NF_DEVICE float sqrt(float x) { return ::sqrtf(x); }
  static NF_DEVICE double sqrt(double x) { return ::sqrt(x); }
  static NF_DEVICE float power(float x, double y) { return ::powf(x, static_cast<float>(y)); }
  static NF_DEVICE double power(double x, double y) { return ::pow(x, y); }
};

// For activations of 16-bit data: a third to a tenth of the instructions of Elementary. The errors are far below half a
// unit in the last place of the 16-bit result. tests/host_cuda/approximations.cpp checks every 16-bit value.
struct Approximate {
  static NF_DEVICE float exp(float x) { return __expf(x); }
  // One Newton step makes 1 / 1 exact, because sigmoid_with_complement() subtracts it from 1. __fdividef returns 0 for
  // b >= 2^126, and so does this function.
  static NF_DEVICE float quotient(float a, float b) {
    const float r = __fdividef(1, b);
    return a * (r == 0 ? r : fmaf(r, fmaf(-b, r, 1), r));
  }
  static NF_DEVICE float sigmoid(float x) { return quotient(1, 1 + __expf(-x)); }
  static NF_DEVICE Sigmoid<float> sigmoid_with_complement(float x) {
    const float value = sigmoid(x);
    return {value, 1 - value};
  }
  static NF_DEVICE float expm1(float x) {
    // Taylor series for small |x|, for which exp(x) - 1 would cancel.
    const float series = x * (1 + x * (1.f / 2 + x * (1.f / 6 + x * (1.f / 24 + x * (1.f / 120)))));
    return x > -0.25f ? series : __expf(x) - 1;
  }
  // erfc(a) = t exp(-a^2 + p(t)) with t = 1 / (1 + a / 2), relative error 1.2e-7 (Press et al., Numerical
  // Recipes, 6.2).
  static NF_DEVICE Normal<float> normal(float x) {
    const float a = fabsf(x) * 0.70710678f, t = __fdividef(1, 1 + 0.5f * a);
    float p = 0.17087277f;
    p = -0.82215223f + t * p;
    p = 1.48851587f + t * p;
    p = -1.13520398f + t * p;
    p = 0.27886807f + t * p;
    p = -0.18628806f + t * p;
    p = 0.09678418f + t * p;
    p = 0.37409196f + t * p;
    p = 1.00002368f + t * p;
    p = -1.26551223f + t * p;
    const float tail = 0.5f * t * __expf(p - a * a);
    return {x < 0 ? tail : 1 - tail, 0.39894228f * __expf(x * x * -0.5f)};
  }
};

// The functions for data of type T.
template <class T>
using elementary_t = std::conditional_t<sizeof(T) == 2, Approximate, Elementary>;

}  // namespace normfused::cuda
