// What is summed for the statistics of a channel.
#pragma once

#include "kernels/cuda/channel_vector.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/math.h"

namespace normfused::cuda {

// Mean and sum of squared deviations; with kExtremes also the least and the greatest value.
//
// A thread sums deviations from the mean of the first values it sees, rounded to S: near enough to the mean that
// neither an outlier nor an offset costs digits, and exact where a channel is constant. From there on sums are double,
// about the channel's first value, which all threads know: so they are joined by addition alone.
template <class T_, bool kExtremes>
struct MomentsOp {
  using T = T_;
  using S = compute_t<T>;
  using Sum = double;
  static constexpr int kInputs = 1, kRequired = 1, kSums = kExtremes ? 4 : 2;
  static constexpr bool kRecomputes = true, kStartsFromMemory = false;

  struct State {
    S pivot, sum, square;
    S extreme[kExtremes ? 2 : 1];
  };

  const T* tensor;
  ChannelView view;

  NF_DEVICE const T* input(int) const { return tensor; }
  template <int>
  NF_DEVICE uint32_t bits(int64_t) const {
    return 0;
  }
  NF_DEVICE double origin(int64_t channel) const {
    const double first = widen<double>(tensor[channel * view.inner]);
    return is_finite(first) ? first : 0;
  }

  static NF_DEVICE double empty(int k) { return k == 2 ? infinity() : k == 3 ? -infinity() : 0; }
  // A NaN among the extremes is lost; the sum of squares tells of it.
  static NF_DEVICE double join(int k, double a, double b) {
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
  NF_DEVICE void accumulate(State& state, const S (&values)[1][n], uint32_t mask, uint32_t, bool first) const {
    const auto counts = [&](int i) { return !kMasked || (mask >> i & 1); };
    const S(&x)[n] = values[0];
    if (first) {
      S base = x[n - 1], sum = 0;
#pragma unroll
      for (int i = n - 1; i >= 0; --i)
        if (counts(i)) base = x[i];
#pragma unroll
      for (int i = 0; i < n; ++i) sum += counts(i) ? x[i] - base : 0;
      state.pivot = base + sum / static_cast<S>(kMasked ? __popc(mask) : n);
      // With a finite pivot a deviation is NaN only where the value is, and the sum of squares only if a value is.
      if (!is_finite(state.pivot)) state.pivot = 0;
    }
    // Four chains of additions, because one would wait for itself.
    constexpr int kChains = n < 4 ? n : 4;
    S sum[kChains]{}, square[kChains]{};
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const S deviation = counts(i) ? x[i] - state.pivot : 0;
      sum[i % kChains] += deviation;
      square[i % kChains] += deviation * deviation;
      if constexpr (kExtremes) {
        if (counts(i) && x[i] < state.extreme[0]) state.extreme[0] = x[i];
        if (counts(i) && x[i] > state.extreme[1]) state.extreme[1] = x[i];
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

  NF_DEVICE void sums(const State& state, int64_t count, int64_t channel, Sum (&sums)[kSums]) const {
    const double shift = static_cast<double>(state.pivot) - origin(channel);
    const double sum = static_cast<double>(state.sum), shifted = static_cast<double>(count) * shift;
    sums[0] = sum + shifted;
    const double squares = static_cast<double>(state.square) + (2 * sum + shifted) * shift;
    // Infinite where an infinite value or an overflow is among the squares, NaN where a NaN is.
    sums[1] = is_finite(squares) ? squares : state.square == state.square ? infinity() : nan_double();
    if constexpr (kExtremes) {
      sums[2] = static_cast<double>(state.extreme[0]);
      sums[3] = static_cast<double>(state.extreme[1]);
    }
  }

  // Mean and M2 in place of the sums.
  NF_DEVICE void results(int64_t channel, Sum (&sums)[kSums]) const {
    if (is_finite(sums[1])) {
      const Moments moments = moments_about(origin(channel), view.positions(), sums[0], sums[1]);
      sums[0] = moments.mean;
      sums[1] = moments.m2;
    } else if (sums[1] != sums[1]) {
      for (int k = 0; k < kSums; ++k) sums[k] = nan_double();
    }
  }

  // Infinite values and what overflows S are computed again, in double. A NaN needs no second look.
  static NF_DEVICE bool is_valid(const Sum (&results)[kSums]) { return results[1] != infinity(); }

  // Computes those of the channels [begin, begin + channels) again that are not sound, all of them at once. The thread
  // that `leads` has the results of channel begin + group. All threads of the block take part.
  NF_DEVICE void recompute(int64_t begin, int channels, int group, bool leads, Sum (&results)[kSums]) const {
    NF_SHARED(bool, broken, [kThreads]);
    NF_SHARED(double, parts, [kThreads]);
    const bool mends = leads && !is_valid(results);
    if (leads) broken[group] = mends;
    __syncthreads();
    int lanes = kThreads;
    while (lanes * channels > kThreads) lanes /= 2;
    // Neighbouring threads read neighbours in memory.
    const int thread = static_cast<int>(threadIdx.x), slots = kThreads / lanes;
    const int own = view.inner == 1 ? thread % slots : thread / lanes;
    const int lane = view.inner == 1 ? thread / slots : thread % lanes;
    const bool works = own < channels && broken[own];
    const auto total = [&](int channel) {
      double sum = 0;
      for (int i = 0; i < lanes; ++i) sum += parts[channel * lanes + i];
      return sum;
    };
    double& part = parts[own * lanes + lane];

    const auto count = static_cast<double>(view.positions());
    part = works ? sum_over(begin + own, lane, lanes, [](double value) { return value; }) : 0;
    __syncthreads();
    const double mean = works ? total(own) / count : 0;
    if (mends) results[0] = total(group) / count;
    __syncthreads();
    // Only of double values can the sum overflow. Of others a mean that is not finite is that of infinite values.
    const bool has_infinity = sizeof(T) < sizeof(double) && !is_finite(mean);
    const auto square = [&](double value) { return (value - mean) * (value - mean); };
    part = !works ? 0 : has_infinity ? nan_double() : sum_over(begin + own, lane, lanes, square);
    __syncthreads();
    if (mends) results[1] = total(group);
  }

 private:
  static NF_DEVICE double infinity() { return HUGE_VAL; }
  static NF_DEVICE double nan_double() { return infinity() - infinity(); }

  // The sum of f over every lanes-th value of a channel. Row and place in it are carried along: a division for each
  // value would take longer than all the rest.
  template <class F>
  NF_DEVICE double sum_over(int64_t channel, int lane, int lanes, const F& f) const {
    const int64_t positions = view.positions(), inner = view.inner;
    const int64_t step = lanes / inner * view.channels * inner + lanes % inner;
    const int64_t place_step = lanes % inner, to_next_row = (view.channels - 1) * inner;
    int64_t place = lane % inner, offset = (lane / inner * view.channels + channel) * inner + place;
    double sum = 0;
#pragma unroll 8
    for (int64_t m = lane; m < positions; m += lanes) {
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

// Sum, sum of squares, least and greatest value: in double for floating types, exactly in int64 for integers.
template <class T_>
struct SumsOp {
  using T = T_;
  using S = std::conditional_t<std::is_integral_v<T>, int64_t, double>;
  using Sum = S;
  static constexpr int kInputs = 1, kRequired = 1, kSums = 4;
  static constexpr bool kRecomputes = false, kStartsFromMemory = false;

  // Packed: 20 bytes of a narrow T, with which the columns' states of a block stay within 48 KiB; 24 would not.
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, T>;  // CUDA's half precision is not to be packed
  struct __attribute__((packed, aligned(4))) State {
    S sum, square;
    Bits extreme[2];
  };

  const T* tensor;
  ChannelView view;

  NF_DEVICE const T* input(int) const { return tensor; }
  template <int>
  NF_DEVICE uint32_t bits(int64_t) const {
    return 0;
  }
  static NF_DEVICE Sum empty(int k) { return k == 2 ? greatest() : k == 3 ? least() : 0; }
  // A NaN is lost among the extremes; the sums tell of it.
  static NF_DEVICE Sum join(int k, Sum a, Sum b) { return k == 2 ? (b < a ? b : a) : k == 3 ? (b > a ? b : a) : a + b; }
  // The first vector's own values begin the extremes: T's limits need not be known.
  NF_DEVICE State start(int64_t) const { return {}; }

  template <int n, bool kMasked>
  NF_DEVICE void accumulate(State& state, const S (&values)[1][n], uint32_t mask, uint32_t, bool first) const {
    Sum low = first ? empty(2) : value_of(state.extreme[0]), high = first ? empty(3) : value_of(state.extreme[1]);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (kMasked && !(mask >> i & 1)) continue;
      const S value = values[0][i];
      state.sum += value;
      state.square += value * value;
      low = join(2, low, value);
      high = join(3, high, value);
    }
    state.extreme[0] = bits_of(low);
    state.extreme[1] = bits_of(high);
  }

  NF_DEVICE void sums(const State& state, int64_t, int64_t, Sum (&sums)[4]) const {
    sums[0] = state.sum;
    sums[1] = state.square;
    sums[2] = value_of(state.extreme[0]);
    sums[3] = value_of(state.extreme[1]);
  }
  NF_DEVICE void results(int64_t, Sum (&sums)[4]) const {
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
  static NF_DEVICE Sum greatest() {
    if constexpr (std::is_integral_v<T>)
      return INT64_MAX;
    else
      return HUGE_VAL;
  }
  static NF_DEVICE Sum least() {
    if constexpr (std::is_integral_v<T>)
      return INT64_MIN;
    else
      return -HUGE_VAL;
  }
};

// Writes row k of the results to its place.
template <class Sum>
struct WriteResults {
  Sum* results[4];

  using Known = Nothing;
  NF_DEVICE Known load(int64_t) const { return {}; }
  NF_DEVICE void prefetch(int64_t) const {}
  template <int n>
  NF_DEVICE void operator()(int64_t channel, const Sum (&sums)[n], const Known&) const {
#pragma unroll
    for (int k = 0; k < n; ++k) results[k][channel] = sums[k];
  }
};

}  // namespace normfused::cuda
