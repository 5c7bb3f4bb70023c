// Packs: the values of one memory access, stored as T and widened to the arithmetic type S.
//
// A pack has one vector, except:
//   bfloat16 as float   two vectors: the values at even and at odd positions. A shift and an AND deinterleave them.
//                       Widening each half in order needs shuffles, for which x86 has one execution port.
//   float, half or bfloat16 as double   two vectors: the first and the second half.
//
// "Memory order" is the order of the values as T; "pack order" is their order in the vectors.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/vec.inl"

namespace normfused::cpu::NF_ISA {
namespace {

template <class S_, class T>
struct Pack {
  using S = S_;
  static constexpr bool kInterleaved = std::is_same_v<T, BFloat16> && std::is_same_v<S, float>;
  static constexpr int64_t kVecs = kInterleaved || (std::is_same_v<S, double> && !std::is_same_v<T, double>) ? 2 : 1;
  static constexpr int64_t kSize = kVecs * kLanes<S>;
  static constexpr int64_t kItemBytes = sizeof(T);

  Vec<S> vec[kVecs];

  // The pack whose vector i is f(i).
  template <class F>
  static NF_INLINE Pack generate(const F& f) {
    Pack result;
    unroll<kVecs>([&](auto i) { result.vec[i] = f(i); });
    return result;
  }
  static NF_INLINE Pack filled(S value) {
    return generate([&](int64_t) { return broadcast<S>(value); });
  }
  friend NF_INLINE Pack operator+(const Pack& a, const Pack& b) {
    return generate([&](int64_t i) { return a.vec[i] + b.vec[i]; });
  }
  friend NF_INLINE Pack operator-(const Pack& a, const Pack& b) {
    return generate([&](int64_t i) { return a.vec[i] - b.vec[i]; });
  }
  friend NF_INLINE Pack operator*(const Pack& a, const Pack& b) {
    return generate([&](int64_t i) { return a.vec[i] * b.vec[i]; });
  }
};

// The first n values of a, in memory order, and the remaining values of b.
template <class S, class T>
NF_FN Pack<S, T> select_first_n(const Pack<S, T>& a, const Pack<S, T>& b, int64_t n) {
  using V = Pack<S, T>;
  return V::generate([&](int64_t i) {
    const int64_t lanes = V::kInterleaved ? (n + 1 - i) / 2 : n - i * kLanes<S>;
    return lane_index<S>() < static_cast<lane_index_t<S>>(lanes) ? a.vec[i] : b.vec[i];
  });
}

// Replaces the values past the tail with those of `fill`.
template <class V>
NF_FN V fill_tail(const V& values, const V&, FullVector) {
  return values;
}
template <class V>
NF_FN V fill_tail(const V& values, const V& fill, Tail tail) {
  return select_first_n(values, fill, tail.lanes);
}

template <class V>
NF_FN int64_t active_values(FullVector) {
  return V::kSize;
}
template <class V>
NF_FN int64_t active_values(Tail tail) {
  return tail.lanes;
}

template <class V, class Body>
NF_FN void for_each_pack(int64_t n, const Body& body) {
  for_each_chunk<V::kSize>(n, body);
}

using BFloat16Pack = Pack<float, BFloat16>;

NF_FN BFloat16Pack deinterleave(U32 raw) {
  const U32 even = raw << 16, odd = raw & 0xffff0000;
  return {{bit_cast<Vec<float>>(even), bit_cast<Vec<float>>(odd)}};
}

NF_FN U32 interleave(const BFloat16Pack& values) {
  return (round_to_bfloat16(values.vec[0]) >> 16) | (round_to_bfloat16(values.vec[1]) & 0xffff0000);
}

// The bytes that store the pack as T.
template <class T, class V>
NF_FN auto to_storage(const V& values) {
  if constexpr (V::kVecs == 1)
    return to_storage<T>(values.vec[0]);
  else
    return interleave(values);
}

// Via float, which is exact.
template <class T, class Width>
NF_FN Pack<double, T> load_doubles(const T* p, Width width) {
  const DoubleVectors<float> halves = widen_to_double(load<float>(p, width));
  return {{halves.vec[0], halves.vec[1]}};
}

template <class V, class T>
NF_FN V load_pack(const T* p, FullVector) {
  if constexpr (V::kVecs == 1)
    return {{load<typename V::S>(p, FullVector{})}};
  else if constexpr (V::kInterleaved)
    return deinterleave(load_unaligned<U32>(p));
  else
    return load_doubles(p, FullVector{});
}

// The values past the tail are those of `fill`. Memory past the tail is not accessed.
template <class V, class T>
NF_FN V load_pack(const T* p, Tail tail, const V& fill = V{}) {
  if constexpr (V::kVecs == 1) {
    return {{load<typename V::S>(p, tail, fill.vec[0])}};
  } else if constexpr (!V::kInterleaved) {
    return select_first_n(load_doubles(p, tail), fill, tail.lanes);
  } else {
#if NF_VECTOR_BYTES == 64
    const V values = deinterleave((U32)_mm512_maskz_loadu_epi16((1u << tail.lanes) - 1, p));
#else
    T buffer[V::kSize] = {};
    std::memcpy(buffer, p, static_cast<size_t>(tail.lanes) * sizeof(T));
    const V values = load_pack<V>(static_cast<const T*>(buffer), FullVector{});
#endif
    return select_first_n(values, fill, tail.lanes);
  }
}

template <class V, class T>
NF_FN V load_pack(const T* p, FullVector, const V&) {
  return load_pack<V>(p, FullVector{});
}

template <class V, class T>
NF_FN void store_pack(T* p, const V& values, FullVector) {
  const auto raw = to_storage<T>(values);
  std::memcpy(p, &raw, sizeof(raw));
}

template <class V, class T>
NF_FN void store_pack(T* p, const V& values, Tail tail) {
  if constexpr (V::kVecs == 1) {
    store(p, values.vec[0], tail);
  } else {
    const auto raw = to_storage<T>(values);
#if NF_VECTOR_BYTES == 64
    _mm512_mask_storeu_epi16(p, (1u << tail.lanes) - 1, (__m512i)raw);
#else
    std::memcpy(p, &raw, static_cast<size_t>(tail.lanes) * sizeof(T));
#endif
  }
}

// Lane i of the result is lane index[i] of the concatenation of a and b.
template <class V, class Index>
NF_FN V shuffle(V a, V b, Index index) {
#if defined(__clang__)
  constexpr int64_t kCount = sizeof(V) / sizeof(a[0]);
  V result;
  for (int64_t lane = 0; lane < kCount; ++lane)
    result[lane] = index[lane] < kCount ? a[index[lane]] : b[index[lane] - kCount];
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Loads values of S in memory order as a pack. The shuffles are slow: for values that are loaded once for many rows.
template <class V>
NF_FN V load_in_pack_order(const typename V::S* p) {
  if constexpr (!V::kInterleaved) {
    return V::generate([&](int64_t i) { return load<typename V::S>(p + i * kLanes<typename V::S>, FullVector{}); });
  } else {
    const Vec<float> a = load<float>(p, FullVector{}), b = load<float>(p + kLanes<float>, FullVector{});
    return V::generate([&](int64_t i) { return shuffle(a, b, 2 * lane_index<float>() + static_cast<int32_t>(i)); });
  }
}

// The inverse: the values of the pack in memory order, as vectors of S.
template <class V>
NF_FN V to_memory_order(const V& pack) {
  if constexpr (!V::kInterleaved) {
    return pack;
  } else {
    const Vec<int32_t> lane = lane_index<float>();
    return V::generate([&](int64_t i) {
      const auto half = static_cast<int32_t>(i * kLanes<float> / 2);
      return shuffle(pack.vec[0], pack.vec[1], half + lane / 2 + lane % 2 * static_cast<int32_t>(kLanes<float>));
    });
  }
}

// Non-temporal store. Precondition: p is aligned to the pack's size in memory.
template <class V, class T>
NF_FN void store_pack_nontemporal(T* p, const V& values) {
  store_nontemporal(p, to_storage<T>(values));
}

// ---- sign masks: one bit per element -----------------------------------------------------------------------------

#if NF_VECTOR_BYTES == 64
// Lane masks: one bit per lane of a vector.
NF_FN uint64_t le_zero_mask(Vec<float> z) { return _mm512_cmp_ps_mask((__m512)z, _mm512_setzero_ps(), _CMP_LE_OQ); }
NF_FN uint64_t le_zero_mask(Vec<double> z) { return _mm512_cmp_pd_mask((__m512d)z, _mm512_setzero_pd(), _CMP_LE_OQ); }
NF_FN uint64_t all_lanes_mask(Vec<float>) { return 0xffff; }
NF_FN uint64_t all_lanes_mask(Vec<double>) { return 0xff; }
NF_FN Vec<float> blend(uint64_t lanes, Vec<float> then, Vec<float> otherwise) {
  return (Vec<float>)_mm512_mask_blend_ps(static_cast<__mmask16>(lanes), (__m512)otherwise, (__m512)then);
}
NF_FN Vec<double> blend(uint64_t lanes, Vec<double> then, Vec<double> otherwise) {
  return (Vec<double>)_mm512_mask_blend_pd(static_cast<__mmask8>(lanes), (__m512d)otherwise, (__m512d)then);
}
constexpr uint64_t kEvenBits = 0x5555555555555555;
#endif

// Bit k is set if value k, in memory order, is positive or NaN.
template <class S, class T>
NF_FN uint64_t positive_bits(const Pack<S, T>& pack) {
  constexpr int64_t kVecs = Pack<S, T>::kVecs;
  uint64_t bits = 0;
  unroll<kVecs>([&](auto v) {
#if NF_VECTOR_BYTES == 64
    const uint64_t lanes = all_lanes_mask(pack.vec[v]) & ~le_zero_mask(pack.vec[v]);
    bits |= kVecs == 2 ? _pdep_u64(lanes, kEvenBits << v) : lanes;
#else
    const auto above = ~(pack.vec[v] <= Vec<S>{});
    uint64_t lanes = 0;
#if NF_VECTOR_BYTES == 32
    lanes =
        static_cast<uint64_t>(sizeof(S) == 4 ? _mm256_movemask_ps((__m256)above) : _mm256_movemask_pd((__m256d)above));
#else
    for (int64_t lane = 0; lane < kLanes<S>; ++lane) lanes |= static_cast<uint64_t>(above[lane] & 1) << lane;
#endif
    if constexpr (kVecs == 2) {  // the bits between belong to the other vector
      lanes = (lanes | lanes << 4) & 0x0f0f;
      lanes = (lanes | lanes << 2) & 0x3333;
      lanes = (lanes | lanes << 1) & 0x5555;
    }
    bits |= lanes << v;
#endif
  });
  return bits;
}

// Stores the bits of values [offset, offset + n). Precondition: these bits are 0. The first and last byte may also
// belong to values of another thread, so they are written with an atomic OR.
NF_FN void store_bits(uint8_t* mask, int64_t offset, uint64_t bits, int64_t n) {
  uint8_t* byte = mask + offset / 8;
  if (offset % 8 == 0 && n % 8 == 0) {
    std::memcpy(byte, &bits, static_cast<size_t>(n / 8));
    return;
  }
  bits = (bits & ((uint64_t{1} << n) - 1)) << offset % 8;
  for (; bits != 0; bits >>= 8, ++byte) __atomic_fetch_or(byte, static_cast<uint8_t>(bits), __ATOMIC_RELAXED);
}

// `then` where the bit of a value is set, else `otherwise`. The bit of the first value is bit `offset` of the mask.
// Reads 8 bytes; see kMaskPadding.
template <class S, class T>
NF_FN Pack<S, T> select_by_bits(const uint8_t* mask, int64_t offset, const Pack<S, T>& then,
                                const Pack<S, T>& otherwise) {
  constexpr int64_t kVecs = Pack<S, T>::kVecs;
  uint64_t word;
  std::memcpy(&word, mask + offset / 8, sizeof word);
  word >>= offset % 8;
#if NF_VECTOR_BYTES == 64
  return Pack<S, T>::generate([&](int64_t v) {
    const uint64_t lanes = kVecs == 2 ? _pext_u64(word, kEvenBits << v) : word;
    return blend(lanes, then.vec[v], otherwise.vec[v]);
  });
#else
  using Bits = std::conditional_t<sizeof(S) == 4, uint32_t, uint64_t>;
  const Vec<Bits> bits = broadcast(static_cast<Bits>(word));
  return Pack<S, T>::generate([&](int64_t v) {
    const auto position = (Vec<Bits>)(kVecs * lane_index<S>() + static_cast<lane_index_t<S>>(v));
    return ((bits >> position) & 1) != 0 ? then.vec[v] : otherwise.vec[v];
  });
#endif
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
