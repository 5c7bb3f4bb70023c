// Synchronized batch norm: each rank packs the moments of its share of the batch, and all ranks merge the packed
// moments to the statistics of the whole batch.
#pragma once

#include "kernels/cuda/batch_norm.cuh"

namespace normfused::cuda {

// A Finish that packs mean and M2 into words for the other ranks (see rank_words() in types.h).
template <class S>
struct WriteMoments {
  PackMoments args;

  using Preloaded = NoPreload;
  NF_DEVICE Preloaded preload(int64_t) const { return {}; }
  NF_DEVICE void prefetch(int64_t) const {}
  NF_DEVICE void operator()(int64_t c, const double (&results)[2], const Preloaded&) const {
    const Moments moments{args.view.positions(), results[0], results[1]};
    reinterpret_cast<RankMoments<S>*>(args.words + 1)[c] = packed<S>(moments);
    if (c == 0) args.words[0] = moments.count;
  }
};

// Merges a channel's moments of all ranks, in the order of the ranks, and finishes its statistics. Without any values
// the running statistics keep their values.
template <class S>
struct MergeChannel {
  MergeRanks args;

  NF_DEVICE void operator()(int64_t c) const {
    const Moments moments = merged<S>(args, c);
    if (c == 0) *args.count = moments.count;
    if (moments.count == 0)
      args.mean[c] = args.invstd[c] = 0;
    else
      finish_statistics(args, c, moments, load_running(args, c));
  }
};

// Increments the counter of batches, in a separate launch after every channel has read the counter.
struct CountBatch {
  int64_t* num_batches_tracked;
  const int64_t* count;

  NF_DEVICE void operator()(int64_t) const { *num_batches_tracked += *count > 0; }
};

}  // namespace normfused::cuda
