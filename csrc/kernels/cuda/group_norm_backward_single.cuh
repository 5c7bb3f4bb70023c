// Backward of group norm in one launch: a block, or a cluster, stages whole groups in shared memory, sums their
// channels, combines these sums by group, and applies.
#pragma once

#include "kernels/cuda/group_norm.cuh"

namespace normfused::cuda {

// The normalization of a channel of a sample.
struct GroupNormalization {
  GroupNormBackward args;
  Divider<uint64_t> by_width{static_cast<uint64_t>(args.view.width())};
  Divider<uint64_t> by_channels{static_cast<uint64_t>(args.view.channels)};

  NF_DEVICE Normalization operator()(int64_t c) const {
    const auto statistic = static_cast<int64_t>(by_width(static_cast<uint64_t>(c)));
    const auto sample = static_cast<int64_t>(by_channels(static_cast<uint64_t>(c)));
    const auto parameter = [&](const SampleParameter& values, double absent) {
      return read(values, values.by_sample ? c : c - sample * args.view.channels, absent);
    };
    return {args.mean[statistic], args.invstd[statistic], parameter(args.weight, 1), parameter(args.bias, 0)};
  }
};

// GradSumsOp of the channels of samples.
template <class T, bool kFused>
struct GroupGradSumsOp : GradSumsOp<T, kFused> {
  using typename GradSumsOp<T, kFused>::State;
  GroupNormalization normalization;

  NF_DEVICE State start(int64_t channel) const { return this->state_of(normalization(channel)); }
};

// Finish of a tile with whole groups.
template <class S, bool kFused>
struct FinishGroupsTogether {
  FinishBackward<S, kFused> channels;
  FinishGroupsBackward<S> groups;
  GroupNormalization normalization;

  using Preloaded = Normalization;
  NF_DEVICE Preloaded preload(int64_t c) const { return normalization(c); }
  NF_DEVICE void prefetch(int64_t) const {}  // GroupGradSumsOp::start() has loaded it
  NF_DEVICE void operator()(int64_t c, const double (&sums)[2], const Normalization& n) const { channels(c, sums, n); }
  NF_DEVICE void finish_together(int64_t first, int64_t last) const {
    for_statistics_of(groups, normalization.by_width, normalization.args.view.width(), first, last);
  }
};

}  // namespace normfused::cuda
