// The way from a C++ function to the operator of its name.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace normfused::ops {

template <class F>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

}  // namespace normfused::ops
