#include "ops/channel_stats.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <array>

#include "kernels/cpu/kernels.h"
#include "ops/find_operator.h"
#include "ops/layout.h"

namespace normfused::ops {

namespace {

using Kernel = void (*)(const ChannelStats&, const cpu::Parallel&);

template <size_t count>
std::array<at::Tensor, count> run(const at::Tensor& input, Kernel kernel) {
  TORCH_CHECK_VALUE(input.dim() >= 2, "input needs at least 2 dimensions, got shape ", input.sizes());
  const at::Tensor dense = with_view(input);
  std::array<at::Tensor, count> results;
  for (at::Tensor& result : results)
    result = at::empty({input.size(1)}, input.options().dtype(at::kDouble).memory_format(at::MemoryFormat::Contiguous));
  ChannelStats args{*view_of(dense), dtype_of(input.scalar_type()), dense.const_data_ptr(), {}};
  for (size_t i = 0; i < count; ++i) args.results[i] = results[i].template mutable_data_ptr<double>();
  if (input.numel() > 0) kernel(args, parallel());
  return results;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> channel_moments_cpu(const at::Tensor& input) {
  auto [mean, m2, min, max] = run<4>(input, cpu::channel_moments);
  if (input.numel() == 0) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    return {mean.zero_(), m2.zero_(), min.fill_(kInfinity), max.fill_(-kInfinity)};
  }
  return {mean, m2, min, max};
}

std::tuple<at::Tensor, at::Tensor> channel_sums_cpu(const at::Tensor& input) {
  auto [sum, sum_of_squares] = run<2>(input, cpu::channel_sums);
  if (input.numel() == 0) return {sum.zero_(), sum_of_squares.zero_()};
  return {sum, sum_of_squares};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> channel_moments(const at::Tensor& input) {
  static const auto op = find_operator<decltype(channel_moments)>("normfused::channel_moments");
  return op.call(input);
}

std::tuple<at::Tensor, at::Tensor> channel_sums(const at::Tensor& input) {
  static const auto op = find_operator<decltype(channel_sums)>("normfused::channel_sums");
  return op.call(input);
}

TORCH_LIBRARY_IMPL(normfused, CPU, m) {
  m.impl("channel_moments", channel_moments_cpu);
  m.impl("channel_sums", channel_sums_cpu);
}

}  // namespace normfused::ops
