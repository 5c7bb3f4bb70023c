// Local response normalization, in blocks of positions with all of their channels. A block is some rows, each in one
// piece in memory: channels first a row has the positions of a channel, channels last the channels of a position. What
// windows are summed over lies in scratch, in rows too, with zeros where a window reaches past the channels. There
// neighbouring channels lie everywhere the same `step` apart, which is all that the layouts differ in.

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

template <class T>
struct ResponseOp {
  using S = compute_t<T>;

  const T* input;
  const T* grad_output;
  T* output;
  Response<S> response;
  int64_t left, right, step;

  // Of windows that begin at `first` and at the places behind it.
  NF_INLINE Vec<S> window_sum(const S* first) const {
    Vec<S> sum = load<S>(first, FullVector{});
    for (int64_t i = 1; i <= left + right; ++i) sum += load<S>(first + i * step, FullVector{});
    return sum;
  }
  NF_INLINE Vec<S> base(const S* squares) const { return response_base(response, window_sum(squares - left * step)); }

  void square(const Rows& rows, S* squares) const {
    rows.for_each<S>([&](int64_t offset, int64_t at, auto width) {
      const Vec<S> x = load<S>(input + offset, width);
      store(squares + at, x * x, width);
    });
  }

  void forward(const Rows& rows, const S* squares) const {
    rows.for_each<S>([&](int64_t offset, int64_t at, auto width) {
      const Vec<S> x = load<S>(input + offset, width);
      store(output + offset, x * response_factor<Elementary>(response, base(squares + at)), width);
    });
  }

  void backward(const Rows& rows, const S* squares, S* shares, S* direct) const {
    rows.for_each<S>([&](int64_t offset, int64_t at, auto width) {
      const Vec<S> x = load<S>(input + offset, width), grad = load<S>(grad_output + offset, width);
      const Vec<S> b = base(squares + at), factor = response_factor<Elementary>(response, b);
      store(shares + at, response_share(grad, x, b, factor), width);
      store(direct + at, grad * factor, width);
    });
    // A channel is in the windows of those from `after` before it to `before` after it.
    rows.for_each<S>([&](int64_t offset, int64_t at, auto width) {
      const Vec<S> x = load<S>(input + offset, width), sum = window_sum(shares + at - right * step);
      store(output + offset, response_gradient(response, load<S>(direct + at, FullVector{}), x, sum), width);
    });
  }
};

template <class T>
void local_response_norm(const LocalResponseNorm& args, const Parallel& parallel) {
  using S = compute_t<T>;
  const ChannelView& view = args.view;
  const bool by_channels = view.inner > 1;  // a row is a channel
  const int64_t arrays = args.grad_output == nullptr ? 1 : 3;
  // A margin of zeros on either side of the channels; the rows of two positions share the one between them.
  const int64_t left = args.left(), width = view.channels + left;
  const BlockPlan plan = plan_blocks(view, arrays * (width + left) * static_cast<int64_t>(sizeof(S)));
  const int64_t step = by_channels ? plan.positions : 1, margin = left * step;
  const int64_t array = (plan.positions * width + margin) / kLanes<S> * kLanes<S> + 2 * kLanes<S>;
  const ResponseOp<T> op{static_cast<const T*>(args.input),
                         static_cast<const T*>(args.grad_output),
                         static_cast<T*>(args.output),
                         response_of<S>(args),
                         left,
                         args.right(),
                         step};

  const auto rows_of = [&](int64_t block) -> Rows {
    if (by_channels) {
      const int64_t each = plan.blocks / view.outer, m = block % each * plan.positions;
      return {view.channels, minimum(plan.positions, view.inner - m), block / each * view.channels * view.inner + m,
              view.inner, plan.positions};
    }
    const int64_t m = block * plan.positions;
    return {minimum(plan.positions, view.outer - m), view.channels, m * view.channels, view.channels, width};
  };
  parallel(plan.tasks, grain(plan), [&](int64_t task) {
    const Workspace workspace(0, arrays * array * static_cast<int64_t>(sizeof(S)));
    S* const scratch = static_cast<S*>(workspace.table);
    std::memset(scratch, 0, static_cast<size_t>(arrays * array) * sizeof(S));
    S* const squares = scratch + margin;
    for (int64_t block = task * plan.blocks / plan.tasks; block < (task + 1) * plan.blocks / plan.tasks; ++block) {
      const Rows rows = rows_of(block);
      op.square(rows, squares);
      arrays == 1 ? op.forward(rows, squares) : op.backward(rows, squares, squares + array, squares + 2 * array);
    }
  });
}
