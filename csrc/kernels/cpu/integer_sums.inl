// Exact sums of integers. 8-bit values are summed in 32 bits for as long as the sum of squares fits, all other types in
// 64 bits. The loops are scalar; compilers vectorize them.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/lanes.inl"
#include "kernels/cpu/pack.inl"
#include "kernels/cpu/planes.inl"

namespace normfused::cpu::NF_ISA {
namespace {

struct IntegerSums {
  int64_t sum, squares, min, max;

  static constexpr IntegerSums identity() {
    return {0, 0, std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()};
  }
  void add(const IntegerSums& other) {
    sum += other.sum;
    squares += other.squares;
    min = other.min < min ? other.min : min;
    max = other.max > max ? other.max : max;
  }
};

// The accumulator type for values of T, and the number of squares that fit it: 2^16 squares of at most 255^2 fit 32
// bits.
template <class T>
struct IntegerAccumulator {
  using type = std::conditional_t<sizeof(T) == 1, uint32_t, uint64_t>;
  static constexpr int64_t kCapacity = sizeof(T) == 1 ? 1 << 16 : std::numeric_limits<int64_t>::max();
};

// Adds one value. Unsigned sums wrap around modulo 2^n, which is correct for negative values too.
template <class T>
NF_FN void add_value(T value, typename IntegerAccumulator<T>::type& sum, typename IntegerAccumulator<T>::type& squares,
                     T& min, T& max) {
  using A = typename IntegerAccumulator<T>::type;
  const A wide = static_cast<A>(value);
  sum += wide;
  squares += wide * wide;
  min = value < min ? value : min;
  max = value > max ? value : max;
}

template <class T>
NF_FN IntegerSums widen_sums(typename IntegerAccumulator<T>::type sum, typename IntegerAccumulator<T>::type squares,
                             T min, T max) {
  using A = typename IntegerAccumulator<T>::type;
  using Signed = std::make_signed_t<A>;
  const int64_t wide = std::is_signed_v<T> ? static_cast<int64_t>(static_cast<Signed>(sum)) : static_cast<int64_t>(sum);
  return {wide, static_cast<int64_t>(squares), static_cast<int64_t>(min), static_cast<int64_t>(max)};
}

// Adds n contiguous values of one channel.
template <class T>
void add_row(const T* values, int64_t n, IntegerSums& total) {
  using A = typename IntegerAccumulator<T>::type;
  while (n > 0) {
    const int64_t run = minimum(n, IntegerAccumulator<T>::kCapacity);
    A sum = 0, squares = 0;
    T low = std::numeric_limits<T>::max(), high = std::numeric_limits<T>::min();
    for (int64_t i = 0; i < run; ++i) add_value(values[i], sum, squares, low, high);
    total.add(widen_sums<T>(sum, squares, low, high));
    values += run;
    n -= run;
  }
}

// Adds a unit in lane layout (see lanes.inl).
template <class T>
void add_lanes(const T* input, const ChannelView& view, const Unit& unit, const LaneLayout& layout,
               IntegerSums* totals) {
  using A = typename IntegerAccumulator<T>::type;
  alignas(64) A sum[kMaxLanes], squares[kMaxLanes];
  alignas(64) T low[kMaxLanes], high[kMaxLanes];
  const T* values = input + offset_of(view, unit.c0, unit.m0);
  for (int64_t m = unit.m0; m < unit.m1;) {
    for (int64_t lane = 0; lane < layout.lanes(); ++lane) {
      sum[lane] = squares[lane] = 0;
      low[lane] = std::numeric_limits<T>::max();
      high[lane] = std::numeric_limits<T>::min();
    }
    const int64_t rows =
        minimum((unit.m1 - m + layout.positions - 1) / layout.positions, IntegerAccumulator<T>::kCapacity);
    for (int64_t i = 0; i < rows; ++i, m += layout.positions, values += view.channels * layout.positions) {
      const int64_t n = minimum(unit.m1 - m, layout.positions) * layout.channels;
      for (int64_t lane = 0; lane < n; ++lane) add_value(values[lane], sum[lane], squares[lane], low[lane], high[lane]);
    }
    for (int64_t lane = 0; lane < layout.lanes(); ++lane)
      totals[layout.channel_of(lane)].add(widen_sums<T>(sum[lane], squares[lane], low[lane], high[lane]));
  }
}

// Rows of up to this many values are summed in lanes. For 7 x 7 that takes 0.4 times as long in uint8, 1.05 times in
// int64.
inline constexpr int64_t kShortIntegerRow = 50;

template <class T>
void add_channels_first(const T* input, const ChannelView& view, const Unit& unit, IntegerSums* totals) {
  const bool in_lanes =
      walk_as_lanes<Pack<float, T>>(view, unit, kShortIntegerRow, [&](const Unit& part, const LaneLayout& layout) {
        add_lanes(input, view, part, layout, totals + (part.c0 - unit.c0));
      });
  if (in_lanes) return;
  for (int64_t m = unit.m0, end; m < unit.m1; m = end) {
    end = minimum(unit.m1, (m / view.inner + 1) * view.inner);
    for (int64_t c = unit.c0; c < unit.c1; ++c) add_row(input + offset_of(view, c, m), end - m, totals[c - unit.c0]);
  }
}

// NHWC pixels of three or four channels are converted to planar tiles: the sums of a channel then stay in registers.
template <class T>
void add_pixels(const T* input, const ChannelView& view, const Unit& unit, IntegerSums* totals) {
  alignas(64) T planar[kTileValues];
  const int64_t length = kTileValues / view.channels;
  for (int64_t m = unit.m0, n; m < unit.m1; m += n) {
    n = minimum(length, unit.m1 - m);
    nhwc_to_planar(input + m * view.channels, view.channels, view.channels, n, planar);
    for (int64_t c = 0; c < view.channels; ++c) add_row(planar + c * n, n, totals[c]);
  }
}

template <class T>
void add_channels_last(const T* input, const ChannelView& view, const Unit& unit, IntegerSums* totals) {
  if (view.channels == 3 || view.channels == 4) return add_pixels(input, view, unit, totals);
  constexpr int64_t kRows = 16;
  const int64_t channels = unit.c1 - unit.c0;
  const bool fitting = channels == view.channels && channels * kRows <= kMaxLanes;
  add_lanes(input, view, unit, {channels, fitting ? kRows : 1, true}, totals);
}

// Writes sums, sums of squares, minima and maxima, all int64.
template <class T>
void integer_sums(const ChannelStats& args, const Parallel& parallel) {
  const ChannelView& view = args.view;
  const T* const input = static_cast<const T*>(args.input);
  const Plan plan = plan_reduction(view, sizeof(T), 1);
  static_assert(sizeof(IntegerSums) == 4 * sizeof(double));
  const Workspace workspace(plan.position_units * 4 * view.channels, 0);
  IntegerSums* const partials = reinterpret_cast<IntegerSums*>(workspace.results);  // (position_units, channels)
  parallel(plan.units(), grain(plan), [&](int64_t index) {
    const Unit unit = unit_of(plan, view, index);
    IntegerSums* const totals = partials + unit.m0 / plan.position_block * view.channels + unit.c0;
    for (int64_t c = 0; c < unit.c1 - unit.c0; ++c) totals[c] = IntegerSums::identity();
    view.inner > 1 ? add_channels_first(input, view, unit, totals) : add_channels_last(input, view, unit, totals);
  });
  for (int64_t c = 0; c < view.channels; ++c) {
    IntegerSums total = IntegerSums::identity();
    for (int64_t part = 0; part < plan.position_units; ++part) total.add(partials[part * view.channels + c]);
    const int64_t results[] = {total.sum, total.squares, total.min, total.max};
    for (int k = 0; k < 4; ++k) static_cast<int64_t*>(args.results[k])[c] = results[k];
  }
}

inline void integer_sums_of(const ChannelStats& args, const Parallel& parallel) {
  switch (args.dtype) {
    case DType::kUInt8:
      return integer_sums<uint8_t>(args, parallel);
    case DType::kInt8:
      return integer_sums<int8_t>(args, parallel);
    case DType::kInt16:
      return integer_sums<int16_t>(args, parallel);
    case DType::kInt32:
      return integer_sums<int32_t>(args, parallel);
    default:
      return integer_sums<int64_t>(args, parallel);
  }
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
