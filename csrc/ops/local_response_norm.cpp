#include "ops/local_response_norm.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/backend.h"
#include "ops/derivatives.h"
#include "ops/layout.h"
#include "ops/output_memory.h"
#include "ops/registration.h"

namespace normfused::ops {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// out[c] = the sum of values[c - left .. c + right], with zeros outside of the channels.
Tensor window_sum(const Tensor& values, int64_t left, int64_t right) {
  if (values.numel() == 0) return values;
  at::DimVector padding(2 * (values.dim() - 1), 0);
  padding.end()[-2] = left;
  padding.end()[-1] = right;
  return at::constant_pad_nd(values, padding).unfold(1, left + 1 + right, 1).sum(-1);
}

void check(const Tensor& input, int64_t size) {
  check_dims(input, 3);
  TORCH_CHECK_VALUE(size >= 1, "size must be at least 1, got ", size);
  dtype_of(input.scalar_type());
}

void check_grad_output(const Tensor& grad_output, const Tensor& input) {
  TORCH_CHECK_VALUE(grad_output.device() == input.device(), "grad_output is on ", grad_output.device(), ", input on ",
                    input.device());
  TORCH_CHECK_VALUE(grad_output.sizes() == input.sizes(), "grad_output has shape ", grad_output.sizes(), ", input ",
                    input.sizes());
  TORCH_CHECK_TYPE(grad_output.scalar_type() == input.scalar_type(), "grad_output is ", grad_output.scalar_type(),
                   ", input ", input.scalar_type());
}

// The formulas of kernels/math.h in ATen operators: differentiable any number of times, and for windows of any size.
// Forward if grad_output is undefined.
Tensor composite(const Tensor& grad_output, const Tensor& input, int64_t size, double alpha, double beta, double k) {
  check(input, size);
  if (grad_output.defined()) check_grad_output(grad_output, input);
  const int64_t left = std::min(size / 2, input.size(1)), right = std::min((size - 1) / 2, input.size(1));
  const double scale = alpha / static_cast<double>(size);
  const Tensor x = input.to(at::toOpMathType(input.scalar_type()));
  const Tensor base = window_sum(x * x, left, right) * scale + k, factor = base.pow(-beta);
  if (!grad_output.defined()) return (x * factor).to(input.scalar_type());
  const Tensor grad = grad_output.to(x.scalar_type());
  const Tensor shares = window_sum(grad * x * factor / base, right, left);
  return (grad * factor - x * shares * (2 * scale * beta)).to(input.scalar_type());
}

// Forward if grad_output is undefined.
Tensor run(const Tensor& grad_output, const Tensor& input, int64_t size, double alpha, double beta, double k) {
  check(input, size);
  const DType dtype = dtype_of(input.scalar_type());
  const Tensor dense = as_dense(input);
  const Tensor grad = grad_output.defined() ? laid_out_as(grad_output, dense) : grad_output;
  const Tensor output = empty_output_like(dense);
  if (input.numel() == 0) return output;
  const LocalResponseNorm args{*view_of(dense),
                               dtype,
                               dense.const_data_ptr(),
                               grad.defined() ? grad.const_data_ptr() : nullptr,
                               output.mutable_data_ptr(),
                               size,
                               alpha,
                               beta,
                               k};
  const Backend& backend = backend_of(input);
  if (backend.supports(args))
    backend.local_response_norm(args, input.device());
  else
    output.copy_(composite(grad_output, input, size, alpha, beta, k));
  return output;
}

Tensor forward_kernels(const Tensor& input, int64_t size, double alpha, double beta, double k) {
  return run({}, input, size, alpha, beta, k);
}

Tensor backward_kernels(const Tensor& grad_output, const Tensor& input, int64_t size, double alpha, double beta,
                        double k) {
  check_grad_output(grad_output, input);
  return run(grad_output, input, size, alpha, beta, k);
}

struct Normalize : torch::autograd::Function<Normalize> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, int64_t size, double alpha, double beta, double k) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({input});
    ctx->saved_data["size"] = size;
    ctx->saved_data["alpha"] = alpha;
    ctx->saved_data["beta"] = beta;
    ctx->saved_data["k"] = k;
    return local_response_norm(input, size, alpha, beta, k);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto number = [&](const char* name) { return ctx->saved_data[name].toDouble(); };
    return {local_response_norm_backward(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["size"].toInt(),
                                         number("alpha"), number("beta"), number("k")),
            {},
            {},
            {},
            {}};
  }
};

Tensor forward_autograd(const Tensor& input, int64_t size, double alpha, double beta, double k) {
  if (needs_composite(input)) return composite({}, input, size, alpha, beta, k);
  if (is_recorded(input)) return Normalize::apply(input, size, alpha, beta, k);
  const at::AutoDispatchBelowADInplaceOrView below;
  return local_response_norm(input, size, alpha, beta, k);
}

Tensor backward_autograd(const Tensor& grad_output, const Tensor& input, int64_t size, double alpha, double beta,
                         double k) {
  if (backward_needs_composite(grad_output, input)) return composite(grad_output, input, size, alpha, beta, k);
  const at::AutoDispatchBelowADInplaceOrView below;
  return local_response_norm_backward(grad_output, input, size, alpha, beta, k);
}

Tensor forward_batched(const Tensor& input, int64_t size, double alpha, double beta, double k) {
  return composite({}, input, size, alpha, beta, k);
}

}  // namespace

Tensor local_response_norm(const Tensor& input, int64_t size, double alpha, double beta, double k) {
  static const auto op = find_operator<decltype(local_response_norm)>("normfused::local_response_norm");
  return op.call(input, size, alpha, beta, k);
}

Tensor local_response_norm_backward(const Tensor& grad_output, const Tensor& input, int64_t size, double alpha,
                                    double beta, double k) {
  static const auto op =
      find_operator<decltype(local_response_norm_backward)>("normfused::local_response_norm_backward");
  return op.call(grad_output, input, size, alpha, beta, k);
}

TORCH_LIBRARY_FRAGMENT(normfused, m) {
  m.def("local_response_norm(Tensor input, int size, float alpha, float beta, float k) -> Tensor");
  m.def(
      "local_response_norm_backward(Tensor grad_output, Tensor input, int size, float alpha, float beta, float k) -> "
      "Tensor");
}

NF_LIBRARY_IMPL_BACKENDS(m) {
  m.impl("local_response_norm", forward_kernels);
  m.impl("local_response_norm_backward", backward_kernels);
}

TORCH_LIBRARY_IMPL(normfused, FuncTorchBatched, m) {
  m.impl("local_response_norm", forward_batched);
  m.impl("local_response_norm_backward", composite);
}

TORCH_LIBRARY_IMPL(normfused, Autograd, m) {
  m.impl("local_response_norm", forward_autograd);
  m.impl("local_response_norm_backward", backward_autograd);
}

}  // namespace normfused::ops
