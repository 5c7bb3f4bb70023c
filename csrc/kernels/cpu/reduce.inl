// Walks a unit of the tensor and reduces it per channel. What is reduced is the Op's business; an Op has
//   V, kSums            block it takes in at once, V::S the type of its arithmetic, and number of accumulators
//   empty(k)            what accumulator k starts from
//   join(k, a, b)       two partial accumulators made one
//   kCoefficients       number of per-channel constants; the first is the pivot
//   coefficient(k, c, offset)                    constant k of channel c, whose first value lies at the offset
//   accumulate(sums, offset, width, coefficients)  takes in the values at an offset of the tensor
//   results_of(pivot, count, sums)               what a tile's sums come to
//   merge(n, a, m, b)                            results of n values and of m values made one
//   kSeeksPivot, next_pivot(pivot, results)      whether a trial over the first values finds a better pivot; the next
// Tiles accumulate in S about a pivot, results are double: single precision never has to hold more than a tile.

// Values behind a pivot sought by trial. An outlier among them costs precision in proportion to tile length over their
// number.
inline constexpr int64_t kTrial = 64;
// Channels first: additions of S in a row before they are folded into double, in every lane of every accumulator.
inline constexpr int64_t kChain = 64;
// Vectors of accumulators that a row is spread over, where it is long enough: covers the latency of an addition on two
// ports. As many neighbouring vectors are taken along together down channels-last rows.
inline constexpr int64_t kVectors = 4;
template <class V>
inline constexpr int64_t kBlocks = kVectors / V::kParts;
// Lane by lane: S holds no more than the rows that advance together, which are as many sequential streams as hardware
// prefetchers follow. A tile is so many times as long as the trial for its pivot.
inline constexpr int64_t kRowsTogether = 16;
inline constexpr int64_t kTrialsInTile = 64;
// Rows of up to so many are reduced in lanes: for 7 x 7 float32, 196 bytes, moments took as long either way, for 5 x 5
// half the time and for 2 x 2 a tenth.
inline constexpr int64_t kShortRowBytes = 100;
// Channels that one task merges after a split reduction.
inline constexpr int64_t kMergeBlock = 256;

// Constants of the channels that a block's values belong to.
template <class Op>
struct Coefficients {
  typename Op::V k[Op::kCoefficients];
};

// kSums doubles per channel, as rows of C.
struct Results {
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
    unroll<Op::kSums>([&](auto i) {
      k[i] = V::each([&](auto part) { return Op::join(i, k[i].part[part], other.k[i].part[part]); });
    });
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
        [&](auto i) { unroll<Op::V::kParts>([&](auto part) { k[i] = Op::join(i, k[i], row.k[i].part[part]); }); });
  }
};

// What an Op has come to for a vector of channels.
template <class Op>
struct Lanes {
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
NF_FN double across(int64_t k, V v) {
  if constexpr (sizeof(V) == 2 * sizeof(double)) {
    return Op::join(k, v[0], v[1]);
  } else {
    using Half = typename VecOf<double, sizeof(V) / 2>::type;
    const char* const lanes = reinterpret_cast<const char*>(&v);
    return across<Op>(k, Op::join(k, read_as<Half>(lanes), read_as<Half>(lanes + sizeof(Half))));
  }
}

template <class Op>
NF_FN double total_of(int64_t k, Vec<typename Op::V::S> lanes) {
  const auto wide = widened(lanes);
  if constexpr (wide.kParts == 1)
    return across<Op>(k, wide.part[0]);
  else
    return across<Op>(k, Op::join(k, wide.part[0], wide.part[1]));
}

template <class V>
inline constexpr int64_t kLongRow = 2 * kBlocks<V> * V::kWidth;

template <class Op>
NF_FN void accumulate_row(const Op& op, ChannelSums<Op>& sums, int64_t offset, int64_t n,
                          const Coefficients<Op>& coefficients) {
  using V = typename Op::V;
  int64_t done = 0;
  Sums<Op> row;  // cleared only where it begins empty: held through the loop, sums in double took 1.3 times as long
  if (n < kLongRow<V>) {
    row.clear();
  } else {
    constexpr int64_t kStep = kBlocks<V> * V::kWidth;
    done = n / kStep * kStep;
    Sums<Op> part[kBlocks<V>];
    unroll<kBlocks<V>>([&](auto b) { part[b].clear(); });
    for (int64_t i = 0; i < done; i += kStep)
      unroll<kBlocks<V>>([&](auto b) { op.accumulate(part[b], offset + i + b * V::kWidth, Whole{}, coefficients); });
    row = part[0];
    unroll<kBlocks<V> - 1>([&](auto b) { row.join(part[b + 1]); });
  }
  for_each_block<V>(n - done,
                    [&](int64_t i, auto width) { op.accumulate(row, offset + done + i, width, coefficients); });
  sums.join(row);
}

// The state of a unit between tiles: coefficients and a tile's sums for each of its channels, as rows of kChannels.
template <class Op, int64_t kChannels>
struct Tile {
  using V = typename Op::V;
  using S = typename V::S;

  const Op& op;
  const Unit& unit;
  const Results& results;
  alignas(64) S table[Op::kCoefficients * kChannels];  // the first row: pivots
  alignas(64) double sums[Op::kSums * kChannels];

  // Leaves the arrays as they are: clearing them would take longer than many a unit.
  Tile(const Op& op, const Unit& unit, const Results& results) : op(op), unit(unit), results(results) {}

  // `offset` is that of the unit's first value, and those of its channels lie `stride` apart.
  void begin(int64_t offset, int64_t stride) {
    for (int64_t k = 0; k < Op::kCoefficients; ++k)
      for (int64_t c = 0; c < unit.c1 - unit.c0; ++c)
        table[k * kChannels + c] = op.coefficient(k, unit.c0 + c, offset + c * stride);
  }

  // Takes the sums of a trial over the unit's first values for better pivots.
  void seek_pivots(int64_t count) {
    for_each_vector<double>(unit.c1 - unit.c0, [&](int64_t i, auto width) {
      Lanes<Op> tile;
      tile.load_rows(sums + i, kChannels, width);
      const Vec<double> pivot = load<double>(table + i, width);
      store_as(table + i, op.next_pivot(pivot, op.results_of(pivot, count, tile)), width);
    });
  }

  // Takes the sums into the results of the `done` positions before, and moves the pivots on.
  void fold(int64_t done, int64_t count) {
    for_each_vector<double>(unit.c1 - unit.c0, [&](int64_t i, auto width) {
      Lanes<Op> tile;
      tile.load_rows(sums + i, kChannels, width);
      const Vec<double> pivot = load<double>(table + i, width);
      Lanes<Op> total = op.results_of(pivot, count, tile);
      double* const rows = &results(0, unit.c0 + i);
      if (done > 0) {
        Lanes<Op> before;
        before.load_rows(rows, results.channels, width);
        total = op.merge(done, before, count, total);
      }
      total.store_rows(rows, results.channels, width);
      store_as(table + i, op.next_pivot(pivot, total), width);
    });
  }
};

template <class Op>
void reduce_channels_first(const Op& op, const ChannelView& view, const Unit& unit, const Results& results) {
  using V = typename Op::V;
  const int64_t channels = unit.c1 - unit.c0;
  Tile<Op, kMaxChannelsFirst> tile(op, unit, results);
  tile.begin(offset_of(view, unit.c0, unit.m0), view.inner);

  const auto accumulate = [&](int64_t m, int64_t end) {
    ChannelSums<Op> sums[kMaxChannelsFirst];
    for (int64_t c = 0; c < channels; ++c) sums[c].clear();
    for (int64_t n; m < end; m += n) {
      n = least(view.inner - m % view.inner, end - m);
      const int64_t offset = offset_of(view, unit.c0, m);
      for (int64_t c = 0; c < channels; ++c) {
        op.prefetch(offset + (view.channels + c) * view.inner, view.inner);
        Coefficients<Op> coefficients;
        unroll<Op::kCoefficients>(
            [&](auto k) { coefficients.k[k] = V::filled(tile.table[k * kMaxChannelsFirst + c]); });
        accumulate_row(op, sums[c], offset + c * view.inner, n, coefficients);
      }
    }
    for (int64_t c = 0; c < channels; ++c)
      unroll<Op::kSums>([&](auto k) { tile.sums[k * kMaxChannelsFirst + c] = total_of<Op>(k, sums[c].k[k]); });
  };

  if constexpr (Op::kSeeksPivot) {
    const int64_t trial = least(kTrial, unit.m1 - unit.m0);
    accumulate(unit.m0, unit.m0 + trial);
    tile.seek_pivots(trial);
  }
  const int64_t full = kChain * V::kWidth * (view.inner >= kLongRow<V> ? kBlocks<V> : 1);
  for (int64_t m = unit.m0; m < unit.m1; m += full) {
    const int64_t count = least(full, unit.m1 - m);
    accumulate(m, m + count);
    tile.fold(m - unit.m0, count);
  }
}

// A few blocks of neighbouring lanes over a few rows that lie `stride` apart: sums in registers meanwhile, then joined
// to the tile's, which are double. What lies `ahead` will be wanted soon.
template <int64_t blocks, class Op, class Width>
NF_FN void accumulate_rows(const Op& op, int64_t offset, int64_t stride, int64_t rows, int64_t ahead, Width width,
                           const typename Op::V::S* table, double* sums) {
  using V = typename Op::V;
  using S = typename V::S;
  Sums<Op> part[blocks];
  Coefficients<Op> coefficients[blocks];
  unroll<blocks>([&](auto b) {
    unroll<Op::kCoefficients>(
        [&](auto k) { coefficients[b].k[k] = in_block_order<V>(table + k * kMaxLanes + b * V::kWidth); });
    part[b].clear();
  });
  for (int64_t row = 0; row < rows; ++row) {
    op.prefetch(offset + row * stride + ahead, blocks * V::kWidth);
    unroll<blocks>(
        [&](auto b) { op.accumulate(part[b], offset + row * stride + b * V::kWidth, width, coefficients[b]); });
  }
  unroll<blocks * Op::kSums>([&](auto i) {
    constexpr int64_t b = i / Op::kSums, k = i % Op::kSums;
    const V lanes = in_own_order(part[b].k[k]);
    unroll<V::kParts>([&](auto v) {
      const Wide<S> wide = widened(lanes.part[v]);
      unroll<Wide<S>::kParts>([&](auto h) {
        double* const sum = sums + k * kMaxLanes + b * V::kWidth + v * kLanes<S> + h * kLanes<double>;
        store(sum, Op::join(k, load<double>(sum, Whole{}), wide.part[h]), Whole{});
      });
    });
  });
}

// Joins the lanes of each channel to one value in the first places: accumulator k.
template <class Op>
void join_lanes(const RowOfLanes& row, int64_t k, double* sums) {
  if (row.channels_last) {
    for (int64_t lane = row.channels; lane < row.lanes(); ++lane)
      sums[lane % row.channels] = Op::join(k, sums[lane % row.channels], sums[lane]);
    return;
  }
  const Vec<double> none = broadcast(static_cast<double>(Op::empty(k)));
  for (int64_t c = 0; c < row.channels; ++c) {
    Vec<double> total = none;
    for_each_vector<double>(row.positions, [&](int64_t i, auto width) {
      total = Op::join(k, total, load<double>(sums + c * row.positions + i, width, none));
    });
    sums[c] = across<Op>(k, total);
  }
}

template <class Op>
void reduce_lanes(const Op& op, const ChannelView& view, const Unit& unit, const RowOfLanes& row,
                  const Results& results) {
  using V = typename Op::V;
  using S = typename V::S;
  const int64_t lanes = row.lanes();
  const int64_t stride = view.channels * row.positions;
  const int64_t padded = (lanes + V::kWidth - 1) / V::kWidth * V::kWidth;  // the last block may use all of its lanes
  Tile<Op, kMaxLanes> tile(op, unit, results);
  tile.begin(offset_of(view, unit.c0, unit.m0), view.inner);

  const auto accumulate_block = [&](int64_t offset, int64_t rows, int64_t n) {
    constexpr int64_t kStep = kBlocks<V> * V::kWidth;
    // Hardware follows channels-last rows, but is late for the first; short rows are too far apart for it.
    const int64_t ahead = row.channels_last ? rows * stride : kStep;
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep)
      accumulate_rows<kBlocks<V>>(op, offset + i, stride, rows, ahead, Whole{}, tile.table + i, tile.sums + i);
    for_each_block<V>(n - i, [&](int64_t j, auto width) {
      accumulate_rows<1>(op, offset + i + j, stride, rows, ahead, width, tile.table + i + j, tile.sums + i + j);
    });
  };
  const auto accumulate = [&](int64_t m, int64_t end) {
    for (int64_t k = 0; k < Op::kCoefficients; ++k) {
      S* const coefficients = tile.table + k * kMaxLanes;
      row.spread(coefficients);
      for (int64_t lane = lanes; lane < padded; ++lane) coefficients[lane] = 0;
    }
    for (int64_t k = 0; k < Op::kSums; ++k)
      for (int64_t lane = 0; lane < padded; ++lane) tile.sums[k * kMaxLanes + lane] = static_cast<double>(Op::empty(k));
    int64_t offset = offset_of(view, unit.c0, m);
    int64_t left = (end - m) / row.positions;
    for (int64_t rows; left > 0; left -= rows, offset += rows * stride) {
      rows = least(kRowsTogether, left);
      accumulate_block(offset, rows, lanes);
    }
    const int64_t rest = (end - m) % row.positions;  // channels last
    if (rest > 0) accumulate_block(offset, 1, rest * row.channels);
    for (int64_t k = 0; k < Op::kCoefficients; ++k) row.gather(tile.table + k * kMaxLanes);
    for (int64_t k = 0; k < Op::kSums; ++k) join_lanes<Op>(row, k, tile.sums + k * kMaxLanes);
  };

  const int64_t trial = (kRowsTogether + row.positions - 1) / row.positions * row.positions;
  if constexpr (Op::kSeeksPivot) {
    const int64_t count = least(trial, unit.m1 - unit.m0);
    accumulate(unit.m0, unit.m0 + count);
    tile.seek_pivots(count);
  }
  for (int64_t m = unit.m0; m < unit.m1; m += kTrialsInTile * trial) {
    const int64_t count = least(kTrialsInTile * trial, unit.m1 - m);
    accumulate(m, m + count);
    tile.fold(m - unit.m0, count);
  }
}

template <class Op>
void reduce(const Op& op, const ChannelView& view, const Unit& unit, const Results& results) {
  const bool in_lanes = for_rows_of_lanes<typename Op::V>(
      view, unit, kShortRowBytes / Op::V::kItem,
      [&](const Unit& part, const RowOfLanes& row) { reduce_lanes(op, view, part, row, results); });
  if (!in_lanes) reduce_channels_first(op, view, unit, results);
}

// The results of all ranges of positions made one, in their order, in the place of the first. Those of range p are the
// rows from p * kSums on.
template <class Op>
void merge_parts(const Op& op, const ChannelView& view, const Plan& plan, const Results& results, int64_t c0,
                 int64_t c1) {
  for_each_vector<double>(c1 - c0, [&](int64_t i, auto width) {
    Lanes<Op> total;
    total.load_rows(&results(0, c0 + i), results.channels, width);
    for (int64_t part = 1; part < plan.position_units; ++part) {
      Lanes<Op> other;
      other.load_rows(&results(part * Op::kSums, c0 + i), results.channels, width);
      const int64_t done = part * plan.position_block;
      total = op.merge(done, total, least(plan.position_block, view.positions() - done), other);
    }
    total.store_rows(&results(0, c0 + i), results.channels, width);
  });
}

// Reduces a whole tensor, has finalize(c0, c1) turn its results into what apply(unit) needs, and applies. A unit that
// owns its channels goes through all three at once, in its cache.
template <class Op, class Finalize, class Apply>
void sweep(const Op& op, const ChannelView& view, const Plan& plan, const Parallel& parallel, const Results& results,
           const Finalize& finalize, const Apply& apply) {
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
  parallel((view.channels + kMergeBlock - 1) / kMergeBlock, 1, [&](int64_t block) {
    const int64_t c0 = block * kMergeBlock, c1 = least(c0 + kMergeBlock, view.channels);
    merge_parts(op, view, plan, results, c0, c1);
    finalize(c0, c1);
  });
  parallel.backwards(plan.units(), grain(plan), [&](int64_t index) { apply(unit_of(plan, view, index)); });
}
