// Walks a unit of the tensor and writes one value for each. What is written is the Op's business; an Op has
//   S, T, kCoefficients, output           type of its arithmetic, of the output, per-channel constants, where to write
//   operator()(offset, width, coefficients)  the values at an offset
// Channels first, positions are walked backwards: what the reduction before read last is still in cache. Channels last
// they are not: rows that follow each other in memory are what hardware prefetchers follow, and against them eval of
// (32, 512, 28, 28) in bfloat16 took twice as long.

// Where streaming stores begin to pay: from 6 MB on, output and its next reader together took 0.7 of the time they take
// with ordinary stores (Ice Lake server, 1.25 MiB of L2 a core).
inline constexpr int64_t kStreamBytes = 4 << 20;
// A third of L1, for short rows on their way.
inline constexpr int64_t kStreamBufferBytes = 16 << 10;

template <class Op>
struct Coefficients {
  Vec<typename Op::S> k[Op::kCoefficients];
};

template <bool kStream, class Op>
NF_FN void apply_row(const Op& op, typename Op::T* output, int64_t offset, int64_t n,
                     const Coefficients<Op>& coefficients) {
  using S = typename Op::S;
  using T = typename Op::T;
  constexpr int64_t kLane = kLanes<S>;
  int64_t i = 0;
  if constexpr (kStream) {
    constexpr auto kItem = static_cast<int64_t>(sizeof(T));
    i = least(n, bytes_to_alignment(output, kLane * kItem) / kItem);
    if (i > 0) store(output, op(offset, Part{i}, coefficients), Part{i});
    for (; i + kLane <= n; i += kLane) stream(output + i, op(offset + i, Whole{}, coefficients));
  }
  for_each_vector<S>(
      n - i, [&](int64_t j, auto width) { store(output + i + j, op(offset + i + j, width, coefficients), width); });
}

template <bool kStream, class Op>
void apply_channels_first(const Op& op, const ChannelView& view, const Unit& unit, const typename Op::S* table) {
  using S = typename Op::S;
  using T = typename Op::T;
  // Neighbouring short rows share cache lines, so they are streamed together, by way of a buffer.
  constexpr int64_t kBuffer = kStreamBufferBytes / static_cast<int64_t>(sizeof(T));
  alignas(64) T buffer[kStream ? kBuffer : 1];
  int64_t start;
  for (int64_t m = unit.m1; m > unit.m0; m = start) {
    start = greatest(unit.m0, (m - 1) / view.inner * view.inner);
    const int64_t n = m - start;
    const int64_t together = kStream && n == view.inner ? kBuffer / n : 0;  // rows that fit
    int64_t next;
    for (int64_t c = unit.c0; c < unit.c1; c = next) {
      next = together > 1 ? least(unit.c1, c + together) : c + 1;
      const int64_t offset = offset_of(view, c, start);
      for (int64_t i = c; i < next; ++i) {
        Coefficients<Op> coefficients;
        for (int64_t k = 0; k < Op::kCoefficients; ++k) coefficients.k[k] = broadcast<S>(table[k * view.channels + i]);
        const int64_t skip = (i - c) * n;
        if (together > 1)
          apply_row<false>(op, buffer + skip, offset + skip, n, coefficients);
        else
          apply_row<kStream>(op, op.output + offset, offset, n, coefficients);
      }
      if (together > 1) stream_copy(op.output + offset, buffer, (next - c) * n);
    }
  }
}

template <bool kStream, class Op>
void apply_channels_last(const Op& op, const ChannelView& view, const Unit& unit, const typename Op::S* table) {
  using S = typename Op::S;
  const int64_t channels = unit.c1 - unit.c0;
  const int64_t together = channels == view.channels ? rows_in_one<S>(channels) : 1;
  int64_t stride = view.channels;
  table += unit.c0;
  alignas(64) S repeated[Op::kCoefficients * kMaxChannelsLast];
  if (together > 1) {
    for (int64_t k = 0; k < Op::kCoefficients; ++k)
      for (int64_t lane = 0; lane < channels * together; ++lane)
        repeated[k * kMaxChannelsLast + lane] =
            lane < channels ? table[k * stride + lane] : repeated[k * kMaxChannelsLast + lane - channels];
    table = repeated;
    stride = kMaxChannelsLast;
  }
  for (int64_t start = unit.m0; start < unit.m1; start += together) {
    const int64_t m = least(unit.m1, start + together);
    const int64_t offset = start * view.channels + unit.c0;
    for_each_vector<S>((m - start) * channels, [&](int64_t i, auto width) {
      Coefficients<Op> coefficients;
      for (int64_t k = 0; k < Op::kCoefficients; ++k) coefficients.k[k] = load<S>(table + k * stride + i, width);
      const Vec<S> value = op(offset + i, width, coefficients);
      if constexpr (kStream && std::is_same_v<decltype(width), Whole>)
        stream(op.output + offset + i, value);
      else
        store(op.output + offset + i, value, width);
    });
  }
}

// Streaming stores spare the read of what they overwrite. Channels-last rows are streamed only where every unit and
// every row of it is aligned.
template <class Op>
bool worth_streaming(const Op& op, const ChannelView& view, const Plan& plan) {
  constexpr int64_t kItem = sizeof(typename Op::T);
  if (kVectorBytes == 16 || view.numel() * kItem < kStreamBytes) return false;
  if (view.inner > 1) return true;
  const int64_t row = view.channels * rows_in_one<typename Op::S>(view.channels);
  return row * kItem % kVectorBytes == 0 && plan.position_block * view.channels * kItem % kVectorBytes == 0 &&
         bytes_to_alignment(op.output, kVectorBytes) == 0;
}

template <class Op>
void apply(const Op& op, const ChannelView& view, const Unit& unit, const typename Op::S* table, bool streaming) {
  if (!streaming)
    return view.inner > 1 ? apply_channels_first<false>(op, view, unit, table)
                          : apply_channels_last<false>(op, view, unit, table);
  view.inner > 1 ? apply_channels_first<true>(op, view, unit, table) : apply_channels_last<true>(op, view, unit, table);
  finish_streams();
}
