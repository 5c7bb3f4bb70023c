#include "ops/batch_norm.h"

#include <ATen/Functions.h>
#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "ops/backend.h"
#include "ops/find_operator.h"
#include "ops/layout.h"

namespace normfused::ops {

namespace {

// Terse: functional.py explains refusals to users. These keep a direct call of the operator from crashing.
void check_input(const at::Tensor& input) {
  TORCH_CHECK_VALUE(input.dim() >= 2, "input needs at least 2 dimensions, got shape ", input.sizes());
  dtype_of(input.scalar_type());
}

void check_channels(const char* name, const OptionalTensor& vector, const at::Tensor& input) {
  if (!vector) return;
  TORCH_CHECK_VALUE(vector->device() == input.device(), name, " is on ", vector->device(), ", input on ",
                    input.device());
  TORCH_CHECK_VALUE(vector->dim() == 1 && vector->size(0) == input.size(1), name, " has shape ", vector->sizes(),
                    ", input has ", input.size(1), " channels");
  const at::ScalarType type = vector->scalar_type();
  const bool narrow = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
  TORCH_CHECK_TYPE(type == input.scalar_type() || (narrow && type == at::kFloat), name, " is ", type, " for input of ",
                   input.scalar_type());
}

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

// Refuses buffers that cannot be written, before anything is; tells autograd that they change.
void begin_update(const OptionalTensor& buffer) {
  if (!buffer) return;
  at::assert_no_internal_overlap(*buffer);
  buffer->unsafeGetTensorImpl()->bump_version();
}

// Brings the values home where the kernel wrote to a contiguous copy.
void finish_update(const OptionalTensor& buffer, const OptionalTensor& written) {
  if (buffer && !written->is_same(*buffer)) buffer->copy_(*written);
}

BatchNormForward forward_args(const at::Tensor& input, const at::Tensor& output, const at::Tensor& statistics,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& running_mean, const OptionalTensor& running_var, double eps) {
  double* const mean = statistics.mutable_data_ptr<double>();
  return {*view_of(input),
          dtype_of(input.scalar_type()),
          input.const_data_ptr(),
          output.mutable_data_ptr(),
          channel_vector(weight),
          channel_vector(bias),
          channel_vector(running_mean),
          channel_vector(running_var),
          nullptr,
          0,
          eps,
          mean,
          mean + input.size(1)};
}

at::Tensor empty_statistics(const at::Tensor& input) {
  return at::empty({2, input.size(1)}, input.options().dtype(at::kDouble).memory_format(at::MemoryFormat::Contiguous));
}

std::tuple<at::Tensor, at::Tensor> batch_norm_training_kernels(const at::Tensor& input, const OptionalTensor& weight,
                                                               const OptionalTensor& bias,
                                                               const OptionalTensor& running_mean,
                                                               const OptionalTensor& running_var,
                                                               const OptionalTensor& num_batches_tracked,
                                                               std::optional<double> momentum, double eps) {
  check_input(input);
  check_channels("weight", weight, input);
  check_channels("bias", bias, input);
  check_channels("running_mean", running_mean, input);
  check_channels("running_var", running_var, input);
  TORCH_CHECK_VALUE(running_mean.has_value() == running_var.has_value(),
                    "running_mean and running_var must be given together");
  TORCH_CHECK_VALUE(!running_mean || !running_mean->is_same(*running_var), "running_mean and running_var are the same");
  TORCH_CHECK_VALUE(
      !num_batches_tracked || (num_batches_tracked->scalar_type() == at::kLong && num_batches_tracked->dim() == 0 &&
                               num_batches_tracked->device() == input.device()),
      "num_batches_tracked must be a 0-d int64 tensor on ", input.device());
  TORCH_CHECK_VALUE(!momentum || std::isfinite(*momentum), "momentum must be finite, got ", *momentum);
  TORCH_CHECK_VALUE(momentum || num_batches_tracked || !running_mean, "momentum=None needs num_batches_tracked");
  TORCH_CHECK_VALUE(eps >= 0 && std::isfinite(eps), "eps must be a non-negative finite number, got ", eps);

  const at::Tensor dense = with_view(input);
  at::Tensor output = empty_output_like(dense);
  at::Tensor statistics = empty_statistics(input);
  if (input.numel() == 0) return {output, statistics.zero_()};
  TORCH_CHECK_VALUE(view_of(dense)->positions() > 1, "expected more than 1 value per channel when training, got ",
                    input.sizes());

  begin_update(running_mean);
  begin_update(running_var);
  begin_update(num_batches_tracked);
  const OptionalTensor mean_buffer = contiguous(running_mean), var_buffer = contiguous(running_var);
  const OptionalTensor weight_dense = contiguous(weight), bias_dense = contiguous(bias);
  BatchNormForward args =
      forward_args(dense, output, statistics, weight_dense, bias_dense, mean_buffer, var_buffer, eps);
  args.num_batches_tracked = num_batches_tracked ? num_batches_tracked->mutable_data_ptr<int64_t>() : nullptr;
  args.momentum = momentum.value_or(std::numeric_limits<double>::quiet_NaN());
  backend_of(input).batch_norm_training(args, input.device());
  finish_update(running_mean, mean_buffer);
  finish_update(running_var, var_buffer);
  return {output, statistics};
}

std::tuple<at::Tensor, at::Tensor> batch_norm_inference_kernels(const at::Tensor& input, const OptionalTensor& weight,
                                                                const OptionalTensor& bias,
                                                                const at::Tensor& running_mean,
                                                                const at::Tensor& running_var, double eps) {
  check_input(input);
  check_channels("weight", weight, input);
  check_channels("bias", bias, input);
  check_channels("running_mean", running_mean, input);
  check_channels("running_var", running_var, input);
  TORCH_CHECK_VALUE(eps >= 0 && std::isfinite(eps), "eps must be a non-negative finite number, got ", eps);

  const at::Tensor dense = with_view(input);
  at::Tensor output = empty_output_like(dense);
  at::Tensor statistics = empty_statistics(input);
  if (input.numel() == 0) return {output, statistics.zero_()};
  const OptionalTensor weight_dense = contiguous(weight), bias_dense = contiguous(bias);
  backend_of(input).batch_norm_inference(forward_args(dense, output, statistics, weight_dense, bias_dense,
                                                      running_mean.contiguous(), running_var.contiguous(), eps),
                                         input.device());
  return {output, statistics};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_backward_kernels(const at::Tensor& grad_output,
                                                                           const at::Tensor& input,
                                                                           const OptionalTensor& weight,
                                                                           const at::Tensor& statistics, bool training,
                                                                           std::array<bool, 3> output_mask) {
  check_input(input);
  check_channels("weight", weight, input);
  TORCH_CHECK_VALUE(grad_output.sizes() == input.sizes() && grad_output.scalar_type() == input.scalar_type() &&
                        grad_output.device() == input.device(),
                    "grad_output must have input's shape, dtype and device");
  TORCH_CHECK_VALUE(statistics.scalar_type() == at::kDouble && statistics.is_contiguous() && statistics.dim() == 2 &&
                        statistics.size(0) == 2 && statistics.size(1) == input.size(1) &&
                        statistics.device() == input.device(),
                    "statistics must be contiguous float64 of shape (2, channels) on ", input.device());

  const at::Tensor dense = with_view(input);
  const auto parameter_options = input.options()
                                     .dtype(weight                               ? weight->scalar_type()
                                            : input.scalar_type() == at::kDouble ? at::kDouble
                                                                                 : at::kFloat)
                                     .memory_format(at::MemoryFormat::Contiguous);
  const auto parameter_grad = [&](bool wanted) {
    return input.numel() == 0 ? at::zeros({wanted ? input.size(1) : 0}, parameter_options)
                              : at::empty({wanted ? input.size(1) : 0}, parameter_options);
  };
  at::Tensor grad_input = output_mask[0] ? empty_output_like(dense) : at::empty({0}, input.options());
  at::Tensor grad_weight = parameter_grad(output_mask[1]);
  at::Tensor grad_bias = parameter_grad(output_mask[2]);
  if (input.numel() == 0) return {grad_input, grad_weight, grad_bias};

  const at::Tensor grad_dense = laid_out_as(grad_output, dense);
  const OptionalTensor weight_dense = contiguous(weight);
  const double* const mean = statistics.const_data_ptr<double>();
  backend_of(input).batch_norm_backward(
      {*view_of(dense), dtype_of(input.scalar_type()), grad_dense.const_data_ptr(), dense.const_data_ptr(),
       output_mask[0] ? grad_input.mutable_data_ptr() : nullptr, channel_vector(weight_dense),
       output_mask[1] ? channel_vector(grad_weight) : ChannelVector{},
       output_mask[2] ? channel_vector(grad_bias) : ChannelVector{}, mean, mean + input.size(1), training},
      input.device());
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> batch_norm_training(const at::Tensor& input, const OptionalTensor& weight,
                                                       const OptionalTensor& bias, const OptionalTensor& running_mean,
                                                       const OptionalTensor& running_var,
                                                       const OptionalTensor& num_batches_tracked,
                                                       std::optional<double> momentum, double eps) {
  static const auto op = find_operator<decltype(batch_norm_training)>("normfused::batch_norm_training");
  return op.call(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps);
}

std::tuple<at::Tensor, at::Tensor> batch_norm_inference(const at::Tensor& input, const OptionalTensor& weight,
                                                        const OptionalTensor& bias, const at::Tensor& running_mean,
                                                        const at::Tensor& running_var, double eps) {
  static const auto op = find_operator<decltype(batch_norm_inference)>("normfused::batch_norm_inference");
  return op.call(input, weight, bias, running_mean, running_var, eps);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(const at::Tensor& grad_output,
                                                                   const at::Tensor& input,
                                                                   const OptionalTensor& weight,
                                                                   const at::Tensor& statistics, bool training,
                                                                   std::array<bool, 3> output_mask) {
  static const auto op = find_operator<decltype(batch_norm_backward)>("normfused::batch_norm_backward");
  return op.call(grad_output, input, weight, statistics, training, output_mask);
}

TORCH_LIBRARY_IMPL(normfused, CPU, m) {
  m.impl("batch_norm_training", batch_norm_training_kernels);
  m.impl("batch_norm_inference", batch_norm_inference_kernels);
  m.impl("batch_norm_backward", batch_norm_backward_kernels);
}

#if defined(NORMFUSED_WITH_CUDA)
TORCH_LIBRARY_IMPL(normfused, CUDA, m) {
  m.impl("batch_norm_training", batch_norm_training_kernels);
  m.impl("batch_norm_inference", batch_norm_inference_kernels);
  m.impl("batch_norm_backward", batch_norm_backward_kernels);
}
#endif

}  // namespace normfused::ops
