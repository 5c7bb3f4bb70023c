// Call objects: the arguments of an operator as one struct, whose members are in the schema's order. Only functions
// that the dispatcher or Python calls have the schema's parameter list, and call_object() generates these.
#pragma once

namespace normfused::ops {

namespace detail {

template <auto function, class Signature>
struct Unpacked;

template <auto function, class R, class... A>
struct Unpacked<function, R(A...)> {
  static R call(A... arguments) { return function({arguments...}); }
};

template <auto function, class R, class Call>
constexpr auto call_object(R (*)(const Call&)) {
  return &Unpacked<function, typename Call::Signature>::call;
}

}  // namespace detail

// A function with the parameter list Call::Signature, which calls `function` with these arguments as a Call.
template <auto function>
constexpr auto call_object() {
  return detail::call_object<function>(function);
}

}  // namespace normfused::ops
