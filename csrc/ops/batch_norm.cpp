#include "ops/batch_norm.h"

#include <ATen/Functions.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <cmath>

#include "ops/activation.h"
#include "ops/backend.h"
#include "ops/batch_norm_checks.h"
#include "ops/find_operator.h"
#include "ops/layout.h"
#include "ops/running_statistics.h"

namespace normfused::ops {

namespace {

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

BatchNormForward forward_args(const at::Tensor& input, const at::Tensor& output, const at::Tensor& statistics,
                              const OptionalTensor& weight, const OptionalTensor& bias) {
  double* const mean = statistics.mutable_data_ptr<double>();
  BatchNormForward args{};
  args.view = *view_of(input);
  args.dtype = dtype_of(input.scalar_type());
  args.input = input.const_data_ptr();
  args.output = output.mutable_data_ptr();
  args.weight = channel_vector(weight);
  args.bias = channel_vector(bias);
  args.mean = mean;
  args.invstd = mean + input.size(1);
  return args;
}

// Laid out in memory as `dense`, the input.
OptionalTensor like_input(const char* name, const OptionalTensor& tensor, const at::Tensor& dense) {
  check_like_input(name, tensor, dense);
  return tensor ? OptionalTensor(laid_out_as(*tensor, dense)) : std::nullopt;
}

const void* data_of(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

at::Tensor empty_mask(const at::Tensor& input, bool wanted) {
  return at::empty({wanted ? mask_bytes(input.numel()) : 0},
                   input.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
}

at::Tensor empty_statistics(const at::Tensor& input) {
  return at::empty({2, input.size(1)}, input.options().dtype(at::kDouble).memory_format(at::MemoryFormat::Contiguous));
}

// Where the values go: over those of the input, or beside them.
enum class Target { kNew, kInput };

at::Tensor target_of(Target target, const at::Tensor& dense) {
  return target == Target::kInput ? dense : empty_output_like(dense);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> normalize_by_batch(
    Target target, const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum, double eps, const OptionalTensor& residual, std::string_view activation,
    double activation_param, bool save_mask, int64_t correction, const OptionalTensor& nonfinite_batches,
    bool update_in_backward) {
  check_input(input);
  check_channels("weight", weight, input);
  check_channels("bias", bias, input);
  check_channels("running_mean", running_mean, input);
  check_channels("running_var", running_var, input);
  RunningStatistics running{running_mean, running_var, num_batches_tracked, nonfinite_batches,
                            momentum,     eps,         correction,          update_in_backward};
  running.check(input.size(1), input.device());

  const at::Tensor dense = as_dense(input);
  const OptionalTensor residual_dense = like_input("residual", residual, dense);
  const Activation applied = activation_of(activation, activation_param);
  at::Tensor output = target_of(target, dense);
  at::Tensor statistics = empty_statistics(input);
  at::Tensor mask = empty_mask(input, save_mask);
  if (input.numel() == 0) return {output, statistics.zero_(), mask};
  TORCH_CHECK_VALUE(view_of(dense)->positions() > 1, "expected more than 1 value per channel when training, got ",
                    input.sizes());

  if (target == Target::kInput) begin_update(input);
  const OptionalTensor weight_dense = contiguous(weight), bias_dense = contiguous(bias);
  BatchNormForward args = forward_args(dense, output, statistics, weight_dense, bias_dense);
  running.begin(args);
  args.residual = data_of(residual_dense);
  args.activation = applied;
  args.mask = save_mask ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  backend_of(input).batch_norm_training(args, input.device());
  if (target == Target::kInput) finish_update(input, dense);
  running.finish();
  return {output, statistics, mask};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> normalize_by_constants(
    Target target, const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const at::Tensor& running_mean, const at::Tensor& running_var, double eps, const OptionalTensor& residual,
    std::string_view activation, double activation_param, bool save_mask) {
  check_input(input);
  check_channels("weight", weight, input);
  check_channels("bias", bias, input);
  check_channels("running_mean", running_mean, input);
  check_channels("running_var", running_var, input);
  TORCH_CHECK_VALUE(eps >= 0 && std::isfinite(eps), "eps must be a non-negative finite number, got ", eps);

  const at::Tensor dense = as_dense(input);
  const OptionalTensor residual_dense = like_input("residual", residual, dense);
  const Activation applied = activation_of(activation, activation_param);
  at::Tensor output = target_of(target, dense);
  at::Tensor statistics = empty_statistics(input);
  at::Tensor mask = empty_mask(input, save_mask);
  if (input.numel() == 0) return {output, statistics.zero_(), mask};
  if (target == Target::kInput) begin_update(input);
  const OptionalTensor weight_dense = contiguous(weight), bias_dense = contiguous(bias);
  const at::Tensor mean_dense = running_mean.contiguous(), var_dense = running_var.contiguous();
  BatchNormForward args = forward_args(dense, output, statistics, weight_dense, bias_dense);
  args.running_mean = channel_vector(mean_dense);
  args.running_var = channel_vector(var_dense);
  args.eps = eps;
  args.residual = data_of(residual_dense);
  args.activation = applied;
  args.mask = save_mask ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  backend_of(input).batch_norm_inference(args, input.device());
  if (target == Target::kInput) finish_update(input, dense);
  return {output, statistics, mask};
}

std::tuple<at::Tensor, at::Tensor> batch_norm_by_statistics_kernels(
    const at::Tensor& input, const at::Tensor& statistics, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, std::string_view activation, double activation_param, bool save_mask) {
  check_input(input);
  check_channels("weight", weight, input);
  check_channels("bias", bias, input);
  check_statistics(statistics, input);
  const at::Tensor dense = as_dense(input);
  const OptionalTensor residual_dense = like_input("residual", residual, dense);
  const Activation applied = activation_of(activation, activation_param);
  at::Tensor output = empty_output_like(dense);
  at::Tensor mask = empty_mask(input, save_mask);
  if (input.numel() == 0) return {output, mask};
  const OptionalTensor weight_dense = contiguous(weight), bias_dense = contiguous(bias);
  BatchNormForward args = forward_args(dense, output, statistics, weight_dense, bias_dense);
  args.residual = data_of(residual_dense);
  args.activation = applied;
  args.mask = save_mask ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  backend_of(input).batch_norm_inference(args, input.device());
  return {output, mask};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_training_kernels(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum, double eps, const OptionalTensor& residual, std::string_view activation,
    double activation_param, bool save_mask, int64_t correction, const OptionalTensor& nonfinite_batches,
    bool update_in_backward) {
  return normalize_by_batch(Target::kNew, input, weight, bias, running_mean, running_var, num_batches_tracked, momentum,
                            eps, residual, activation, activation_param, save_mask, correction, nonfinite_batches,
                            update_in_backward);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_inference_kernels(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const at::Tensor& running_mean,
    const at::Tensor& running_var, double eps, const OptionalTensor& residual, std::string_view activation,
    double activation_param, bool save_mask) {
  return normalize_by_constants(Target::kNew, input, weight, bias, running_mean, running_var, eps, residual, activation,
                                activation_param, save_mask);
}

at::Tensor batch_norm_training_inplace_kernels(const at::Tensor& input, const OptionalTensor& weight,
                                               const OptionalTensor& bias, const OptionalTensor& running_mean,
                                               const OptionalTensor& running_var,
                                               const OptionalTensor& num_batches_tracked,
                                               std::optional<double> momentum, double eps, std::string_view activation,
                                               double activation_param, int64_t correction,
                                               const OptionalTensor& nonfinite_batches, bool update_in_backward) {
  return std::get<1>(normalize_by_batch(Target::kInput, input, weight, bias, running_mean, running_var,
                                        num_batches_tracked, momentum, eps, std::nullopt, activation, activation_param,
                                        /*save_mask=*/false, correction, nonfinite_batches, update_in_backward));
}

at::Tensor batch_norm_inference_inplace_kernels(const at::Tensor& input, const OptionalTensor& weight,
                                                const OptionalTensor& bias, const at::Tensor& running_mean,
                                                const at::Tensor& running_var, double eps, std::string_view activation,
                                                double activation_param) {
  return std::get<1>(normalize_by_constants(Target::kInput, input, weight, bias, running_mean, running_var, eps,
                                            std::nullopt, activation, activation_param, /*save_mask=*/false));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_backward_kernels(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight, const at::Tensor& statistics,
    bool training, std::array<bool, 4> output_mask, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& mask, std::string_view activation, double activation_param, bool from_output,
    const OptionalTensor& sums, const OptionalTensor& count) {
  check_backward(grad_output, input, weight, statistics, training, output_mask, bias, residual, mask, activation,
                 activation_param, from_output, sums, count);
  const at::Tensor dense = as_dense(input);
  const OptionalTensor grad_dense = like_input("grad_output", grad_output, dense);
  const OptionalTensor residual_dense = mask ? std::nullopt : like_input("residual", residual, dense);
  const auto parameter_options = input.options()
                                     .dtype(weight                               ? weight->scalar_type()
                                            : input.scalar_type() == at::kDouble ? at::kDouble
                                                                                 : at::kFloat)
                                     .memory_format(at::MemoryFormat::Contiguous);
  const auto parameter_grad = [&](bool wanted) {
    return input.numel() == 0 ? at::zeros({wanted ? input.size(1) : 0}, parameter_options)
                              : at::empty({wanted ? input.size(1) : 0}, parameter_options);
  };
  const auto grad_like_input = [&](bool wanted) {
    return wanted ? empty_output_like(dense) : at::empty({0}, input.options());
  };
  at::Tensor grad_input = grad_like_input(output_mask[0]);
  at::Tensor grad_weight = parameter_grad(output_mask[1]);
  at::Tensor grad_bias = parameter_grad(output_mask[2]);
  at::Tensor grad_residual = grad_like_input(output_mask[3]);
  const bool wanted = output_mask[0] || output_mask[1] || output_mask[2] || output_mask[3];
  if (input.numel() == 0 || !wanted) return {grad_input, grad_weight, grad_bias, grad_residual};

  const OptionalTensor weight_dense = contiguous(weight), bias_dense = contiguous(bias);
  BatchNormBackward args{};
  args.view = *view_of(dense);
  args.dtype = dtype_of(input.scalar_type());
  args.grad_output = grad_dense->const_data_ptr();
  args.input = dense.const_data_ptr();
  args.weight = channel_vector(weight_dense);
  args.bias = channel_vector(bias_dense);
  args.mean = statistics.const_data_ptr<double>();
  args.invstd = args.mean + input.size(1);
  args.training = training;
  args.activation = activation_of(activation, activation_param);
  args.residual = data_of(residual_dense);
  args.mask = static_cast<const uint8_t*>(data_of(mask));
  args.from_output = from_output;
  if (output_mask[1]) args.grad_weight = channel_vector(grad_weight);
  if (output_mask[2]) args.grad_bias = channel_vector(grad_bias);
  if (sums) {
    args.grad_weight = channel_vector(sums->select(0, 0));
    args.grad_bias = channel_vector(sums->select(0, 1));
    args.count = count->const_data_ptr<int64_t>();
  }
  // The kernels write the residual's gradient on their way to the input's.
  at::Tensor unasked;
  if (output_mask[0] || output_mask[3]) {
    unasked = output_mask[0] ? grad_input : empty_output_like(dense);
    args.grad_input = unasked.mutable_data_ptr();
  }
  if (output_mask[3]) args.grad_residual = grad_residual.mutable_data_ptr();
  backend_of(input).batch_norm_backward(args, input.device());
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_training(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum, double eps, const OptionalTensor& residual, std::string_view activation,
    double activation_param, bool save_mask, int64_t correction, const OptionalTensor& nonfinite_batches,
    bool update_in_backward) {
  static const auto op = find_operator<decltype(batch_norm_training)>("normfused::batch_norm_training");
  return op.call(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, residual,
                 activation, activation_param, save_mask, correction, nonfinite_batches, update_in_backward);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_inference(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const at::Tensor& running_mean,
    const at::Tensor& running_var, double eps, const OptionalTensor& residual, std::string_view activation,
    double activation_param, bool save_mask) {
  static const auto op = find_operator<decltype(batch_norm_inference)>("normfused::batch_norm_inference");
  return op.call(input, weight, bias, running_mean, running_var, eps, residual, activation, activation_param,
                 save_mask);
}

std::tuple<at::Tensor, at::Tensor> batch_norm_by_statistics(const at::Tensor& input, const at::Tensor& statistics,
                                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                                            const OptionalTensor& residual, std::string_view activation,
                                                            double activation_param, bool save_mask) {
  static const auto op = find_operator<decltype(batch_norm_by_statistics)>("normfused::batch_norm_by_statistics");
  return op.call(input, statistics, weight, bias, residual, activation, activation_param, save_mask);
}

at::Tensor batch_norm_training_(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                                std::string_view activation, double activation_param, int64_t correction,
                                const OptionalTensor& nonfinite_batches, bool update_in_backward) {
  static const auto op = find_operator<decltype(batch_norm_training_)>("normfused::batch_norm_training_");
  return op.call(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, activation,
                 activation_param, correction, nonfinite_batches, update_in_backward);
}

at::Tensor batch_norm_inference_(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                 const at::Tensor& running_mean, const at::Tensor& running_var, double eps,
                                 std::string_view activation, double activation_param) {
  static const auto op = find_operator<decltype(batch_norm_inference_)>("normfused::batch_norm_inference_");
  return op.call(input, weight, bias, running_mean, running_var, eps, activation, activation_param);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight, const at::Tensor& statistics,
    bool training, std::array<bool, 4> output_mask, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& mask, std::string_view activation, double activation_param, bool from_output,
    const OptionalTensor& sums, const OptionalTensor& count) {
  static const auto op = find_operator<decltype(batch_norm_backward)>("normfused::batch_norm_backward");
  return op.call(grad_output, input, weight, statistics, training, output_mask, bias, residual, mask, activation,
                 activation_param, from_output, sums, count);
}

TORCH_LIBRARY_IMPL(normfused, CPU, m) {
  m.impl("batch_norm_training", batch_norm_training_kernels);
  m.impl("batch_norm_inference", batch_norm_inference_kernels);
  m.impl("batch_norm_by_statistics", batch_norm_by_statistics_kernels);
  m.impl("batch_norm_training_", batch_norm_training_inplace_kernels);
  m.impl("batch_norm_inference_", batch_norm_inference_inplace_kernels);
  m.impl("batch_norm_backward", batch_norm_backward_kernels);
}

#if defined(NORMFUSED_WITH_CUDA)
TORCH_LIBRARY_IMPL(normfused, CUDA, m) {
  m.impl("batch_norm_training", batch_norm_training_kernels);
  m.impl("batch_norm_inference", batch_norm_inference_kernels);
  m.impl("batch_norm_by_statistics", batch_norm_by_statistics_kernels);
  m.impl("batch_norm_training_", batch_norm_training_inplace_kernels);
  m.impl("batch_norm_inference_", batch_norm_inference_inplace_kernels);
  m.impl("batch_norm_backward", batch_norm_backward_kernels);
}
#endif

TORCH_LIBRARY_IMPL(normfused, Autograd, m) {
  m.impl("batch_norm_by_statistics", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace normfused::ops
