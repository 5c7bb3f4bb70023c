// The pass over a block of rows in which constants and sums belong to rows and to columns.
//
// Layer norm has two kinds of each: those of a statistic, over which values are averaged, and those of a parameter. In
// memory a statistic is either a row or a column, and a parameter is the other. An op does not know which.
//
// A sweep op defines what is computed:
//   V                              the Pack it computes
//   kStatistic, kParameter         numbers of constants of a statistic and of a parameter
//   kStatisticSums, kParameterSums numbers of sums over the values of a statistic, and over those of a parameter
//   operator()(offset, width, statistic, parameter, statistic_sums, parameter_sums, store)
//                                  computes the values at `offset`, adds to the sums and passes outputs to `store`
//   prefetch(offset)               prefetches what is read next; `offset` is kSweepRows rows ahead
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/apply.inl"

namespace normfused::cpu::NF_ISA {
namespace {

// Number of rows that are processed together: the constants of a column are loaded once for them, and the constants and
// sums of the rows are in registers.
template <class Op, bool kStatisticIsRow>
inline constexpr int64_t kSweepRows =
    (kStatisticIsRow ? Op::kStatistic + Op::kStatisticSums : Op::kParameter + Op::kParameterSums) > 4 ? 2 : 4;
// Number of values that are added in S, in each lane of each sum, before they are added in double.
inline constexpr int64_t kMaxSweepRows = kAdditionsPerFold;
template <class V>
inline constexpr int64_t kMaxSweepColumns = kAdditionsPerFold * V::kSize;

// `rows` rows of `columns` values, `stride` apart.
struct Block {
  int64_t offset, rows, columns, stride;
};

// Constants of rows or columns: entry (k, i) is constant k of row or column i. For columns, entries up to a pack past
// the last one are read; they must be finite.
template <class S>
struct Entries {
  S* data;
  int64_t stride;

  S& operator()(int64_t k, int64_t i) const { return data[k * stride + i]; }
  Entries from(int64_t i) const { return {data + i, stride}; }
};

template <class Op>
struct SweepOperands {
  using S = typename Op::V::S;

  Entries<S> statistic, parameter;
  Entries<double> row_sums{};  // added to
  // Added to, in pack order, up to a full pack past the last column.
  Entries<S> column_sums{};
};

// The addition of packs, as an op of the engine's reductions.
template <class V_>
struct Addition {
  using V = V_;

  template <class W>
  static NF_INLINE W join(int64_t, W a, W b) {
    return a + b;
  }
};

// The sum of a pack's values, in a few lanes.
template <class V>
NF_FN Vec<double> sum_of_vectors(const V& pack) {
  Vec<typename V::S> sum = pack.vec[0];
  unroll<V::kVecs - 1>([&](auto i) { sum = sum + pack.vec[i + 1]; });
  const auto wide = widen_to_double(sum);
  Vec<double> total = wide.vec[0];
  unroll<wide.kVecs - 1>([&](auto i) { total = total + wide.vec[i + 1]; });
  return total;
}

// Rows of lanes, one after the other: a vector has one or more.
template <int64_t n>
struct LaneRowVectors {
  Vec<double> vec[n];
};

// Adds the second half of each row of kLength lanes to the first half. The rows of b follow those of a.
template <int64_t kLength>
NF_FN Vec<double> add_halves(Vec<double> a, Vec<double> b) {
  constexpr int64_t kHalf = kLength / 2;
  const Vec<int64_t> lane = lane_index<double>(), first = lane / kHalf * kLength + lane % kHalf;
  return shuffle(a, b, first) + shuffle(a, b, first + kHalf);
}

// The sums of rows of kLength lanes. The order of the additions in a row is the same for any number of rows.
template <int64_t kLength = kLanes<double>, int64_t n>
NF_FN auto sums_of_rows(const LaneRowVectors<n>& rows) {
  if constexpr (kLength == 1) {
    return rows;
  } else {
    LaneRowVectors<(n + 1) / 2> halved;
    unroll<(n + 1) / 2>(
        [&](auto i) { halved.vec[i] = add_halves<kLength>(rows.vec[2 * i], rows.vec[minimum(2 * i + 1, n - 1)]); });
    return sums_of_rows<kLength / 2>(halved);
  }
}

// Adds the sum of each pack's values to one of kRows neighbouring entries.
template <class V, int64_t kRows, class PackOf>
NF_FN void add_row_sums(double* entries, const PackOf& pack_of) {
  LaneRowVectors<kRows> rows;
  unroll<kRows>([&](auto r) { rows.vec[r] = sum_of_vectors<V>(pack_of(r)); });
  const auto sums = sums_of_rows(rows);
  constexpr int64_t kLast = kRows % kLanes<double>;
  unroll<sizeof(sums) / kVectorBytes>([&](auto i) {
    double* const entry = entries + i * kLanes<double>;
    if constexpr (kLast == 0)
      store(entry, load<double>(entry, FullVector{}) + sums.vec[i], FullVector{});
    else
      store(entry, load<double>(entry, Tail{kLast}) + sums.vec[i], Tail{kLast});
  });
}

// Values of S in pack order.
template <class V>
NF_FN V load_vectors(const typename V::S* p) {
  return V::generate([&](int64_t i) { return load<typename V::S>(p + i * kLanes<typename V::S>, FullVector{}); });
}
template <class V>
NF_FN void store_vectors(typename V::S* p, const V& pack) {
  unroll<V::kVecs>([&](auto i) { store(p + i * kLanes<typename V::S>, pack.vec[i], FullVector{}); });
}

// The constants or the sums of a row or column, one pack each.
template <class V, int64_t n>
struct Packs {
  V k[n > 0 ? n : 1];
};

template <bool kStatisticIsRow, bool kNonTemporal, int64_t kRows, class Op>
NF_FN void sweep_rows(const Op& op, const Block& block, int64_t first, const SweepOperands<Op>& operands) {
  using V = typename Op::V;
  constexpr int64_t kRowCoefficients = kStatisticIsRow ? Op::kStatistic : Op::kParameter;
  constexpr int64_t kColumnCoefficients = kStatisticIsRow ? Op::kParameter : Op::kStatistic;
  constexpr int64_t kRowSums = kStatisticIsRow ? Op::kStatisticSums : Op::kParameterSums;
  constexpr int64_t kColumnSums = kStatisticIsRow ? Op::kParameterSums : Op::kStatisticSums;
  const auto& of_rows = kStatisticIsRow ? operands.statistic : operands.parameter;
  const auto& of_columns = kStatisticIsRow ? operands.parameter : operands.statistic;
  const Store<kNonTemporal> store;
  Packs<V, kRowCoefficients> rows[kRows];
  Packs<V, kRowSums> row_sums[kRows];
  unroll<kRows>([&](auto r) {
    unroll<kRowCoefficients>([&](auto k) { rows[r].k[k] = V::filled(of_rows(k, first + r)); });
    unroll<kRowSums>([&](auto k) { row_sums[r].k[k] = V::filled(0); });
  });
  for_each_pack<V>(block.columns, [&](int64_t i, auto width) {
    Packs<V, kColumnCoefficients> column;
    Packs<V, kColumnSums> column_sums;
    unroll<kColumnCoefficients>([&](auto k) { column.k[k] = load_in_pack_order<V>(&of_columns(k, i)); });
    unroll<kColumnSums>([&](auto k) { column_sums.k[k] = load_vectors<V>(&operands.column_sums(k, i)); });
    unroll<kRows>([&](auto r) {
      const int64_t offset = block.offset + (first + r) * block.stride + i;
      op.prefetch(offset + kSweepRows<Op, kStatisticIsRow> * block.stride);
      if constexpr (kStatisticIsRow)
        op(offset, width, rows[r].k, column.k, row_sums[r].k, column_sums.k, store);
      else
        op(offset, width, column.k, rows[r].k, column_sums.k, row_sums[r].k, store);
    });
    unroll<kColumnSums>([&](auto k) { store_vectors(&operands.column_sums(k, i), column_sums.k[k]); });
  });
  unroll<kRowSums>([&](auto k) {
    add_row_sums<V, kRows>(&operands.row_sums(k, first), [&](auto r) -> const V& { return row_sums[r].k[k]; });
  });
}

// Applies the op to a block. Sums of rows are exact to S for up to kMaxSweepColumns columns, sums of columns for up to
// kMaxSweepRows rows.
template <bool kStatisticIsRow, bool kNonTemporal, class Op>
NF_NOINLINE void sweep(const Op& op, const Block& block, const SweepOperands<Op>& operands) {
  constexpr int64_t kRows = kSweepRows<Op, kStatisticIsRow>;
  int64_t row = 0;
  for (; row + kRows <= block.rows; row += kRows)
    sweep_rows<kStatisticIsRow, kNonTemporal, kRows>(op, block, row, operands);
  for (; row < block.rows; ++row) sweep_rows<kStatisticIsRow, kNonTemporal, 1>(op, block, row, operands);
}

// Adds sums of columns in S, in pack order, to those in double, and clears them.
template <class V>
void fold_column_sums(const Entries<typename V::S>& sums, const Entries<double>& totals, int64_t k, int64_t columns) {
  using S = typename V::S;
  for (int64_t i = 0; i < columns; i += V::kSize) {
    join_to_doubles<Addition<V>>(k, &totals(k, i), load_vectors<V>(&sums(k, i)));
    store_vectors(&sums(k, i), V::filled(S(0)));
  }
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
