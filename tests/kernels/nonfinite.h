// Statistics of channels with infinities, NaN, or values whose sums or squares overflow or underflow.
#pragma once

#include "values.h"

namespace normfused::testing {

// Infinity and NaN in each dtype.
inline void set_infinity(float* p, bool negative) { *p = (negative ? -1 : 1) * std::numeric_limits<float>::infinity(); }
inline void set_infinity(double* p, bool negative) {
  *p = (negative ? -1 : 1) * std::numeric_limits<double>::infinity();
}
inline void set_infinity(Half* p, bool negative) { p->bits = negative ? 0xfc00 : 0x7c00; }
inline void set_infinity(BFloat16* p, bool negative) { p->bits = negative ? 0xff80 : 0x7f80; }
inline void set_nan(float* p) { *p = std::numeric_limits<float>::quiet_NaN(); }
inline void set_nan(double* p) { *p = std::numeric_limits<double>::quiet_NaN(); }
inline void set_nan(Half* p) { p->bits = 0x7e00; }
inline void set_nan(BFloat16* p) { p->bits = 0x7fc0; }

// The largest finite value (of bfloat16 for float, too); values whose squares overflow the arithmetic type, underflow
// to 0, and underflow to few digits, if there are any.
template <class T>
struct Extreme {
  static constexpr bool kIsDouble = std::is_same_v<T, double>;
  static double maximum() { return kIsDouble ? 1.7976931348623157e308 : 3.38953138925153547e38; }
  static double square_overflows() { return std::ldexp(1, kIsDouble ? 700 : 100); }
  static double square_underflows() { return std::ldexp(1, kIsDouble ? -400 : -90); }
  static double square_loses_digits() { return std::ldexp(1, kIsDouble ? -400 : -69); }
};
template <>
struct Extreme<Half> {
  static double maximum() { return 65504; }
  static double square_overflows() { return 65504; }
  static double square_underflows() { return std::ldexp(1, -8); }
  static double square_loses_digits() { return std::ldexp(1, -7); }
};

enum NonfiniteChannel {
  kNaNFirst,
  kNaNLast,
  kNaNAndInfinities,
  kInfinityFirst,
  kInfinityLast,
  kBothInfinities,
  kSquaresOverflow,
  kSquaresOverflowNearZero,
  kSquaresUnderflow,
  kSquaresLoseDigits,
  kMaximum,
  kFinite,
  kNonfiniteChannels
};

template <class T>
void set_nonfinite(T* p, int64_t channel, int64_t m, int64_t count) {
  const double small = m % 8 / 8.0 - 0.5;
  encode(p, small);
  switch (channel) {
    case kNaNFirst:
      if (m == 0) set_nan(p);
      break;
    case kNaNLast:
      if (m == count - 1) set_nan(p);
      break;
    case kNaNAndInfinities:
      if (m == 1 || m == count / 2) set_infinity(p, m == 1);
      if (m == count - 1) set_nan(p);
      break;
    case kInfinityFirst:
      if (m == 0) set_infinity(p, true);
      break;
    case kInfinityLast:
      if (m == count - 1) set_infinity(p, false);
      break;
    case kBothInfinities:
      if (m == 0 || m == count - 1) set_infinity(p, m == 0);
      break;
    case kSquaresOverflow:
      encode(p, (m % 2 == 0 ? 1 : -1) * Extreme<T>::square_overflows());
      break;
    case kSquaresOverflowNearZero:
      if (m == count / 2) encode(p, Extreme<T>::square_overflows());
      break;
    case kSquaresUnderflow:
      encode(p, small * Extreme<T>::square_underflows());
      break;
    case kSquaresLoseDigits:
      encode(p, small * Extreme<T>::square_loses_digits());
      break;
    case kMaximum:
      encode(p, Extreme<T>::maximum());
      break;
    default:
      break;
  }
}

// Precondition: outer * inner is even and greater than 4.
template <class T, class Backend>
void run_nonfinite(const Backend& backend, int64_t outer, int64_t inner) {
  const int64_t channels = kNonfiniteChannels, count = outer * inner;
  current = backend.name() + " nonfinite " + Format<T>::name + " outer " + std::to_string(outer) + " inner " +
            std::to_string(inner);
  Buffer<T> input(count * channels, 0);
  std::vector<double> low(channels, HUGE_VAL), high(channels, -HUGE_VAL);
  std::vector<long double> mean(channels), m2(channels);
  std::vector<double> results[4];
  for (auto& r : results) r.resize(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const auto at = [&](int64_t m) { return input.data + (m / inner * channels + c) * inner + m % inner; };
    for (int64_t m = 0; m < count; ++m) {
      set_nonfinite(at(m), c, m, count);
      const double value = decode(at(m));
      mean[c] += static_cast<long double>(value) / count;
      low[c] = std::isnan(value) ? value : std::min(low[c], value);  // once NaN, always NaN: std::min keeps it
      high[c] = std::isnan(value) ? value : std::max(high[c], value);
    }
    for (int64_t m = 0; m < count; ++m) {
      const long double deviation = decode(at(m)) - mean[c];
      m2[c] += deviation * deviation;
    }
  }
  mean[kMaximum] = Extreme<T>::maximum();  // long double sums round; the deviations are exactly 0
  m2[kMaximum] = 0;
  backend.channel_moments(ChannelStats{{outer, channels, inner},
                                       Format<T>::dtype,
                                       input.data,
                                       {results[0].data(), results[1].data(), results[2].data(), results[3].data()}});
  for (int64_t c = 0; c < channels; ++c) {
    const auto want = static_cast<double>(mean[c]), squares = static_cast<double>(m2[c]);
    const bool tiny = c == kSquaresUnderflow || c == kSquaresLoseDigits;
    expect_near("mean", c, results[0][c], want,
                1e-6 * std::sqrt(static_cast<double>(m2[c] / count)) + (tiny ? 0 : 1e-7));
    expect_near("m2", c, results[1][c], squares, 1e-5 * squares);
    expect_near("min", c, results[2][c], low[c], 0);
    expect_near("max", c, results[3][c], high[c], 0);
  }
}

template <class Backend>
void run_nonfinite(const Backend& backend) {
  // CUDA: rows in one and in several blocks; matrices with fewer and with more rows than a block has threads.
  for (const auto& [outer, inner] : {std::pair<int64_t, int64_t>{2, 50}, {4, 700}, {1, 6000}, {100, 1}, {2600, 1}}) {
    run_nonfinite<float>(backend, outer, inner);
    run_nonfinite<double>(backend, outer, inner);
    run_nonfinite<Half>(backend, outer, inner);
    run_nonfinite<BFloat16>(backend, outer, inner);
  }
}

}  // namespace normfused::testing
