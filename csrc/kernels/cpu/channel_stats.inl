// Statistics per channel: moments (mean, M2) and sums (sum, sum of squares), with minimum and maximum.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/reduce.inl"

namespace normfused::cpu::NF_ISA {
namespace {

// Sums 0 and 1 are sums; 2 is the minimum and 3 the maximum.
template <class S>
NF_FN S identity_of_sum(int64_t k) {
  constexpr S kInfinity = std::numeric_limits<S>::infinity();
  return k == 2 ? kInfinity : k == 3 ? -kInfinity : S(0);
}

// The comparisons lose a NaN. The sums are then NaN, so the callers restore it from them.
template <class V>
NF_FN V join_sum_or_extreme(int64_t k, V a, V b) {
  return k == 2 ? minimum(a, b) : k == 3 ? maximum(a, b) : a + b;
}

// Mean and M2, from the deviations from a pivot; with kExtremes also minimum and maximum.
template <class T, bool kExtremes>
struct MomentsOp {
  using S = compute_t<T>;
  using V = Pack<S, T>;
  static constexpr int64_t kSums = kExtremes ? 4 : 2, kReads = 1, kCoefficients = 1;
  static constexpr bool kEstimatesPivot = true;

  const T* input;
  double eps = 0;  // that the variance is added to

  static NF_INLINE S identity(int64_t k) { return identity_of_sum<S>(k); }

  template <class V>
  static NF_INLINE V join(int64_t k, V a, V b) {
    return join_sum_or_extreme(k, a, b);
  }

  template <class Width>
  NF_INLINE void accumulate(Sums<MomentsOp>& sums, int64_t offset, Width width,
                            const Coefficients<MomentsOp>& c) const {
    const V value = load_pack(input + offset, width, c.k[0]);
    const V deviation = value - c.k[0];
    sums.k[0] = sums.k[0] + deviation;
    sums.k[1] = sums.k[1] + deviation * deviation;
    if constexpr (kExtremes)
      unroll<2>([&](auto k) {
        sums.k[2 + k] = V::generate([&](auto i) { return join(2 + k, sums.k[2 + k].vec[i], value.vec[i]); });
      });
  }

  NF_INLINE void prefetch(int64_t offset, int64_t n) const { prefetch_row(input + offset, n); }
  NF_INLINE S coefficient(int64_t, int64_t, int64_t offset) const { return load<S>(input + offset, Tail{1})[0]; }

  NF_INLINE ChannelResults<MomentsOp> results_of(Vec<double> pivot, int64_t count,
                                                 ChannelResults<MomentsOp> sums) const {
    const auto moments = moments_about(pivot, count, sums.k[0], sums.k[1]);
    sums.k[0] = moments.mean;
    sums.k[1] = moments.m2;
    return sums;
  }

  NF_INLINE ChannelResults<MomentsOp> merge(int64_t n, ChannelResults<MomentsOp> a, int64_t m,
                                            const ChannelResults<MomentsOp>& b) const {
    const auto merged = normfused::merge(MomentsOf<Vec<double>>{n, a.k[0], a.k[1]}, {m, b.k[0], b.k[1]});
    a.k[0] = merged.mean;
    a.k[1] = merged.m2;
    for (int64_t k = 2; k < kSums; ++k) a.k[k] = join(k, a.k[k], b.k[k]);
    return a;
  }

  NF_INLINE Vec<double> next_pivot(Vec<double>, const ChannelResults<MomentsOp>& results) const { return results.k[0]; }

  // Whether M2 is exact to the digits of S: it is not with a NaN, an infinity, or squares that overflow or underflow S.
  // A constant channel is exact.
  bool is_valid(const ResultTable& results, int64_t c, int64_t count) const {
    const Moments moments{count, results(0, c), results(1, c)};
    if (!(moments.m2 <= std::numeric_limits<double>::max())) return false;
    if constexpr (kExtremes)
      if (results(2, c) == results(3, c)) return true;
    return !can_underflow<S>(moments, eps);
  }
};

// Sum, sum of squares, minimum and maximum, accumulated in double. The pivot is not used.
template <class T>
struct SumsOp {
  using S = double;
  using V = Pack<S, T>;
  static constexpr int64_t kSums = 4, kReads = 1, kCoefficients = 1;
  static constexpr bool kEstimatesPivot = false;

  const T* input;

  static NF_INLINE S identity(int64_t k) { return identity_of_sum<S>(k); }
  template <class V>
  static NF_INLINE V join(int64_t k, V a, V b) {
    return join_sum_or_extreme(k, a, b);
  }

  template <class Width>
  NF_INLINE void accumulate(Sums<SumsOp>& sums, int64_t offset, Width width, const Coefficients<SumsOp>&) const {
    const V value = load_pack<V>(input + offset, width);
    sums.k[0] = sums.k[0] + value;
    sums.k[1] = sums.k[1] + value * value;
    unroll<2>([&](auto k) {
      const V seen = fill_tail(value, V::filled(identity(2 + k)), width);
      sums.k[2 + k] = V::generate([&](auto i) { return join(2 + k, sums.k[2 + k].vec[i], seen.vec[i]); });
    });
  }

  NF_INLINE void prefetch(int64_t offset, int64_t n) const { prefetch_row(input + offset, n); }
  NF_INLINE S coefficient(int64_t, int64_t, int64_t) const { return 0; }

  NF_INLINE ChannelResults<SumsOp> results_of(Vec<double>, int64_t, const ChannelResults<SumsOp>& sums) const {
    return sums;
  }
  NF_INLINE ChannelResults<SumsOp> merge(int64_t, ChannelResults<SumsOp> a, int64_t,
                                         const ChannelResults<SumsOp>& b) const {
    for (int64_t k = 0; k < kSums; ++k) a.k[k] = join(k, a.k[k], b.k[k]);
    return a;
  }
  NF_INLINE Vec<double> next_pivot(Vec<double> pivot, const ChannelResults<SumsOp>&) const { return pivot; }
};

// Calls f(value) for each value of channel c, as double, until f returns false.
template <class T, class F>
void for_each_value(const T* input, const ChannelView& view, int64_t c, const F& f) {
  const T* row = input + c * view.inner;
  for (int64_t o = 0; o < view.outer; ++o, row += view.channels * view.inner)
    for (int64_t i = 0; i < view.inner; ++i)
      if (!f(static_cast<double>(load<compute_t<T>>(row + i, Tail{1})[0]))) return;
}

// Recomputes, in double and by the definition, the invalid channels of [c0, c1). A channel with a NaN gets NaN results.
template <class T, bool kExtremes>
void recompute_moments(const MomentsOp<T, kExtremes>& op, const ChannelView& view, const ResultTable& results,
                       int64_t c0, int64_t c1) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  for (int64_t c = c0; c < c1; ++c) {
    if (op.is_valid(results, c, view.positions())) {
      if (results(1, c) < 0) results(1, c) = 0;  // by rounding
      continue;
    }
    bool holds_nan = false;
    double sum = 0, m2 = 0, low = std::numeric_limits<double>::infinity(), high = -low;
    for_each_value(op.input, view, c, [&](double value) {
      sum += value;
      low = value < low ? value : low;
      high = value > high ? value : high;
      holds_nan = value != value;
      return !holds_nan;
    });
    if (holds_nan) {
      for (int64_t k = 0; k < op.kSums; ++k) results(k, c) = kNaN;
      continue;
    }
    const double mean = sum / static_cast<double>(view.positions());
    for_each_value(op.input, view, c, [&](double value) {
      m2 += (value - mean) * (value - mean);
      return m2 == m2;
    });
    results(0, c) = mean;
    results(1, c) = m2;
    if constexpr (kExtremes) {
      results(2, c) = low;
      results(3, c) = high;
    }
  }
}

// Reduces a tensor. finish(results, c0, c1) is called for ranges that cover all channels once.
template <class Op, class Finish>
void reduce_tensor(const Op& op, const ChannelView& view, int64_t itemsize, const Parallel& parallel,
                   const Finish& finish) {
  const Plan plan = plan_reduction(view, itemsize, 1);
  const Workspace workspace(plan.position_units * Op::kSums * view.channels, 0);
  const ResultTable results{workspace.results, view.channels};
  reduce_finalize_apply(
      op, view, plan, parallel, results, [&](int64_t c0, int64_t c1) { finish(results, c0, c1); }, [](const Unit&) {});
}

// Copies row k of the results to args.results[k].
inline void write_results(const ChannelStats& args, const ResultTable& results, int64_t c0, int64_t c1) {
  for (int64_t k = 0; k < 4; ++k)
    for (int64_t c = c0; c < c1; ++c) args.results[k][c] = results(k, c);
}

template <class T>
void channel_moments(const ChannelStats& args, const Parallel& parallel) {
  const MomentsOp<T, true> op{static_cast<const T*>(args.input)};
  reduce_tensor(op, args.view, sizeof(T), parallel, [&](const ResultTable& results, int64_t c0, int64_t c1) {
    recompute_moments(op, args.view, results, c0, c1);
    write_results(args, results, c0, c1);
  });
}

template <class T>
void channel_sums(const ChannelStats& args, const Parallel& parallel) {
  const SumsOp<T> op{static_cast<const T*>(args.input)};
  reduce_tensor(op, args.view, sizeof(T), parallel, [&](const ResultTable& results, int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c)
      if (results(1, c) != results(1, c)) results(2, c) = results(3, c) = results(1, c);
    write_results(args, results, c0, c1);
  });
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
