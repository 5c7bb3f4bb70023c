// SIMD vectors of NF_VECTOR_BYTES bytes: loads and stores that convert between storage and arithmetic type, of a full
// vector or of a tail. Arithmetic uses the operators of GCC's and Clang's vector types.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/math.h"

namespace normfused::cpu::NF_ISA {
namespace {

inline constexpr int64_t kVectorBytes = NF_VECTOR_BYTES;

// Calls f(0), f(1), …, f(n - 1) with the indices as compile-time constants. GCC unrolls a plain loop over an array of
// vectors too late to hold the array in registers.
template <int64_t... i, class F>
NF_FN void unroll(std::integer_sequence<int64_t, i...>, const F& f) {
  (f(std::integral_constant<int64_t, i>{}), ...);
}
template <int64_t n, class F>
NF_FN void unroll(const F& f) {
  unroll(std::make_integer_sequence<int64_t, n>{}, f);
}

// The arithmetic type for values stored as T: double for double, else float.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using compute_t = typename ComputeOf<T>::type;

template <class S, int64_t bytes = kVectorBytes>
struct VecOf {
  typedef S type __attribute__((vector_size(bytes)));
};
template <class S>
using Vec = typename VecOf<S>::type;

template <class S>
inline constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(S));

// If a or b is NaN, the result is b, as for the x86 instructions.
template <class V>
NF_FN V minimum(V a, V b) {
#if NF_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm512_min_ps((__m512)a, (__m512)b);
#endif
  return a < b ? a : b;
}
template <class V>
NF_FN V maximum(V a, V b) {
#if NF_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm512_max_ps((__m512)a, (__m512)b);
#endif
  return a > b ? a : b;
}

template <class S>
using lane_index_t = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;

template <class S>
NF_FN Vec<lane_index_t<S>> lane_index() {
  Vec<lane_index_t<S>> index{};
  for (int64_t lane = 0; lane < kLanes<S>; ++lane) index[lane] = static_cast<lane_index_t<S>>(lane);
  return index;
}

// How many values a load or store accesses: all of a vector, or the first `lanes` of it, at the end of a range. A
// parameter of either type is called `width`.
struct FullVector {};
struct Tail {
  int64_t lanes;
};

template <class S>
NF_FN int64_t active_lanes(FullVector) {
  return kLanes<S>;
}
template <class S>
NF_FN int64_t active_lanes(Tail tail) {
  return tail.lanes;
}

// Calls body(i, FullVector{}) for i = 0, lanes, 2 * lanes, …, then body(i, Tail{rest}) if n is not a multiple of lanes.
template <int64_t lanes, class Body>
NF_FN void for_each_chunk(int64_t n, const Body& body) {
  // Depends on n alone: in a loop over rows of equal length, the compiler hoists it and the tail's lane mask.
  const int64_t full = n / lanes * lanes;
  for (int64_t i = 0; i < full; i += lanes) body(i, FullVector{});
  if (full < n) body(full, Tail{n - full});
}
template <class S, class Body>
NF_FN void for_each_vector(int64_t n, const Body& body) {
  for_each_chunk<kLanes<S>>(n, body);
}

template <class S>
NF_FN Vec<S> broadcast(S value) {
  return value - Vec<S>{};
}

template <class V, class P>
NF_FN V load_unaligned(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class From>
NF_FN V bit_cast(const From& from) {
  static_assert(sizeof(V) == sizeof(From));
  return load_unaligned<V>(&from);
}

// ---- conversions of 16-bit storage -------------------------------------------------------------------------------

using U16 = VecOf<uint16_t, kVectorBytes / 2>::type;  // as many lanes as Vec<float>
using U32 = Vec<uint32_t>;

// GCC 12 compiles a __builtin_convertvector between vectors of different widths to several instructions.
NF_FN U32 to_u32(U16 raw) {
#if NF_VECTOR_BYTES == 64
  return (U32)_mm512_cvtepu16_epi32((__m256i)raw);
#elif NF_VECTOR_BYTES == 32
  return (U32)_mm256_cvtepu16_epi32((__m128i)raw);
#else
  return __builtin_convertvector(raw, U32);
#endif
}

NF_FN U16 to_u16(U32 wide) {
#if NF_VECTOR_BYTES == 64
  return (U16)_mm512_cvtepi32_epi16((__m512i)wide);
#else
  return __builtin_convertvector(wide, U16);
#endif
}

NF_FN Vec<float> widen(BFloat16, U16 raw) {
  const U32 bits = to_u32(raw) << 16;
  return bit_cast<Vec<float>>(bits);
}

// Rounds to nearest, ties to even; the result is the upper half of each lane. Precondition: the lower half of a NaN is
// zero, as for the default NaN and every widened NaN. Otherwise the carry could turn the NaN into a number.
NF_FN U32 round_to_bfloat16(Vec<float> value) {
  const U32 bits = bit_cast<U32>(value);
  return bits + 0x7fff + ((bits >> 16) & 1);
}

NF_FN U16 narrow(BFloat16, Vec<float> value) { return to_u16(round_to_bfloat16(value) >> 16); }

NF_FN Vec<float> widen(Half, U16 raw) {
#if NF_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps((__m256i)raw);
#elif NF_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps((__m128i)raw);
#else
  // One multiplication changes the exponent bias and normalizes subnormals. Infinity and NaN are handled separately.
  const U32 h = to_u32(raw);
  const U32 magnitude = (h & 0x7fff) << 13;
  const Vec<float> scaled = bit_cast<Vec<float>>(magnitude) * 0x1p112f;
  const U32 finite = bit_cast<U32>(scaled);
  const U32 bits = (magnitude >= (0x7c00u << 13) ? (magnitude | 0x7f800000) : finite) | ((h & 0x8000) << 16);
  return bit_cast<Vec<float>>(bits);
#endif
}

NF_FN U16 narrow(Half, Vec<float> value) {
#if NF_VECTOR_BYTES == 64
  return (U16)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif NF_VECTOR_BYTES == 32
  return (U16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
  const U32 bits = bit_cast<U32>(value);
  const U32 magnitude = bits & 0x7fffffff;
  const Vec<float> absolute = bit_cast<Vec<float>>(magnitude);
  // Subnormal halves: adding 0.5 aligns their last bit with the last bit of float, and the addition rounds to even.
  const Vec<float> aligned = absolute + 0.5f;
  const U32 subnormal = bit_cast<U32>(aligned) - 0x3f000000;
  const U32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const U32 overflow = magnitude > 0x7f800000 ? ((magnitude >> 13) & 0x3ff) | 0x7e00 : U32{} + 0x7c00;
  const U32 half = magnitude >= 0x477ff000 ? overflow : (magnitude < 0x38800000 ? subnormal : normal);
  return to_u16(half | ((bits >> 16) & 0x8000));
#endif
}

// ---- loads -------------------------------------------------------------------------------------------------------

NF_FN Vec<float> load_bytes_as_float(const uint8_t* p) {
#if NF_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_unaligned<__m128i>(p)));
#else
  return __builtin_convertvector(load_unaligned<typename VecOf<uint8_t, kLanes<float>>::type>(p), Vec<float>);
#endif
}

template <class S, class T>
NF_FN Vec<S> load(const T* p, FullVector) {
  if constexpr (std::is_same_v<S, T>) {
    return load_unaligned<Vec<S>>(p);
  } else if constexpr (std::is_same_v<T, uint8_t>) {
    return load_bytes_as_float(p);
  } else if constexpr (std::is_same_v<S, float>) {
    return widen(T{}, load_unaligned<U16>(p));
  } else if constexpr (std::is_same_v<T, float>) {
    return __builtin_convertvector(load_unaligned<typename VecOf<float, kVectorBytes / 2>::type>(p), Vec<double>);
  } else {
    // Half and bfloat16 to double via float, which is exact.
    T buffer[kLanes<float>] = {};
    std::memcpy(buffer, p, kLanes<double> * sizeof(T));
    const Vec<float> wide = load<float>(buffer, FullVector{});
    return __builtin_convertvector(load_unaligned<typename VecOf<float, kVectorBytes / 2>::type>(&wide), Vec<double>);
  }
}

// Loads the lanes of the tail; the other lanes are those of `fill`. Memory past the tail is not accessed.
template <class S, class T>
NF_FN Vec<S> load(const T* p, Tail tail, Vec<S> fill = Vec<S>{}) {
#if NF_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, T> && sizeof(S) == 4) {
    return (Vec<S>)_mm512_mask_loadu_ps((__m512)fill, static_cast<__mmask16>((1u << tail.lanes) - 1), p);
  } else if constexpr (std::is_same_v<S, T>) {
    return (Vec<S>)_mm512_mask_loadu_pd((__m512d)fill, static_cast<__mmask8>((1u << tail.lanes) - 1), p);
  } else if constexpr (std::is_same_v<S, float> && sizeof(T) == 2) {
    const auto lane_mask = static_cast<__mmask16>((1u << tail.lanes) - 1);
    const Vec<float> value = widen(T{}, (U16)_mm256_maskz_loadu_epi16(lane_mask, p));
    return (Vec<S>)_mm512_mask_blend_ps(lane_mask, (__m512)fill, (__m512)value);
  } else
#endif
  {
    T buffer[kLanes<S>] = {};
    std::memcpy(buffer, p, static_cast<size_t>(tail.lanes) * sizeof(T));
    const Vec<S> value = load<S>(static_cast<const T*>(buffer), FullVector{});
    return lane_index<S>() < static_cast<lane_index_t<S>>(tail.lanes) ? value : fill;
  }
}

template <class S, class T>
NF_FN Vec<S> load(const T* p, FullVector, Vec<S>) {
  return load<S>(p, FullVector{});
}

// All lanes of a vector, as one or two vectors of double.
template <class S>
struct DoubleVectors {
  static constexpr int64_t kVecs = sizeof(double) / sizeof(S);
  Vec<double> vec[kVecs];
};

NF_FN DoubleVectors<double> widen_to_double(Vec<double> v) { return {{v}}; }
// Intrinsics rather than a store and two loads, which would force the accumulators into memory.
NF_FN DoubleVectors<float> widen_to_double(Vec<float> v) {
#if NF_VECTOR_BYTES == 64
  return {{(Vec<double>)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)),
           (Vec<double>)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1))}};
#elif NF_VECTOR_BYTES == 32
  return {{(Vec<double>)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)),
           (Vec<double>)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))}};
#else
  using HalfVector = VecOf<float, kVectorBytes / 2>::type;
  const auto* const lanes = reinterpret_cast<const char*>(&v);
  return {{__builtin_convertvector(load_unaligned<HalfVector>(lanes), Vec<double>),
           __builtin_convertvector(load_unaligned<HalfVector>(lanes + kVectorBytes / 2), Vec<double>)}};
#endif
}

// ---- stores ------------------------------------------------------------------------------------------------------

template <class T>
NF_FN auto to_storage(Vec<compute_t<T>> value) {
  if constexpr (std::is_same_v<compute_t<T>, T>)
    return value;
  else
    return narrow(T{}, value);
}

template <class T>
NF_FN void store(T* p, Vec<compute_t<T>> value, FullVector) {
  const auto raw = to_storage<T>(value);
  std::memcpy(p, &raw, sizeof(raw));
}

template <class T>
NF_FN void store(T* p, Vec<compute_t<T>> value, Tail tail) {
#if NF_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << tail.lanes) - 1), (__m512)value);
  } else if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << tail.lanes) - 1), (__m512d)value);
  } else {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << tail.lanes) - 1), (__m256i)to_storage<T>(value));
  }
#else
  const auto raw = to_storage<T>(value);
  std::memcpy(p, &raw, static_cast<size_t>(tail.lanes) * sizeof(T));
#endif
}

// Stores doubles as S, rounded once.
template <class S, class Width>
NF_FN void store_double_as(S* p, Vec<double> value, Width width) {
  if constexpr (std::is_same_v<S, double>) {
    store(p, value, width);
  } else {
    const auto narrow = __builtin_convertvector(value, typename VecOf<float, kVectorBytes / 2>::type);
    std::memcpy(p, &narrow, sizeof(S) * static_cast<size_t>(active_lanes<double>(width)));
  }
}

// Non-temporal store: Parallel orders it before what follows the loop. Precondition: p is aligned to sizeof(V).
template <class V>
NF_FN void store_nontemporal(void* p, V raw) {
#if NF_VECTOR_BYTES == 64
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)raw);
#endif
#if NF_VECTOR_BYTES >= 32
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)raw);
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)raw);
#endif
  std::memcpy(p, &raw, sizeof(V));
}

// Distance from p to the next multiple of `alignment`.
NF_FN int64_t bytes_to_alignment(const void* p, int64_t alignment) {
  return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(alignment));
}

// Prefetches a row of up to 2048 bytes. Rows of one channel are far apart in memory, and hardware prefetchers do not
// cross pages, so without this each short row begins with a cache miss.
template <class T>
NF_FN void prefetch_row(const T* row, int64_t n) {
  if (n * static_cast<int64_t>(sizeof(T)) > 2048) return;
  const char* const begin = reinterpret_cast<const char*>(row);
  const char* const end = reinterpret_cast<const char*>(row + n);
  for (const char* line = begin; line < end; line += 64) __builtin_prefetch(line);
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
