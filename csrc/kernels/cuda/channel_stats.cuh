// Reduce operations for the statistics of a channel (see reduce_phases.cuh for their contract), and a Finish that
// writes their results.
#pragma once

#include "kernels/cuda/channel_vector.cuh"
#include "kernels/cuda/reduce_phases.cuh"
#include "kernels/math.h"

namespace normfused::cuda {

// Mean and M2, the sum of squared deviations from the mean; with kExtremes also minimum and maximum.
//
// A thread sums deviations from a pivot, the mean of the first values it reads, rounded to S. The pivot is near enough
// to the mean that neither an outlier nor an offset costs digits, and a constant channel gives exact results. fold()
// converts the sums to double and shifts them to the channel's first value, the origin, which all threads know. Partial
// sums about the same origin are merged by addition alone.
template <class T_, bool kExtremes>
struct MomentsOp {
  using T = T_;
  using S = compute_t<T>;
  using Sum = double;
  static constexpr int kInputs = 1, kRequiredInputs = 1, kSums = kExtremes ? 4 : 2;
  static constexpr bool kRecomputes = true, kStartsFromMemory = false;

  struct State {
    S pivot, sum, square;
    S extreme[kExtremes ? 2 : 1];
  };

  const T* tensor;
  ChannelView view;
  double eps = 0;  // that the variance is added to
  Divider<uint64_t> by_channels{static_cast<uint64_t>(view.channels)};

  NF_DEVICE const T* input(int) const { return tensor; }
  template <int>
  NF_DEVICE uint32_t mask_bits(int64_t) const {
    return 0;
  }
  NF_DEVICE double origin(int64_t channel) const {
    const double first = widen<double>(tensor[first_value(channel)]);
    return is_finite(first) ? first : 0;
  }

  static NF_DEVICE double identity(int k) { return k == 2 ? infinity() : k == 3 ? -infinity() : 0; }
  // Minimum and maximum ignore a NaN; the sum of squares carries it.
  static NF_DEVICE double merge(int k, double a, double b) {
    return k == 2 ? (b < a ? b : a) : k == 3 ? (b > a ? b : a) : a + b;
  }

  NF_DEVICE State start(int64_t) const {
    State state{};
    if constexpr (kExtremes) {
      state.extreme[0] = static_cast<S>(infinity());
      state.extreme[1] = -state.extreme[0];
    }
    return state;
  }

  template <int n, bool kMasked>
  NF_DEVICE void accumulate(State& state, const S (&values)[1][n], uint32_t valid, uint32_t, bool first) const {
    const auto is_valid_value = [&](int i) { return !kMasked || (valid >> i & 1); };
    const S(&x)[n] = values[0];
    if (first) {
      S base = x[n - 1], sum = 0;
#pragma unroll
      for (int i = n - 1; i >= 0; --i)
        if (is_valid_value(i)) base = x[i];
#pragma unroll
      for (int i = 0; i < n; ++i) sum += is_valid_value(i) ? x[i] - base : 0;
      state.pivot = base + sum / static_cast<S>(kMasked ? __popc(valid) : n);
      // With a finite pivot a deviation is NaN only if its value is, and so is the sum of squares.
      if (!is_finite(state.pivot)) state.pivot = 0;
    }
    // Four independent chains of additions hide their latency.
    constexpr int kChains = n < 4 ? n : 4;
    S sum[kChains]{}, square[kChains]{};
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const S deviation = is_valid_value(i) ? x[i] - state.pivot : 0;
      sum[i % kChains] += deviation;
      square[i % kChains] += deviation * deviation;
      if constexpr (kExtremes) {
        if (is_valid_value(i) && x[i] < state.extreme[0]) state.extreme[0] = x[i];
        if (is_valid_value(i) && x[i] > state.extreme[1]) state.extreme[1] = x[i];
      }
    }
#pragma unroll
    for (int i = 1; i < kChains; ++i) {
      sum[0] += sum[i];
      square[0] += square[i];
    }
    state.sum += sum[0];
    state.square += square[0];
  }

  NF_DEVICE void fold(const State& state, int64_t count, int64_t channel, Sum (&sums)[kSums]) const {
    const double shift = static_cast<double>(state.pivot) - origin(channel);
    const double sum = static_cast<double>(state.sum), shifted = static_cast<double>(count) * shift;
    sums[0] = sum + shifted;
    const double squares = static_cast<double>(state.square) + (2 * sum + shifted) * shift;
    // Infinite if a value is infinite or a square overflowed S, NaN if a value is NaN.
    sums[1] = is_finite(squares) ? squares : state.square == state.square ? infinity() : nan_double();
    if constexpr (kExtremes) {
      sums[2] = static_cast<double>(state.extreme[0]);
      sums[3] = static_cast<double>(state.extreme[1]);
    }
  }

  // Replaces the sums by mean and M2. A channel with a NaN has NaN for every result.
  NF_DEVICE void finalize(int64_t channel, Sum (&sums)[kSums]) const {
    if (is_finite(sums[1])) {
      const Moments moments = moments_about(origin(channel), view.positions(), sums[0], sums[1]);
      sums[0] = moments.mean;
      sums[1] = moments.m2 < 0 ? 0 : moments.m2;  // rounding can leave a tiny negative M2
    } else if (sums[1] != sums[1]) {
      for (int k = 0; k < kSums; ++k) sums[k] = nan_double();
    }
  }

  // A channel with an infinite value, or whose squares overflow or underflow S, is recomputed in double. A NaN is a
  // valid result, and a constant channel is exact.
  NF_DEVICE bool is_valid(const Sum (&results)[kSums]) const {
    if (results[1] == infinity()) return false;
    if constexpr (kExtremes)
      if (results[2] == results[3]) return true;
    return !can_underflow<S>({view.positions(), results[0], results[1]}, eps);
  }

  // Block-wide: recomputes mean and M2 of the invalid channels among [first, first + channels), all of them at once, in
  // two passes over the tensor: one for the mean, one for the squared deviations. The leader of a channel, the thread
  // with `is_leader`, holds its results; `slot` is the channel's index. All threads of the block must call it; it
  // begins and ends without a barrier.
  NF_DEVICE void recompute(int64_t first, int channels, int slot, bool is_leader, Sum (&results)[kSums]) const {
    NF_SHARED(bool, invalid, [kThreads]);
    NF_SHARED(double, thread_sums, [kThreads]);
    const bool replaces = is_leader && !is_valid(results);
    if (is_leader) invalid[slot] = replaces;
    __syncthreads();
    int lanes = kThreads;
    while (lanes * channels > kThreads) lanes /= 2;
    // Neighbouring threads read neighbours in memory: positions of a channel, or channels of a position.
    const int thread = static_cast<int>(threadIdx.x), slots = kThreads / lanes;
    const int read_slot = view.inner == 1 ? thread % slots : thread / lanes;
    const int lane = view.inner == 1 ? thread / slots : thread % lanes;
    const bool reads = read_slot < channels && invalid[read_slot];
    const auto total = [&](int channel) {
      double sum = 0;
      for (int i = 0; i < lanes; ++i) sum += thread_sums[channel * lanes + i];
      return sum;
    };
    double& thread_sum = thread_sums[read_slot * lanes + lane];

    const auto count = static_cast<double>(view.positions());
    thread_sum = reads ? sum_over(first + read_slot, lane, lanes, [](double value) { return value; }) : 0;
    __syncthreads();
    const double mean = reads ? total(read_slot) / count : 0;
    if (replaces) results[0] = total(slot) / count;
    __syncthreads();
    // The sum can overflow only for double data. For other data a mean that is not finite means an infinite value.
    const bool has_infinity = sizeof(T) < sizeof(double) && !is_finite(mean);
    const auto square = [&](double value) { return (value - mean) * (value - mean); };
    thread_sum = !reads ? 0 : has_infinity ? nan_double() : sum_over(first + read_slot, lane, lanes, square);
    __syncthreads();
    if (replaces) results[1] = total(slot);
  }

 private:
  // The offset of a channel's first value. Channels are counted over one sample after the other.
  NF_DEVICE int64_t first_value(int64_t channel) const {
    if (view.samples == 1 || view.outer == 1) return channel * view.inner;
    const auto sample = static_cast<int64_t>(by_channels(static_cast<uint64_t>(channel)));
    return (sample * (view.outer - 1) * view.channels + channel) * view.inner;
  }
  static NF_DEVICE double infinity() { return HUGE_VAL; }
  static NF_DEVICE double nan_double() { return infinity() - infinity(); }

  // The sum of f over every lanes-th value of a channel, starting at the lane's own. The offset and the place in the
  // row are updated by additions: a 64-bit division per value would take longer than everything else.
  template <class F>
  NF_DEVICE double sum_over(int64_t channel, int lane, int lanes, const F& f) const {
    const int64_t positions = view.positions(), inner = view.inner;
    const int64_t step = lanes / inner * view.channels * inner + lanes % inner;
    const int64_t place_step = lanes % inner, to_next_row = (view.channels - 1) * inner;
    int64_t place = lane % inner, offset = first_value(channel) + lane / inner * view.channels * inner + place;
    double sum = 0;
#pragma unroll 8
    for (int64_t position = lane; position < positions; position += lanes) {
      sum += f(widen<double>(tensor[offset]));
      offset += step;
      place += place_step;
      if (place >= inner) {
        place -= inner;
        offset += to_next_row;
      }
    }
    return sum;
  }
};

// Sum, sum of squares, minimum and maximum, in double.
template <class T_>
struct SumsOp {
  using T = T_;
  using S = double;
  using Sum = double;
  static constexpr int kInputs = 1, kRequiredInputs = 1, kSums = 4;
  static constexpr bool kRecomputes = false, kStartsFromMemory = false;

  // Packed to 20 bytes for a 16-bit T: the states of a block then fit into 48 KiB of shared memory, with 24 they would
  // not. CUDA's 16-bit types cannot be members of a packed struct, so their bits are stored.
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, T>;
  struct __attribute__((packed, aligned(4))) State {
    S sum, square;
    Bits extreme[2];
  };

  const T* tensor;
  ChannelView view;

  NF_DEVICE const T* input(int) const { return tensor; }
  template <int>
  NF_DEVICE uint32_t mask_bits(int64_t) const {
    return 0;
  }
  static NF_DEVICE Sum identity(int k) { return k == 2 ? HUGE_VAL : k == 3 ? -HUGE_VAL : 0; }
  // Minimum and maximum ignore a NaN; the sums carry it.
  static NF_DEVICE Sum merge(int k, Sum a, Sum b) {
    return k == 2 ? (b < a ? b : a) : k == 3 ? (b > a ? b : a) : a + b;
  }
  // accumulate() initializes the extremes with its first values, so T's limits are not needed.
  NF_DEVICE State start(int64_t) const { return {}; }

  template <int n, bool kMasked>
  NF_DEVICE void accumulate(State& state, const S (&values)[1][n], uint32_t valid, uint32_t, bool first) const {
    Sum low = first ? identity(2) : value_of(state.extreme[0]), high = first ? identity(3) : value_of(state.extreme[1]);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (kMasked && !(valid >> i & 1)) continue;
      const S value = values[0][i];
      state.sum += value;
      state.square += value * value;
      low = merge(2, low, value);
      high = merge(3, high, value);
    }
    state.extreme[0] = bits_of(low);
    state.extreme[1] = bits_of(high);
  }

  NF_DEVICE void fold(const State& state, int64_t, int64_t, Sum (&sums)[4]) const {
    sums[0] = state.sum;
    sums[1] = state.square;
    sums[2] = value_of(state.extreme[0]);
    sums[3] = value_of(state.extreme[1]);
  }
  NF_DEVICE void finalize(int64_t, Sum (&sums)[4]) const {
    if (sums[1] != sums[1]) sums[2] = sums[3] = sums[1];
  }

 private:
  static NF_DEVICE Sum value_of(Bits bits) {
    T value;
    memcpy(static_cast<void*>(&value), &bits, sizeof value);
    return widen<Sum>(value);
  }
  static NF_DEVICE Bits bits_of(Sum sum) {
    const T value = narrow<T>(sum);
    Bits bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
  }
};

// The rows of IntegerSums that T has, in order, as sums in int64: exact.
template <class T_>
struct IntegerSumsOp {
  using T = T_;
  using S = int64_t;
  using Sum = int64_t;
  static constexpr int kParts = kIntegerParts<T>, kMin = kParts, kMax = kParts + 1;
  static constexpr int kInputs = 1, kRequiredInputs = 1, kSums = kParts + 2;
  static constexpr bool kRecomputes = false, kStartsFromMemory = false;

  // Packed, so that the states of a block fit into 48 KiB of shared memory.
  struct __attribute__((packed, aligned(4))) State {
    Sum parts[kParts];
    T low, high;
  };

  const T* tensor;
  ChannelView view;

  NF_DEVICE const T* input(int) const { return tensor; }
  template <int>
  NF_DEVICE uint32_t mask_bits(int64_t) const {
    return 0;
  }
  static NF_DEVICE Sum identity(int k) { return k == kMin ? INT64_MAX : k == kMax ? INT64_MIN : 0; }
  static NF_DEVICE Sum merge(int k, Sum a, Sum b) {
    return k == kMin ? (b < a ? b : a) : k == kMax ? (b > a ? b : a) : a + b;
  }
  // accumulate() initializes the extremes with its first values, so T's limits are not needed.
  NF_DEVICE State start(int64_t) const { return {}; }

  template <int n, bool kMasked>
  NF_DEVICE void accumulate(State& state, const S (&values)[1][n], uint32_t valid, uint32_t, bool first) const {
    Sum low = first ? identity(kMin) : state.low, high = first ? identity(kMax) : state.high;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (kMasked && !(valid >> i & 1)) continue;
      const S value = values[0][i];
      uint64_t parts[kParts];
      split_integer(static_cast<T>(value), parts);
#pragma unroll
      for (int k = 0; k < kParts; ++k) state.parts[k] += static_cast<Sum>(parts[k]);
      low = merge(kMin, low, value);
      high = merge(kMax, high, value);
    }
    state.low = static_cast<T>(low);
    state.high = static_cast<T>(high);
  }

  NF_DEVICE void fold(const State& state, int64_t, int64_t, Sum (&sums)[kSums]) const {
#pragma unroll
    for (int k = 0; k < kParts; ++k) sums[k] = state.parts[k];
    sums[kMin] = state.low;
    sums[kMax] = state.high;
  }
  NF_DEVICE void finalize(int64_t, Sum (&)[kSums]) const {}
};

// A Finish that writes result k of a channel to results[k][channel].
template <class Sum>
struct WriteResults {
  Sum* results[IntegerSums::kRows];

  using Preloaded = NoPreload;
  NF_DEVICE Preloaded preload(int64_t) const { return {}; }
  NF_DEVICE void prefetch(int64_t) const {}
  template <int n>
  NF_DEVICE void operator()(int64_t channel, const Sum (&sums)[n], const Preloaded&) const {
#pragma unroll
    for (int k = 0; k < n; ++k) results[k][channel] = sums[k];
  }
};

}  // namespace normfused::cuda
