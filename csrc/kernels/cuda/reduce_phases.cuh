// Phases of a reduction: what a block does with one split, and how the splits of a channel become results. reduce.cuh
// composes the kernels of them. A reduce Op provides
//
//   T, S, Sum                        types of the inputs, of the arithmetic, and of the sums
//   kInputs, kSums                   how many inputs are read together, and how many sums a channel has
//   kRequiredInputs                  inputs that are always present; the others may be null and then read as 0
//   input(k)                         the tensors
//   mask_bits<n>(offset)             bits that belong to n values at an offset: those of an activation mask, or 0
//   State, start(channel)            what a thread accumulates for a channel, and its initial state
//   kStartsFromMemory                whether start() reads memory and so depends on the channel
//   accumulate<n, kMasked>(state, values, valid, mask_bits, first)
//                                    adds n values of each input to the state; with kMasked only those whose bit in
//                                    `valid` is set, at least one; `first`: the state is empty
//   fold(state, count, channel, sums)
//                                    converts the state of `count` values to sums that can be merged
//   merge(k, a, b), identity(k)      merges two values of sum k; the neutral value of that merge
//   finalize(channel, sums)          converts the merged sums to results, in place
//   kRecomputes, is_valid(results), recompute(first, channels, slot, is_leader, results)
//                                    whether results can be invalid, whether they are, and the slow way to compute
//                                    them, for all channels that the block finishes together
//
// A Finish consumes the results of a channel:
//
//   prefetch(channel)                starts to fetch the memory that it will read; called first
//   Preloaded, preload(channel)      loads its other inputs, before the results are merged
//   operator()(channel, results, preloaded)
//                                    called by one thread, once per channel
//   finish_together(first, last)     optional, if the launch applies: called by all threads of a block, after the
//                                    channels [first, last) of its tile are finished
//
// check_reduce_op() verifies both contracts at compile time.
#pragma once

#include "kernels/cuda/contracts.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/iterators.cuh"
#include "kernels/cuda/stage.cuh"

namespace normfused::cuda {

// The Preloaded of a Finish whose only input is the results.
struct NoPreload {};

// Device memory of a reduction: the partial sums of every split, and tickets. A tile has a ticket for each group of
// splits, and one more for the groups if there are several.
template <class Sum>
struct Partials {
  Sum* data;  // (splits, sums, channels)
  unsigned* tickets;
  int64_t channels;
  int splits, group, groups;  // group: splits that are merged together

  static constexpr int tickets_per_tile(int groups) { return groups > 1 ? groups + 1 : 1; }

  NF_DEVICE Sum& at(int64_t split, int sums, int k, int64_t channel) const {
    return data[(split * sums + k) * channels + channel];
  }
};

// The channels [first, last) that a block reduces.
struct ChannelRange {
  int64_t first, last;
};

// The tile and the split that a block reduces.
struct BlockPlace {
  unsigned tile;
  int split;
};

// Channels first: the place of a thread in a tile.
struct RowPlace {
  int lane;
  int64_t channel;
  ChannelRange range;  // of the tile

  NF_DEVICE RowPlace(const RowsPlan& plan, int64_t tile) : lane(threadIdx.x % plan.lanes) {
    const int64_t first = tile * plan.channels, end = first + plan.channels;
    channel = first + threadIdx.x / plan.lanes;
    range = {first, end < plan.view.channels ? end : plan.view.channels};
  }
  NF_DEVICE bool has_channel() const { return channel < range.last; }
};

template <class Op>
NF_DEVICE void set_identity(typename Op::Sum (&sums)[Op::kSums]) {
  for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::identity(k);
}

template <class Op>
NF_DEVICE void store_partial(const Partials<typename Op::Sum>& partials, int64_t split, int64_t channel,
                             const typename Op::Sum (&sums)[Op::kSums]) {
  for (int k = 0; k < Op::kSums; ++k) partials.at(split, Op::kSums, k, channel) = sums[k];
}

// --- accumulate, channels first

// The vectors that a thread has in flight together. Bit v * kValues + i of the bitmasks is for value i of vector v.
template <int kValues, int kVectors>
struct RowVectors {
  int64_t offsets[kVectors];
  uint32_t valid = 0, mask_bits = 0;
  bool within;  // all vectors are present and lie wholly within the tensor
};

// Advances the iterator by kVectors vectors, or with kFull false by the remaining ones.
template <bool kFull, int kVectors, class Op, int kValues, bool kMasked>
NF_DEVICE RowVectors<kValues, kVectors> next_vectors(const Op& op, RowIterator<kValues, kMasked>& it, int64_t numel) {
  RowVectors<kValues, kVectors> vectors;
  vectors.within = kFull;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const bool present = kFull || !it.done();
    uint32_t valid;
    vectors.offsets[v] = it.next(valid);
    if (kMasked) vectors.within = vectors.within && vectors.offsets[v] + kValues <= numel;
    if (!present) continue;
    vectors.valid |= valid << (v * kValues);
    vectors.mask_bits |= op.template mask_bits<kValues>(vectors.offsets[v]) << (v * kValues);
  }
  return vectors;
}

// Loads these vectors of every input. All loads are independent of each other.
template <class Op, int kValues, int kVectors>
NF_DEVICE void load_vectors(const Op& op, const RowVectors<kValues, kVectors>& vectors, int64_t numel,
                            Vector<typename Op::T, kValues> (&loaded)[Op::kInputs][kVectors]) {
  using T = typename Op::T;
  using V = Vector<T, kValues>;
  const auto load_with = [&](const auto& load) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
      for (int k = 0; k < Op::kInputs; ++k)
        loaded[k][v] = k < Op::kRequiredInputs || op.input(k) != nullptr ? load(op.input(k), v) : V{};
  };
  if (vectors.within)
    load_with([&](const T* tensor, int v) { return V::load(tensor + vectors.offsets[v]); });
  else
    load_with([&](const T* tensor, int v) {
      if ((vectors.valid >> (v * kValues) & kAllValid<kValues>) == 0) return V{};
      return load_clipped<false, T, kValues>(tensor, vectors.offsets[v], numel);
    });
}

// The same for the thread's vectors from number `first` on, whose copies are staged. With kFull all of them exist.
template <bool kFull, class Op, int kValues, int kVectors>
NF_DEVICE void load_staged(Stage<typename Op::T, kValues>& stage, int first,
                           Vector<typename Op::T, kValues> (&loaded)[Op::kInputs][kVectors]) {
  stage.wait(first + kVectors);
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int k = 0; k < Op::kInputs; ++k)
      loaded[k][v] =
          kFull || first + v < stage.vectors() ? stage.load(first + v, k) : Vector<typename Op::T, kValues>{};
}

// Accumulates a lane's values of one channel and split. Returns the state, and in `count` the number of values.
// `stage`: the Stage that holds the values, or a NoStage.
template <class Op, int kValues, bool kMasked, class Staged>
NF_DEVICE typename Op::State accumulate_row(const Op& op, const RowsPlan& plan, int64_t channel, int64_t split,
                                            int lane, Staged& stage, int64_t& count) {
  using S = typename Op::S;
  constexpr int kVectors = row_vectors_in_flight(Op::kInputs), kCount = kVectors * kValues;
  RowIterator<kValues, kMasked> it(plan, channel, split, lane);
  const int64_t numel = plan.view.numel();
  typename Op::State state = op.start(channel);
  [[maybe_unused]] int first = 0;

  const auto consume = [&](auto full) {
    constexpr bool kFull = decltype(full)::value, kSomeInvalid = kMasked || !kFull;
    const auto vectors = next_vectors<kFull, kVectors>(op, it, numel);
    Vector<typename Op::T, kValues> loaded[Op::kInputs][kVectors];
    if constexpr (std::is_same_v<Staged, NoStage>)
      load_vectors(op, vectors, numel, loaded);
    else
      load_staged<kFull, Op>(stage, first, loaded);
    first += kVectors;
    if (kSomeInvalid && vectors.valid == 0) return;
    S values[Op::kInputs][kCount];
#pragma unroll
    for (int k = 0; k < Op::kInputs; ++k)
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[k][i] = widen<S>(loaded[k][i / kValues].value[i % kValues]);
    op.template accumulate<kCount, kSomeInvalid>(state, values, vectors.valid, vectors.mask_bits, count == 0);
    count += kSomeInvalid ? __popc(vectors.valid) : kCount;
  };
  while (it.has(kVectors)) consume(std::true_type{});
  if (!it.done()) consume(std::false_type{});
  return state;
}

// --- accumulate, matrices

// Block-wide: the initial states of a thread's columns. If they come from memory, the block loads and computes each
// channel's state once, in `shared_states`, one per channel of the range. All threads of the block must call it; in
// that case it ends with a barrier, after which `shared_states` may be overwritten.
template <class Op, int kValues>
NF_DEVICE void start_columns(const Op& op, const ColumnIterator<kValues>& it, const ChannelRange& range,
                             typename Op::State* shared_states, typename Op::State (&state)[kValues]) {
  if constexpr (Op::kStartsFromMemory) {
    const int count = static_cast<int>(range.last - range.first);
    for (int c = static_cast<int>(threadIdx.x); c < count; c += kThreads) shared_states[c] = op.start(range.first + c);
    __syncthreads();
    int64_t channels[kValues];
    it.channels(channels);
#pragma unroll
    for (int i = 0; i < kValues; ++i)
      state[i] = shared_states[channels[i] < range.last ? channels[i] - range.first : 0];
    __syncthreads();
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) state[i] = op.start(0);
  }
}

// Accumulates one iteration of a thread's rows: the next kRows, or with kFull false the remaining ones, of which the
// first is the thread's row number `index`. Returns the offset of a vector that reaches past the end of the tensor and
// is left to accumulate_clipped(), or numel.
template <bool kFull, int kRows, class Op, int kValues, class Staged>
NF_DEVICE int64_t accumulate_rows(const Op& op, ColumnIterator<kValues>& it, int64_t numel, Staged& stage, int& index,
                                  bool& first, typename Op::State (&state)[kValues]) {
  using S = typename Op::S;
  Vector<typename Op::T, kValues> loaded[Op::kInputs][kRows];
  uint32_t mask_bits[kRows], valid = 0;  // valid: a bit per row
  int64_t clipped = numel;
  if constexpr (!std::is_same_v<Staged, NoStage>) load_staged<kFull, Op>(stage, index, loaded);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const bool in_split = kFull || !it.done();
    const int64_t offset = it.next();
    const bool whole = kFull || (in_split && offset + kValues <= numel);
    if (!kFull && in_split && !whole && offset < numel) clipped = offset;
    valid |= static_cast<uint32_t>(whole) << r;
    mask_bits[r] = whole ? op.template mask_bits<kValues>(offset) : 0;
    if constexpr (std::is_same_v<Staged, NoStage>)
#pragma unroll
      for (int k = 0; k < Op::kInputs; ++k)
        loaded[k][r] = whole && (k < Op::kRequiredInputs || op.input(k) != nullptr)
                           ? Vector<typename Op::T, kValues>::load(op.input(k) + offset)
                           : Vector<typename Op::T, kValues>{};
  }
  if (!kFull && valid == 0) return clipped;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    S values[Op::kInputs][kRows];
    uint32_t column_bits = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      column_bits |= (mask_bits[r] >> i & 1) << r;
#pragma unroll
      for (int k = 0; k < Op::kInputs; ++k) values[k][r] = widen<S>(loaded[k][r].value[i]);
    }
    op.template accumulate<kRows, !kFull>(state[i], values, valid, column_bits, first);
  }
  first = false;  // not index == 0, which costs a register where nothing is staged
  index += kRows;
  return clipped;
}

// Accumulates the values before the end of the tensor of a vector that reaches past it.
template <class Op, int kValues>
NF_DEVICE void accumulate_clipped(const Op& op, int64_t offset, int64_t numel, bool first,
                                  typename Op::State (&state)[kValues]) {
  using S = typename Op::S;
  const uint32_t mask_bits = op.template mask_bits<kValues>(offset);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (offset + i >= numel) break;
    S values[Op::kInputs][1];
#pragma unroll
    for (int k = 0; k < Op::kInputs; ++k)
      values[k][0] = k < Op::kRequiredInputs || op.input(k) != nullptr ? widen<S>(op.input(k)[offset + i]) : S{};
    op.template accumulate<1, false>(state[i], values, 0, mask_bits >> i & 1, first);
  }
}

// Accumulates a thread's columns in one split, each in its own state. `stage`: the Stage that holds the values, or a
// NoStage.
template <class Op, int kValues, class Staged>
NF_DEVICE void accumulate_columns(const Op& op, const ColumnsPlan& plan, ColumnIterator<kValues>& it, Staged& stage,
                                  typename Op::State (&state)[kValues]) {
  constexpr int kRows = column_vectors_in_flight(Op::kInputs, sizeof(typename Op::S) > sizeof(float));
  const int64_t numel = plan.view.numel();
  int index = 0;
  bool first = true;
  int64_t clipped = numel;
  while (it.has(kRows) && (plan.repeat == 1 || it.ahead(kRows - 1) + kValues <= numel))
    accumulate_rows<true, kRows>(op, it, numel, stage, index, first, state);
  if (!it.done()) clipped = accumulate_rows<false, kRows>(op, it, numel, stage, index, first, state);
  if (clipped < numel) accumulate_clipped(op, clipped, numel, first, state);
}

// --- fold, matrices

// The states of a block's threads, in shared memory: (plan.height, columns of the tile).
template <class Op, int kValues>
struct ColumnStates {
  const ColumnsPlan& plan;
  const ColumnIterator<kValues>& it;
  const typename Op::State* data;

  // Folds the states of one channel of the tile and merges their sums. Each of `lanes` lanes processes every lanes-th
  // state. `first` is the tile's first channel.
  NF_DEVICE void fold(const Op& op, int64_t first, int channel, int lane, int lanes,
                      typename Op::Sum (&sums)[Op::kSums]) const {
    const int tile_columns = plan.width * kValues;
    // Thread row y of the block read `each` rows of the split, or one more if y < more. The last row of the split was
    // read by `last_reader`, and may end before some columns.
    const int64_t each = it.rows() / plan.height;
    const int more = static_cast<int>(it.rows() - each * plan.height);
    const int last_reader = (more > 0 ? more : plan.height) - 1;
    for (int i = lane; i < plan.columns_each() * plan.height; i += lanes) {
      const int x = plan.tile_column(channel, i / plan.height), y = i % plan.height;
      const bool lacks_one = y == last_reader && it.ends_before(it.tile_column() + x);
      const int64_t count = each + (y < more) - lacks_one;
      if (count <= 0) continue;
      typename Op::Sum folded[Op::kSums];
      op.fold(data[y * tile_columns + x], count, first + channel, folded);
#pragma unroll
      for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::merge(k, sums[k], folded[k]);
    }
  }
};

// --- merge and finish

// Every step-th split in [begin, end).
struct SplitRange {
  int begin, end, step;
};

// Merges the partial sums of these splits for a channel. Each of `lanes` lanes processes every lanes-th of the splits.
template <class Op>
NF_DEVICE void merge_splits(const Partials<typename Op::Sum>& partials, int64_t channel, const SplitRange& range,
                            int lane, int lanes, typename Op::Sum (&sums)[Op::kSums]) {
#pragma unroll 4
  for (int split = range.begin + lane * range.step; split < range.end; split += lanes * range.step)
#pragma unroll
    for (int k = 0; k < Op::kSums; ++k) sums[k] = Op::merge(k, sums[k], partials.at(split, Op::kSums, k, channel));
}

// Grid-wide: whether this block is the one to finish its channels, because it is the last of all splits to arrive. The
// last block of a group of splits first merges that group's partial sums, in place of those of its first split. All
// threads of the block must call it, after they stored the block's partial sums; it begins with a barrier.
template <class Op>
NF_DEVICE bool arrive(const Partials<typename Op::Sum>& partials, const ChannelRange& range, const BlockPlace& place) {
  using Sum = typename Op::Sum;
  if (partials.splits == 1) {
    __syncthreads();
    return true;
  }
  unsigned* const tickets = partials.tickets + place.tile * Partials<Sum>::tickets_per_tile(partials.groups);
  const int group = place.split / partials.group, begin = group * partials.group;
  const int end = begin + partials.group < partials.splits ? begin + partials.group : partials.splits;
  if (!last_to_arrive(tickets + group, end - begin)) return false;
  if (partials.groups == 1) return true;
  const int lanes = lanes_for(range.last - range.first), lane = threadIdx.x % lanes;
  for (int64_t first = range.first; first < range.last; first += kThreads / lanes) {
    const int64_t channel = first + threadIdx.x / lanes;
    Sum sums[Op::kSums];
    set_identity<Op>(sums);
    if (channel < range.last) merge_splits<Op>(partials, channel, {begin, end, 1}, lane, lanes, sums);
    merge_lanes<Op>(sums, lanes);
    if (lane == 0 && channel < range.last) store_partial<Op>(partials, begin, channel, sums);
  }
  return last_to_arrive(tickets + partials.groups, partials.groups);
}

// Block-wide: merges the partial sums of all groups and finishes the block's channels, as many at once as lanes allow.
// All threads of the block must call it, after arrive() returned true.
template <class Op, class Finish>
NF_DEVICE void finish_channels(const Op& op, const Finish& finish, const Partials<typename Op::Sum>& partials,
                               const ChannelRange& range) {
  using Sum = typename Op::Sum;
  const int lanes = lanes_for(range.last - range.first), slots = kThreads / lanes;
  const int slot = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  for (int64_t first = range.first; first < range.last; first += slots) {
    const int64_t channel = first + slot;
    const bool is_leader = lane == 0 && channel < range.last;
    typename Finish::Preloaded preloaded{};
    if (is_leader) preloaded = finish.preload(channel);
    Sum sums[Op::kSums];
    set_identity<Op>(sums);
    const int step = partials.groups > 1 ? partials.group : 1;
    if (channel < range.last) merge_splits<Op>(partials, channel, {0, partials.splits, step}, lane, lanes, sums);
    merge_lanes<Op>(sums, lanes);
    if (is_leader) op.finalize(channel, sums);
    if constexpr (Op::kRecomputes)
      if (__syncthreads_or(is_leader && !op.is_valid(sums))) {
        const int64_t left = range.last - first;
        op.recompute(first, left < slots ? static_cast<int>(left) : slots, slot, is_leader, sums);
      }
    if (is_leader) finish(channel, sums, preloaded);
  }
}

// Cluster-wide: finishes the channels of a tile in the first of its blocks, which are a cluster. All threads of the
// cluster must call it, after they stored their partial sums; it begins and ends with a barrier.
template <class Op, class Finish>
NF_DEVICE void finish_in_cluster(const Op& op, const Finish& finish, const Partials<typename Op::Sum>& partials,
                                 const ChannelRange& range, int split) {
  sync_blocks(partials.splits);
  if (split == 0) {
    finish_channels(op, finish, partials, range);
    if constexpr (contracts::FinishesTogether<Finish>::value) {
      __syncthreads();  // the channels' results are written
      finish.finish_together(range.first, range.last);
    }
  }
  sync_blocks(partials.splits);
}

// Block-wide: finishes the channels of a tile and lets the blocks pass that will apply its splits.
template <class Op, class Finish>
NF_DEVICE void finish_and_release(const Op& op, const Finish& finish, const Partials<typename Op::Sum>& partials,
                                  const ChannelRange& range, unsigned* applicable) {
  finish_channels(op, finish, partials, range);
  release(applicable, static_cast<unsigned>(partials.splits));
}

}  // namespace normfused::cuda
