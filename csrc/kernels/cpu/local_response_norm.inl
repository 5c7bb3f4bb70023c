// Local response normalization. A task processes blocks of positions with all of their channels, in scratch memory.
//
// A block is a set of rows, each contiguous in memory: channels first, a row is the block's positions of one channel;
// channels last, the channels of one position. Scratch memory has the same rows, with margins of zeros for windows that
// reach past the first or last channel. In scratch, neighbouring channels are `step` values apart: positions of a block
// (channels first) or 1 (channels last). Apart from that, both layouts use the same code.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/elementary.inl"
#include "kernels/cpu/lanes.inl"

namespace normfused::cpu::NF_ISA {
namespace {

// The rows of a block.
struct BlockRows {
  int64_t count, length;
  int64_t offset, stride;  // in the tensor: of the first row, and from row to row
  int64_t scratch_stride;

  // Calls body(offset in the tensor, offset in scratch, width) for each vector.
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
  int64_t left, right, step;  // the window of channel c: c - left, …, c + right

  // For each lane, the sum over a window that begins at that lane of `first`.
  NF_INLINE Vec<S> window_sum(const S* first) const {
    Vec<S> sum = load<S>(first, FullVector{});
    for (int64_t i = 1; i <= left + right; ++i) sum += load<S>(first + i * step, FullVector{});
    return sum;
  }
  NF_INLINE Vec<S> base(const S* squares) const { return response_base(response, window_sum(squares - left * step)); }

  // squares = x * x
  void square(const BlockRows& rows, S* squares) const {
    rows.for_each<S>([&](int64_t offset, int64_t at, auto width) {
      const Vec<S> x = load<S>(input + offset, width);
      store(squares + at, x * x, width);
    });
  }

  void forward(const BlockRows& rows, const S* squares) const {
    rows.for_each<S>([&](int64_t offset, int64_t at, auto width) {
      const Vec<S> x = load<S>(input + offset, width);
      store(output + offset, x * response_factor<Elementary>(response, base(squares + at)), width);
    });
  }

  // Two passes: the gradient of a channel needs the shares of all channels whose windows contain it.
  void backward(const BlockRows& rows, const S* squares, S* shares, S* direct) const {
    rows.for_each<S>([&](int64_t offset, int64_t at, auto width) {
      const Vec<S> x = load<S>(input + offset, width), grad = load<S>(grad_output + offset, width);
      const Vec<S> b = base(squares + at), factor = response_factor<Elementary>(response, b);
      store(shares + at, response_share(grad, x, b, factor), width);
      store(direct + at, grad * factor, width);
    });
    // The windows of the channels c - right, …, c + left contain channel c.
    rows.for_each<S>([&](int64_t offset, int64_t at, auto width) {
      const Vec<S> x = load<S>(input + offset, width), sum = window_sum(shares + at - right * step);
      store(output + offset, response_gradient(response, load<S>(direct + at, FullVector{}), x, sum), width);
    });
  }
};

// Rows of block number `block`. `scratch_width` is the scratch stride channels last.
BlockRows rows_of_block(const ChannelView& view, const BlockPlan& plan, int64_t block, int64_t scratch_width) {
  if (view.inner > 1) {
    const int64_t blocks = plan.blocks / view.outer, m = block % blocks * plan.positions;  // of an outer index
    return {view.channels, minimum(plan.positions, view.inner - m), block / blocks * view.channels * view.inner + m,
            view.inner, plan.positions};
  }
  const int64_t m = block * plan.positions;
  return {minimum(plan.positions, view.outer - m), view.channels, m * view.channels, view.channels, scratch_width};
}

template <class T>
void local_response_norm(const LocalResponseNorm& args, const Parallel& parallel) {
  using S = compute_t<T>;
  const ChannelView& view = args.view;
  const int64_t arrays = args.grad_output == nullptr ? 1 : 3;  // squares; backward also shares and direct
  // Margins of zeros on both sides of the channels. Channels last, adjacent positions share a margin.
  const int64_t left = args.left(), width = view.channels + left;
  const BlockPlan plan = plan_blocks(view, arrays * (width + left) * static_cast<int64_t>(sizeof(S)));
  const int64_t step = view.inner > 1 ? plan.positions : 1, margin = left * step;
  const int64_t array = (plan.positions * width + margin) / kLanes<S> * kLanes<S> + 2 * kLanes<S>;
  const ResponseOp<T> op{static_cast<const T*>(args.input),
                         static_cast<const T*>(args.grad_output),
                         static_cast<T*>(args.output),
                         response_of<S>(args),
                         left,
                         args.right(),
                         step};

  parallel(plan.tasks, grain(plan), [&](int64_t task) {
    const Workspace workspace(0, arrays * array * static_cast<int64_t>(sizeof(S)));
    S* const scratch = static_cast<S*>(workspace.table);
    std::memset(scratch, 0, static_cast<size_t>(arrays * array) * sizeof(S));
    S* const squares = scratch + margin;
    for (int64_t block = task * plan.blocks / plan.tasks; block < (task + 1) * plan.blocks / plan.tasks; ++block) {
      const BlockRows rows = rows_of_block(view, plan, block, width);
      op.square(rows, squares);
      arrays == 1 ? op.forward(rows, squares) : op.backward(rows, squares, squares + array, squares + 2 * array);
    }
  });
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
