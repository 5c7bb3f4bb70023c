// Reductions per channel, in phases:
//
//   accumulate  a segment of a unit, in S, in vector registers
//   fold        the segment's sums into the unit's results, in double
//   merge       the results of the splits of a channel, in a fixed order
//   finish      the caller's finalize(c0, c1): results to statistics, coefficients, gradients
//   apply       the caller's apply(unit): the elementwise pass
//
// A reduce op defines what is summed:
//   V, kSums                   the Pack that accumulate() reads, and the number of sums (partial sums, or extremes)
//   kReads                     number of tensors that accumulate() reads, without a residual
//   identity(k), join(k, a, b)    initial value of sum k, and the combination of two partial sums
//   kCoefficients              number of per-channel constants; constant 0 is the pivot
//   coefficient(k, c, offset)  constant k of channel c, whose first value is at `offset`
//   prefetch(offset, n)        prefetches n values
//   accumulate(sums, offset, width, coefficients)  adds the values at `offset`
//   results_of(pivot, count, sums)                 results of a segment of `count` values
//   merge(n, a, m, b)          merges the results of n values with those of m values
//   kEstimatesPivot, next_pivot(pivot, results)    whether a sample of the first values gives a better pivot, and which
//
// Segments are accumulated in S relative to the pivot; results are double. So S never has to represent a sum of more
// values than a segment has.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/lanes.inl"
#include "kernels/cpu/pack.inl"

namespace normfused::cpu::NF_ISA {
namespace {

// Number of values in the sample that estimates a pivot. An outlier among them costs precision in proportion to the
// segment's length divided by this.
inline constexpr int64_t kPivotSample = 64;
// Channels first: number of consecutive additions in S, in each lane of each sum, before a fold into double.
inline constexpr int64_t kAdditionsPerFold = 64;
// Number of vectors of sums that a long row is spread over, to hide the latency of additions on two ports. Channels
// last, the number of neighbouring vectors that are accumulated together.
inline constexpr int64_t kAccumulatorVectors = 4;
template <class V>
inline constexpr int64_t kAccumulatorPacks = kAccumulatorVectors / V::kVecs;
// Lane layout: number of rows that are accumulated in S, in registers, before they are joined to the segment's sums in
// double. In proportion to the number of sums, because each takes as long to join.
template <class Op>
inline constexpr int64_t kRowsPerStep = 8 * Op::kSums;
// Lane layout: positions of the pivot sample, and of a segment relative to it. The sample is read twice, so a short
// unit of channels last has a short sample. A sample within one row of channels first has a power of two of its values,
// whose mean is then not rounded where their sum is exact. Sums of exact data relative to a rounded pivot would not be
// exact.
inline constexpr int64_t kLaneSample = 16, kShortLaneSample = 4, kSamplesPerSegment = 64;
// Rows of up to this many bytes in all tensors that the op reads are reduced in lanes. In lanes, moments of 7 x 7 in
// float32 (196 bytes) take 0.7 times as long, the sums of gradients in bfloat16 0.95 times. Of 8 x 8 both take as long
// or longer.
inline constexpr int64_t kShortRowBytes = 200;
// Number of channels that one task merges.
inline constexpr int64_t kChannelsPerMergeTask = 256;

// A row of at least this many values is accumulated in several packs of sums.
template <class V>
inline constexpr int64_t kLongRow = 2 * kAccumulatorPacks<V> * V::kSize;

// Per-channel constants, one pack each: every value has the constant of its channel.
template <class Op>
struct Coefficients {
  typename Op::V k[Op::kCoefficients];
};

// A (kSums, channels) array of results: entry (k, c) is result k of channel c.
struct ResultTable {
  double* data;
  int64_t channels;

  double& operator()(int64_t k, int64_t c) const { return data[k * channels + c]; }
};

// The sums of a pack's values, in registers.
template <class Op>
struct Sums {
  using V = typename Op::V;

  V k[Op::kSums];

  NF_INLINE void clear() {
    unroll<Op::kSums>([&](auto i) { k[i] = V::filled(Op::identity(i)); });
  }
  NF_INLINE void join(const Sums& other) {
    unroll<Op::kSums>(
        [&](auto i) { k[i] = V::generate([&](auto v) { return Op::join(i, k[i].vec[v], other.k[i].vec[v]); }); });
  }
};

// The sums of one channel between its rows. One vector each, not one pack: those of all channels of a unit share the L1
// cache with the values.
template <class Op>
struct ChannelSums {
  using S = typename Op::V::S;

  Vec<S> k[Op::kSums];

  NF_INLINE void clear() {
    unroll<Op::kSums>([&](auto i) { k[i] = broadcast<S>(Op::identity(i)); });
  }
  NF_INLINE void join(const Sums<Op>& row) {
    unroll<Op::kSums>(
        [&](auto i) { unroll<Op::V::kVecs>([&](auto v) { k[i] = Op::join(i, k[i], row.k[i].vec[v]); }); });
  }
};

// The sums or results of kLanes<double> neighbouring channels, one channel in each lane.
template <class Op>
struct ChannelResults {
  Vec<double> k[Op::kSums];

  template <class Width>
  NF_INLINE void load_from(const double* table, int64_t stride, Width width) {
    unroll<Op::kSums>([&](auto i) { k[i] = load<double>(table + i * stride, width); });
  }
  template <class Width>
  NF_INLINE void store_to(double* table, int64_t stride, Width width) const {
    unroll<Op::kSums>([&](auto i) { store(table + i * stride, k[i], width); });
  }
};

// ---- contract of a reduce op -------------------------------------------------------------------------------------

NF_REQUIREMENT(has_pack, std::declval<typename Op::V>().vec[Op::V::kVecs - 1]);
NF_REQUIREMENT(has_sums, Op::kSums);
NF_REQUIREMENT(has_reads, Op::kReads);
NF_REQUIREMENT(has_identity, Op::identity(int64_t{}));
NF_REQUIREMENT(has_join, Op::join(int64_t{}, double{}, double{}));
NF_REQUIREMENT(has_coefficients, Op::kCoefficients);
NF_REQUIREMENT(has_coefficient, std::declval<const Op&>().coefficient(int64_t{}, int64_t{}, int64_t{}));
NF_REQUIREMENT(has_prefetch, std::declval<const Op&>().prefetch(int64_t{}, int64_t{}));
NF_REQUIREMENT(has_accumulate, std::declval<const Op&>().accumulate(std::declval<Sums<Op>&>(), int64_t{}, FullVector{},
                                                                    std::declval<const Coefficients<Op>&>()));
NF_REQUIREMENT(has_results_of,
               std::declval<const Op&>().results_of(Vec<double>{}, int64_t{}, std::declval<ChannelResults<Op>>()));
NF_REQUIREMENT(has_merge, std::declval<const Op&>().merge(int64_t{}, std::declval<ChannelResults<Op>>(), int64_t{},
                                                          std::declval<ChannelResults<Op>>()));
NF_REQUIREMENT(has_pivot_estimate, Op::kEstimatesPivot);
NF_REQUIREMENT(has_next_pivot,
               std::declval<const Op&>().next_pivot(Vec<double>{}, std::declval<const ChannelResults<Op>&>()));

template <class Op>
constexpr bool check_reduce_op() {
  static_assert(has_pack<Op>, "A reduce op must define `V`, the Pack<S, T> that accumulate() reads.");
  static_assert(has_sums<Op>, "A reduce op must define `kSums`, the number of sums per channel.");
  static_assert(has_reads<Op>, "A reduce op must define `kReads`, the number of tensors that accumulate() reads.");
  static_assert(has_identity<Op>,
                "A reduce op must define `static S identity(int64_t k)`, the initial value of sum k.");
  static_assert(has_join<Op>, "A reduce op must define `static V join(int64_t k, V a, V b)` for doubles and vectors.");
  static_assert(has_coefficients<Op>, "A reduce op must define `kCoefficients`; coefficient 0 is the pivot.");
  static_assert(has_coefficient<Op>, "A reduce op must define `S coefficient(int64_t k, int64_t c, int64_t offset)`.");
  static_assert(has_prefetch<Op>, "A reduce op must define `void prefetch(int64_t offset, int64_t n)`.");
  static_assert(
      has_accumulate<Op>,
      "A reduce op must define `void accumulate(Sums<Op>&, int64_t offset, Width, const Coefficients<Op>&)`.");
  static_assert(has_results_of<Op>,
                "A reduce op must define `ChannelResults<Op> results_of(Vec<double> pivot, int64_t count, sums)`.");
  static_assert(has_merge<Op>, "A reduce op must define `ChannelResults<Op> merge(int64_t n, a, int64_t m, b)`.");
  static_assert(has_pivot_estimate<Op>, "A reduce op must define `bool kEstimatesPivot`.");
  static_assert(has_next_pivot<Op>, "A reduce op must define `Vec<double> next_pivot(Vec<double> pivot, results)`.");
  return true;
}

// ---- horizontal reductions ---------------------------------------------------------------------------------------

// Joins the lanes of a vector of sum k.
template <class Op, class V>
NF_FN double horizontal_reduce(int64_t k, V v) {
  if constexpr (sizeof(V) == 2 * sizeof(double)) {
    return Op::join(k, v[0], v[1]);
  } else {
    using HalfVector = typename VecOf<double, sizeof(V) / 2>::type;
    const char* const lanes = reinterpret_cast<const char*>(&v);
    return horizontal_reduce<Op>(
        k, Op::join(k, load_unaligned<HalfVector>(lanes), load_unaligned<HalfVector>(lanes + sizeof(HalfVector))));
  }
}

template <class Op>
NF_FN double reduce_to_double(int64_t k, Vec<typename Op::V::S> lanes) {
  const auto wide = widen_to_double(lanes);
  if constexpr (wide.kVecs == 1)
    return horizontal_reduce<Op>(k, wide.vec[0]);
  else
    return horizontal_reduce<Op>(k, Op::join(k, wide.vec[0], wide.vec[1]));
}

// Joins sum k of each value, in memory order, to kSize doubles.
template <class Op>
NF_FN void join_to_doubles(int64_t k, double* sums, const typename Op::V& pack) {
  using V = typename Op::V;
  using S = typename V::S;
  const V lanes = to_memory_order(pack);
  unroll<V::kVecs>([&](auto v) {
    const DoubleVectors<S> wide = widen_to_double(lanes.vec[v]);
    unroll<DoubleVectors<S>::kVecs>([&](auto h) {
      double* const sum = sums + v * kLanes<S> + h * kLanes<double>;
      store(sum, Op::join(k, load<double>(sum, FullVector{}), wide.vec[h]), FullVector{});
    });
  });
}

// ---- segments ----------------------------------------------------------------------------------------------------

// State of a unit during its reduction: the coefficients and the current segment's sums of each of its channels, as
// (kCoefficients, kChannels) and (kSums, kChannels) arrays.
template <class Op, int64_t kChannels>
struct Segment {
  using V = typename Op::V;
  using S = typename V::S;

  const Op& op;
  const Unit& unit;
  const ResultTable& results;
  alignas(64) S table[Op::kCoefficients * kChannels];  // coefficients; the first kChannels entries are the pivots
  alignas(64) double sums[Op::kSums * kChannels];

  // Does not initialize the arrays: for a small unit, that would take longer than its reduction.
  Segment(const Op& op, const Unit& unit, const ResultTable& results) : op(op), unit(unit), results(results) {}

  // Loads the coefficients. The first value of channel c of the unit is at offset + c * stride.
  void begin(int64_t offset, int64_t stride) {
    for (int64_t k = 0; k < Op::kCoefficients; ++k)
      for (int64_t c = 0; c < unit.c1 - unit.c0; ++c)
        table[k * kChannels + c] = op.coefficient(k, unit.c0 + c, offset + c * stride);
  }

  // Sets the pivots from the sums of a sample of `count` values.
  void estimate_pivots(int64_t count) {
    for_each_vector<double>(unit.c1 - unit.c0, [&](int64_t i, auto width) {
      ChannelResults<Op> sample;
      sample.load_from(sums + i, kChannels, width);
      const Vec<double> pivot = load<double>(table + i, width);
      store_double_as(table + i, op.next_pivot(pivot, op.results_of(pivot, count, sample)), width);
    });
  }

  // Merges the sums of a segment of `count` values into the results of the unit's first `done` values, and updates the
  // pivots.
  void fold(int64_t done, int64_t count) {
    for_each_vector<double>(unit.c1 - unit.c0, [&](int64_t i, auto width) {
      ChannelResults<Op> segment;
      segment.load_from(sums + i, kChannels, width);
      const Vec<double> pivot = load<double>(table + i, width);
      ChannelResults<Op> total = op.results_of(pivot, count, segment);
      double* const entries = &results(0, unit.c0 + i);
      if (done > 0) {
        ChannelResults<Op> previous;
        previous.load_from(entries, results.channels, width);
        total = op.merge(done, previous, count, total);
      }
      total.store_to(entries, results.channels, width);
      store_double_as(table + i, op.next_pivot(pivot, total), width);
    });
  }
};

// Reduces a unit segment by segment. accumulate(m0, m1) sums the positions [m0, m1) into the segment, and
// accumulate_sample(m0, m1) does so for the pivot sample. `sample` and `length` are numbers of positions.
template <class Op, int64_t kChannels, class Accumulate, class AccumulateSample>
NF_FN void reduce_segments(Segment<Op, kChannels>& segment, int64_t sample, int64_t length,
                           const Accumulate& accumulate, const AccumulateSample& accumulate_sample) {
  const Unit& unit = segment.unit;
  if constexpr (Op::kEstimatesPivot) {
    const int64_t count = minimum(sample, unit.m1 - unit.m0);
    accumulate_sample(unit.m0, unit.m0 + count);
    segment.estimate_pivots(count);
  }
  for (int64_t m = unit.m0; m < unit.m1; m += length) {
    const int64_t count = minimum(length, unit.m1 - m);
    accumulate(m, m + count);
    segment.fold(m - unit.m0, count);
  }
}

// ---- channels first: rows of one channel -------------------------------------------------------------------------

// Adds a row of n values of one channel to its sums.
template <class Op>
NF_FN void accumulate_row(const Op& op, ChannelSums<Op>& sums, int64_t offset, int64_t n,
                          const Coefficients<Op>& coefficients) {
  using V = typename Op::V;
  int64_t done = 0;
  Sums<Op> row;  // cleared only for a short row: initialized before the loop, sums in double took 1.3 times as long
  if (n < kLongRow<V>) {
    row.clear();
  } else {
    constexpr int64_t kStep = kAccumulatorPacks<V> * V::kSize;
    done = n / kStep * kStep;
    Sums<Op> acc[kAccumulatorPacks<V>];
    unroll<kAccumulatorPacks<V>>([&](auto b) { acc[b].clear(); });
    for (int64_t i = 0; i < done; i += kStep)
      unroll<kAccumulatorPacks<V>>(
          [&](auto b) { op.accumulate(acc[b], offset + i + b * V::kSize, FullVector{}, coefficients); });
    row = acc[0];
    unroll<kAccumulatorPacks<V> - 1>([&](auto b) { row.join(acc[b + 1]); });
  }
  for_each_pack<V>(n - done,
                   [&](int64_t i, auto width) { op.accumulate(row, offset + done + i, width, coefficients); });
  sums.join(row);
}

// Sums the first n values of each of the unit's channels, at most one row, into the segment.
template <class Op, int64_t kChannels>
void accumulate_first_values(const Op& op, const ChannelView& view, Segment<Op, kChannels>& segment, int64_t n) {
  const Unit& unit = segment.unit;
  for (int64_t c = 0; c < unit.c1 - unit.c0; ++c) {
    Coefficients<Op> coefficients;
    unroll<Op::kCoefficients>([&](auto k) { coefficients.k[k] = Op::V::filled(segment.table[k * kChannels + c]); });
    ChannelSums<Op> sums;
    sums.clear();
    accumulate_row(op, sums, offset_of(view, unit.c0 + c, unit.m0), n, coefficients);
    unroll<Op::kSums>([&](auto k) { segment.sums[k * kChannels + c] = reduce_to_double<Op>(k, sums.k[k]); });
  }
}

// Sums positions [m, end) of the unit's channels into the segment, row by row.
template <class Op>
void accumulate_channels_first(const Op& op, const ChannelView& view, Segment<Op, kMaxChannelsFirst>& segment,
                               int64_t m, int64_t end) {
  using V = typename Op::V;
  const Unit& unit = segment.unit;
  const int64_t channels = unit.c1 - unit.c0;
  ChannelSums<Op> sums[kMaxChannelsFirst];
  for (int64_t c = 0; c < channels; ++c) sums[c].clear();
  for (int64_t n; m < end; m += n) {
    n = minimum(view.inner - m % view.inner, end - m);
    const int64_t offset = offset_of(view, unit.c0, m);
    for (int64_t c = 0; c < channels; ++c) {
      if (end - m > n) op.prefetch(offset + (view.channels + c) * view.inner, view.inner);
      Coefficients<Op> coefficients;
      unroll<Op::kCoefficients>(
          [&](auto k) { coefficients.k[k] = V::filled(segment.table[k * kMaxChannelsFirst + c]); });
      accumulate_row(op, sums[c], offset + c * view.inner, n, coefficients);
    }
  }
  for (int64_t c = 0; c < channels; ++c)
    unroll<Op::kSums>([&](auto k) { segment.sums[k * kMaxChannelsFirst + c] = reduce_to_double<Op>(k, sums[c].k[k]); });
}

template <class Op>
void reduce_channels_first(const Op& op, const ChannelView& view, const Unit& unit, const ResultTable& results) {
  using V = typename Op::V;
  Segment<Op, kMaxChannelsFirst> segment(op, unit, results);
  segment.begin(offset_of(view, unit.c0, unit.m0), view.inner);
  const int64_t length = kAdditionsPerFold * V::kSize * (view.inner >= kLongRow<V> ? kAccumulatorPacks<V> : 1);
  const auto accumulate = [&](int64_t m, int64_t end) { accumulate_channels_first(op, view, segment, m, end); };
  reduce_segments(segment, kPivotSample, length, accumulate, accumulate);
}

// ---- lane layout: rows of lanes ----------------------------------------------------------------------------------

// `count` rows of lanes, from `offset` on, `stride` apart. `ahead` is the distance at which values are prefetched.
struct LaneRows {
  int64_t offset, count, stride, ahead;
};

// Adds a few neighbouring packs of each row to the segment's sums: first in S, in registers, then in double.
template <int64_t packs, class Op, class Width>
NF_FN void accumulate_rows(const Op& op, const LaneRows rows, Width width, const typename Op::V::S* table,
                           double* sums) {
  using V = typename Op::V;
  Sums<Op> acc[packs];
  Coefficients<Op> coefficients[packs];
  unroll<packs>([&](auto b) {
    unroll<Op::kCoefficients>(
        [&](auto k) { coefficients[b].k[k] = load_in_pack_order<V>(table + k * kMaxLanes + b * V::kSize); });
    acc[b].clear();
  });
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t offset = rows.offset + row * rows.stride;
    op.prefetch(offset + rows.ahead, packs * V::kSize);
    unroll<packs>([&](auto b) { op.accumulate(acc[b], offset + b * V::kSize, width, coefficients[b]); });
  }
  unroll<packs * Op::kSums>([&](auto i) {
    constexpr int64_t b = i / Op::kSums, k = i % Op::kSums;
    join_to_doubles<Op>(k, sums + k * kMaxLanes + b * V::kSize, acc[b].k[k]);
  });
}

// Adds the first n lanes of each row to the segment's sums.
template <class Op>
void accumulate_lanes(const Op& op, bool channels_last, LaneRows rows, int64_t n, Segment<Op, kMaxLanes>& segment) {
  using V = typename Op::V;
  constexpr int64_t kStep = kAccumulatorPacks<V> * V::kSize;
  const int64_t offset = rows.offset;
  // Channels last, hardware prefetchers follow the rows once they are started, so the first access to each of the next
  // rows is prefetched. Short rows of channels first are too far apart for them.
  rows.ahead = channels_last ? rows.count * rows.stride : kStep;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    rows.offset = offset + i;
    accumulate_rows<kAccumulatorPacks<V>>(op, rows, FullVector{}, segment.table + i, segment.sums + i);
  }
  for_each_pack<V>(n - i, [&](int64_t j, auto width) {
    rows.offset = offset + i + j;
    accumulate_rows<1>(op, rows, width, segment.table + i + j, segment.sums + i + j);
  });
}

// Copies the coefficients to all lanes and clears the sums. The last pack may read past the last lane.
template <class Op>
void begin_lanes(const LaneLayout& layout, Segment<Op, kMaxLanes>& segment) {
  using V = typename Op::V;
  const int64_t lanes = layout.lanes(), padded = (lanes + V::kSize - 1) / V::kSize * V::kSize;
  for (int64_t k = 0; k < Op::kCoefficients; ++k) {
    typename V::S* const coefficients = segment.table + k * kMaxLanes;
    layout.broadcast_to_lanes(coefficients);
    for (int64_t lane = lanes; lane < padded; ++lane) coefficients[lane] = 0;
  }
  for (int64_t k = 0; k < Op::kSums; ++k)
    for (int64_t lane = 0; lane < padded; ++lane)
      segment.sums[k * kMaxLanes + lane] = static_cast<double>(Op::identity(k));
}

// Joins the lanes of each channel of sum k; the sum of channel c becomes entry c.
template <class Op>
void join_lanes(const LaneLayout& layout, int64_t k, double* sums) {
  if (layout.channels_last) {
    for (int64_t lane = layout.channels; lane < layout.lanes(); ++lane)
      sums[lane % layout.channels] = Op::join(k, sums[lane % layout.channels], sums[lane]);
    return;
  }
  const Vec<double> none = broadcast(static_cast<double>(Op::identity(k)));
  for (int64_t c = 0; c < layout.channels; ++c) {
    Vec<double> total = none;
    for_each_vector<double>(layout.positions, [&](int64_t i, auto width) {
      total = Op::join(k, total, load<double>(sums + c * layout.positions + i, width, none));
    });
    sums[c] = horizontal_reduce<Op>(k, total);
  }
}

// Sums positions [m, end) of the unit's channels into the segment, kRowsPerStep<Op> rows of lanes at a time.
template <class Op>
void accumulate_unit_lanes(const Op& op, const ChannelView& view, const LaneLayout& layout,
                           Segment<Op, kMaxLanes>& segment, int64_t m, int64_t end) {
  const int64_t stride = view.channels * layout.positions;
  begin_lanes(layout, segment);
  int64_t offset = offset_of(view, segment.unit.c0, m);
  int64_t left = (end - m) / layout.positions;
  for (int64_t rows; left > 0; left -= rows, offset += rows * stride) {
    rows = minimum(kRowsPerStep<Op>, left);
    accumulate_lanes(op, layout.channels_last, {offset, rows, stride, 0}, layout.lanes(), segment);
  }
  const int64_t rest = (end - m) % layout.positions;  // only channels last
  if (rest > 0) accumulate_lanes(op, layout.channels_last, {offset, 1, stride, 0}, rest * layout.channels, segment);
  for (int64_t k = 0; k < Op::kCoefficients; ++k) layout.compact_to_channels(segment.table + k * kMaxLanes);
  for (int64_t k = 0; k < Op::kSums; ++k) join_lanes<Op>(layout, k, segment.sums + k * kMaxLanes);
}

// The largest power of two up to n.
NF_FN int64_t power_of_two(int64_t n) {
  int64_t power = 1;
  while (2 * power <= n) power *= 2;
  return power;
}

template <class Op>
void reduce_lanes(const Op& op, const ChannelView& view, const Unit& unit, const LaneLayout& layout,
                  const ResultTable& results) {
  Segment<Op, kMaxLanes> segment(op, unit, results);
  segment.begin(offset_of(view, unit.c0, unit.m0), view.inner);
  const bool is_short = layout.channels_last && unit.m1 - unit.m0 <= kShortLaneSample * kSamplesPerSegment;
  const int64_t least = is_short ? kShortLaneSample : kLaneSample;
  const int64_t sample = (least + layout.positions - 1) / layout.positions * layout.positions;
  const int64_t length = kSamplesPerSegment * sample;
  const auto accumulate = [&](int64_t m, int64_t end) { accumulate_unit_lanes(op, view, layout, segment, m, end); };
  if (layout.channels_last || layout.positions < kLaneSample)
    reduce_segments(segment, sample, length, accumulate, accumulate);
  else  // to fill and to join the lanes for one row takes longer
    reduce_segments(segment, power_of_two(layout.positions), length, accumulate,
                    [&](int64_t m, int64_t end) { accumulate_first_values(op, view, segment, end - m); });
}

// ---- the tensor --------------------------------------------------------------------------------------------------

// Reduces one unit to its results.
template <class Op>
void reduce(const Op& op, const ChannelView& view, const Unit& unit, const ResultTable& results) {
  const bool in_lanes = walk_as_lanes<typename Op::V>(
      view, unit, kShortRowBytes / (Op::kReads * Op::V::kItemBytes),
      [&](const Unit& part, const LaneLayout& layout) { reduce_lanes(op, view, part, layout, results); });
  if (!in_lanes) reduce_channels_first(op, view, unit, results);
}

// Merges the results of all splits of channels [c0, c1), in order, into those of split 0. The results of split s are
// the entries from (s * kSums, 0) on.
template <class Op>
void merge_splits(const Op& op, const ChannelView& view, const Plan& plan, const ResultTable& results, int64_t c0,
                  int64_t c1) {
  for_each_vector<double>(c1 - c0, [&](int64_t i, auto width) {
    ChannelResults<Op> total;
    total.load_from(&results(0, c0 + i), results.channels, width);
    for (int64_t split = 1; split < plan.position_units; ++split) {
      ChannelResults<Op> other;
      other.load_from(&results(split * Op::kSums, c0 + i), results.channels, width);
      const int64_t done = split * plan.position_block;
      total = op.merge(done, total, minimum(plan.position_block, view.positions() - done), other);
    }
    total.store_to(&results(0, c0 + i), results.channels, width);
  });
}

// Reduces a tensor to `results`, calls finalize(c0, c1) for ranges that cover all channels once, and then apply(unit)
// for all units. With one split, a unit goes through all three while it is in cache.
template <class Op, class Finalize, class Apply>
void reduce_finalize_apply(const Op& op, const ChannelView& view, const Plan& plan, const Parallel& parallel,
                           const ResultTable& results, const Finalize& finalize, const Apply& apply) {
  static_assert(check_reduce_op<Op>());
  const auto reduce_unit = [&](const Unit& unit) {
    reduce(op, view, unit, {&results(unit.m0 / plan.position_block * Op::kSums, 0), view.channels});
  };
  if (plan.position_units == 1) {
    parallel(plan.units(), grain(plan), [&](int64_t index) {
      const Unit unit = unit_of(plan, view, index);
      reduce_unit(unit);
      finalize(unit.c0, unit.c1);
      apply(unit);
    });
    return;
  }
  parallel(plan.units(), grain(plan), [&](int64_t index) { reduce_unit(unit_of(plan, view, index)); });
  parallel((view.channels + kChannelsPerMergeTask - 1) / kChannelsPerMergeTask, 1, [&](int64_t task) {
    const int64_t c0 = task * kChannelsPerMergeTask, c1 = minimum(c0 + kChannelsPerMergeTask, view.channels);
    merge_splits(op, view, plan, results, c0, c1);
    finalize(c0, c1);
  });
  parallel.backwards(plan.units() * plan.apply_blocks(), grain(plan), [&](int64_t index) {
    const Unit task = apply_task_of(plan, view, index);
    if (task.m0 < task.m1) apply(task);
  });
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
