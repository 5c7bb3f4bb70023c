// Sums of integers, exact: 8-bit values are added up in 32 bits for as long as these hold the squares, and all else in
// 64. The loops are plain, and compilers turn them into vectors. Unsigned sums wrap around, which is right for negative
// values too.

struct IntegerSums {
  int64_t sum = 0, squares = 0;
};

// What values of T are added up in, and how many squares it holds: 2^16 of at most 255^2.
template <class T>
using accumulator_t = std::conditional_t<sizeof(T) == 1, uint32_t, uint64_t>;
template <class T>
inline constexpr int64_t kCapacity = sizeof(T) == 1 ? 1 << 16 : std::numeric_limits<int64_t>::max();

template <class T>
NF_FN void add_sums(IntegerSums& total, accumulator_t<T> sum, accumulator_t<T> squares) {
  using Signed = std::make_signed_t<accumulator_t<T>>;
  total.sum += std::is_signed_v<T> ? static_cast<int64_t>(static_cast<Signed>(sum)) : static_cast<int64_t>(sum);
  total.squares += static_cast<int64_t>(squares);
}

// n values of one channel.
template <class T>
void add_row(const T* values, int64_t n, IntegerSums& total) {
  using A = accumulator_t<T>;
  while (n > 0) {
    const int64_t run = least(n, kCapacity<T>);
    A sum = 0, squares = 0;
    for (int64_t i = 0; i < run; ++i) {
      const A value = static_cast<A>(values[i]);
      sum += value;
      squares += value * value;
    }
    add_sums<T>(total, sum, squares);
    values += run;
    n -= run;
  }
}

template <class T>
void add_channels_first(const T* input, const ChannelView& view, const Unit& unit, IntegerSums* totals) {
  for (int64_t m = unit.m0, end; m < unit.m1; m = end) {
    end = least(unit.m1, (m / view.inner + 1) * view.inner);
    for (int64_t c = unit.c0; c < unit.c1; ++c) add_row(input + offset_of(view, c, m), end - m, totals[c - unit.c0]);
  }
}

// Rows of few channels are walked 16 at once, so that neighbours in memory are neighbouring lanes of whole vectors.
template <class T>
void add_channels_last(const T* input, const ChannelView& view, const Unit& unit, IntegerSums* totals) {
  using A = accumulator_t<T>;
  constexpr int64_t kRows = 16;
  const int64_t channels = unit.c1 - unit.c0;
  const int64_t together = channels == view.channels && channels * kRows <= kMaxChannelsLast ? kRows : 1;
  const int64_t lanes = channels * together;
  alignas(64) A sum[kMaxChannelsLast], squares[kMaxChannelsLast];
  for (int64_t m = unit.m0; m < unit.m1;) {
    for (int64_t lane = 0; lane < lanes; ++lane) sum[lane] = squares[lane] = 0;
    const int64_t groups = least((unit.m1 - m + together - 1) / together, kCapacity<T>);
    for (int64_t group = 0; group < groups; ++group, m += together) {
      const T* const values = input + m * view.channels + unit.c0;
      const int64_t n = least(unit.m1 - m, together) * channels;
      for (int64_t lane = 0; lane < n; ++lane) {
        const A value = static_cast<A>(values[lane]);
        sum[lane] += value;
        squares[lane] += value * value;
      }
    }
    for (int64_t lane = 0; lane < lanes; ++lane) add_sums<T>(totals[lane % channels], sum[lane], squares[lane]);
  }
}

// Writes int64 sums and sums of squares.
template <class T>
void integer_sums(const ChannelStats& args, const Parallel& parallel) {
  const ChannelView& view = args.view;
  const T* const input = static_cast<const T*>(args.input);
  const Plan plan = plan_reduction(view, sizeof(T), 1);
  static_assert(sizeof(IntegerSums) == 2 * sizeof(double));
  const Workspace workspace(plan.position_units * 2 * view.channels, 0);
  IntegerSums* const parts = reinterpret_cast<IntegerSums*>(workspace.results);  // of position units, by channels
  parallel(plan.units(), grain(plan), [&](int64_t index) {
    const Unit unit = unit_of(plan, view, index);
    IntegerSums* const totals = parts + unit.m0 / plan.position_block * view.channels + unit.c0;
    for (int64_t c = 0; c < unit.c1 - unit.c0; ++c) totals[c] = {};
    view.inner > 1 ? add_channels_first(input, view, unit, totals) : add_channels_last(input, view, unit, totals);
  });
  for (int64_t c = 0; c < view.channels; ++c) {
    IntegerSums total;
    for (int64_t part = 0; part < plan.position_units; ++part) {
      total.sum += parts[part * view.channels + c].sum;
      total.squares += parts[part * view.channels + c].squares;
    }
    static_cast<int64_t*>(args.results[0])[c] = total.sum;
    static_cast<int64_t*>(args.results[1])[c] = total.squares;
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
