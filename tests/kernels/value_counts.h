// Counts of rounded values.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/cpu/value_counts.h"
#include "values.h"

namespace normfused::testing {

// A finite value rounded to 11 significant bits, ties away from zero; small integers as they are.
template <class T>
double rounded_to_11_bits(T value) {
  if (std::is_integral_v<T> && value >= -(1 << 15) && static_cast<double>(value) < 1 << 16)
    return static_cast<double>(value);
  int exponent;
  const double significand = std::frexp(static_cast<double>(value), &exponent);
  const double digits = std::min(std::floor(std::fabs(significand) * 2048 + 0.5), exponent == 1024 ? 2047.0 : 2048.0);
  return std::copysign(std::ldexp(digits, exponent - 11), static_cast<double>(value)) + 0.0;
}

// Values of any magnitude, and the ones at which rounding or the sign changes.
template <class T>
T value_for_counting(std::mt19937& random) {
  using Limits = std::numeric_limits<T>;
  constexpr T kSpecial[] = {T(0), T(1), Limits::max(), Limits::lowest(), T(127)};
  const int which = std::uniform_int_distribution<int>(0, 15)(random);
  if (which < 5) return kSpecial[which];
  if constexpr (std::is_integral_v<T>) {
    const int shift = std::uniform_int_distribution<int>(0, 8 * sizeof(T) - 1)(random);
    return static_cast<T>(std::uniform_int_distribution<int64_t>(Limits::lowest(), Limits::max())(random) >> shift);
  } else {
    if (which == 5) return -T(0);
    if (which == 6) return Limits::infinity();
    if (which == 7) return Limits::quiet_NaN();
    if (which == 8) return T(1 + 0x1p-11);  // a tie
    const int exponent = std::uniform_int_distribution<int>(-30, 30)(random);
    return std::ldexp(std::uniform_real_distribution<T>(-1, 1)(random), exponent);
  }
}

template <class T>
void run_value_counts(const cpu::Parallel& parallel, DType dtype, const ChannelView& view, int64_t offset,
                      std::mt19937& random) {
  current = "counts of values of dtype " + std::to_string(static_cast<int>(dtype)) + ", outer " +
            std::to_string(view.outer) + " channels " + std::to_string(view.channels) + " inner " +
            std::to_string(view.inner) + " offset " + std::to_string(offset);
  Buffer<T> input(view.numel(), offset);
  std::vector<std::vector<double>> expected(view.channels);
  for (int64_t i = 0; i < view.numel(); ++i) {
    input.data[i] = value_for_counting<T>(random);
    if (std::isfinite(static_cast<double>(input.data[i])))
      expected[i / view.inner % view.channels].push_back(rounded_to_11_bits(input.data[i]));
  }
  const auto counts = cpu::value_counts({view, dtype, input.data}, parallel);
  expect_near("channels", 0, static_cast<double>(counts.size()), static_cast<double>(view.channels), 0);
  for (int64_t c = 0; c < view.channels; ++c) {
    std::vector<double>& values = expected[c];
    std::sort(values.begin(), values.end());
    size_t k = 0;
    for (auto first = values.begin(), end = first; first != values.end(); first = end, ++k) {
      end = std::upper_bound(first, values.end(), *first);
      expect_near("has a value", c, k < counts[c].size(), 1, 0);
      expect_near("value", c, counts[c][k].value, *first, 0);
      expect_near("count", c, static_cast<double>(counts[c][k].count), static_cast<double>(end - first), 0);
    }
    expect_near("values", c, static_cast<double>(counts[c].size()), static_cast<double>(k), 0);
  }
}

}  // namespace normfused::testing
