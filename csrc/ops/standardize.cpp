#include "ops/standardize.h"

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/backend.h"
#include "ops/derivatives.h"
#include "ops/layout.h"
#include "ops/output_memory.h"
#include "ops/registration.h"

namespace normfused::ops {

namespace {

using at::Tensor;
using Constants = at::ArrayRef<double>;

at::ScalarType output_type(const Tensor& input, std::optional<at::ScalarType> dtype) {
  return dtype.value_or(input.scalar_type() == at::kByte ? at::kFloat : input.scalar_type());
}

at::MemoryFormat output_format(const Tensor& input, std::optional<at::MemoryFormat> memory_format) {
  const at::MemoryFormat format = memory_format.value_or(at::MemoryFormat::Preserve);
  return format == at::MemoryFormat::Preserve ? input.suggest_memory_format() : format;
}

void check(const Tensor& input, at::ScalarType output, Constants mean, Constants std) {
  const at::ScalarType type = input.scalar_type();
  TORCH_CHECK_VALUE(input.dim() == 3 || input.dim() == 4, "input must have shape (N, C, H, W) or (C, H, W), got ",
                    input.sizes());
  TORCH_CHECK_TYPE(type == at::kByte || type == output || (type == at::kFloat && output != at::kDouble), "input of ",
                   type, " cannot be standardized to ", output);
  TORCH_CHECK_TYPE(type != at::kByte || output != at::kDouble, "input of ", type, " cannot be standardized to double");
  for (const Constants& constants : {mean, std})
    TORCH_CHECK_VALUE(static_cast<int64_t>(constants.size()) == input.size(-3), constants.size(),
                      " constants for an input with ", input.size(-3), " channels");
}

// A single image as a batch of one.
Tensor as_batch(const Tensor& input) { return input.dim() == 3 ? input.unsqueeze(0) : input; }

// Precondition: input and output are dense and have the same shape (N, C, H, W).
void run(const Tensor& input, const Tensor& output, Constants mean, Constants std, double scale) {
  if (input.numel() == 0) return;
  const auto is_last = [](const Tensor& tensor) { return !tensor.is_contiguous(); };
  const Standardize args{input.size(0),
                         input.size(1),
                         input.size(2) * input.size(3),
                         any_dtype_of(input.scalar_type()),
                         dtype_of(output.scalar_type()),
                         input.const_data_ptr(),
                         output.mutable_data_ptr(),
                         is_last(input),
                         is_last(output),
                         mean.data(),
                         std.data(),
                         scale};
  backend_of(input).standardize(args, input.device());
}

Tensor standardize_kernels(const Tensor& input, Constants mean, Constants std, double scale,
                           std::optional<at::ScalarType> dtype, std::optional<at::MemoryFormat> memory_format) {
  const at::ScalarType type = output_type(input, dtype);
  check(input, type, mean, std);
  const Tensor dense = as_dense(as_batch(input));
  const Tensor output =
      empty_output(dense.sizes(), input.options().dtype(type).memory_format(output_format(dense, memory_format)));
  run(dense, output, mean, std, scale);
  return input.dim() == 3 ? output.squeeze(0) : output;
}

void standardize_out_kernels(const Tensor& input, Constants mean, Constants std, double scale, const Tensor& out) {
  check(input, out.scalar_type(), mean, std);
  TORCH_CHECK_VALUE(out.sizes() == input.sizes(), "out has shape ", out.sizes(), ", input ", input.sizes());
  TORCH_CHECK_VALUE(out.device() == input.device(), "out is on ", out.device(), ", input on ", input.device());
  at::assert_no_internal_overlap(out);
  at::assert_no_overlap(out, input);
  out.unsafeGetTensorImpl()->bump_version();
  if (const Tensor images = as_batch(out); view_of(images))
    run(as_dense(as_batch(input)), images, mean, std, scale);
  else
    out.copy_(standardize_kernels(input, mean, std, scale, out.scalar_type(), std::nullopt));
}

void standardize_inplace_kernels(const Tensor& input, Constants mean, Constants std, double scale) {
  check(input, input.scalar_type(), mean, std);
  at::assert_no_internal_overlap(input);
  input.unsafeGetTensorImpl()->bump_version();
  if (const Tensor images = as_batch(input); view_of(images))
    run(images, images, mean, std, scale);
  else
    input.copy_(standardize_kernels(input, mean, std, scale, std::nullopt, std::nullopt));
}

// standardize in ATen operators; see derivatives.h.
Tensor composite(const Tensor& input, Constants mean, Constants std, double scale, std::optional<at::ScalarType> dtype,
                 std::optional<at::MemoryFormat> memory_format) {
  const at::ScalarType type = output_type(input, dtype);
  check(input, type, mean, std);
  // scalar_tensor, because compilers and torch.func trace tensors from factory functions.
  const auto per_channel = [&](Constants constants) {
    std::vector<Tensor> scalars;
    for (const double constant : constants)
      scalars.push_back(at::scalar_tensor(constant, input.options().dtype(at::kDouble)));
    return at::stack(scalars).view({-1, 1, 1});
  };
  const Tensor output = (input.to(at::kDouble) * scale - per_channel(mean)) / per_channel(std);
  return output.to(type, /*non_blocking=*/false, /*copy=*/false, memory_format);
}

// The gradient, grad_output * scale / std, is itself a standardization, and so is differentiable.
class StandardizeFunction : public torch::autograd::Function<StandardizeFunction> {
 public:
  // `operate` calls the operator below autograd and returns its output.
  template <class Operate>
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& input, Constants std, double scale,
                        bool inplace, const Operate& operate) {
    ctx->saved_data["std"] = std.vec();
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["type"] = input.scalar_type();
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor output = operate();
    if (inplace) ctx->mark_dirty({input});
    return output;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const std::vector<double> std = ctx->saved_data["std"].toDoubleVector(), zeros(std.size());
    const Tensor grad = grads[0].to(ctx->saved_data["type"].toScalarType());
    const double scale = ctx->saved_data["scale"].toDouble();
    return {standardize(grad, zeros, std, scale, std::nullopt, std::nullopt), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor standardize_autograd(const Tensor& input, Constants mean, Constants std, double scale,
                            std::optional<at::ScalarType> dtype, std::optional<at::MemoryFormat> memory_format) {
  const auto operate = [&] { return standardize(input, mean, std, scale, dtype, memory_format); };
  if (needs_composite(input)) return composite(input, mean, std, scale, dtype, memory_format);
  if (is_recorded(input)) return StandardizeFunction::apply(input, std, scale, false, operate);
  const at::AutoDispatchBelowADInplaceOrView below;
  return operate();
}

void standardize_inplace_autograd(const Tensor& input, Constants mean, Constants std, double scale) {
  const auto operate = [&] {
    standardize_(input, mean, std, scale);
    return input;
  };
  TORCH_CHECK_NOT_IMPLEMENTED(!in_transform() && !has_tangent(input),
                              "standardize_ has no derivative under torch.func or in forward mode; use standardize");
  if (is_recorded(input)) {
    torch::autograd::check_inplace(input, /*requires_grad=*/true);
    StandardizeFunction::apply(input, std, scale, true, operate);
  } else {
    const at::AutoDispatchBelowADInplaceOrView below;
    operate();
  }
}

}  // namespace

Tensor standardize(const Tensor& input, Constants mean, Constants std, double scale,
                   std::optional<at::ScalarType> dtype, std::optional<at::MemoryFormat> memory_format) {
  static const auto op = find_operator<decltype(standardize)>("normfused::standardize");
  return op.call(input, mean, std, scale, dtype, memory_format);
}

void standardize_out(const Tensor& input, Constants mean, Constants std, double scale, const Tensor& out) {
  static const auto op = find_operator<decltype(standardize_out)>("normfused::standardize_out");
  op.call(input, mean, std, scale, out);
}

void standardize_(const Tensor& input, Constants mean, Constants std, double scale) {
  static const auto op = find_operator<decltype(standardize_)>("normfused::standardize_");
  op.call(input, mean, std, scale);
}

TORCH_LIBRARY_FRAGMENT(normfused, m) {
  m.def(
      "standardize(Tensor input, float[] mean, float[] std, float scale=1., ScalarType? dtype=None, "
      "MemoryFormat? memory_format=None) -> Tensor");
  m.def("standardize_out(Tensor input, float[] mean, float[] std, float scale, Tensor(a!) out) -> ()");
  m.def("standardize_(Tensor(a!) input, float[] mean, float[] std, float scale=1.) -> ()");
}

NF_LIBRARY_IMPL_BACKENDS(m) {
  m.impl("standardize", standardize_kernels);
  m.impl("standardize_", standardize_inplace_kernels);
  m.impl("standardize_out", standardize_out_kernels);
}

TORCH_LIBRARY_IMPL(normfused, FuncTorchBatched, m) { m.impl("standardize", composite); }

TORCH_LIBRARY_IMPL(normfused, Autograd, m) {
  m.impl("standardize", standardize_autograd);
  m.impl("standardize_", standardize_inplace_autograd);
  m.impl("standardize_out", not_differentiable());
}

}  // namespace normfused::ops
