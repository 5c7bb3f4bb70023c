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

// One access each. CUDA's own __ldcs is volatile assembly that says nothing of memory, so that the compiler may move it
// across stores: fenced, it stays where it is among all other accesses.
template <class W>
NF_DEVICE W load_word_last(const W* source) {
  NF_COMPILER_FENCE();
  const W word = __ldcs(source);
  NF_COMPILER_FENCE();
  return word;
}
// Brings it to the L2 cache.
NF_DEVICE void prefetch_address([[maybe_unused]] const void* address) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}
// As one instruction: a plain store of four words becomes four, where the compiler sees what each of them is made of.
template <class W>
NF_DEVICE void store_word(W* target, W word, bool streaming) {
  if (streaming)
    __stcs(target, word);
  else
    __stwb(target, word);
}

// kValues neighbours in memory, read and written by one instruction, or by as many as it takes at 16 bytes each. They
// must lie on a multiple of that.
template <class T, int kValues>
struct Vector {
  static constexpr int kBytes = kValues * static_cast<int>(sizeof(T));
  static constexpr int kAccesses = kBytes > 16 ? kBytes / 16 : 1;
  using Access = typename Word<kBytes / kAccesses>::type;

  T value[kValues];

  NF_DEVICE char* part(int i) { return reinterpret_cast<char*>(value) + i * sizeof(Access); }
  static NF_DEVICE Vector load(const T* source) {
    Vector vector;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      const Access word = reinterpret_cast<const Access*>(source)[i];
      memcpy(vector.part(i), &word, sizeof word);
    }
    return vector;
  }
  // For what is not read again: first to leave the caches.
  static NF_DEVICE Vector load_last(const T* source) {
    Vector vector;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      const Access word = load_word_last(reinterpret_cast<const Access*>(source) + i);
      memcpy(vector.part(i), &word, sizeof word);
    }
    return vector;
  }

  NF_DEVICE void store(T* target, bool streaming) const {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      Access word;
      memcpy(&word, reinterpret_cast<const char*>(value) + i * sizeof(Access), sizeof word);
      store_word(reinterpret_cast<Access*>(target) + i, word, streaming);
    }
  }
};

}  // namespace normfused::cuda
