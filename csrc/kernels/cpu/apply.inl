// The elementwise pass over a unit. An apply op defines what is written:
//   V, T, kCoefficients       the Pack it computes, the dtype of its output, the number of per-channel constants
//   output                    pointer to the first element of its (main) output
//   outputs_share_alignment() whether all of its outputs have the same alignment relative to a cache line
//   operator()(offset, width, coefficients, store)  computes the values at `offset` and passes each output to `store`
//
// Channels first, positions are processed in descending order: the values that the reduction read last are still in
// cache. Channels last, the order is ascending, because hardware prefetchers follow ascending rows: in descending
// order, inference of (32, 512, 28, 28) in bfloat16 took twice as long.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/reduce.inl"

namespace normfused::cpu::NF_ISA {
namespace {

// Stores one output of an op. Tails are always stored through the caches.
template <bool kNonTemporal>
struct Store {
  template <class T, class V, class Width>
  NF_INLINE void operator()(T* output, const V& values, Width width) const {
    if constexpr (kNonTemporal && std::is_same_v<Width, FullVector>)
      store_pack_nontemporal(output, values);
    else
      store_pack(output, values, width);
  }
};

NF_REQUIREMENT(has_output_type, std::declval<typename Op::T>());
NF_REQUIREMENT(has_output, std::declval<const Op&>().output);
NF_REQUIREMENT(has_alignment, std::declval<const Op&>().outputs_share_alignment());
NF_REQUIREMENT(is_applicable, std::declval<const Op&>()(int64_t{}, FullVector{},
                                                        std::declval<const Coefficients<Op>&>(), Store<false>{}));

template <class Op>
constexpr bool check_apply_op() {
  static_assert(has_pack<Op>, "An apply op must define `V`, the Pack<S, T> that it computes.");
  static_assert(has_output_type<Op>, "An apply op must define `T`, the dtype of its output.");
  static_assert(has_coefficients<Op>, "An apply op must define `kCoefficients`.");
  static_assert(has_output<Op>, "An apply op must have a member `T* output`.");
  static_assert(has_alignment<Op>, "An apply op must define `bool outputs_share_alignment()`.");
  static_assert(is_applicable<Op>,
                "An apply op must define `void operator()(int64_t offset, Width, const Coefficients<Op>&, store)`.");
  return true;
}

// Applies the op to `rows` contiguous rows of n values each, one channel per row. The channels' constants are the
// columns of `table`.
//
// The rows are processed as one run of packs that may cross row boundaries. So only the first and the last store of the
// run are tails, and all others are aligned, even if rows are short. If rows were processed separately, each row of 7 x
// 7 float32 would end in a store of four bytes.
template <bool kNonTemporal, class Op>
NF_FN void apply_run(const Op& op, int64_t offset, int64_t rows, int64_t n, const typename Op::V::S* table,
                     int64_t table_stride) {
  using V = typename Op::V;
  constexpr int64_t kSize = V::kSize;
  constexpr int64_t kItemBytes = V::kItemBytes;
  typename Op::T* const output = op.output + offset;
  Coefficients<Op> current;  // of the row that ends at `end`
  const auto next_row = [&]() __attribute__((always_inline)) {
    unroll<Op::kCoefficients>([&](auto k) { current.k[k] = V::filled(table[k * table_stride]); });
    ++table;
  };
  int64_t end = n;
  next_row();
  const auto apply_pack = [&](int64_t i, int64_t size, auto width) __attribute__((always_inline)) {
    Coefficients<Op> mixed = current;
    for (; end < i + size; end += n) {
      next_row();
      unroll<Op::kCoefficients>([&](auto k) { mixed.k[k] = select_first_n(mixed.k[k], current.k[k], end - i); });
    }
    op(offset + i, width, mixed, Store<kNonTemporal>{});
  };

  const int64_t total = rows * n;
  int64_t i = minimum(total, bytes_to_alignment(output, kSize * kItemBytes) / kItemBytes);
  if (i > 0) apply_pack(0, i, Tail{i});
  for (; i + kSize <= total; i += kSize) apply_pack(i, kSize, FullVector{});
  if (i < total) apply_pack(i, total - i, Tail{total - i});
}

// Not inlined, like apply_lanes: with both inlined in one function, 7 x 7 float32 took 1.05 times as long.
template <bool kNonTemporal, class Op>
NF_NOINLINE void apply_channels_first(const Op& op, const ChannelView& view, const Unit& unit,
                                      const typename Op::V::S* table) {
  int64_t start;
  for (int64_t m = unit.m1; m > unit.m0; m = start) {
    start = maximum(unit.m0, (m - 1) / view.inner * view.inner);
    const int64_t n = m - start;
    const int64_t rows = n == view.inner ? unit.c1 - unit.c0 : 1;
    for (int64_t c = unit.c0; c < unit.c1; c += rows)
      apply_run<kNonTemporal>(op, offset_of(view, c, start), rows, n, table + c, view.channels);
  }
}

// Applies the op to the first `lanes` lanes of `rows` rows that are `stride` apart. The coefficients of a pack are
// loaded once for all rows, as a full pack: the table must be readable up to a pack past its end.
template <bool kNonTemporal, int64_t rows, class Op>
NF_FN void apply_rows(const Op& op, int64_t offset, int64_t stride, int64_t lanes, const typename Op::V::S* table,
                      int64_t table_stride) {
  using V = typename Op::V;
  for_each_pack<V>(lanes, [&](int64_t i, auto width) {
    Coefficients<Op> coefficients;
    unroll<Op::kCoefficients>([&](auto k) { coefficients.k[k] = load_in_pack_order<V>(table + k * table_stride + i); });
    for (int64_t row = 0; row < rows; ++row) op(offset + row * stride + i, width, coefficients, Store<kNonTemporal>{});
  });
}

template <bool kNonTemporal, class Op>
NF_NOINLINE void apply_lanes(const Op& op, const ChannelView& view, const Unit& unit, const LaneLayout& layout,
                             const typename Op::V::S* table) {
  using S = typename Op::V::S;
  constexpr int64_t kRows = 4;
  int64_t table_stride = view.channels;
  table += unit.c0;
  alignas(64) S lane_table[Op::kCoefficients * kMaxLanes];
  if (layout.positions > 1) {
    for (int64_t k = 0; k < Op::kCoefficients; ++k) {
      std::copy_n(table + k * table_stride, layout.channels, lane_table + k * kMaxLanes);
      layout.broadcast_to_lanes(lane_table + k * kMaxLanes);
    }
    table = lane_table;
    table_stride = kMaxLanes;
  }
  const int64_t stride = view.channels * layout.positions;
  int64_t offset = offset_of(view, unit.c0, unit.m0);
  int64_t left = (unit.m1 - unit.m0) / layout.positions;
  for (; left >= kRows; left -= kRows, offset += kRows * stride)
    apply_rows<kNonTemporal, kRows>(op, offset, stride, layout.lanes(), table, table_stride);
  for (; left > 0; --left, offset += stride)
    apply_rows<kNonTemporal, 1>(op, offset, stride, layout.lanes(), table, table_stride);
  const int64_t rest = (unit.m1 - unit.m0) % layout.positions;  // only channels last
  if (rest > 0) apply_rows<kNonTemporal, 1>(op, offset, stride, rest * layout.channels, table, table_stride);
}

// Rows of up to this many values are applied in lanes. A pack contains values of at most three longer rows; selecting
// their constants costs less than the unaligned stores of lanes. Packs of 16-bit values are twice as long: there lanes
// take 0.8 to 0.95 times as long up to four packs. Non-temporal stores need the alignment.
template <class V, bool kNonTemporal>
inline constexpr int64_t kShortRow = V::kItemBytes == 2 && !kNonTemporal ? 4 * V::kSize : V::kSize / 2;

// Whether to use non-temporal stores: for outputs larger than 1/cache_part of the last-level cache whose stores are
// aligned. In a lane layout, each row must be aligned; short rows of channels first never are.
template <class Op>
bool use_nontemporal_stores(const Op& op, const ChannelView& view, const Plan& plan, int64_t cache_part) {
  using V = typename Op::V;
  if (kVectorBytes == 16 || view.numel() * V::kItemBytes < nontemporal_threshold(cache_part) ||
      !op.outputs_share_alignment())
    return false;
  if (view.inner > 1) return view.inner > kShortRow<V, true>;
  const int64_t row = view.channels * positions_per_row<typename V::S>(view.channels);
  return row * V::kItemBytes % kVectorBytes == 0 &&
         plan.position_block * view.channels * V::kItemBytes % kVectorBytes == 0 &&
         bytes_to_alignment(op.output, kVectorBytes) == 0;
}

template <bool kNonTemporal, class Op>
void apply_as(const Op& op, const ChannelView& view, const Unit& unit, const typename Op::V::S* table) {
  using V = typename Op::V;
  constexpr int64_t kLongest = kShortRow<V, kNonTemporal>;
  const bool in_lanes = walk_as_lanes<V>(view, unit, kLongest, [&](const Unit& part, const LaneLayout& layout) {
    apply_lanes<kNonTemporal>(op, view, part, layout, table);
  });
  if (!in_lanes) apply_channels_first<kNonTemporal>(op, view, unit, table);
}

// Applies the op to one unit. `table` holds the coefficients of all channels as a (kCoefficients, channels) array.
template <class Op>
void apply(const Op& op, const ChannelView& view, const Unit& unit, const typename Op::V::S* table, bool nontemporal) {
  static_assert(check_apply_op<Op>());
  if (nontemporal)
    apply_as<true>(op, view, unit, table);
  else
    apply_as<false>(op, view, unit, table);
}

// Applies the op to the whole tensor, without a reduction before.
template <class Op>
void apply_to_tensor(const Op& op, const ChannelView& view, const Parallel& parallel, const typename Op::V::S* table,
                     int64_t cache_part) {
  const Plan plan = plan_elementwise(view, sizeof(typename Op::T), 2);
  const bool nontemporal = use_nontemporal_stores(op, view, plan, cache_part);
  parallel(plan.units(), grain(plan),
           [&](int64_t index) { apply(op, view, unit_of(plan, view, index), table, nontemporal); });
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
