// A batch that is shared out over ranks, as torch operators. What goes from rank to rank between the two is for the
// caller to send.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "ops/batch_norm.h"

namespace normfused::ops {

// Count, means and standard deviations of `input`, int64 of shape (words): see rank_words() in kernels/types.h.
at::Tensor pack_moments(const at::Tensor& input);

// The `statistics` (see batch_norm.h) of all ranks, whose words are the rows of `words`, and of how many values a
// channel they are: `count`, int64 of shape (). Updates as batch_norm_training does; where there are no values,
// nothing. `own_count` is that of this rank: below 2 it is made sure that all ranks together have two, which waits for
// a device.
std::tuple<at::Tensor, at::Tensor> merge_ranks(const at::Tensor& words, int64_t channels, int64_t own_count,
                                               const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                               const OptionalTensor& num_batches_tracked,
                                               std::optional<double> momentum, double eps, int64_t correction,
                                               const OptionalTensor& nonfinite_batches, bool update_in_backward);

}  // namespace normfused::ops
