// Elementary functions of what a thread has in registers.
#pragma once

#include "kernels/cuda/prelude.h"
#include "kernels/math.h"

namespace normfused::cuda {

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
  static NF_DEVICE float sqrt(float x) { return ::sqrtf(x); }
  static NF_DEVICE double sqrt(double x) { return ::sqrt(x); }
  static NF_DEVICE float power(float x, double y) { return ::powf(x, static_cast<float>(y)); }
  static NF_DEVICE double power(double x, double y) { return ::pow(x, y); }
};

}  // namespace normfused::cuda
