// Sums of integers.
#pragma once

#include "values.h"

namespace normfused::testing {

// Exact sums of integers in the range of T, or in [-2^15, 2^15] if T has more than 16 bits. With `extreme`, all are the
// maximum, with which a narrow accumulator overflows first.
template <class T, class Backend>
void run_integer_sums(Backend& backend, DType dtype, const ChannelView& view, int64_t offset, bool extreme,
                      std::mt19937& random) {
  current = backend.name() + " sums of integers of " + std::to_string(sizeof(T)) + " bytes, outer " +
            std::to_string(view.outer) + " channels " + std::to_string(view.channels) + " inner " +
            std::to_string(view.inner) + " offset " + std::to_string(offset);
  const int64_t channels = view.channels;
  Buffer<T> input(view.numel(), offset);
  constexpr bool kWide = sizeof(T) > 2;
  const int64_t lowest = kWide ? -(1 << 15) : std::numeric_limits<T>::min();
  const int64_t highest = kWide ? 1 << 15 : std::numeric_limits<T>::max();
  std::uniform_int_distribution<int64_t> values(extreme ? highest : lowest, highest);
  std::vector<int64_t> want[4];
  want[0].resize(channels), want[1].resize(channels);
  want[2].assign(channels, std::numeric_limits<int64_t>::max());
  want[3].assign(channels, std::numeric_limits<int64_t>::min());
  for (int64_t i = 0; i < view.numel(); ++i) {
    const int64_t value = values(random), c = i / view.inner % channels;
    input.data[i] = static_cast<T>(value);
    want[0][c] += value;
    want[1][c] += value * value;
    want[2][c] = std::min(want[2][c], value);
    want[3][c] = std::max(want[3][c], value);
  }
  std::vector<int64_t> got[4];
  for (auto& r : got) r.resize(channels);
  backend.channel_sums({view, dtype, input.data, {got[0].data(), got[1].data(), got[2].data(), got[3].data()}});
  const char* const names[] = {"sum", "sum_of_squares", "min", "max"};
  for (int k = 0; k < 4; ++k)
    for (int64_t c = 0; c < channels; ++c) expect_near(names[k], c, static_cast<double>(got[k][c] - want[k][c]), 0, 0);
}

}  // namespace normfused::testing
