// When an operator's derivative must be computed in torch's own operators instead of by kernels.
//
// An autograd Function written in C++ drops the tangents of forward mode and refuses the levels of torch.func. Each
// operator therefore has a composite: the same formula in ATen operators, which torch differentiates to any order, in
// either mode and under every transform. It is also the operator's batching rule for vmap.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

namespace normfused::ops {

inline bool needs_grad(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
inline bool needs_grad(const std::optional<at::Tensor>& tensor) { return tensor && needs_grad(*tensor); }

inline bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const std::optional<at::Tensor>& tensor) { return tensor && has_tangent(*tensor); }

// Whether reverse mode records these tensors now.
template <class... T>
bool is_recorded(const T&... tensors) {
  return at::GradMode::is_enabled() && (needs_grad(tensors) || ...);
}

// Whether a level of torch.func is active.
inline bool in_transform() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

// Whether a forward operator needs its composite.
template <class... T>
bool needs_composite(const T&... tensors) {
  return (has_tangent(tensors) || ...) || (in_transform() && is_recorded(tensors...));
}

// Whether a backward operator does: it has no autograd Function of its own.
template <class... T>
bool backward_needs_composite(const T&... tensors) {
  return (has_tangent(tensors) || ...) || is_recorded(tensors...);
}

}  // namespace normfused::ops
