// Reductions of every channel to a few sums, and what is done with them, in one launch. An Op says what is summed:
//
//   S, Sum, kInputs, kSums       types of the arithmetic and of the sums; how many tensors are read, and how many sums
//   input(k), kRequired          the tensors, and how many are always there; others may be null, and then read as 0
//   bits<n>(offset)              what else is read with n values at an offset: a bit for each
//   State, start(channel)        what a thread keeps for a channel while it reads, and an empty one
//   accumulate<n, masked>(state, values, mask, bits, first)
//                                takes in n values of each input
//   sums(state, count, channel, sums)
//                                a state as sums that can be joined with those of any other thread
//   join(k, a, b), empty(k)
//   results(channel, sums)       turns the joined sums into what was asked for
//   kRepairs, sound(sums), repair(begin, channels, group, leads, sums)
//                                whether that can fail, whether it did, and the slow way, for all channels that a block
//                                finishes at once
//
// A Finish says what becomes of a channel's results; it is called once for each channel. An Apply, where there is one,
// is done by the block itself.
#pragma once

#include "kernels/cuda/apply.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/walk.cuh"

namespace normfused::cuda {

// Memory of a launch: results of each split before they are merged, and a ticket for each tile.
template <class Sum>
struct Partials {
  Sum* data;  // (splits, sums, columns)
  unsigned* tickets;
  int64_t columns;

  NF_DEVICE Sum& at(int64_t split, int sums, int k, int64_t column) const {
    return data[(split * sums + k) * columns + column];
  }
};

// Vectors of each input in flight: four loads, and at most 32 values to widen at once.
template <class Op, int kValues>
inline constexpr int kUnroll = 4 * kValues <= 32 ? 4 / Op::kInputs : 32 / kValues;

template <class Op, int kValues, bool kMasked>
NF_DEVICE typename Op::State reduce_row_walk(const Op& op, const RowsPlan& plan, int64_t channel, int64_t split,
                                             int lane, int64_t& count) {
  using T = typename Op::T;
  using S = typename Op::S;
  RowWalk<kValues, kMasked> walk(plan, channel, split, lane);
  const int64_t numel = plan.view.numel();
  typename Op::State state = op.start(channel);

  const auto take = [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value, kCount = kVectors * kValues;
    Vector<T, kValues> loaded[Op::kInputs][kVectors];
    uint32_t mask = 0, bits = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      uint32_t within;
      const int64_t offset = walk.next(within);
      mask |= within << (v * kValues);
      bits |= op.template bits<kValues>(offset) << (v * kValues);
#pragma unroll
      for (int k = 0; k < Op::kInputs; ++k) {
        if (k >= Op::kRequired && op.input(k) == nullptr)
          loaded[k][v] = {};
        else
          loaded[k][v] = kMasked ? load_masked<false, T, kValues>(op.input(k), offset, numel)
                                 : Vector<T, kValues>::load(op.input(k) + offset);
      }
    }
    if (kMasked && mask == 0) return;
    S values[Op::kInputs][kCount];
#pragma unroll
    for (int k = 0; k < Op::kInputs; ++k)
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[k][i] = widen<S>(loaded[k][i / kValues].value[i % kValues]);
    op.template accumulate<kCount, kMasked>(state, values, mask, bits, count == 0);
    count += kMasked ? __popc(mask) : kCount;
  };
  constexpr int kVectors = kUnroll<Op, kValues>;
  while (walk.has(kVectors)) take(std::integral_constant<int, kVectors>{});
  while (walk.has(1)) take(std::integral_constant<int, 1>{});
  return state;
}

// Merges what all splits left for channels [first, last) and finishes them. All threads of the block take part.
template <class Op, class Finish>
NF_DEVICE void finish_channels(const Op& op, const Finish& finish, const Partials<typename Op::Sum>& partials,
                               int splits, int repeat, int64_t first, int64_t last) {
  using Sum = typename Op::Sum;
  const int lanes = lanes_for(last - first);
  const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes, groups = kThreads / lanes;
  for (int64_t begin = first; begin < last; begin += groups) {
    const int64_t channel = begin + group;
    Sum sums[Op::kSums];
    for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::empty(k);
    if (channel < last) {
      for (int beside = 0; beside < repeat; ++beside) {
        const int64_t column = channel + beside * op.view.channels;
#pragma unroll 4
        for (int split = lane; split < splits; split += lanes)
#pragma unroll
          for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::join(k, sums[k], partials.at(split, Op::kSums, k, column));
      }
    }
    join_lanes<Op>(sums, lanes);
    const bool leads = lane == 0 && channel < last;
    if (leads) op.results(channel, sums);
    if constexpr (Op::kRepairs)
      if (__syncthreads_or(leads && !op.sound(sums))) {
        const int64_t left = last - begin;
        op.repair(begin, left < groups ? static_cast<int>(left) : groups, group, leads, sums);
      }
    if (leads) finish(channel, sums);
  }
}

template <class Op, class Finish, class Apply, int kValues, bool kMasked>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    reduce_rows(const Op op, const Finish finish, const Apply apply, const RowsPlan plan,
                const Partials<typename Op::Sum> partials) {
  using Sum = typename Op::Sum;
  NF_SHARED(Sum, of_warps, [kWarps * Op::kSums]);
  const int lane = threadIdx.x % plan.lanes, group = threadIdx.x / plan.lanes, groups = kThreads / plan.lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * groups;
  const int64_t last = first + groups < plan.view.channels ? first + groups : plan.view.channels;
  const int64_t channel = first + group;

  Sum sums[Op::kSums];
  for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::empty(k);
  if (channel < last) {
    int64_t count = 0;
    const auto state =
        reduce_row_walk<Op, kValues, kMasked>(op, plan, channel, static_cast<int64_t>(blockIdx.y), lane, count);
    if (count > 0) op.sums(state, count, channel, sums);
  }
  join_lanes<Op>(sums, kWarp);
  if (threadIdx.x % kWarp == 0)
    for (int k = 0; k < Op::kSums; ++k) of_warps[threadIdx.x / kWarp * Op::kSums + k] = sums[k];
  __syncthreads();
  const int warps = plan.lanes / kWarp;
  for (int i = threadIdx.x; i < groups * Op::kSums; i += kThreads) {
    const int g = i / Op::kSums, k = i % Op::kSums;
    Sum sum = Op::empty(k);
    for (int w = 0; w < warps; ++w) sum = Op::join(k, sum, of_warps[(g * warps + w) * Op::kSums + k]);
    if (first + g < last) partials.at(blockIdx.y, Op::kSums, k, first + g) = sum;
  }

  if (plan.splits == 1)
    __syncthreads();
  else if (!last_to_arrive(partials.tickets + blockIdx.x, gridDim.y))
    return;
  finish_channels(op, finish, partials, plan.splits, 1, first, last);

  if constexpr (!std::is_same_v<Apply, Nothing>) {
    __syncthreads();  // the coefficients are there
    apply.before();
    if (channel < last) apply_row_walk<Apply, kValues, kMasked>(apply, plan, channel, lane);
  }
}

template <class Op, class Finish, class Apply, int kValues>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    reduce_columns(const Op op, const Finish finish, const Apply apply, const ColumnsPlan plan,
                   const Partials<typename Op::Sum> partials) {
  using T = typename Op::T;
  using S = typename Op::S;
  using Sum = typename Op::Sum;
  NF_SHARED(typename Op::State, states, [kThreads * kValues]);
  ColumnWalk<kValues> walk(plan, blockIdx.x, blockIdx.y);
  const int64_t numel = plan.view.numel();

  typename Op::State state[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) state[i] = op.start(walk.column < plan.columns ? walk.channel(i) : 0);
  bool first = true;
  constexpr int kRows = 8 / Op::kInputs / (sizeof(S) > sizeof(float) ? 2 : 1);
  while (walk.has(kRows) && (plan.repeat == 1 || walk.ahead(kRows - 1) + kValues <= numel)) {
    Vector<T, kValues> loaded[Op::kInputs][kRows];
    uint32_t bits[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t offset = walk.next();
      bits[r] = op.template bits<kValues>(offset);
#pragma unroll
      for (int k = 0; k < Op::kInputs; ++k)
        loaded[k][r] = k < Op::kRequired || op.input(k) != nullptr ? Vector<T, kValues>::load(op.input(k) + offset)
                                                                   : Vector<T, kValues>{};
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      S values[Op::kInputs][kRows];
      uint32_t own = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        own |= (bits[r] >> i & 1) << r;
#pragma unroll
        for (int k = 0; k < Op::kInputs; ++k) values[k][r] = widen<S>(loaded[k][r].value[i]);
      }
      op.template accumulate<kRows, false>(state[i], values, 0, own, first);
    }
    first = false;
  }
  while (walk.has(1)) {
    const int64_t offset = walk.next();
    if (offset >= numel) break;  // the last row can be short
    Vector<T, kValues> loaded[Op::kInputs];
#pragma unroll
    for (int k = 0; k < Op::kInputs; ++k)
      loaded[k] = k < Op::kRequired || op.input(k) != nullptr
                      ? load_masked<false, T, kValues>(op.input(k), offset, numel)
                      : Vector<T, kValues>{};
    const uint32_t bits = op.template bits<kValues>(offset);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (offset + i >= numel) continue;
      S values[Op::kInputs][1];
#pragma unroll
      for (int k = 0; k < Op::kInputs; ++k) values[k][0] = widen<S>(loaded[k].value[i]);
      op.template accumulate<1, false>(state[i], values, 0, bits >> i & 1, first);
    }
    first = false;
  }

  // A column's threads stand above one another.
  const int across = plan.width * kValues;
  if (walk.y < plan.height)
#pragma unroll
    for (int i = 0; i < kValues; ++i) states[walk.y * across + walk.x * kValues + i] = state[i];
  __syncthreads();
  const int64_t begin = blockIdx.x * static_cast<int64_t>(across);
  const int lanes = lanes_for(across), lane = threadIdx.x % lanes;
  for (int i = 0; i < across; i += kThreads / lanes) {
    const int x = i + static_cast<int>(threadIdx.x) / lanes;
    const int64_t column = begin + x;
    const bool there = x < across && column < plan.columns;
    Sum sums[Op::kSums];
    for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::empty(k);
    if (there) {
      const int64_t channel = plan.repeat == 1 ? column : column % plan.view.channels;
      const int64_t rows = walk.rows_of(column), each = rows / plan.height, rest = rows % plan.height;
      for (int y = lane; y < plan.height; y += lanes) {
        const int64_t count = each + (y < rest);
        if (count == 0) break;
        Sum more[Op::kSums];
        op.sums(states[y * across + x], count, channel, more);
#pragma unroll
        for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::join(k, sums[k], more[k]);
      }
    }
    join_lanes<Op>(sums, lanes);
    if (there && lane == 0)
      for (int k = 0; k < Op::kSums; ++k) partials.at(blockIdx.y, Op::kSums, k, column) = sums[k];
  }

  if (plan.splits == 1)
    __syncthreads();
  else if (!last_to_arrive(partials.tickets + blockIdx.x, gridDim.y))
    return;
  const int64_t end = begin + across < plan.view.channels ? begin + across : plan.view.channels;
  finish_channels(op, finish, partials, plan.splits, plan.repeat, begin, end);

  if constexpr (!std::is_same_v<Apply, Nothing>) {
    __syncthreads();  // the coefficients are there
    apply.before();
    apply_column_walk<Apply, kValues>(apply, plan, blockIdx.x, 0, false);
  }
}

// Starts the kernel that a plan asks for.
template <class Op, class Finish, class Apply>
cudaError_t reduce(const Op& op, const Finish& finish, const Apply& apply, const ReductionPlan& plan,
                   const Partials<typename Op::Sum>& partials, cudaStream_t stream) {
  constexpr int kValues = values_per_access(sizeof(typename Op::T));
  const LaunchConfig config{dim3(static_cast<unsigned>(plan.tiles()), static_cast<unsigned>(plan.splits())),
                            dim3(kThreads), stream};
  const auto start = [&](auto kernel, const auto& details) {
    return launch(config, kernel, op, finish, apply, details, partials);
  };
  if (!plan.by_rows)
    return plan.columns.values == 1 ? start(reduce_columns<Op, Finish, Apply, 1>, plan.columns)
                                    : start(reduce_columns<Op, Finish, Apply, kValues>, plan.columns);
  if (plan.rows.values == 1) return start(reduce_rows<Op, Finish, Apply, 1, false>, plan.rows);
  return plan.rows.masked ? start(reduce_rows<Op, Finish, Apply, kValues, true>, plan.rows)
                          : start(reduce_rows<Op, Finish, Apply, kValues, false>, plan.rows);
}

}  // namespace normfused::cuda
