// Standardization of images: output = (x * scale - mean) / std, with conversion of layout and dtype in the same pass.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/planes.inl"

namespace normfused::cpu::NF_ISA {
namespace {

// Standardizes n contiguous values of one channel.
template <bool kNonTemporal, class T, class Output>
void standardize_row(const T* input, Output* output, int64_t n, const StandardizeCoefficients<T, compute_t<T>> c) {
  const auto store_at = [&](int64_t i, auto width) __attribute__((always_inline)) {
    const auto y = applied(c, load<compute_t<T>>(input + i, width));
    if constexpr (kNonTemporal && std::is_same_v<decltype(width), FullVector>)
      store_nontemporal(output + i, to_storage<Output>(y));
    else
      store(output + i, y, width);
  };
  constexpr int64_t kLanesOf = kLanes<compute_t<Output>>;
  int64_t i = 0;
  if (kNonTemporal) {
    i = minimum(n, bytes_to_alignment(output, kLanesOf * sizeof(Output)) / static_cast<int64_t>(sizeof(Output)));
    if (i > 0) store_at(0, Tail{i});
  }
  for (; i + kLanesOf <= n; i += kLanesOf) store_at(i, FullVector{});
  if (i < n) store_at(i, Tail{n - i});
}

// The images cut into tiles of `width` channels by `length` pixels. Planar to planar, a tile has one channel.
template <class T, class Output>
struct StandardizeTiles {
  using Coefficient = StandardizeCoefficients<T, compute_t<T>>;

  const Standardize& args;
  const Coefficient* coefficients;  // (channels)
  int64_t width, length, channel_tiles, pixel_tiles;

  StandardizeTiles(const Standardize& args, const Coefficient* coefficients) : args(args), coefficients(coefficients) {
    const bool planar = !args.input_is_last && !args.output_is_last;
    width = planar ? 1 : minimum(args.channels, kTileChannels);
    length = minimum(args.pixels, kTileValues / width / kLanes<uint8_t> * kLanes<uint8_t>);
    channel_tiles = (args.channels + width - 1) / width;
    pixel_tiles = (args.pixels + length - 1) / length;
  }

  int64_t count() const { return args.images * channel_tiles * pixel_tiles; }
  int64_t tile_bytes() const { return length * width * static_cast<int64_t>(sizeof(T) + sizeof(Output)); }

  // Standardizes one tile: NHWC input to planar, each channel, planar to NHWC output.
  template <bool kNonTemporal>
  void run(int64_t tile) const {
    const int64_t channels = args.channels, pixels = args.pixels;
    const int64_t p0 = tile % pixel_tiles * length, n = minimum(length, pixels - p0);
    const int64_t c0 = tile / pixel_tiles % channel_tiles * width, count = minimum(width, channels - c0);
    const int64_t image = tile / pixel_tiles / channel_tiles * channels * pixels;
    const int64_t planar_offset = image + c0 * pixels + p0, nhwc_offset = image + p0 * channels + c0;
    const T* input = static_cast<const T*>(args.input) + (args.input_is_last ? nhwc_offset : planar_offset);
    Output* const output = static_cast<Output*>(args.output) + (args.output_is_last ? nhwc_offset : planar_offset);
    alignas(64) T planes_in[kTileValues];
    alignas(64) Output planes_out[kTileValues], pixels_out[kTileValues];
    if (args.input_is_last) {
      nhwc_to_planar(input, channels, count, n, planes_in);
      input = planes_in;
    }
    for (int64_t c = 0; c < count; ++c) {
      const T* const from = input + c * (args.input_is_last ? n : pixels);
      if (args.output_is_last)
        standardize_row<false>(from, planes_out + c * n, n, coefficients[c0 + c]);
      else
        standardize_row<kNonTemporal>(from, output + c * pixels, n, coefficients[c0 + c]);
    }
    if (args.output_is_last && kNonTemporal) {
      planar_to_nhwc(planes_out, count, count, n, pixels_out);
      copy_nontemporal(pixels_out, n * count, output);
    } else if (args.output_is_last) {
      planar_to_nhwc(planes_out, channels, count, n, output);
    }
  }
};

template <bool kNonTemporal, class T, class Output>
void standardize_tiles(const Standardize& args, const Parallel& parallel) {
  using Tiles = StandardizeTiles<T, Output>;
  using Coefficient = typename Tiles::Coefficient;
  const Workspace workspace(0, args.channels * static_cast<int64_t>(sizeof(Coefficient)));
  auto* const coefficients = static_cast<Coefficient*>(workspace.table);
  for (int64_t c = 0; c < args.channels; ++c) prepare(normalization_of(args, c), coefficients[c]);
  const Tiles tiles(args, coefficients);
  parallel(tiles.count(), (32 << 10) / tiles.tile_bytes() + 1,
           [&](int64_t tile) { tiles.template run<kNonTemporal>(tile); });
}

template <class T, class Output>
void standardize_as(const Standardize& args, const Parallel& parallel) {
  const int64_t bytes = args.images * args.channels * args.pixels * static_cast<int64_t>(sizeof(Output));
  const bool in_place = args.input == args.output;
  const bool contiguous = !args.output_is_last || args.channels <= kTileChannels;  // a tile's output
  if (kVectorBytes > 16 && bytes >= kMinNonTemporalBytes && !in_place && contiguous)
    standardize_tiles<true, T, Output>(args, parallel);
  else
    standardize_tiles<false, T, Output>(args, parallel);
}

template <class T>
void standardize_from(const Standardize& args, const Parallel& parallel) {
  switch (args.output_dtype) {
    case DType::kFloat16:
      return standardize_as<T, Half>(args, parallel);
    case DType::kBFloat16:
      return standardize_as<T, BFloat16>(args, parallel);
    default:
      return standardize_as<T, float>(args, parallel);
  }
}

inline void standardize(const Standardize& args, const Parallel& parallel) {
  switch (args.dtype) {
    case DType::kUInt8:
      return standardize_from<uint8_t>(args, parallel);
    case DType::kFloat32:
      return standardize_from<float>(args, parallel);
    case DType::kFloat64:
      return standardize_as<double, double>(args, parallel);
    case DType::kFloat16:
      return standardize_as<Half, Half>(args, parallel);
    default:
      return standardize_as<BFloat16, BFloat16>(args, parallel);
  }
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
