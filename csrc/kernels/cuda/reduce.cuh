// Reductions of every channel to a few sums, and what is done with them, in one launch. An Op says what is summed:
//
//   S, Sum, kInputs, kSums       types of the arithmetic and of the sums; how many tensors are read, and how many sums
//   input(k), kRequired          the tensors, and how many are always there; others may be null, and then read as 0
//   bits<n>(offset)              what else is read with n values at an offset: a bit for each
//   State, start(channel)        what a thread keeps for a channel while it reads, and an empty one
//   kStartsFromMemory            whether that depends on the channel
//   accumulate<n, masked>(state, values, mask, bits, first)
//                                takes in n values of each input
//   sums(state, count, channel, sums)
//                                a state as sums that can be joined with those of any other thread
//   join(k, a, b), empty(k)
//   results(channel, sums)       turns the joined sums into what was asked for
//   kRecomputes, is_valid(sums), recompute(begin, channels, group, leads, sums)
//                                whether that can fail, whether it did, and the slow way, for all channels that a block
//                                finishes at once
//
// A Finish says what becomes of a channel's results; it is called once for each channel, with what it load()ed before
// these were there: prefetch() comes first of all. An Apply, where there is one, is done by the block itself.
#pragma once

#include "kernels/cuda/apply.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/walk.cuh"

namespace normfused::cuda {

// Memory of a launch: results of each split before they are merged, and tickets for each tile: one for each group of
// splits, and one for the groups where there are several.
template <class Sum>
struct Partials {
  Sum* data;  // (splits, sums, channels)
  unsigned* tickets;
  int64_t channels;
  int splits, group, groups;

  static constexpr int tickets_each(int groups) { return groups > 1 ? groups + 1 : 1; }

  NF_DEVICE Sum& at(int64_t split, int sums, int k, int64_t channel) const {
    return data[(split * sums + k) * channels + channel];
  }
};

template <class Op, int kValues, bool kMasked>
NF_DEVICE typename Op::State reduce_row(const Op& op, const RowsPlan& plan, int64_t channel, int64_t split, int lane,
                                        int64_t& count) {
  using T = typename Op::T;
  using S = typename Op::S;
  RowIterator<kValues, kMasked> walk(plan, channel, split, lane);
  const int64_t numel = plan.view.numel();
  typename Op::State state = op.start(channel);

  // A round: as many vectors as are in flight together, or, where it is not full, what is left of them.
  constexpr int kVectors = row_vectors_in_flight(Op::kInputs), kCount = kVectors * kValues;
  const auto take = [&](auto full) {
    constexpr bool kFull = decltype(full)::value, kCounts = kMasked || !kFull;
    Vector<T, kValues> loaded[Op::kInputs][kVectors];
    int64_t offsets[kVectors];
    uint32_t mask = 0, bits = 0;
    bool within = kFull;  // the tensor, all of all vectors
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const bool there = kFull || walk.has(1);
      uint32_t counts;
      offsets[v] = walk.next(counts);
      if (kMasked) within = within && offsets[v] + kValues <= numel;
      if (!there) continue;
      mask |= counts << (v * kValues);
      bits |= op.template bits<kValues>(offsets[v]) << (v * kValues);
    }
    const auto load = [&](const auto& load_one) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int k = 0; k < Op::kInputs; ++k)
          loaded[k][v] = k < Op::kRequired || op.input(k) != nullptr ? load_one(op.input(k), v) : Vector<T, kValues>{};
    };
    if (within)
      load([&](const T* tensor, int v) { return Vector<T, kValues>::load(tensor + offsets[v]); });
    else
      load([&](const T* tensor, int v) {
        if ((mask >> (v * kValues) & kWhole<kValues>) == 0) return Vector<T, kValues>{};
        return load_masked<false, T, kValues>(tensor, offsets[v], numel);
      });
    if (kCounts && mask == 0) return;
    S values[Op::kInputs][kCount];
#pragma unroll
    for (int k = 0; k < Op::kInputs; ++k)
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[k][i] = widen<S>(loaded[k][i / kValues].value[i % kValues]);
    op.template accumulate<kCount, kCounts>(state, values, mask, bits, count == 0);
    count += kCounts ? __popc(mask) : kCount;
  };
  while (walk.has(kVectors)) take(std::true_type{});
  if (walk.has(1)) take(std::false_type{});
  return state;
}

// Joins what every step-th of the splits from first to last left for a channel, of which each lane takes some.
template <class Op>
NF_DEVICE void join_splits(const Partials<typename Op::Sum>& partials, int64_t channel, int first, int last, int step,
                           int lane, int lanes, typename Op::Sum (&sums)[Op::kSums]) {
#pragma unroll 4
  for (int split = first + lane * step; split < last; split += lanes * step)
#pragma unroll
    for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::join(k, sums[k], partials.at(split, Op::kSums, k, channel));
}

// Whether this block is to finish channels [first, last): it is if it is the last of all splits to arrive. The last of
// a group of them merges these first, in the place of its first one. All threads of the block take part.
template <class Op>
NF_DEVICE bool arrive(const Partials<typename Op::Sum>& partials, int64_t first, int64_t last) {
  using Sum = typename Op::Sum;
  if (partials.splits == 1) {
    __syncthreads();
    return true;
  }
  unsigned* const tickets = partials.tickets + blockIdx.x * Partials<Sum>::tickets_each(partials.groups);
  const int group = static_cast<int>(blockIdx.y) / partials.group, begin = group * partials.group;
  const int end = begin + partials.group < partials.splits ? begin + partials.group : partials.splits;
  if (!last_to_arrive(tickets + group, end - begin)) return false;
  if (partials.groups == 1) return true;
  const int lanes = lanes_for(last - first), lane = threadIdx.x % lanes;
  for (int64_t from = first; from < last; from += kThreads / lanes) {
    const int64_t channel = from + threadIdx.x / lanes;
    Sum sums[Op::kSums];
    for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::empty(k);
    if (channel < last) join_splits<Op>(partials, channel, begin, end, 1, lane, lanes, sums);
    join_lanes<Op>(sums, lanes);
    if (lane == 0 && channel < last)
      for (int k = 0; k < Op::kSums; ++k) partials.at(begin, Op::kSums, k, channel) = sums[k];
  }
  return last_to_arrive(tickets + partials.groups, partials.groups);
}

// Merges what all groups of splits left for channels [first, last) and finishes them. All threads of the block take
// part.
template <class Op, class Finish>
NF_DEVICE void finish_channels(const Op& op, const Finish& finish, const Partials<typename Op::Sum>& partials,
                               int64_t first, int64_t last) {
  using Sum = typename Op::Sum;
  const int lanes = lanes_for(last - first);
  const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes, groups = kThreads / lanes;
  for (int64_t begin = first; begin < last; begin += groups) {
    const int64_t channel = begin + group;
    typename Finish::Known known{};
    if (lane == 0 && channel < last) known = finish.load(channel);
    Sum sums[Op::kSums];
    for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::empty(k);
    const int step = partials.groups > 1 ? partials.group : 1;
    if (channel < last) join_splits<Op>(partials, channel, 0, partials.splits, step, lane, lanes, sums);
    join_lanes<Op>(sums, lanes);
    const bool leads = lane == 0 && channel < last;
    if (leads) op.results(channel, sums);
    if constexpr (Op::kRecomputes)
      if (__syncthreads_or(leads && !op.is_valid(sums))) {
        const int64_t left = last - begin;
        op.recompute(begin, left < groups ? static_cast<int>(left) : groups, group, leads, sums);
      }
    if (leads) finish(channel, sums, known);
  }
}

template <class Op, class Finish, class Apply, int kValues, bool kMasked>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    reduce_rows(const Op op, const Finish finish, const Apply apply, const RowsPlan plan,
                const Partials<typename Op::Sum> partials) {
  using Sum = typename Op::Sum;
  allow_next_launch();
  const int lane = threadIdx.x % plan.lanes, groups = kThreads / plan.lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * groups, channel = first + threadIdx.x / plan.lanes;
  const int64_t last = first + groups < plan.view.channels ? first + groups : plan.view.channels;

  if (channel < last && lane == 0) finish.prefetch(channel);
  Sum sums[Op::kSums];
  for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::empty(k);
  if (channel < last) {
    int64_t count = 0;
    const auto state =
        reduce_row<Op, kValues, kMasked>(op, plan, channel, static_cast<int64_t>(blockIdx.y), lane, count);
    if (count > 0) op.sums(state, count, channel, sums);
  }
  join_lanes<Op>(sums, plan.lanes);
  if (channel < last && lane == 0)
    for (int k = 0; k < Op::kSums; ++k) partials.at(blockIdx.y, Op::kSums, k, channel) = sums[k];
  if (!arrive<Op>(partials, first, last)) return;
  finish_channels(op, finish, partials, first, last);

  if constexpr (!std::is_same_v<Apply, Nothing>) {
    __syncthreads();  // the coefficients are there
    apply.prologue();
    if (channel < last) apply_row<Apply, kValues, kMasked>(apply, plan, channel, lane);
  }
}

// The states that a thread begins with. What a channel's is made from is loaded and computed once for the block.
template <class Op, int kValues>
NF_DEVICE void start_columns(const Op& op, const ColumnIterator<kValues>& walk, int64_t first, int64_t last,
                             typename Op::State* of_channels, typename Op::State (&state)[kValues]) {
  if constexpr (Op::kStartsFromMemory) {
    for (int64_t c = first + threadIdx.x; c < last; c += kThreads) of_channels[c - first] = op.start(c);
    __syncthreads();
    int64_t channels[kValues];
    walk.channels(channels);
#pragma unroll
    for (int i = 0; i < kValues; ++i) state[i] = of_channels[channels[i] < last ? channels[i] - first : 0];
    __syncthreads();  // the block's states come to the same place
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) state[i] = op.start(0);
  }
}

// The values of a thread's columns in one split, each with a state of its own.
template <class Op, int kValues>
NF_DEVICE void accumulate_columns(const Op& op, const ColumnsPlan& plan, ColumnIterator<kValues>& walk,
                                  typename Op::State (&state)[kValues]) {
  using T = typename Op::T;
  using S = typename Op::S;
  constexpr int kRows = column_vectors_in_flight(Op::kInputs, sizeof(S) > sizeof(float));
  const int64_t numel = plan.view.numel();
  bool first = true;
  int64_t end = numel;  // offset of the tensor's last vector, where it is short and this thread's
  // A round: as many rows as are in flight together, or, where it is not full, what is left of them.
  const auto take = [&](auto full) {
    constexpr bool kFull = decltype(full)::value;
    Vector<T, kValues> loaded[Op::kInputs][kRows];
    uint32_t bits[kRows], mask = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool in_split = kFull || walk.has(1);
      const int64_t offset = walk.next();
      const bool there = kFull || (in_split && offset + kValues <= numel);
      if (!kFull && in_split && !there && offset < numel) end = offset;
      mask |= static_cast<uint32_t>(there) << r;
      bits[r] = there ? op.template bits<kValues>(offset) : 0;
#pragma unroll
      for (int k = 0; k < Op::kInputs; ++k)
        loaded[k][r] = there && (k < Op::kRequired || op.input(k) != nullptr)
                           ? Vector<T, kValues>::load(op.input(k) + offset)
                           : Vector<T, kValues>{};
    }
    if (!kFull && mask == 0) return;
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
      op.template accumulate<kRows, !kFull>(state[i], values, mask, own, first);
    }
    first = false;
  };
  while (walk.has(kRows) && (plan.repeat == 1 || walk.ahead(kRows - 1) + kValues <= numel)) take(std::true_type{});
  if (walk.has(1)) take(std::false_type{});
  if (end == numel) return;
  const uint32_t bits = op.template bits<kValues>(end);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (end + i >= numel) break;
    S values[Op::kInputs][1];
#pragma unroll
    for (int k = 0; k < Op::kInputs; ++k)
      values[k][0] = k < Op::kRequired || op.input(k) != nullptr ? widen<S>(op.input(k)[end + i]) : S{};
    op.template accumulate<1, false>(state[i], values, 0, bits >> i & 1, first);
  }
}

// Joins the states of all threads for one of the channels of a tile that begins with channel `first`, of which each
// lane takes some.
template <class Op, int kValues>
NF_DEVICE void join_states(const Op& op, const ColumnsPlan& plan, const ColumnIterator<kValues>& walk,
                           const typename Op::State* states, int64_t first, int channel, int lane, int lanes,
                           typename Op::Sum (&sums)[Op::kSums]) {
  const int across = plan.width * kValues;
  const int64_t each = walk.rows() / plan.height;
  const int rest = static_cast<int>(walk.rows() - each * plan.height);  // threads that have a row more
  const int last = (rest > 0 ? rest : plan.height) - 1;                 // the one that has the last row
  for (int i = lane; i < plan.columns_each() * plan.height; i += lanes) {
    const int x = plan.tile_column(channel, i / plan.height), y = i % plan.height;
    const bool lacks_one = y == last && walk.ends_before(blockIdx.x * static_cast<int64_t>(across) + x);
    const int64_t count = each + (y < rest) - lacks_one;
    if (count <= 0) continue;
    typename Op::Sum more[Op::kSums];
    op.sums(states[y * across + x], count, first + channel, more);
#pragma unroll
    for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::join(k, sums[k], more[k]);
  }
}

template <class Op, class Finish, class Apply, int kValues>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    reduce_columns(const Op op, const Finish finish, const Apply apply, const ColumnsPlan plan,
                   const Partials<typename Op::Sum> partials) {
  using Sum = typename Op::Sum;
  allow_next_launch();
  NF_SHARED(typename Op::State, states, [kThreads * kValues]);
  ColumnIterator<kValues> walk(plan, blockIdx.x, blockIdx.y);
  const int count = plan.tile_channels(), across = plan.width * kValues;
  const int64_t first = blockIdx.x * static_cast<int64_t>(count);
  const int64_t last = first + count < plan.view.channels ? first + count : plan.view.channels;
  if (first + threadIdx.x < last) finish.prefetch(first + threadIdx.x);
  typename Op::State state[kValues];
  start_columns(op, walk, first, last, states, state);
  accumulate_columns(op, plan, walk, state);

  // A column's threads stand above one another.
  if (walk.y < plan.height)
#pragma unroll
    for (int i = 0; i < kValues; ++i) states[walk.y * across + walk.x * kValues + i] = state[i];
  __syncthreads();
  const int lanes = lanes_for(count), lane = threadIdx.x % lanes;
  for (int from = 0; from < count; from += kThreads / lanes) {
    const int c = from + static_cast<int>(threadIdx.x) / lanes;
    Sum sums[Op::kSums];
    for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::empty(k);
    if (first + c < last) join_states(op, plan, walk, states, first, c, lane, lanes, sums);
    join_lanes<Op>(sums, lanes);
    if (lane == 0 && first + c < last)
      for (int k = 0; k < Op::kSums; ++k) partials.at(blockIdx.y, Op::kSums, k, first + c) = sums[k];
  }
  if (!arrive<Op>(partials, first, last)) return;
  finish_channels(op, finish, partials, first, last);

  if constexpr (!std::is_same_v<Apply, Nothing>) {
    __syncthreads();  // the coefficients are there
    apply.prologue();
    apply_tile<Apply, kValues>(apply, plan, blockIdx.x, 0, false);
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
