// Values on their way between memory and registers: conversions, and vectors of up to 16 bytes per access.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/cuda/prelude.h"

namespace normfused::cuda {

// The type of the arithmetic on values of type T: float, or double for types that float does not represent exactly.
template <class T>
using compute_t =
    std::conditional_t<std::is_same_v<T, double> || (std::is_integral_v<T> && sizeof(T) >= 4), double, float>;

// Converts a stored value to the type of the arithmetic.
template <class S, class T>
NF_DEVICE S widen(T value) {
  if constexpr (std::is_same_v<T, __half>)
    return static_cast<S>(__half2float(value));
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return static_cast<S>(__bfloat162float(value));
  else
    return static_cast<S>(value);
}

// Converts a result to the stored type; rounds to nearest even.
template <class T, class S>
NF_DEVICE T narrow(S value) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(static_cast<float>(value));
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(static_cast<float>(value));
  else
    return static_cast<T>(value);
}

// The register type of one memory access of this many bytes.
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

// Loads a word that is not read again: the caches evict it first. CUDA's __ldcs is volatile assembly without a memory
// clobber, which the compiler may move across stores; the fences keep its place among all other accesses.
template <class W>
NF_DEVICE W load_word_streaming(const W* source) {
  NF_COMPILER_FENCE();
  const W word = __ldcs(source);
  NF_COMPILER_FENCE();
  return word;
}

// Starts an asynchronous copy of 16 bytes from global to shared memory. A thread that has waited for its own copies can
// read them. Before compute capability 8.0 they are synchronous.
NF_DEVICE void start_copy(uint4* target, const void* source) {
#if !defined(__CUDACC__)
  cudahost::start_copy(target, source, 16);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(target))),
      "l"(source)
      : "memory");
#else
  *target = *static_cast<const uint4*>(source);
#endif
}
// The same for the first `bytes` bytes only, a multiple of 2; the rest become zeros.
NF_DEVICE void start_clipped_copy(uint4* target, const void* source, int bytes) {
#if !defined(__CUDACC__)
  cudahost::start_copy(target, source, bytes);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(target))),
      "l"(source), "r"(bytes)
      : "memory");
#else
  *target = {};
  for (int i = 0; i < bytes / 2; ++i) reinterpret_cast<uint16_t*>(target)[i] = static_cast<const uint16_t*>(source)[i];
#endif
}
// Makes the copies that the thread has started since the last call a group.
NF_DEVICE void end_copies() {
#if !defined(__CUDACC__)
  cudahost::end_copies();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all of the thread's groups of copies except the last kPending.
template <int kPending>
NF_DEVICE void wait_for_copies() {
#if !defined(__CUDACC__)
  cudahost::wait_for_copies(kPending);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Starts to fetch an address into the L2 cache.
NF_DEVICE void prefetch_address([[maybe_unused]] const void* address) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// Stores a word with one instruction. The intrinsics matter: nvcc splits a plain store of 16 bytes into four if it sees
// how each part was computed.
template <class W>
NF_DEVICE void store_word(W* target, W word, bool streaming) {
  if (streaming)
    __stcs(target, word);
  else
    __stwb(target, word);
}

// kValues consecutive values in registers. They are read and written by one instruction, or by one for every 16 bytes.
// The address must be a multiple of the access size.
template <class T, int kValues>
struct Vector {
  static constexpr int kBytes = kValues * static_cast<int>(sizeof(T));
  static constexpr int kAccesses = kBytes > 16 ? kBytes / 16 : 1;
  using Access = typename Word<kBytes / kAccesses>::type;

  T value[kValues];

  static NF_DEVICE Vector load(const T* source) {
    return from_words([&](int i) { return reinterpret_cast<const Access*>(source)[i]; });
  }
  // For data that is not read again: the caches evict it first.
  static NF_DEVICE Vector load_streaming(const T* source) {
    return from_words([&](int i) { return load_word_streaming(reinterpret_cast<const Access*>(source) + i); });
  }
  // The vector that consists of word(0), word(1), ..., of type Access.
  template <class Word>
  static NF_DEVICE Vector from_words(const Word& word_of) {
    Vector vector;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      const Access word = word_of(i);
      memcpy(reinterpret_cast<char*>(vector.value) + i * sizeof(Access), &word, sizeof word);
    }
    return vector;
  }

  // `streaming`: the data is not read soon; the caches evict it first.
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
