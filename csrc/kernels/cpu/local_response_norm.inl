// Local response normalization, in blocks of positions with all of their channels. A block is some rows, each of which
// follows on in memory: channels first a row has the positions of a channel, channels last the channels of a position.
// What windows are summed over lies in scratch, in rows too, with zeros where a window reaches past the channels. So
// channels that are neighbours lie everywhere the same `step` apart, which is all that the layouts differ in.

struct Rows {
  int64_t count, length;
  int64_t offset, stride;  // in the tensor: of the first row, and from row to row
  int64_t scratch_stride;

  // Calls body(offset in the tensor, offset in scratch, width) for every vector.
  template <class S, class Body>
  NF_INLINE void for_each(const Body& body) const {
    for (int64_t row = 0; row < count; ++row)
      for_each_vector<S>(
          length, [&](int64_t i, auto width) { body(offset + row * stride + i, row * scratch_stride + i, width); });
  }
};

// Sums of n values each, `step` apart.
template <class S>
NF_FN Vec<S> window_sum(const S* first, int64_t n, int64_t step) {
  Vec<S> sum = load<S>(first, Whole{});
  for (int64_t i = 1; i < n; ++i) sum += load<S>(first + i * step, Whole{});
  return sum;
}

template <class T, bool kBackward>
void local_response_norm(const LocalResponseNorm& args, const Parallel& parallel) {
  using S = compute_t<T>;
  constexpr int64_t kArrays = kBackward ? 3 : 1;
  const ChannelView& view = args.view;
  const T* const input = static_cast<const T*>(args.input);
  const T* const grad_output = static_cast<const T*>(args.grad_output);
  T* const output = static_cast<T*>(args.output);
  const Response<S> response = response_of<S>(args);
  const bool first = view.inner > 1;
  const int64_t before = args.before(), after = args.after(), window = before + 1 + after;

  // The longer side of a window is a margin for both, and between two rows of channels the margin of both.
  const int64_t width = view.channels + before;
  const BlockPlan plan = plan_blocks(view, kArrays * (width + before) * static_cast<int64_t>(sizeof(S)));
  const int64_t step = first ? plan.positions : 1, margin = before * step;
  const int64_t array = (plan.positions * width + margin) / kLanes<S> * kLanes<S> + 2 * kLanes<S>;
  const int64_t blocks_of_outer = first ? plan.blocks / view.outer : 0;

  const auto rows_of = [&](int64_t block) -> Rows {
    if (first) {
      const int64_t m = block % blocks_of_outer * plan.positions;
      return {view.channels, least(plan.positions, view.inner - m),
              block / blocks_of_outer * view.channels * view.inner + m, view.inner, plan.positions};
    }
    const int64_t m = block * plan.positions;
    return {least(plan.positions, view.outer - m), view.channels, m * view.channels, view.channels, width};
  };

  parallel(plan.tasks, grain(plan), [&](int64_t task) {
    const Workspace workspace(0, kArrays * array * static_cast<int64_t>(sizeof(S)));
    S* const scratch = static_cast<S*>(workspace.table);
    std::memset(scratch, 0, static_cast<size_t>(kArrays * array) * sizeof(S));
    S* const squares = scratch + margin;
    const auto base_at = [&](int64_t at) __attribute__((always_inline)) {
      return response_base(response, window_sum(squares + at - before * step, window, step));
    };
    for (int64_t block = task * plan.blocks / plan.tasks; block < (task + 1) * plan.blocks / plan.tasks; ++block) {
      const Rows rows = rows_of(block);
      rows.for_each<S>([&](int64_t offset, int64_t at, auto part) {
        const Vec<S> x = load<S>(input + offset, part);
        store(squares + at, x * x, part);
      });
      if constexpr (!kBackward) {
        rows.for_each<S>([&](int64_t offset, int64_t at, auto part) {
          const Vec<S> x = load<S>(input + offset, part);
          store(output + offset, x * response_factor<Elementary>(response, base_at(at)), part);
        });
      } else {
        S* const shares = squares + array;
        S* const direct = shares + array;
        rows.for_each<S>([&](int64_t offset, int64_t at, auto part) {
          const Vec<S> x = load<S>(input + offset, part), grad = load<S>(grad_output + offset, part);
          const Vec<S> base = base_at(at), factor = response_factor<Elementary>(response, base);
          store(shares + at, response_share(grad, x, base, factor), part);
          store(direct + at, grad * factor, part);
        });
        rows.for_each<S>([&](int64_t offset, int64_t at, auto part) {
          const Vec<S> x = load<S>(input + offset, part);
          const Vec<S> sum = window_sum(shares + at - after * step, window, step);
          store(output + offset, response_gradient(response, load<S>(direct + at, Whole{}), x, sum), part);
        });
      }
    }
  });
}

template <class T>
void local_response_norm(const LocalResponseNorm& args, const Parallel& parallel) {
  args.grad_output == nullptr ? local_response_norm<T, false>(args, parallel)
                              : local_response_norm<T, true>(args, parallel);
}
