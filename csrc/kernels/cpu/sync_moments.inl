// Synchronized batch norm: the moments of one rank's part of a batch, and the statistics of the whole batch.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/batch_norm.inl"

namespace normfused::cpu::NF_ISA {
namespace {

// Writes the message of this rank: count, mean and standard deviation of each channel.
template <class T>
void pack_moments(const PackMoments& args, const Parallel& parallel) {
  using S = compute_t<T>;
  const ChannelView& view = args.view;
  const MomentsOp<T, false> op{static_cast<const T*>(args.input), args.eps};
  args.words[0] = view.positions();
  auto* const moments = reinterpret_cast<RankMoments<S>*>(args.words + 1);
  reduce_tensor(op, view, sizeof(T), parallel, [&](const ResultTable& results, int64_t c0, int64_t c1) {
    recompute_moments(op, view, results, c0, c1);
    for (int64_t c = c0; c < c1; ++c) moments[c] = packed<S>(Moments{view.positions(), results(0, c), results(1, c)});
  });
}

// Merges the messages of all ranks to the statistics of the batch and updates the running statistics.
template <class S>
void merge_ranks_of(const MergeRanks& args) {
  const Workspace workspace(2 * args.channels, 0);
  const ResultTable results{workspace.results, args.channels};
  for (int64_t c = 0; c < args.channels; ++c) {
    const Moments moments = merged<S>(args, c);
    results(0, c) = moments.mean;
    results(1, c) = moments.m2;
  }
  *args.count = 0;
  for (int64_t rank = 0; rank < args.ranks; ++rank) *args.count += args.words[rank * args.stride];
  if (*args.count == 0) {
    std::fill_n(args.mean, args.channels, 0.);
    std::fill_n(args.invstd, args.channels, 0.);
    return;
  }
  const double factor = next_update_factor(args);
  for_each_channel_chunk(0, args.channels,
                         [&](int64_t c0, int64_t n) { finish_statistics(args, *args.count, results, factor, c0, n); });
}

inline void merge_ranks(const MergeRanks& args, const Parallel&) {
  args.is_double ? merge_ranks_of<double>(args) : merge_ranks_of<float>(args);
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
