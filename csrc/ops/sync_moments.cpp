#include "ops/sync_moments.h"

#include <ATen/Functions.h>

#include "ops/backend.h"
#include "ops/call.h"
#include "ops/layout.h"
#include "ops/output_memory.h"
#include "ops/registration.h"

namespace normfused::ops {

namespace {

using at::Tensor;

Tensor pack_moments_kernels(const Tensor& input, double eps) {
  check_floating(input);
  const DType dtype = dtype_of(input.scalar_type());
  const auto options = input.options().dtype(at::kLong).memory_format(at::MemoryFormat::Contiguous);
  const int64_t words = rank_words(input.size(1), dtype);
  if (input.numel() == 0) return at::zeros({words}, options);
  const Tensor dense = as_dense(input);
  const Tensor result = empty_output({words}, options);
  backend_of(input).pack_moments(
      {*view_of(dense), dtype, dense.const_data_ptr(), result.mutable_data_ptr<int64_t>(), eps}, input.device());
  return result;
}

MergeRanksCall::Result merge_ranks_kernels(const MergeRanksCall& call) {
  const Tensor& words = call.words;
  const int64_t channels = call.channels;
  const bool is_double = words.dim() == 2 && words.size(1) == rank_words(channels, DType::kFloat64);
  TORCH_CHECK_VALUE(words.scalar_type() == at::kLong && words.dim() == 2 && words.stride(1) == 1 && channels > 0 &&
                        (is_double || words.size(1) == rank_words(channels, DType::kFloat32)),
                    "words must be int64, with the words of ", channels, " channels in each row, got ",
                    words.scalar_type(), " of shape ", words.sizes());
  RunningStatistics running = call.running();
  running.check(channels, words.device());
  if (call.own_count < 2) {  // true on every rank if the total is 1
    const int64_t total = words.select(1, 0).sum().item<int64_t>();
    TORCH_CHECK_VALUE(total != 1, "expected more than 1 value per channel when training, got 1 on all ranks together");
  }

  const Tensor statistics = empty_output({2, channels}, words.options().dtype(at::kDouble));
  const Tensor count = empty_output({}, words.options());
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

Tensor pack_moments(const Tensor& input, double eps) {
  static const auto op = find_operator<decltype(pack_moments)>("normfused::pack_moments");
  return op.call(input, eps);
}

MergeRanksCall::Result merge_ranks(const MergeRanksCall& c) {
  static const auto op = find_operator<MergeRanksCall::Signature>("normfused::merge_ranks");
  return op.call(c.words, c.channels, c.own_count, c.running_mean, c.running_var, c.num_batches_tracked, c.momentum,
                 c.eps, c.correction, c.nonfinite_batches, c.update_in_backward);
}

TORCH_LIBRARY_FRAGMENT(normfused, m) {
  m.def("pack_moments(Tensor input, float eps) -> Tensor words");
  m.def(
      "merge_ranks(Tensor words, int channels, int own_count, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum, float eps, int correction=1, Tensor(d!)? "
      "nonfinite_batches=None, "
      "bool update_in_backward=True) -> (Tensor statistics, Tensor count)");
}

NF_LIBRARY_IMPL_BACKENDS(m) {
  m.impl("pack_moments", pack_moments_kernels);
  m.impl("merge_ranks", call_object<merge_ranks_kernels>());
}

TORCH_LIBRARY_IMPL(normfused, Autograd, m) {
  m.impl("pack_moments", not_differentiable());
  m.impl("merge_ranks", not_differentiable());
}

}  // namespace normfused::ops
