#include "ops/batch_norm.h"

#include <ATen/Functions.h>

#include "ops/backend.h"
#include "ops/batch_norm_checks.h"
#include "ops/call.h"
#include "ops/layout.h"
#include "ops/output_memory.h"
#include "ops/registration.h"

namespace normfused::ops {

namespace {

using at::Tensor;

// The tensor in the memory layout of `dense`, the input.
OptionalTensor like_input(const char* name, const OptionalTensor& tensor, const Tensor& dense) {
  check_like_input(name, tensor, dense);
  return laid_out_as(tensor, dense);
}

Tensor empty_statistics(const Tensor& input) {
  return empty_output({2, input.size(1)},
                      input.options().dtype(at::kDouble).memory_format(at::MemoryFormat::Contiguous));
}

enum class Target { kNew, kInput };  // kInput: the output overwrites the input

// One forward call: dense operands, outputs, and the kernel's arguments except for the running statistics. Throws if
// residual or activation are invalid.
class Forward {
 public:
  Forward(Target target, const BatchNormOptions& options)
      : target_(target),
        save_mask_(options.save_mask),
        input_(options.input),
        dense_(as_dense(options.input)),
        residual_(like_input("residual", options.residual, dense_)),
        activation_(activation_of(options.activation, options.activation_param)),
        weight_(contiguous(options.weight)),
        bias_(contiguous(options.bias)),
        output(target == Target::kInput ? dense_ : empty_output_like(dense_)),
        mask(empty_output({save_mask_ ? mask_bytes(input_.numel()) : 0},
                          input_.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous))) {}

  // The result points to memory of this object and of `statistics`.
  BatchNormForward begin(const Tensor& statistics) const {
    if (target_ == Target::kInput) begin_update(input_);
    BatchNormForward args{};
    args.view = *view_of(dense_);
    args.dtype = dtype_of(input_.scalar_type());
    args.input = dense_.const_data_ptr();
    args.output = output.mutable_data_ptr();
    args.weight = channel_vector(weight_);
    args.bias = channel_vector(bias_);
    args.mean = statistics.mutable_data_ptr<double>();
    args.invstd = args.mean + input_.size(1);
    args.residual = data_of(residual_);
    args.activation = activation_;
    args.mask = save_mask_ ? mask.mutable_data_ptr<uint8_t>() : nullptr;
    return args;
  }
  void finish() const {
    if (target_ == Target::kInput) finish_update(input_, dense_);
  }

 private:
  const Target target_;
  const bool save_mask_;
  const Tensor& input_;
  const Tensor dense_;
  const OptionalTensor residual_;
  const Activation activation_;
  const OptionalTensor weight_, bias_;

 public:
  const Tensor output, mask;
};

BatchNormTrainingCall::Result normalize_by_batch(Target target, const BatchNormOptions& options,
                                                 RunningStatistics running) {
  const Tensor& input = options.input;
  check_operands(options, running.mean, running.var);
  running.check(input.size(1), input.device());
  const Forward forward(target, options);
  const Tensor statistics = empty_statistics(input);
  if (input.numel() == 0) return {forward.output, statistics.zero_(), forward.mask};
  check_training_count(input.numel() / input.size(1), input);
  BatchNormForward args = forward.begin(statistics);
  running.begin(args);
  backend_of(input).batch_norm_training(args, input.device());
  forward.finish();
  running.finish();
  return {forward.output, statistics, forward.mask};
}

BatchNormInferenceCall::Result normalize_by_running(Target target, const BatchNormOptions& options,
                                                    const Tensor& running_mean, const Tensor& running_var, double eps) {
  const Tensor& input = options.input;
  check_operands(options, running_mean, running_var);
  check_eps(eps);
  const Forward forward(target, options);
  const Tensor statistics = empty_statistics(input);
  if (input.numel() == 0) return {forward.output, statistics.zero_(), forward.mask};
  const Tensor mean = running_mean.contiguous(), var = running_var.contiguous();
  BatchNormForward args = forward.begin(statistics);
  args.running_mean = channel_vector(mean);
  args.running_var = channel_vector(var);
  args.eps = eps;
  backend_of(input).batch_norm_inference(args, input.device());
  forward.finish();
  return {forward.output, statistics, forward.mask};
}

BatchNormTrainingCall::Result training_kernels(const BatchNormTrainingCall& call) {
  return normalize_by_batch(Target::kNew, call.options(), call.running());
}

Tensor training_inplace_kernels(const BatchNormTrainingInPlaceCall& call) {
  return std::get<1>(normalize_by_batch(Target::kInput, call.options(), call.running()));
}

BatchNormInferenceCall::Result inference_kernels(const BatchNormInferenceCall& call) {
  return normalize_by_running(Target::kNew, call.options(), call.running_mean, call.running_var, call.eps);
}

Tensor inference_inplace_kernels(const BatchNormInferenceInPlaceCall& call) {
  return std::get<1>(
      normalize_by_running(Target::kInput, call.options(), call.running_mean, call.running_var, call.eps));
}

BatchNormByStatisticsCall::Result by_statistics_kernels(const BatchNormByStatisticsCall& call) {
  check_operands(call.options(), std::nullopt, std::nullopt);
  check_statistics(call.statistics, call.input);
  const Forward forward(Target::kNew, call.options());
  if (call.input.numel() > 0)
    backend_of(call.input).batch_norm_inference(forward.begin(call.statistics), call.input.device());
  return {forward.output, forward.mask};
}

// The requested gradients, uninitialized, and zero-size tensors in place of the others.
BatchNormBackwardCall::Result empty_gradients(const BatchNormBackwardCall& call, const Tensor& dense) {
  const Tensor& input = call.input;
  const at::ScalarType type = call.weight                          ? call.weight->scalar_type()
                              : input.scalar_type() == at::kDouble ? at::kDouble
                                                                   : at::kFloat;
  const auto options = input.options().dtype(type).memory_format(at::MemoryFormat::Contiguous);
  const auto of_parameter = [&](bool requested) { return empty_output({requested ? input.size(1) : 0}, options); };
  const auto of_input = [&](bool requested) {
    return requested ? empty_output_like(dense) : empty_output({0}, input.options());
  };
  const auto& requested = call.output_mask;
  return {of_input(requested[0]), of_parameter(requested[1]), of_parameter(requested[2]), of_input(requested[3])};
}

BatchNormBackwardCall::Result backward_kernels(const BatchNormBackwardCall& call) {
  check_backward(call);
  const Tensor& input = call.input;
  const Tensor dense = as_dense(input);
  const OptionalTensor grad_dense = like_input("grad_output", call.grad_output, dense);
  const OptionalTensor residual_dense = call.mask ? std::nullopt : like_input("residual", call.residual, dense);
  auto gradients = empty_gradients(call, dense);
  auto& [grad_input, grad_weight, grad_bias, grad_residual] = gradients;
  const auto& requested = call.output_mask;
  if (input.numel() == 0) {
    grad_weight.zero_();
    grad_bias.zero_();
  }
  if (input.numel() == 0 || !(requested[0] || requested[1] || requested[2] || requested[3])) return gradients;

  const OptionalTensor weight_dense = contiguous(call.weight), bias_dense = contiguous(call.bias);
  BatchNormBackward args{};
  args.view = *view_of(dense);
  args.dtype = dtype_of(input.scalar_type());
  args.grad_output = grad_dense->const_data_ptr();
  args.input = dense.const_data_ptr();
  args.weight = channel_vector(weight_dense);
  args.bias = channel_vector(bias_dense);
  args.mean = call.statistics.const_data_ptr<double>();
  args.invstd = args.mean + input.size(1);
  args.training = call.training;
  args.activation = activation_of(call.activation, call.activation_param);
  args.residual = data_of(residual_dense);
  args.mask = static_cast<const uint8_t*>(data_of(call.mask));
  args.from_output = call.from_output;
  if (requested[1]) args.grad_weight = channel_vector(grad_weight);
  if (requested[2]) args.grad_bias = channel_vector(grad_bias);
  if (call.sums) {
    args.grad_weight = channel_vector(call.sums->select(0, 0));
    args.grad_bias = channel_vector(call.sums->select(0, 1));
    args.count = call.count->const_data_ptr<int64_t>();
  }
  // Kernels write grad_residual only together with grad_input, which then needs memory even if it is not requested.
  Tensor scratch;
  if (requested[0] || requested[3]) {
    scratch = requested[0] ? grad_input : empty_output_like(dense);
    args.grad_input = scratch.mutable_data_ptr();
  }
  if (requested[3]) args.grad_residual = grad_residual.mutable_data_ptr();
  backend_of(input).batch_norm_backward(args, input.device());
  return gradients;
}

}  // namespace

BatchNormTrainingCall::Result batch_norm_training(const BatchNormTrainingCall& c) {
  static const auto op = find_operator<BatchNormTrainingCall::Signature>("normfused::batch_norm_training");
  return op.call(c.input, c.weight, c.bias, c.running_mean, c.running_var, c.num_batches_tracked, c.momentum, c.eps,
                 c.residual, c.activation, c.activation_param, c.save_mask, c.correction, c.nonfinite_batches,
                 c.update_in_backward);
}

BatchNormInferenceCall::Result batch_norm_inference(const BatchNormInferenceCall& c) {
  static const auto op = find_operator<BatchNormInferenceCall::Signature>("normfused::batch_norm_inference");
  return op.call(c.input, c.weight, c.bias, c.running_mean, c.running_var, c.eps, c.residual, c.activation,
                 c.activation_param, c.save_mask);
}

BatchNormByStatisticsCall::Result batch_norm_by_statistics(const BatchNormByStatisticsCall& c) {
  static const auto op = find_operator<BatchNormByStatisticsCall::Signature>("normfused::batch_norm_by_statistics");
  return op.call(c.input, c.statistics, c.weight, c.bias, c.residual, c.activation, c.activation_param, c.save_mask);
}

Tensor batch_norm_training_(const BatchNormTrainingInPlaceCall& c) {
  static const auto op = find_operator<BatchNormTrainingInPlaceCall::Signature>("normfused::batch_norm_training_");
  return op.call(c.input, c.weight, c.bias, c.running_mean, c.running_var, c.num_batches_tracked, c.momentum, c.eps,
                 c.activation, c.activation_param, c.correction, c.nonfinite_batches, c.update_in_backward);
}

Tensor batch_norm_inference_(const BatchNormInferenceInPlaceCall& c) {
  static const auto op = find_operator<BatchNormInferenceInPlaceCall::Signature>("normfused::batch_norm_inference_");
  return op.call(c.input, c.weight, c.bias, c.running_mean, c.running_var, c.eps, c.activation, c.activation_param);
}

BatchNormBackwardCall::Result batch_norm_backward(const BatchNormBackwardCall& c) {
  static const auto op = find_operator<BatchNormBackwardCall::Signature>("normfused::batch_norm_backward");
  return op.call(c.grad_output, c.input, c.weight, c.statistics, c.training, c.output_mask, c.bias, c.residual, c.mask,
                 c.activation, c.activation_param, c.from_output, c.sums, c.count);
}

TORCH_LIBRARY_FRAGMENT(normfused, m) {
  m.def(
      "batch_norm_training(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, Tensor? residual=None, "
      "str activation=\"identity\", float activation_param=0., bool save_mask=False, int correction=1, "
      "Tensor(d!)? nonfinite_batches=None, bool update_in_backward=True) -> (Tensor output, Tensor statistics, Tensor "
      "mask)");
  m.def(
      "batch_norm_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "float eps, Tensor? residual=None, str activation=\"identity\", float activation_param=0., "
      "bool save_mask=False) -> (Tensor output, Tensor statistics, Tensor mask)");
  m.def(
      "batch_norm_training_(Tensor(a!) input, Tensor? weight, Tensor? bias, Tensor(b!)? running_mean, "
      "Tensor(c!)? running_var, Tensor(d!)? num_batches_tracked, float? momentum, float eps, "
      "str activation=\"identity\", float activation_param=0., int correction=1, Tensor(e!)? nonfinite_batches=None, "
      "bool update_in_backward=True) -> Tensor statistics");
  m.def(
      "batch_norm_inference_(Tensor(a!) input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "float eps, str activation=\"identity\", float activation_param=0.) -> Tensor statistics");
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor statistics, bool training, "
      "bool[4] output_mask, Tensor? bias=None, Tensor? residual=None, Tensor? mask=None, "
      "str activation=\"identity\", float activation_param=0., bool from_output=False, Tensor? sums=None, "
      "Tensor? count=None) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)");
  m.def(
      "batch_norm_by_statistics(Tensor input, Tensor statistics, Tensor? weight, Tensor? bias, Tensor? residual=None, "
      "str activation=\"identity\", float activation_param=0., bool save_mask=False) -> (Tensor output, Tensor mask)");
}

NF_LIBRARY_IMPL_BACKENDS(m) {
  m.impl("batch_norm_training", call_object<training_kernels>());
  m.impl("batch_norm_inference", call_object<inference_kernels>());
  m.impl("batch_norm_by_statistics", call_object<by_statistics_kernels>());
  m.impl("batch_norm_training_", call_object<training_inplace_kernels>());
  m.impl("batch_norm_inference_", call_object<inference_inplace_kernels>());
  m.impl("batch_norm_backward", call_object<backward_kernels>());
}

TORCH_LIBRARY_IMPL(normfused, Autograd, m) { m.impl("batch_norm_by_statistics", not_differentiable()); }

}  // namespace normfused::ops
