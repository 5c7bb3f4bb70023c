// Synchronized batch norm: the moments of one rank's part of a batch. merge_ranks.cpp merges those of all ranks.
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

}  // namespace
}  // namespace normfused::cpu::NF_ISA
