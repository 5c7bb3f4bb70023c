// A batch that is shared out over ranks: the moments of a share, and the statistics of all.
#pragma once

#include "kernels/cuda/batch_norm.cuh"

namespace normfused::cuda {

// Results are a mean and an M2.
template <class S>
struct WriteMoments {
  PackMoments args;

  using Known = Nothing;
  NF_DEVICE Known load(int64_t) const { return {}; }
  NF_DEVICE void prefetch(int64_t) const {}
  NF_DEVICE void operator()(int64_t c, const double (&results)[2], const Known&) const {
    const Moments moments{args.view.positions(), results[0], results[1]};
    reinterpret_cast<RankMoments<S>*>(args.words + 1)[c] = packed<S>(moments);
    if (c == 0) args.words[0] = moments.count;
  }
};

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

// After all channels have read the counter.
struct CountBatch {
  int64_t* num_batches_tracked;
  const int64_t* count;

  NF_DEVICE void operator()(int64_t) const { *num_batches_tracked += *count > 0; }
};

}  // namespace normfused::cuda
