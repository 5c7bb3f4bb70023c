// Statistics of a batch that is distributed over ranks, as torch operators. The caller exchanges the packed moments
// between the two operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "ops/running_statistics.h"

namespace normfused::ops {

// The count, means and standard deviations of `input`, int64 of shape (rank_words,): see rank_words() in
// kernels/types.h.
at::Tensor pack_moments(const at::Tensor& input, double eps);

// Merges the moments of all ranks, one rank per row of `words`. Returns `statistics` (see batch_norm.h) and `count`,
// the number of elements per channel on all ranks together, int64 of shape (). Updates the buffers of running(), unless
// the count is 0.
struct MergeRanksCall {
  using Result = std::tuple<at::Tensor, at::Tensor>;  // statistics, count
  using Signature = Result(const at::Tensor&, int64_t, int64_t, const OptionalTensor&, const OptionalTensor&,
                           const OptionalTensor&, std::optional<double>, double, int64_t, const OptionalTensor&, bool);

  const at::Tensor& words;
  int64_t channels;
  int64_t own_count;  // of this rank; below 2 the total is checked to be not 1, which waits for the device
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  const OptionalTensor& num_batches_tracked;
  std::optional<double> momentum;
  double eps;
  int64_t correction;
  const OptionalTensor& nonfinite_batches;
  bool update_in_backward;

  RunningStatistics running() const {
    return {running_mean, running_var, num_batches_tracked, nonfinite_batches,
            momentum,     eps,         correction,          update_in_backward};
  }
};
MergeRanksCall::Result merge_ranks(const MergeRanksCall& call);

}  // namespace normfused::ops
