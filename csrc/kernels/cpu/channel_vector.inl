// Reads and writes per-channel parameters and buffers (ChannelVector) of any floating dtype as double. They are copied
// to and from small arrays, so that the loops over formulas in between are pure arithmetic, which compilers vectorize.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/vec.inl"

namespace normfused::cpu::NF_ISA {
namespace {

// Maximum number of channels that are processed together, and the length of those arrays.
inline constexpr int64_t kChannelChunk = 64;

// Every NaN becomes the default NaN: round_to_bfloat16 requires a NaN whose low bits are 0.
template <class T>
void load_entries(const void* data, int64_t c0, int64_t n, double* entries) {
  const Vec<double> nan = broadcast(std::numeric_limits<double>::quiet_NaN());
  for_each_vector<double>(n, [&](int64_t i, auto width) {
    const Vec<double> value = load<double>(static_cast<const T*>(data) + c0 + i, width);
    store(entries + i, value == value ? value : nan, width);
  });
}

template <class T>
void store_entries(void* data, int64_t c0, int64_t n, const double* entries) {
  using S = compute_t<T>;
  for (int64_t i = 0; i < n; ++i)
    store(static_cast<T*>(data) + c0 + i, broadcast<S>(static_cast<S>(entries[i])), Tail{1});
}

// entries[i] = vector[c0 + i] for i < n, or `absent` if the vector is absent.
void read_channels(const ChannelVector& vector, int64_t c0, int64_t n, double absent, double* entries) {
  if (!vector) {
    for (int64_t i = 0; i < n; ++i) entries[i] = absent;
    return;
  }
  switch (vector.dtype) {
    case DType::kFloat64:
      return load_entries<double>(vector.data, c0, n, entries);
    case DType::kFloat16:
      return load_entries<Half>(vector.data, c0, n, entries);
    case DType::kBFloat16:
      return load_entries<BFloat16>(vector.data, c0, n, entries);
    default:
      return load_entries<float>(vector.data, c0, n, entries);
  }
}

// vector[c0 + i] = entries[i] for i < n. Does nothing if the vector is absent.
void write_channels(const ChannelVector& vector, int64_t c0, int64_t n, const double* entries) {
  if (!vector) return;
  switch (vector.dtype) {
    case DType::kFloat64:
      return store_entries<double>(vector.data, c0, n, entries);
    case DType::kFloat16:
      return store_entries<Half>(vector.data, c0, n, entries);
    case DType::kBFloat16:
      return store_entries<BFloat16>(vector.data, c0, n, entries);
    default:
      return store_entries<float>(vector.data, c0, n, entries);
  }
}

// Calls f(c0, n) for consecutive chunks of the channels [c0, c1).
template <class F>
NF_FN void for_each_channel_chunk(int64_t c0, int64_t c1, const F& f) {
  for (; c0 < c1; c0 += kChannelChunk) f(c0, minimum(kChannelChunk, c1 - c0));
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
