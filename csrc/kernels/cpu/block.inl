// Blocks: what one access to memory holds of T, as vectors of S. That is one vector, but two
//   of bfloat16 as float: the values at even and those at odd places, which a shift and a mask take apart, and put
//     together again. Widening and narrowing lane by lane takes shuffles, for which there is one port;
//   of what is narrower than double as double: those of the first and of the second half.
template <class S_, class T>
struct Block {
  using S = S_;
  static constexpr bool kInterleaved = std::is_same_v<T, BFloat16> && std::is_same_v<S, float>;
  static constexpr int64_t kParts = kInterleaved || (std::is_same_v<S, double> && !std::is_same_v<T, double>) ? 2 : 1;
  static constexpr int64_t kWidth = kParts * kLanes<S>;
  static constexpr int64_t kItem = sizeof(T);

  Vec<S> part[kParts];

  template <class F>
  static NF_INLINE Block each(const F& f) {
    Block result;
    unroll<kParts>([&](auto i) { result.part[i] = f(i); });
    return result;
  }
  static NF_INLINE Block filled(S value) {
    return each([&](int64_t) { return broadcast<S>(value); });
  }
  friend NF_INLINE Block operator+(const Block& a, const Block& b) {
    return each([&](int64_t i) { return a.part[i] + b.part[i]; });
  }
  friend NF_INLINE Block operator-(const Block& a, const Block& b) {
    return each([&](int64_t i) { return a.part[i] - b.part[i]; });
  }
  friend NF_INLINE Block operator*(const Block& a, const Block& b) {
    return each([&](int64_t i) { return a.part[i] * b.part[i]; });
  }
};

// As many values of a as there are lanes, and b's behind them; in the order they have in memory as T.
template <class S, class T>
NF_FN Block<S, T> joined(const Block<S, T>& a, const Block<S, T>& b, int64_t lanes) {
  using V = Block<S, T>;
  return V::each([&](int64_t i) {
    const int64_t of_part = V::kInterleaved ? (lanes + 1 - i) / 2 : lanes - i * kLanes<S>;
    return lane_index<S>() < static_cast<lane_index_t<S>>(of_part) ? a.part[i] : b.part[i];
  });
}

// Values of which only a part was loaded, with those of `fill` behind them.
template <class V>
NF_FN V filled_up(const V& values, const V&, Whole) {
  return values;
}
template <class V>
NF_FN V filled_up(const V& values, const V& fill, Part part) {
  return joined(values, fill, part.lanes);
}

template <class V>
NF_FN int64_t values_in(Whole) {
  return V::kWidth;
}
template <class V>
NF_FN int64_t values_in(Part part) {
  return part.lanes;
}

template <class V, class Body>
NF_FN void for_each_block(int64_t n, const Body& body) {
  for_each_part<V::kWidth>(n, body);
}

using Block16 = Block<float, BFloat16>;

NF_FN Block16 taken_apart(U32 raw) {
  const U32 even = raw << 16, odd = raw & 0xffff0000;
  return {{read_as<Vec<float>>(&even), read_as<Vec<float>>(&odd)}};
}

template <class T, class V>
NF_FN auto put_together(const V& values) {
  if constexpr (V::kParts == 1)
    return stored<T>(values.part[0]);
  else
    return (round_to_bfloat16(values.part[0]) >> 16) | (round_to_bfloat16(values.part[1]) & 0xffff0000);
}

// By way of float, exactly.
template <class T, class Width>
NF_FN Block<double, T> load_doubles(const T* p, Width width) {
  const Wide<float> halves = widened(load<float>(p, width));
  return {{halves.part[0], halves.part[1]}};
}

template <class V, class T>
NF_FN V load_block(const T* p, Whole) {
  if constexpr (V::kParts == 1)
    return {{load<typename V::S>(p, Whole{})}};
  else if constexpr (V::kInterleaved)
    return taken_apart(read_as<U32>(p));
  else
    return load_doubles(p, Whole{});
}

// The lanes beyond the part are those of `fill`.
template <class V, class T>
NF_FN V load_block(const T* p, Part part, const V& fill = V{}) {
  if constexpr (V::kParts == 1) {
    return {{load<typename V::S>(p, part, fill.part[0])}};
  } else if constexpr (!V::kInterleaved) {
    return joined(load_doubles(p, part), fill, part.lanes);
  } else {
#if NF_VECTOR_BYTES == 64
    const V values = taken_apart((U32)_mm512_maskz_loadu_epi16((1u << part.lanes) - 1, p));
#else
    T buffer[V::kWidth] = {};
    std::memcpy(buffer, p, static_cast<size_t>(part.lanes) * sizeof(T));
    const V values = load_block<V>(static_cast<const T*>(buffer), Whole{});
#endif
    return joined(values, fill, part.lanes);
  }
}

template <class V, class T>
NF_FN V load_block(const T* p, Whole, const V&) {
  return load_block<V>(p, Whole{});
}

template <class V, class T>
NF_FN void store_block(T* p, const V& values, Whole) {
  const auto raw = put_together<T>(values);
  std::memcpy(p, &raw, sizeof(raw));
}

template <class V, class T>
NF_FN void store_block(T* p, const V& values, Part part) {
  if constexpr (V::kParts == 1) {
    store(p, values.part[0], part);
  } else {
    const auto raw = put_together<T>(values);
#if NF_VECTOR_BYTES == 64
    _mm512_mask_storeu_epi16(p, (1u << part.lanes) - 1, (__m512i)raw);
#else
    std::memcpy(p, &raw, static_cast<size_t>(part.lanes) * sizeof(T));
#endif
  }
}

// Lanes of a and, behind them, b, picked by index.
NF_FN Vec<float> picked(Vec<float> a, Vec<float> b, Vec<int32_t> index) {
#if defined(__clang__)
  Vec<float> result;
  for (int64_t lane = 0; lane < kLanes<float>; ++lane)
    result[lane] = index[lane] < kLanes<float> ? a[index[lane]] : b[index[lane] - kLanes<float>];
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// A block from values of S in their own order, and back. These shuffle; they are for what is loaded once for many rows.
template <class V>
NF_FN V in_block_order(const typename V::S* p) {
  if constexpr (!V::kInterleaved) {
    return V::each([&](int64_t i) { return load<typename V::S>(p + i * kLanes<typename V::S>, Whole{}); });
  } else {
    const Vec<float> a = load<float>(p, Whole{}), b = load<float>(p + kLanes<float>, Whole{});
    return V::each([&](int64_t i) { return picked(a, b, 2 * lane_index<float>() + static_cast<int32_t>(i)); });
  }
}

template <class V>
NF_FN V in_own_order(const V& block) {
  if constexpr (!V::kInterleaved) {
    return block;
  } else {
    const Vec<int32_t> lane = lane_index<float>();
    return V::each([&](int64_t i) {
      const auto half = static_cast<int32_t>(i * kLanes<float> / 2);
      return picked(block.part[0], block.part[1], half + lane / 2 + lane % 2 * static_cast<int32_t>(kLanes<float>));
    });
  }
}

// Past the caches; p must be aligned to the block's size in memory.
template <class V, class T>
NF_FN void stream_block(T* p, const V& values) {
  stream_raw(p, put_together<T>(values));
}

// ---- one bit for each value --------------------------------------------------------------------------------------

#if NF_VECTOR_BYTES == 64
// A bit for each lane; of the even or odd values, where these are a vector.
NF_FN uint64_t not_above_zero(Vec<float> z) { return _mm512_cmp_ps_mask((__m512)z, _mm512_setzero_ps(), _CMP_LE_OQ); }
NF_FN uint64_t not_above_zero(Vec<double> z) { return _mm512_cmp_pd_mask((__m512d)z, _mm512_setzero_pd(), _CMP_LE_OQ); }
NF_FN uint64_t all_lanes(Vec<float>) { return 0xffff; }
NF_FN uint64_t all_lanes(Vec<double>) { return 0xff; }
NF_FN Vec<float> choose(uint64_t lanes, Vec<float> then, Vec<float> otherwise) {
  return (Vec<float>)_mm512_mask_blend_ps(static_cast<__mmask16>(lanes), (__m512)otherwise, (__m512)then);
}
NF_FN Vec<double> choose(uint64_t lanes, Vec<double> then, Vec<double> otherwise) {
  return (Vec<double>)_mm512_mask_blend_pd(static_cast<__mmask8>(lanes), (__m512d)otherwise, (__m512d)then);
}
constexpr uint64_t kEveryOther = 0x5555555555555555;
#endif

// Bit k of the result tells whether value k in memory is above zero, or NaN.
template <class S, class T>
NF_FN uint64_t positive_bits(const Block<S, T>& block) {
  constexpr int64_t kParts = Block<S, T>::kParts;
  uint64_t bits = 0;
  unroll<kParts>([&](auto part) {
#if NF_VECTOR_BYTES == 64
    const uint64_t lanes = all_lanes(block.part[part]) & ~not_above_zero(block.part[part]);
    bits |= kParts == 2 ? _pdep_u64(lanes, kEveryOther << part) : lanes;
#else
    const auto above = ~(block.part[part] <= Vec<S>{});
    uint64_t lanes = 0;
#if NF_VECTOR_BYTES == 32
    lanes =
        static_cast<uint64_t>(sizeof(S) == 4 ? _mm256_movemask_ps((__m256)above) : _mm256_movemask_pd((__m256d)above));
#else
    for (int64_t lane = 0; lane < kLanes<S>; ++lane) lanes |= static_cast<uint64_t>(above[lane] & 1) << lane;
#endif
    if constexpr (kParts == 2) {  // every other bit is the other part's
      lanes = (lanes | lanes << 4) & 0x0f0f;
      lanes = (lanes | lanes << 2) & 0x3333;
      lanes = (lanes | lanes << 1) & 0x5555;
    }
    bits |= lanes << part;
#endif
  });
  return bits;
}

// Sets the bits of n values from an offset on; they are zero before. Bytes that are not wholly theirs may be written by
// another thread meanwhile.
NF_FN void store_bits(uint8_t* mask, int64_t offset, uint64_t bits, int64_t n) {
  uint8_t* byte = mask + offset / 8;
  if (offset % 8 == 0 && n % 8 == 0) {
    std::memcpy(byte, &bits, static_cast<size_t>(n / 8));
    return;
  }
  bits = (bits & ((uint64_t{1} << n) - 1)) << offset % 8;
  for (; bits != 0; bits >>= 8, ++byte) __atomic_fetch_or(byte, static_cast<uint8_t>(bits), __ATOMIC_RELAXED);
}

// Values of `then` where the bits from an offset on are set, of `otherwise` elsewhere.
template <class S, class T>
NF_FN Block<S, T> choose_by_bits(const uint8_t* mask, int64_t offset, const Block<S, T>& then,
                                 const Block<S, T>& otherwise) {
  constexpr int64_t kParts = Block<S, T>::kParts;
  uint64_t word;
  std::memcpy(&word, mask + offset / 8, sizeof word);
  word >>= offset % 8;
#if NF_VECTOR_BYTES == 64
  return Block<S, T>::each([&](int64_t part) {
    const uint64_t lanes = kParts == 2 ? _pext_u64(word, kEveryOther << part) : word;
    return choose(lanes, then.part[part], otherwise.part[part]);
  });
#else
  using Bits = std::conditional_t<sizeof(S) == 4, uint32_t, uint64_t>;
  const Vec<Bits> bits = broadcast(static_cast<Bits>(word));
  return Block<S, T>::each([&](int64_t part) {
    const auto place = (Vec<Bits>)(kParts * lane_index<S>() + static_cast<lane_index_t<S>>(part));
    return ((bits >> place) & 1) != 0 ? then.part[part] : otherwise.part[part];
  });
#endif
}
