// Whether an operator's derivative is computed by kernels or by its composite.
//
// A C++ autograd Function discards forward-mode tangents and does not support the levels of torch.func. Each operator
// therefore has a composite: the same formula in ATen operators, which torch differentiates to any order, in both modes
// and under every transform. It is also the operator's batching rule for vmap.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

namespace normfused::ops {

inline bool needs_grad(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
inline bool needs_grad(const std::optional<at::Tensor>& tensor) { return tensor && needs_grad(*tensor); }

inline bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const std::optional<at::Tensor>& tensor) { return tensor && has_tangent(*tensor); }

// Whether reverse mode records an operation on these tensors.
template <class... T>
bool is_recorded(const T&... tensors) {
  return at::GradMode::is_enabled() && (needs_grad(tensors) || ...);
}

// Whether a level of torch.func is active.
inline bool in_transform() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

// For forward operators.
template <class... T>
bool needs_composite(const T&... tensors) {
  return (has_tangent(tensors) || ...) || (in_transform() && is_recorded(tensors...));
}

// For backward operators, which have no autograd Function.
template <class... T>
bool backward_needs_composite(const T&... tensors) {
  return (has_tangent(tensors) || ...) || is_recorded(tensors...);
}

}  // namespace normfused::ops
