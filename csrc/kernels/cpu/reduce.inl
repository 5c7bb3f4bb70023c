// Walks a unit of the tensor and reduces it per channel. What is reduced is the Op's business; an Op has
//   V, kSums            block it takes in at once, V::S the type of its arithmetic, and number of accumulators
//   empty(k)            what accumulator k starts from
//   join(k, a, b)       two partial accumulators made one
//   kCoefficients       number of per-channel constants; the first is the pivot
//   coefficient(k, c, offset)                    constant k of channel c, whose first value lies at the offset
//   accumulate(sums, offset, width, coefficients)  takes in the values at an offset of the tensor
//   results_of(pivot, count, sums)               what a segment's sums come to
//   merge(n, a, m, b)                            results of n values and of m values made one
//   kEstimatesPivot, next_pivot(pivot, results)      whether a sample over the first values finds a better pivot; the
//   next
// Tiles accumulate in S about a pivot, results are double: single precision never has to hold more than a segment.

// Values behind a pivot sought by sample. An outlier among them costs precision in proportion to segment length over
// their number.
inline constexpr int64_t kPivotSample = 64;
// Channels first: additions of S in a row before they are folded into double, in every lane of every accumulator.
inline constexpr int64_t kAdditionsPerFold = 64;
// Vectors of accumulators that a row is spread over, where it is long enough: covers the latency of an addition on two
// ports. As many neighbouring vectors are taken along together down channels-last rows.
inline constexpr int64_t kAccumulatorVectors = 4;
template <class V>
inline constexpr int64_t kAccumulatorPacks = kAccumulatorVectors / V::kVecs;
// Lane by lane: S holds no more than the rows that advance together, which are as many sequential streams as hardware
// prefetchers follow. A segment is so many times as long as the sample for its pivot.
inline constexpr int64_t kRowsPerStep = 16;
inline constexpr int64_t kSamplesPerSegment = 64;
// Rows of up to so many are reduced in lanes: for 7 x 7 float32, 196 bytes, moments took as long either way, for 5 x 5
// half the time and for 2 x 2 a tenth.
inline constexpr int64_t kShortRowBytes = 100;
// Channels that one task merges after a split reduction.
inline constexpr int64_t kChannelsPerMergeTask = 256;

// Constants of the channels that a block's values belong to.
template <class Op>
struct Coefficients {
  typename Op::V k[Op::kCoefficients];
};

// kSums doubles per channel, as rows of C.
struct ResultTable {
  double* data;
  int64_t channels;

  double& operator()(int64_t k, int64_t c) const { return data[k * channels + c]; }
};

// Accumulators in registers.
template <class Op>
struct Sums {
  using V = typename Op::V;

  V k[Op::kSums];

  NF_INLINE void clear() {
    unroll<Op::kSums>([&](auto i) { k[i] = V::filled(Op::empty(i)); });
  }
  NF_INLINE void join(const Sums& other) {
    unroll<Op::kSums>(
        [&](auto i) { k[i] = V::generate([&](auto v) { return Op::join(i, k[i].vec[v], other.k[i].vec[v]); }); });
  }
};

// Accumulators of one channel between its rows: a vector each, because those of all of a unit's channels share L1 with
// the values.
template <class Op>
struct ChannelSums {
  using S = typename Op::V::S;

  Vec<S> k[Op::kSums];

  NF_INLINE void clear() {
    unroll<Op::kSums>([&](auto i) { k[i] = broadcast<S>(Op::empty(i)); });
  }
  NF_INLINE void join(const Sums<Op>& row) {
    unroll<Op::kSums>(
        [&](auto i) { unroll<Op::V::kVecs>([&](auto v) { k[i] = Op::join(i, k[i], row.k[i].vec[v]); }); });
  }
};

// What an Op has come to for a vector of channels.
template <class Op>
struct ChannelResults {
  Vec<double> k[Op::kSums];

  template <class Width>
  NF_INLINE void load_rows(const double* rows, int64_t stride, Width width) {
    unroll<Op::kSums>([&](auto i) { k[i] = load<double>(rows + i * stride, width); });
  }
  template <class Width>
  NF_INLINE void store_rows(double* rows, int64_t stride, Width width) const {
    unroll<Op::kSums>([&](auto i) { store(rows + i * stride, k[i], width); });
  }
};

// Joins the lanes of accumulator k.
template <class Op, class V>
NF_FN double horizontal_reduce(int64_t k, V v) {
  if constexpr (sizeof(V) == 2 * sizeof(double)) {
    return Op::join(k, v[0], v[1]);
  } else {
    using Half = typename VecOf<double, sizeof(V) / 2>::type;
    const char* const lanes = reinterpret_cast<const char*>(&v);
    return horizontal_reduce<Op>(k,
                                 Op::join(k, load_unaligned<Half>(lanes), load_unaligned<Half>(lanes + sizeof(Half))));
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

template <class V>
inline constexpr int64_t kLongRow = 2 * kAccumulatorPacks<V> * V::kSize;

template <class Op>
NF_FN void accumulate_row(const Op& op, ChannelSums<Op>& sums, int64_t offset, int64_t n,
                          const Coefficients<Op>& coefficients) {
  using V = typename Op::V;
  int64_t done = 0;
  Sums<Op> row;  // cleared only where it begins empty: held through the loop, sums in double took 1.3 times as long
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

// The state of a unit between tiles: coefficients and a segment's sums for each of its channels, as rows of kChannels.
template <class Op, int64_t kChannels>
struct Segment {
  using V = typename Op::V;
  using S = typename V::S;

  const Op& op;
  const Unit& unit;
  const ResultTable& results;
  alignas(64) S table[Op::kCoefficients * kChannels];  // the first row: pivots
  alignas(64) double sums[Op::kSums * kChannels];

  // Leaves the arrays as they are: clearing them would take longer than many a unit.
  Segment(const Op& op, const Unit& unit, const ResultTable& results) : op(op), unit(unit), results(results) {}

  // `offset` is that of the unit's first value, and those of its channels lie `stride` apart.
  void begin(int64_t offset, int64_t stride) {
    for (int64_t k = 0; k < Op::kCoefficients; ++k)
      for (int64_t c = 0; c < unit.c1 - unit.c0; ++c)
        table[k * kChannels + c] = op.coefficient(k, unit.c0 + c, offset + c * stride);
  }

  // Takes the sums of a sample over the unit's first values for better pivots.
  void estimate_pivots(int64_t count) {
    for_each_vector<double>(unit.c1 - unit.c0, [&](int64_t i, auto width) {
      ChannelResults<Op> segment;
      segment.load_rows(sums + i, kChannels, width);
      const Vec<double> pivot = load<double>(table + i, width);
      store_double_as(table + i, op.next_pivot(pivot, op.results_of(pivot, count, segment)), width);
    });
  }

  // Takes the sums into the results of the `done` positions before, and moves the pivots on.
  void fold(int64_t done, int64_t count) {
    for_each_vector<double>(unit.c1 - unit.c0, [&](int64_t i, auto width) {
      ChannelResults<Op> segment;
      segment.load_rows(sums + i, kChannels, width);
      const Vec<double> pivot = load<double>(table + i, width);
      ChannelResults<Op> total = op.results_of(pivot, count, segment);
      double* const rows = &results(0, unit.c0 + i);
      if (done > 0) {
        ChannelResults<Op> previous;
        previous.load_rows(rows, results.channels, width);
        total = op.merge(done, previous, count, total);
      }
      total.store_rows(rows, results.channels, width);
      store_double_as(table + i, op.next_pivot(pivot, total), width);
    });
  }
};

template <class Op>
void reduce_channels_first(const Op& op, const ChannelView& view, const Unit& unit, const ResultTable& results) {
  using V = typename Op::V;
  const int64_t channels = unit.c1 - unit.c0;
  Segment<Op, kMaxChannelsFirst> segment(op, unit, results);
  segment.begin(offset_of(view, unit.c0, unit.m0), view.inner);

  const auto accumulate = [&](int64_t m, int64_t end) {
    ChannelSums<Op> sums[kMaxChannelsFirst];
    for (int64_t c = 0; c < channels; ++c) sums[c].clear();
    for (int64_t n; m < end; m += n) {
      n = minimum(view.inner - m % view.inner, end - m);
      const int64_t offset = offset_of(view, unit.c0, m);
      for (int64_t c = 0; c < channels; ++c) {
        op.prefetch(offset + (view.channels + c) * view.inner, view.inner);
        Coefficients<Op> coefficients;
        unroll<Op::kCoefficients>(
            [&](auto k) { coefficients.k[k] = V::filled(segment.table[k * kMaxChannelsFirst + c]); });
        accumulate_row(op, sums[c], offset + c * view.inner, n, coefficients);
      }
    }
    for (int64_t c = 0; c < channels; ++c)
      unroll<Op::kSums>(
          [&](auto k) { segment.sums[k * kMaxChannelsFirst + c] = reduce_to_double<Op>(k, sums[c].k[k]); });
  };

  if constexpr (Op::kEstimatesPivot) {
    const int64_t sample = minimum(kPivotSample, unit.m1 - unit.m0);
    accumulate(unit.m0, unit.m0 + sample);
    segment.estimate_pivots(sample);
  }
  const int64_t full = kAdditionsPerFold * V::kSize * (view.inner >= kLongRow<V> ? kAccumulatorPacks<V> : 1);
  for (int64_t m = unit.m0; m < unit.m1; m += full) {
    const int64_t count = minimum(full, unit.m1 - m);
    accumulate(m, m + count);
    segment.fold(m - unit.m0, count);
  }
}

// A few blocks of neighbouring lanes over a few rows that lie `stride` apart: sums in registers meanwhile, then joined
// to the segment's, which are double. What lies `ahead` will be wanted soon.
template <int64_t blocks, class Op, class Width>
NF_FN void accumulate_rows(const Op& op, int64_t offset, int64_t stride, int64_t rows, int64_t ahead, Width width,
                           const typename Op::V::S* table, double* sums) {
  using V = typename Op::V;
  using S = typename V::S;
  Sums<Op> acc[blocks];
  Coefficients<Op> coefficients[blocks];
  unroll<blocks>([&](auto b) {
    unroll<Op::kCoefficients>(
        [&](auto k) { coefficients[b].k[k] = load_in_pack_order<V>(table + k * kMaxLanes + b * V::kSize); });
    acc[b].clear();
  });
  for (int64_t row = 0; row < rows; ++row) {
    op.prefetch(offset + row * stride + ahead, blocks * V::kSize);
    unroll<blocks>(
        [&](auto b) { op.accumulate(acc[b], offset + row * stride + b * V::kSize, width, coefficients[b]); });
  }
  unroll<blocks * Op::kSums>([&](auto i) {
    constexpr int64_t b = i / Op::kSums, k = i % Op::kSums;
    const V lanes = to_memory_order(acc[b].k[k]);
    unroll<V::kVecs>([&](auto v) {
      const DoubleVectors<S> wide = widen_to_double(lanes.vec[v]);
      unroll<DoubleVectors<S>::kVecs>([&](auto h) {
        double* const sum = sums + k * kMaxLanes + b * V::kSize + v * kLanes<S> + h * kLanes<double>;
        store(sum, Op::join(k, load<double>(sum, FullVector{}), wide.vec[h]), FullVector{});
      });
    });
  });
}

// Joins the lanes of each channel to one value in the first places: accumulator k.
template <class Op>
void join_lanes(const LaneLayout& layout, int64_t k, double* sums) {
  if (layout.channels_last) {
    for (int64_t lane = layout.channels; lane < layout.lanes(); ++lane)
      sums[lane % layout.channels] = Op::join(k, sums[lane % layout.channels], sums[lane]);
    return;
  }
  const Vec<double> none = broadcast(static_cast<double>(Op::empty(k)));
  for (int64_t c = 0; c < layout.channels; ++c) {
    Vec<double> total = none;
    for_each_vector<double>(layout.positions, [&](int64_t i, auto width) {
      total = Op::join(k, total, load<double>(sums + c * layout.positions + i, width, none));
    });
    sums[c] = horizontal_reduce<Op>(k, total);
  }
}

template <class Op>
void reduce_lanes(const Op& op, const ChannelView& view, const Unit& unit, const LaneLayout& layout,
                  const ResultTable& results) {
  using V = typename Op::V;
  using S = typename V::S;
  const int64_t lanes = layout.lanes();
  const int64_t stride = view.channels * layout.positions;
  const int64_t padded = (lanes + V::kSize - 1) / V::kSize * V::kSize;  // the last block may use all of its lanes
  Segment<Op, kMaxLanes> segment(op, unit, results);
  segment.begin(offset_of(view, unit.c0, unit.m0), view.inner);

  const auto accumulate_step = [&](int64_t offset, int64_t rows, int64_t n) {
    constexpr int64_t kStep = kAccumulatorPacks<V> * V::kSize;
    // Hardware follows channels-last rows, but is late for the first; short rows are too far apart for it.
    const int64_t ahead = layout.channels_last ? rows * stride : kStep;
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep)
      accumulate_rows<kAccumulatorPacks<V>>(op, offset + i, stride, rows, ahead, FullVector{}, segment.table + i,
                                            segment.sums + i);
    for_each_pack<V>(n - i, [&](int64_t j, auto width) {
      accumulate_rows<1>(op, offset + i + j, stride, rows, ahead, width, segment.table + i + j, segment.sums + i + j);
    });
  };
  const auto accumulate = [&](int64_t m, int64_t end) {
    for (int64_t k = 0; k < Op::kCoefficients; ++k) {
      S* const coefficients = segment.table + k * kMaxLanes;
      layout.broadcast_to_lanes(coefficients);
      for (int64_t lane = lanes; lane < padded; ++lane) coefficients[lane] = 0;
    }
    for (int64_t k = 0; k < Op::kSums; ++k)
      for (int64_t lane = 0; lane < padded; ++lane)
        segment.sums[k * kMaxLanes + lane] = static_cast<double>(Op::empty(k));
    int64_t offset = offset_of(view, unit.c0, m);
    int64_t left = (end - m) / layout.positions;
    for (int64_t rows; left > 0; left -= rows, offset += rows * stride) {
      rows = minimum(kRowsPerStep, left);
      accumulate_step(offset, rows, lanes);
    }
    const int64_t rest = (end - m) % layout.positions;  // channels last
    if (rest > 0) accumulate_step(offset, 1, rest * layout.channels);
    for (int64_t k = 0; k < Op::kCoefficients; ++k) layout.compact_to_channels(segment.table + k * kMaxLanes);
    for (int64_t k = 0; k < Op::kSums; ++k) join_lanes<Op>(layout, k, segment.sums + k * kMaxLanes);
  };

  const int64_t sample = (kRowsPerStep + layout.positions - 1) / layout.positions * layout.positions;
  if constexpr (Op::kEstimatesPivot) {
    const int64_t count = minimum(sample, unit.m1 - unit.m0);
    accumulate(unit.m0, unit.m0 + count);
    segment.estimate_pivots(count);
  }
  for (int64_t m = unit.m0; m < unit.m1; m += kSamplesPerSegment * sample) {
    const int64_t count = minimum(kSamplesPerSegment * sample, unit.m1 - m);
    accumulate(m, m + count);
    segment.fold(m - unit.m0, count);
  }
}

template <class Op>
void reduce(const Op& op, const ChannelView& view, const Unit& unit, const ResultTable& results) {
  const bool in_lanes = walk_as_lanes<typename Op::V>(
      view, unit, kShortRowBytes / Op::V::kItemBytes,
      [&](const Unit& part, const LaneLayout& layout) { reduce_lanes(op, view, part, layout, results); });
  if (!in_lanes) reduce_channels_first(op, view, unit, results);
}

// The results of all ranges of positions made one, in their order, in the place of the first. Those of range p are the
// rows from p * kSums on.
template <class Op>
void merge_splits(const Op& op, const ChannelView& view, const Plan& plan, const ResultTable& results, int64_t c0,
                  int64_t c1) {
  for_each_vector<double>(c1 - c0, [&](int64_t i, auto width) {
    ChannelResults<Op> total;
    total.load_rows(&results(0, c0 + i), results.channels, width);
    for (int64_t part = 1; part < plan.position_units; ++part) {
      ChannelResults<Op> other;
      other.load_rows(&results(part * Op::kSums, c0 + i), results.channels, width);
      const int64_t done = part * plan.position_block;
      total = op.merge(done, total, minimum(plan.position_block, view.positions() - done), other);
    }
    total.store_rows(&results(0, c0 + i), results.channels, width);
  });
}

// Reduces a whole tensor, has finalize(c0, c1) turn its results into what apply(unit) needs, and applies. A unit that
// owns its channels goes through all three at once, in its cache.
template <class Op, class Finalize, class Apply>
void reduce_finalize_apply(const Op& op, const ChannelView& view, const Plan& plan, const Parallel& parallel,
                           const ResultTable& results, const Finalize& finalize, const Apply& apply) {
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
  parallel((view.channels + kChannelsPerMergeTask - 1) / kChannelsPerMergeTask, 1, [&](int64_t block) {
    const int64_t c0 = block * kChannelsPerMergeTask, c1 = minimum(c0 + kChannelsPerMergeTask, view.channels);
    merge_splits(op, view, plan, results, c0, c1);
    finalize(c0, c1);
  });
  parallel.backwards(plan.units(), grain(plan), [&](int64_t index) { apply(unit_of(plan, view, index)); });
}
