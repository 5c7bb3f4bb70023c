// Forward of group norm of channels-last tensors in one launch: a block, or a cluster, stages whole groups in shared
// memory, computes the moments of their channels, merges them by group, and applies.
#pragma once

#include "kernels/cuda/channel_stats.cuh"
#include "kernels/cuda/group_norm.cuh"

namespace normfused::cuda {

// Finish of a tile with whole groups.
template <class S>
struct FinishGroupMoments {
  FinishGroups<S> groups;
  double *mean, *m2;  // those that `groups` reads; written
  Divider<uint64_t> by_width{static_cast<uint64_t>(groups.parts)};

  using Preloaded = NoPreload;
  NF_DEVICE Preloaded preload(int64_t) const { return {}; }
  NF_DEVICE void prefetch(int64_t) const {}
  NF_DEVICE void operator()(int64_t c, const double (&results)[2], const Preloaded&) const {
    mean[c] = results[0];
    m2[c] = results[1];
  }
  NF_DEVICE void finish_together(int64_t first, int64_t last) const {
    for_statistics_of(groups, by_width, groups.parts, first, last);
  }
};

}  // namespace normfused::cuda
