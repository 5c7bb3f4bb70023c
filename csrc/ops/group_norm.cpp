#include "ops/group_norm.h"

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

// Throws unless the tensor has shape (C) or (N, C), the input's device, and the input's dtype or float32 for a 16-bit
// input.
void check_parameter(const char* name, const OptionalTensor& parameter, const Tensor& input) {
  if (!parameter) return;
  const bool by_sample = parameter->dim() == 2 && parameter->size(0) == input.size(0);
  TORCH_CHECK_VALUE((parameter->dim() == 1 || by_sample) && parameter->size(-1) == input.size(1), name, " has shape ",
                    parameter->sizes(), ", input has shape ", input.sizes());
  check_channels(name, parameter->dim() == 1 ? *parameter : parameter->select(0, 0), input);
}

void check_groups(const Tensor& input, int64_t num_groups) {
  check_floating(input);
  TORCH_CHECK_VALUE(num_groups >= 1 && input.size(1) % num_groups == 0, "num_groups must divide the ", input.size(1),
                    " channels of input, got ", num_groups);
}

// The view of a dense tensor.
GroupView group_view(const Tensor& dense, int64_t groups) {
  const int64_t samples = dense.size(0), channels = dense.size(1);
  return {samples, groups, channels, dense.numel() / (samples * channels), !dense.is_contiguous()};
}

SampleParameter group_parameter(const OptionalTensor& tensor) {
  return {channel_vector(tensor), tensor && tensor->dim() == 2};
}

GroupNormCall::Result forward_kernels(const GroupNormCall& call) {
  check(call);
  const Tensor &input = call.input, dense = as_dense(input);
  const Activation activation = activation_of(call.activation, call.activation_param);
  const Tensor output = empty_output_like(dense);
  const auto contiguous_options = input.options().memory_format(at::MemoryFormat::Contiguous);
  const Tensor statistics = empty_output({2, input.size(0), call.num_groups}, contiguous_options.dtype(at::kDouble));
  const Tensor mask =
      empty_output({call.save_mask ? mask_bytes(input.numel()) : 0}, contiguous_options.dtype(at::kByte));
  if (input.numel() == 0) return {output, statistics.zero_(), mask};
  const OptionalTensor weight = contiguous(call.weight), bias = contiguous(call.bias);
  const OptionalTensor residual = laid_out_as(call.residual, dense);
  GroupNormForward args{};
  args.view = group_view(dense, call.num_groups);
  args.dtype = dtype_of(input.scalar_type());
  args.input = dense.const_data_ptr();
  args.output = output.mutable_data_ptr();
  args.weight = group_parameter(weight);
  args.bias = group_parameter(bias);
  args.eps = call.eps;
  args.mean = statistics.mutable_data_ptr<double>();
  args.invstd = args.mean + args.view.statistics();
  args.activation = activation;
  args.residual = data_of(residual);
  args.mask = call.save_mask ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  backend_of(input).group_norm(args, input.device());
  return {output, statistics, mask};
}

// The requested gradients, uninitialized, and zero-size tensors in place of the others.
GroupNormBackwardCall::Result empty_gradients(const GroupNormBackwardCall& call, const Tensor& dense) {
  const Tensor& input = call.input;
  const auto options = input.options().memory_format(at::MemoryFormat::Contiguous);
  const auto of_parameter = [&](bool requested, const OptionalTensor& like) {
    const at::ScalarType type = like                                 ? like->scalar_type()
                                : input.scalar_type() == at::kDouble ? at::kDouble
                                                                     : at::kFloat;
    if (!requested) return empty_output({0}, options.dtype(type));
    return like ? empty_output(like->sizes(), options.dtype(type)) : empty_output({input.size(1)}, options.dtype(type));
  };
  const auto of_input = [&](bool requested) {
    return requested ? empty_output_like(dense) : empty_output({0}, input.options());
  };
  const auto& requested = call.output_mask;
  return {of_input(requested[0]), of_parameter(requested[1], call.weight),
          of_parameter(requested[2], call.bias ? call.bias : call.weight), of_input(requested[3])};
}

GroupNormBackwardCall::Result backward_kernels(const GroupNormBackwardCall& call) {
  check(call);
  const Tensor &input = call.input, dense = as_dense(input);
  auto gradients = empty_gradients(call, dense);
  auto& [grad_input, grad_weight, grad_bias, grad_residual] = gradients;
  const auto& requested = call.output_mask;
  if (input.numel() == 0) {
    grad_weight.zero_();
    grad_bias.zero_();
  }
  if (input.numel() == 0 || !(requested[0] || requested[1] || requested[2] || requested[3])) return gradients;
  const Tensor grad_output = laid_out_as(call.grad_output, dense);
  const OptionalTensor weight = contiguous(call.weight), bias = contiguous(call.bias);
  const OptionalTensor residual = call.mask ? std::nullopt : laid_out_as(call.residual, dense);
  GroupNormBackward args{};
  args.view = group_view(dense, call.num_groups);
  args.dtype = dtype_of(input.scalar_type());
  args.grad_output = grad_output.const_data_ptr();
  args.input = dense.const_data_ptr();
  args.weight = group_parameter(weight);
  args.bias = group_parameter(bias);
  args.mean = call.statistics.const_data_ptr<double>();
  args.invstd = args.mean + args.view.statistics();
  args.activation = activation_of(call.activation, call.activation_param);
  args.residual = data_of(residual);
  args.mask = static_cast<const uint8_t*>(data_of(call.mask));
  if (requested[1]) args.grad_weight = group_parameter(grad_weight);
  if (requested[2]) args.grad_bias = group_parameter(grad_bias);
  // The kernel writes grad_residual only together with grad_input, which then needs memory even if it is not requested.
  Tensor scratch;
  if (requested[0] || requested[3]) {
    scratch = requested[0] ? grad_input : empty_output_like(dense);
    args.grad_input = scratch.mutable_data_ptr();
  }
  if (requested[3]) args.grad_residual = grad_residual.mutable_data_ptr();
  backend_of(input).group_norm_backward(args, input.device());
  return gradients;
}

}  // namespace

void check(const GroupNormCall& call) {
  check_groups(call.input, call.num_groups);
  check_parameter("weight", call.weight, call.input);
  check_parameter("bias", call.bias, call.input);
  check_like_input("residual", call.residual, call.input);
  check_eps(call.eps);
  activation_of(call.activation, call.activation_param);
}

void check(const GroupNormBackwardCall& call) {
  const Tensor &input = call.input, &statistics = call.statistics;
  check_groups(input, call.num_groups);
  check_parameter("weight", call.weight, input);
  check_parameter("bias", call.bias, input);
  TORCH_CHECK_VALUE(statistics.scalar_type() == at::kDouble && statistics.is_contiguous() &&
                        statistics.sizes() == at::IntArrayRef({2, input.size(0), call.num_groups}) &&
                        statistics.device() == input.device(),
                    "statistics must be contiguous float64 of shape (2, samples, groups) on ", input.device());
  check_like_input("grad_output", call.grad_output, input);
  if (!call.mask) check_like_input("residual", call.residual, input);
  const Activation activation = activation_of(call.activation, call.activation_param);
  if (call.mask) check_mask(*call.mask, input, activation);
}

GroupNormCall::Result group_norm(const GroupNormCall& c) {
  static const auto op = find_operator<GroupNormCall::Signature>("normfused::group_norm");
  return op.call(c.input, c.num_groups, c.weight, c.bias, c.eps, c.residual, c.activation, c.activation_param,
                 c.save_mask);
}

GroupNormBackwardCall::Result group_norm_backward(const GroupNormBackwardCall& c) {
  static const auto op = find_operator<GroupNormBackwardCall::Signature>("normfused::group_norm_backward");
  return op.call(c.grad_output, c.input, c.num_groups, c.weight, c.statistics, c.output_mask, c.bias, c.residual,
                 c.mask, c.activation, c.activation_param);
}

TORCH_LIBRARY_FRAGMENT(normfused, m) {
  m.def(
      "group_norm(Tensor input, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? residual=None, "
      "str activation=\"identity\", float activation_param=0., bool save_mask=False) -> (Tensor output, Tensor "
      "statistics, Tensor mask)");
  m.def(
      "group_norm_backward(Tensor grad_output, Tensor input, int num_groups, Tensor? weight, Tensor statistics, "
      "bool[4] output_mask, Tensor? bias=None, Tensor? residual=None, Tensor? mask=None, "
      "str activation=\"identity\", float activation_param=0.) -> (Tensor grad_input, Tensor grad_weight, Tensor "
      "grad_bias, Tensor grad_residual)");
}

NF_LIBRARY_IMPL_BACKENDS(m) {
  m.impl("group_norm", call_object<forward_kernels>());
  m.impl("group_norm_backward", call_object<backward_kernels>());
}

}  // namespace normfused::ops
