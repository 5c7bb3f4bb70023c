// Values on their way between memory and registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/cuda/prelude.h"

namespace normfused::cuda {

// What a value is computed in: float, or double for what float does not hold.
template <class T>
using compute_t =
    std::conditional_t<std::is_same_v<T, double> || (std::is_integral_v<T> && sizeof(T) >= 4), double, float>;

template <class S, class T>
NF_DEVICE S widen(T value) {
  if constexpr (std::is_same_v<T, __half>)
    return static_cast<S>(__half2float(value));
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return static_cast<S>(__bfloat162float(value));
  else
    return static_cast<S>(value);
}

// Rounds to nearest even.
template <class T, class S>
NF_DEVICE T narrow(S value) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(static_cast<float>(value));
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(static_cast<float>(value));
  else
    return static_cast<T>(value);
}

// The register type of one memory access.
template <int bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<1> {
  using type = uint8_t;
};

// kValues neighbours in memory, read and written by one instruction. They must lie on a multiple of their size.
template <class T, int kValues>
struct Vector {
  using Access = typename Word<kValues* static_cast<int>(sizeof(T))>::type;

  T value[kValues];

  static NF_DEVICE Vector from(Access word) {
    Vector vector;
    memcpy(static_cast<void*>(vector.value), &word, sizeof word);
    return vector;
  }
  static NF_DEVICE Vector load(const T* source) { return from(*reinterpret_cast<const Access*>(source)); }
  // For what is not read again: first to leave the caches.
  static NF_DEVICE Vector load_last(const T* source) { return from(__ldcs(reinterpret_cast<const Access*>(source))); }

  NF_DEVICE void store(T* target, bool streaming) const {
    Access word;
    memcpy(&word, static_cast<const void*>(value), sizeof word);
    if (streaming)
      __stcs(reinterpret_cast<Access*>(target), word);
    else
      *reinterpret_cast<Access*>(target) = word;
  }
};

}  // namespace normfused::cuda
