#include "ops/sync_moments.h"

#include <ATen/Functions.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/backend.h"
#include "ops/find_operator.h"
#include "ops/layout.h"
#include "ops/running_statistics.h"

namespace normfused::ops {

namespace {

at::Tensor pack_moments_kernels(const at::Tensor& input) {
  TORCH_CHECK_VALUE(input.dim() >= 2, "input needs at least 2 dimensions, got shape ", input.sizes());
  const DType dtype = dtype_of(input.scalar_type());
  const auto options = input.options().dtype(at::kLong).memory_format(at::MemoryFormat::Contiguous);
  const int64_t words = rank_words(input.size(1), dtype);
  if (input.numel() == 0) return at::zeros({words}, options);
  const at::Tensor dense = as_dense(input);
  at::Tensor result = at::empty({words}, options);
  backend_of(input).pack_moments({*view_of(dense), dtype, dense.const_data_ptr(), result.mutable_data_ptr<int64_t>()},
                                 input.device());
  return result;
}

std::tuple<at::Tensor, at::Tensor> merge_ranks_kernels(
    const at::Tensor& words, int64_t channels, int64_t own_count, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
    double eps, int64_t correction, const OptionalTensor& nonfinite_batches, bool update_in_backward) {
  const bool is_double = words.dim() == 2 && words.size(1) == rank_words(channels, DType::kFloat64);
  TORCH_CHECK_VALUE(words.scalar_type() == at::kLong && words.dim() == 2 && words.stride(1) == 1 && channels > 0 &&
                        (is_double || words.size(1) == rank_words(channels, DType::kFloat32)),
                    "words must be int64, with the words of ", channels, " channels in each row, got ",
                    words.scalar_type(), " of shape ", words.sizes());
  RunningStatistics running{running_mean, running_var, num_batches_tracked, nonfinite_batches,
                            momentum,     eps,         correction,          update_in_backward};
  running.check(channels, words.device());
  if (own_count < 2) {
    // Every rank of a batch of one value comes here.
    const int64_t total = words.select(1, 0).sum().item<int64_t>();
    TORCH_CHECK_VALUE(total != 1, "expected more than 1 value per channel when training, got 1 on all ranks together");
  }

  at::Tensor statistics = at::empty({2, channels}, words.options().dtype(at::kDouble));
  at::Tensor count = at::empty({}, words.options());
  MergeRanks args{};
  running.begin(args);
  args.mean = statistics.mutable_data_ptr<double>();
  args.invstd = args.mean + channels;
  args.ranks = words.size(0);
  args.channels = channels;
  args.is_double = is_double;
  args.words = words.const_data_ptr<int64_t>();
  args.stride = words.stride(0);
  args.count = count.mutable_data_ptr<int64_t>();
  backend_of(words).merge_ranks(args, words.device());
  running.finish();
  return {statistics, count};
}

}  // namespace

at::Tensor pack_moments(const at::Tensor& input) {
  static const auto op = find_operator<decltype(pack_moments)>("normfused::pack_moments");
  return op.call(input);
}

std::tuple<at::Tensor, at::Tensor> merge_ranks(const at::Tensor& words, int64_t channels, int64_t own_count,
                                               const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                               const OptionalTensor& num_batches_tracked,
                                               std::optional<double> momentum, double eps, int64_t correction,
                                               const OptionalTensor& nonfinite_batches, bool update_in_backward) {
  static const auto op = find_operator<decltype(merge_ranks)>("normfused::merge_ranks");
  return op.call(words, channels, own_count, running_mean, running_var, num_batches_tracked, momentum, eps, correction,
                 nonfinite_batches, update_in_backward);
}

TORCH_LIBRARY_IMPL(normfused, CPU, m) {
  m.impl("pack_moments", pack_moments_kernels);
  m.impl("merge_ranks", merge_ranks_kernels);
}

#if defined(NORMFUSED_WITH_CUDA)
TORCH_LIBRARY_IMPL(normfused, CUDA, m) {
  m.impl("pack_moments", pack_moments_kernels);
  m.impl("merge_ranks", merge_ranks_kernels);
}
#endif

TORCH_LIBRARY_IMPL(normfused, Autograd, m) {
  m.impl("pack_moments", torch::autograd::autogradNotImplementedFallback());
  m.impl("merge_ranks", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace normfused::ops
