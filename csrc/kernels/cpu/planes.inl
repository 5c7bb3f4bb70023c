// Conversion between NHWC pixels and planar arrays, one per channel, a tile at a time. Loops over a planar array are
// loops over contiguous values of one channel, which compilers vectorize.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/vec.inl"

namespace normfused::cpu::NF_ISA {
namespace {

// Values of a tile. Its planar input, planar output and NHWC output, of up to 4 bytes per value, use 24 KiB of a 48 KiB
// L1.
inline constexpr int64_t kTileValues = 2048;
// Maximum number of channels of a tile: its planar arrays are at least one vector of bytes long.
inline constexpr int64_t kTileChannels = 32;
static_assert(kTileValues / kTileChannels >= kLanes<uint8_t>);

// Calls f(stride, channels), with compile-time constants for 3 and 4 channels: for these, compilers turn the loops
// below into shuffles.
template <class F>
NF_FN void dispatch_channels(int64_t stride, int64_t channels, const F& f) {
  constexpr std::integral_constant<int64_t, 3> kThree;
  constexpr std::integral_constant<int64_t, 4> kFour;
  if (stride == 3) return f(kThree, kThree);
  if (stride == 4) return f(kFour, kFour);
  f(stride, channels);
}

// planar[c * n + i] = pixels[i * stride + c], for i < n and c < channels.
template <class T>
void nhwc_to_planar(const T* pixels, int64_t stride, int64_t channels, int64_t n, T* planar) {
  dispatch_channels(stride, channels, [&](auto step, auto count) {
    NF_NO_ALIASES
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < count; ++c) planar[c * n + i] = pixels[i * step + c];
  });
}

// pixels[i * stride + c] = planar[c * n + i], for i < n and c < channels.
template <class T>
void planar_to_nhwc(const T* planar, int64_t stride, int64_t channels, int64_t n, T* pixels) {
  dispatch_channels(stride, channels, [&](auto step, auto count) {
    NF_NO_ALIASES
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < count; ++c) pixels[i * step + c] = planar[c * n + i];
  });
}

// Copies n values with non-temporal stores.
template <class T>
void copy_nontemporal(const T* from, int64_t n, T* to) {
  constexpr int64_t kStep = kVectorBytes / static_cast<int64_t>(sizeof(T));
  int64_t i = minimum(n, bytes_to_alignment(to, kVectorBytes) / static_cast<int64_t>(sizeof(T)));
  std::memcpy(to, from, static_cast<size_t>(i) * sizeof(T));
  for (; i + kStep <= n; i += kStep) store_nontemporal(to + i, load_unaligned<Vec<float>>(from + i));
  std::memcpy(to + i, from + i, static_cast<size_t>(n - i) * sizeof(T));
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
