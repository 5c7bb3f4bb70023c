// Statistics of channels with infinities, NaN, or values whose sums or squares overflow.
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

// The largest finite value (of bfloat16 for float, too), and a value whose square overflows the arithmetic type if
// there is one.
template <class T>
struct Large {
  static double maximum() { return std::is_same_v<T, double> ? 1.7976931348623157e308 : 3.38953138925153547e38; }
  static double square_overflows() { return std::ldexp(1, std::is_same_v<T, double> ? 700 : 100); }
};
template <>
struct Large<Half> {
  static double maximum() { return 65504; }
  static double square_overflows() { return 65504; }
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
  kMaximum,
  kFinite,
  kNonfiniteChannels
};

template <class T>
void set_nonfinite(T* p, int64_t channel, int64_t m, int64_t count) {
  encode(p, m % 8 / 8.0 - 0.5);
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
      encode(p, (m % 2 == 0 ? 1 : -1) * Large<T>::square_overflows());
      break;
    case kSquaresOverflowNearZero:
      if (m == count / 2) encode(p, Large<T>::square_overflows());
      break;
    case kMaximum:
      encode(p, Large<T>::maximum());
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
  mean[kMaximum] = Large<T>::maximum();  // long double sums round; the deviations are exactly 0
  m2[kMaximum] = 0;
  backend.channel_moments(ChannelStats{{outer, channels, inner},
                                       Format<T>::dtype,
                                       input.data,
                                       {results[0].data(), results[1].data(), results[2].data(), results[3].data()}});
  for (int64_t c = 0; c < channels; ++c) {
    const auto want = static_cast<double>(mean[c]), squares = static_cast<double>(m2[c]);
    expect_near("mean", c, results[0][c], want, 1e-6 * std::sqrt(static_cast<double>(m2[c] / count)) + 1e-7);
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
