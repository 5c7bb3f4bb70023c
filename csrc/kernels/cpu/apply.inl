// Walks a unit of the tensor and writes values for each. What is written is the Op's business; an Op has
//   V, T, kCoefficients, output           block it takes at once, type of the output, per-channel constants, where it
//                                         begins
//   outputs_share_alignment()           whether all outputs begin at the same place of a cache line
//   operator()(offset, width, coefficients, store)  puts the values at an offset
// Channels first, positions are walked backwards: what the reduction before read last is still in cache. Channels last
// they are not: rows that follow each other in memory are what hardware prefetchers follow, and against them eval of
// (32, 512, 28, 28) in bfloat16 took twice as long.

// Writes one of an Op's outputs.
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

// `rows` rows of n values each, which follow each other in memory: a channel each, whose constants are in the table's
// columns. They are taken as one run of blocks, so that all but the first and the last store are whole and aligned,
// however short the rows are: one of 7 x 7 float32 would end in a store of four bytes.
template <bool kNonTemporal, class Op>
NF_FN void apply_run(const Op& op, int64_t offset, int64_t rows, int64_t n, const typename Op::V::S* table,
                     int64_t table_stride) {
  using V = typename Op::V;
  constexpr int64_t kSize = V::kSize;
  constexpr int64_t kItemBytes = V::kItemBytes;
  typename Op::T* const output = op.output + offset;
  Coefficients<Op> row;
  const auto next_row = [&]() __attribute__((always_inline)) {
    unroll<Op::kCoefficients>([&](auto k) { row.k[k] = V::filled(table[k * table_stride]); });
    ++table;
  };
  int64_t end = n;  // of the row that `row` is of
  next_row();
  const auto block = [&](int64_t i, int64_t lanes, auto width) __attribute__((always_inline)) {
    Coefficients<Op> mixed = row;
    for (; end < i + lanes; end += n) {
      next_row();
      unroll<Op::kCoefficients>([&](auto k) { mixed.k[k] = select_first_n(mixed.k[k], row.k[k], end - i); });
    }
    op(offset + i, width, mixed, Store<kNonTemporal>{});
  };

  const int64_t total = rows * n;
  int64_t i = minimum(total, bytes_to_alignment(output, kSize * kItemBytes) / kItemBytes);
  if (i > 0) block(0, i, Tail{i});
  for (; i + kSize <= total; i += kSize) block(i, kSize, FullVector{});
  if (i < total) block(i, total - i, Tail{total - i});
}

// Called, as apply_lanes is: inlined side by side, 7 x 7 float32 took 1.05 times as long.
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

// `lanes` values of each of a few rows that lie `stride` apart, with coefficients loaded once for all of them, and for
// the last block whole: what a table holds may be read up to a block past its end.
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
  alignas(64) S spread[Op::kCoefficients * kMaxLanes];
  if (layout.positions > 1) {
    for (int64_t k = 0; k < Op::kCoefficients; ++k) {
      std::copy_n(table + k * table_stride, layout.channels, spread + k * kMaxLanes);
      layout.broadcast_to_lanes(spread + k * kMaxLanes);
    }
    table = spread;
    table_stride = kMaxLanes;
  }
  const int64_t stride = view.channels * layout.positions;
  int64_t offset = offset_of(view, unit.c0, unit.m0);
  int64_t left = (unit.m1 - unit.m0) / layout.positions;
  for (; left >= kRows; left -= kRows, offset += kRows * stride)
    apply_rows<kNonTemporal, kRows>(op, offset, stride, layout.lanes(), table, table_stride);
  for (; left > 0; --left, offset += stride)
    apply_rows<kNonTemporal, 1>(op, offset, stride, layout.lanes(), table, table_stride);
  const int64_t rest = (unit.m1 - unit.m0) % layout.positions;  // channels last
  if (rest > 0) apply_rows<kNonTemporal, 1>(op, offset, stride, rest * layout.channels, table, table_stride);
}

// Rows of up to so many values are applied in lanes. Of longer ones two or three have a part in a block, and its mixed
// constants cost less than lanes whose stores are not aligned.
template <class V>
inline constexpr int64_t kShortRow = V::kSize / 2;

// Whether to stream outputs larger than that part of the last-level cache. Rows of lanes are streamed only where each
// of them is aligned; short rows channels first are not.
template <class Op>
bool use_nontemporal_stores(const Op& op, const ChannelView& view, const Plan& plan, int64_t cache_part) {
  using V = typename Op::V;
  if (kVectorBytes == 16 || view.numel() * V::kItemBytes < nontemporal_threshold(cache_part) ||
      !op.outputs_share_alignment())
    return false;
  if (view.inner > 1) return view.inner > kShortRow<V>;
  const int64_t row = view.channels * positions_per_row<typename V::S>(view.channels);
  return row * V::kItemBytes % kVectorBytes == 0 &&
         plan.position_block * view.channels * V::kItemBytes % kVectorBytes == 0 &&
         bytes_to_alignment(op.output, kVectorBytes) == 0;
}

template <bool kNonTemporal, class Op>
void apply_as(const Op& op, const ChannelView& view, const Unit& unit, const typename Op::V::S* table) {
  using V = typename Op::V;
  const bool in_lanes = walk_as_lanes<V>(view, unit, kShortRow<V>, [&](const Unit& part, const LaneLayout& layout) {
    apply_lanes<kNonTemporal>(op, view, part, layout, table);
  });
  if (!in_lanes) apply_channels_first<kNonTemporal>(op, view, unit, table);
}

template <class Op>
void apply(const Op& op, const ChannelView& view, const Unit& unit, const typename Op::V::S* table, bool nontemporal) {
  if (!nontemporal) return apply_as<false>(op, view, unit, table);
  apply_as<true>(op, view, unit, table);
  nontemporal_fence();
}
