// Test data that every dtype represents exactly, its conversion, and the comparison of results. Shared by the tests of
// the CPU kernels and of the CUDA kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/types.h"

namespace normfused::testing {

inline std::string current;  // description of the running test case, for failure messages
inline int64_t checks = 0;   // number of comparisons so far

// Exits with a message unless |got - want| <= tolerance, or both are NaN, or both are the same infinity.

inline void expect_near(const char* what, int64_t index, double got, double want, double tolerance) {
  ++checks;
  if (std::abs(got - want) <= tolerance || (std::isnan(got) && std::isnan(want)) || got == want) return;
  std::printf("FAILED %s: %s[%lld] is %.17g, expected %.17g within %.3g\n", current.c_str(), what,
              static_cast<long long>(index), got, want, tolerance);
  std::exit(1);
}

inline double decode(const float* p) { return *p; }
inline double decode(const double* p) { return *p; }
inline double decode(const uint8_t* p) { return *p; }
inline double decode(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline double decode(const Half* p) {
  const int exponent = (p->bits >> 10) & 31, mantissa = p->bits & 1023;
  const double sign = p->bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}

// Precondition: the format represents the value exactly.
inline void encode(float* p, double value) { *p = static_cast<float>(value); }
inline void encode(double* p, double value) { *p = value; }
inline void encode(uint8_t* p, double value) { *p = static_cast<uint8_t>(value); }
inline void encode(BFloat16* p, double value) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  p->bits = static_cast<uint16_t>(bits >> 16);
}
inline void encode(Half* p, double value) {
  if (value == 0) return void(p->bits = 0);
  int exponent;
  const double fraction = std::frexp(std::abs(value), &exponent);
  p->bits = static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) |
                                  static_cast<int>(std::ldexp(fraction, 11) - 1024));
}

// `epsilon`: half the distance from 1 to the next value. `rounding`: the same of the arithmetic type.
template <class T>
struct Format;
template <>
struct Format<float> {
  static constexpr DType dtype = DType::kFloat32;
  static constexpr double epsilon = 6e-8, rounding = 6e-8;
  static constexpr const char* name = "float32";
};
template <>
struct Format<double> {
  static constexpr DType dtype = DType::kFloat64;
  static constexpr double epsilon = 1.2e-16, rounding = 6e-16;
  static constexpr const char* name = "float64";
};
template <>
struct Format<Half> {
  static constexpr DType dtype = DType::kFloat16;
  static constexpr double epsilon = 5e-4, rounding = 6e-8;
  static constexpr const char* name = "float16";
};
template <>
struct Format<BFloat16> {
  static constexpr DType dtype = DType::kBFloat16;
  static constexpr double epsilon = 4e-3, rounding = 6e-8;
  static constexpr const char* name = "bfloat16";
};

// n values, `offset` values after the start of an allocation that ends with them: AddressSanitizer sees every access
// past the end.
template <class T>
struct Buffer {
  Buffer(int64_t n, int64_t offset) : memory(new T[static_cast<size_t>(n + offset)]), data(memory.get() + offset) {}
  std::unique_ptr<T[]> memory;
  T* data;
};

// An input and a gradient for one shape.
template <class T>
struct Case {
  ChannelView view;
  Buffer<T> input, grad;

  Case(ChannelView v, int64_t offset, std::mt19937& random)
      : view(v), input(v.numel(), offset), grad(v.numel(), offset) {
    std::uniform_int_distribution<int> eighths(-16, 16);
    for (int64_t i = 0; i < v.numel(); ++i) {
      encode(input.data + i, 3 + eighths(random) / 8.0);
      encode(grad.data + i, eighths(random) / 8.0);
    }
  }
  double x(int64_t i) const { return decode(input.data + i); }
  double g(int64_t i) const { return decode(grad.data + i); }
  int64_t channel(int64_t i) const { return i / view.inner % view.channels; }
};

// Per channel: what defines a normalization.
struct AffineStatistics {
  std::vector<double> mean, invstd, weight, bias;

  double z(double x, int64_t c) const { return (x - mean[c]) * invstd[c] * weight[c] + bias[c]; }
};

}  // namespace normfused::testing
