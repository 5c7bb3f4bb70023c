// Channels-last pixels taken apart into one row for each channel, and put together again, a tile of the L1 cache at a
// time: in between, loops run over neighbours of one channel.

// Values of a tile: with four bytes each, taken apart, computed and put together, they take 24 of 48 KiB.
inline constexpr int64_t kTileValues = 2048;
// Channels of a tile, so that its rows are whole vectors of bytes.
inline constexpr int64_t kTileChannels = 32;
static_assert(kTileValues / kTileChannels >= kLanes<uint8_t>);

// Calls f(step, channels): as constants for the usual numbers of channels, for which compilers turn the loops below
// into shuffles.
template <class F>
NF_FN void for_channels(int64_t step, int64_t channels, const F& f) {
  constexpr std::integral_constant<int64_t, 3> kThree;
  constexpr std::integral_constant<int64_t, 4> kFour;
  if (step == 3) return f(kThree, kThree);
  if (step == 4) return f(kFour, kFour);
  f(step, channels);
}

// Value c of n pixels, which lie `step` values apart, to rows[c * n], for all c < channels.
template <class T>
void nhwc_to_planar(const T* pixels, int64_t step, int64_t channels, int64_t n, T* rows) {
  for_channels(step, channels, [&](auto apart, auto count) {
    NF_NO_ALIASES
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < count; ++c) rows[c * n + i] = pixels[i * apart + c];
  });
}

// And back.
template <class T>
void planar_to_nhwc(const T* rows, int64_t step, int64_t channels, int64_t n, T* pixels) {
  for_channels(step, channels, [&](auto apart, auto count) {
    NF_NO_ALIASES
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < count; ++c) pixels[i * apart + c] = rows[c * n + i];
  });
}

// Copies a tile past the caches.
template <class T>
void copy_nontemporal(const T* from, int64_t n, T* to) {
  constexpr int64_t kAtOnce = kVectorBytes / static_cast<int64_t>(sizeof(T));
  int64_t i = minimum(n, bytes_to_alignment(to, kVectorBytes) / static_cast<int64_t>(sizeof(T)));
  std::memcpy(to, from, static_cast<size_t>(i) * sizeof(T));
  for (; i + kAtOnce <= n; i += kAtOnce) store_nontemporal(to + i, load_unaligned<Vec<float>>(from + i));
  std::memcpy(to + i, from + i, static_cast<size_t>(n - i) * sizeof(T));
}
