// Registration of an operator next to its implementation. Each operator's file declares its schema with
// TORCH_LIBRARY_FRAGMENT(normfused, m) and its implementations with the macros below or TORCH_LIBRARY_IMPL. The order
// of static initialization does not matter: the dispatcher accepts an implementation before its schema.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

// Implementations that run on every device with a Backend:
//   NF_LIBRARY_IMPL_BACKENDS(m) { m.impl("name", function); }
#if defined(NORMFUSED_WITH_CUDA)
#define NF_LIBRARY_IMPL_BACKENDS(m)                                \
  static void register_backends(torch::Library&);                  \
  TORCH_LIBRARY_IMPL(normfused, CPU, m) { register_backends(m); }  \
  TORCH_LIBRARY_IMPL(normfused, CUDA, m) { register_backends(m); } \
  static void register_backends(torch::Library& m)
#else
#define NF_LIBRARY_IMPL_BACKENDS(m)                               \
  static void register_backends(torch::Library&);                 \
  TORCH_LIBRARY_IMPL(normfused, CPU, m) { register_backends(m); } \
  static void register_backends(torch::Library& m)
#endif

namespace normfused::ops {

// The registered operator of this name, typed as the C++ function F.
template <class F>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

// For operators without a derivative: backward through their outputs raises an error that names the operator.
inline torch::CppFunction not_differentiable() { return torch::autograd::autogradNotImplementedFallback(); }

}  // namespace normfused::ops
