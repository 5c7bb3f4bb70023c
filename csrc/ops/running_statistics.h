// Running statistics in training: what they must be, and how kernels come to write them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/types.h"

namespace normfused::ops {

// Refuses a tensor that cannot be written; tells autograd that it changes.
void begin_update(const at::Tensor& tensor);
// Brings the values home where they were written to a contiguous copy.
void finish_update(const at::Tensor& tensor, const at::Tensor& written);

struct RunningStatistics {
  const std::optional<at::Tensor>&mean, &var, &num_batches_tracked, &skipped;
  std::optional<double> momentum;  // none: cumulative averages
  double eps;
  int64_t correction;
  bool update_in_backward;

  void check(int64_t channels, const at::Device& device) const;
  // All buffers are refused before one is written. The arguments point to memory that is kept until finish(). Without
  // update_in_backward they point to no buffer inside a backward pass: there a forward recomputes what has already
  // updated them.
  void begin(BatchStatistics& args);
  void finish();

  std::optional<at::Tensor> dense_mean{}, dense_var{};
};

}  // namespace normfused::ops
