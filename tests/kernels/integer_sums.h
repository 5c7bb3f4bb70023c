// Sums of integers.
#pragma once

#include "values.h"

namespace normfused::testing {

// kAny: values of the whole range of the type, with its limits first in every channel. kMaximum: the maximum alone,
// with which a narrow accumulator overflows first.
enum class Integers { kAny, kMaximum };

// Sums of integers, exact. The sum of squares of 64-bit integers takes more than 128 bits, so it is compared in two
// halves: that of the low and that of the high 64 bits of each square.
template <class T, class Backend>
void run_integer_sums(Backend& backend, DType dtype, const ChannelView& view, int64_t offset, Integers which,
                      std::mt19937& random) {
  using Wide = __int128;
  current = backend.name() + " sums of integers of " + std::to_string(sizeof(T)) + " bytes, outer " +
            std::to_string(view.outer) + " channels " + std::to_string(view.channels) + " inner " +
            std::to_string(view.inner) + " offset " + std::to_string(offset);
  const int64_t channels = view.channels;
  constexpr int64_t kLowest = std::numeric_limits<T>::min(), kHighest = std::numeric_limits<T>::max();
  std::uniform_int_distribution<int64_t> values(which == Integers::kMaximum ? kHighest : kLowest, kHighest);
  Buffer<T> input(view.numel(), offset);
  std::vector<Wide> sum(channels), low_squares(channels), high_squares(channels);
  std::vector<int64_t> seen(channels), low(channels, INT64_MAX), high(channels, INT64_MIN);
  for (int64_t i = 0; i < view.numel(); ++i) {
    const int64_t c = i / view.inner % channels, m = seen[c]++;
    const int64_t value = m == 0 ? kHighest : m == 1 && which == Integers::kAny ? kLowest : values(random);
    input.data[i] = static_cast<T>(value);
    const auto square = static_cast<unsigned __int128>(Wide{value} * value);
    sum[c] += value;
    low_squares[c] += static_cast<uint64_t>(square);
    high_squares[c] += static_cast<uint64_t>(square >> 64);
    low[c] = std::min(low[c], value);
    high[c] = std::max(high[c], value);
  }
  std::vector<int64_t> rows(IntegerSums::kRows * channels);
  backend.integer_sums(IntegerSums{view, dtype, input.data, rows.data()});
  for (int64_t c = 0; c < channels; ++c) {
    const auto row = [&](int k) { return Wide{rows[k * channels + c]}; };
    const auto expect_equal = [&](const char* what, Wide got, Wide want) {
      expect_near(what, c, static_cast<double>(got - want), 0, 0);
    };
    const Wide digit = Wide{1} << 32, squares = row(2) + digit * row(3), more_squares = row(4) + digit * row(5);
    // Equal sums: what the low halves carry into the high ones is the same on both sides, modulo 2^64.
    const Wide carry = (low_squares[c] - squares) / (digit * digit);
    expect_equal("sum", row(0) + digit * row(1), sum[c]);
    expect_equal("low sum_of_squares", squares + carry * digit * digit, low_squares[c]);
    expect_equal("high sum_of_squares", more_squares - carry, high_squares[c]);
    expect_equal("min", row(6), low[c]);
    expect_equal("max", row(7), high[c]);
  }
}

}  // namespace normfused::testing
