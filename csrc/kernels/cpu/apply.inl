// Walks a unit of the tensor and writes one value for each. What is written is the Op's business; an Op has
//   S, T, kCoefficients, output           type of its arithmetic, of the output, per-channel constants, where to write
//   operator()(offset, width, coefficients)  the values at an offset
// Positions are walked backwards: what the reduction before read last is still in cache.

// Where streaming stores begin to pay. Measured on an Ice Lake server, 48 MiB of L3.
inline constexpr int64_t kStreamBytes = 16 << 20;
inline constexpr int64_t kStreamRowBytes = 1 << 10;

template <class Op>
struct Coefficients {
  Vec<typename Op::S> k[Op::kCoefficients];
};

template <bool kStream, class Op>
NF_FN void apply_row(const Op& op, int64_t offset, int64_t n, const Coefficients<Op>& coefficients) {
  using S = typename Op::S;
  using T = typename Op::T;
  constexpr int64_t kLane = kLanes<S>;
  T* const output = op.output + offset;
  int64_t i = 0;
  if constexpr (kStream) {
    constexpr auto kStored = kLane * static_cast<int64_t>(sizeof(T));
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(output) % kStored);
    if (past != 0) {
      i = least(n, (kStored - past) / static_cast<int64_t>(sizeof(T)));
      store(output, op(offset, Part{i}, coefficients), Part{i});
    }
    for (; i + kLane <= n; i += kLane) stream(output + i, op(offset + i, Whole{}, coefficients));
  }
  for_each_vector<S>(n - i, [&](int64_t j, auto width) {
    store(output + i + j, op(offset + i + j, width, coefficients), width);
  });
}

template <bool kStream, class Op>
void apply_channels_first(const Op& op, const ChannelView& view, const Unit& unit, const typename Op::S* table) {
  using S = typename Op::S;
  int64_t start;
  for (int64_t m = unit.m1; m > unit.m0; m = start) {
    start = greatest(unit.m0, (m - 1) / view.inner * view.inner);
    for (int64_t c = unit.c0; c < unit.c1; ++c) {
      Coefficients<Op> coefficients;
      for (int64_t i = 0; i < Op::kCoefficients; ++i)
        coefficients.k[i] = broadcast<S>(table[i * view.channels + c]);
      apply_row<kStream>(op, offset_of(view, c, start), m - start, coefficients);
    }
  }
}

template <bool kStream, class Op>
void apply_channels_last(const Op& op, const ChannelView& view, const Unit& unit, const typename Op::S* table) {
  using S = typename Op::S;
  for (int64_t m = unit.m1; m-- > unit.m0;) {
    for_each_vector<S>(unit.c1 - unit.c0, [&](int64_t j, auto width) {
      const int64_t c = unit.c0 + j;
      Coefficients<Op> coefficients;
      for (int64_t i = 0; i < Op::kCoefficients; ++i)
        coefficients.k[i] = load<S>(table + i * view.channels + c, width);
      const int64_t offset = m * view.channels + c;
      const Vec<S> value = op(offset, width, coefficients);
      if constexpr (kStream && std::is_same_v<decltype(width), Whole>)
        stream(op.output + offset, value);
      else
        store(op.output + offset, value, width);
    });
  }
}

// Streaming stores spare the read of what they overwrite, which pays once the output cannot stay in cache anyway.
// Channels-last rows are streamed only where every one of them is aligned; short rows of either layout never are.
template <class Op>
bool worth_streaming(const Op& op, const ChannelView& view) {
  constexpr int64_t kItem = sizeof(typename Op::T);
  if (kVectorBytes == 16 || view.numel() * kItem < kStreamBytes) return false;
  if (view.inner > 1) return view.inner * kItem >= kStreamRowBytes;
  return view.channels * kItem % kVectorBytes == 0 && reinterpret_cast<uintptr_t>(op.output) % kVectorBytes == 0;
}

template <class Op>
void apply(const Op& op, const ChannelView& view, const Unit& unit, const typename Op::S* table, bool streaming) {
  if (!streaming)
    return view.inner > 1 ? apply_channels_first<false>(op, view, unit, table)
                          : apply_channels_last<false>(op, view, unit, table);
  view.inner > 1 ? apply_channels_first<true>(op, view, unit, table)
                 : apply_channels_last<true>(op, view, unit, table);
  finish_streams();
}
