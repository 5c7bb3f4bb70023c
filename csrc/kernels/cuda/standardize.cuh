// Standardization of images, from one layout and dtype to another, in one launch. A block takes a tile: some pixels of
// some channels of one image. Where the layouts differ it turns the tile around in shared memory.
#pragma once

#include "kernels/cuda/plan.h"
#include "kernels/cuda/vector.cuh"
#include "kernels/math.h"

namespace normfused::cuda {

// Values of a tile: 32 KiB of double.
inline constexpr int kImageTileValues = 4096;
// Channels of a tile, so that a cache line of each is in it.
inline constexpr int kImageTileChannels = 32;
// Channels of a launch: their coefficients, in double, take 3 of the 4 KiB that the arguments of a launch may have.
inline constexpr int kLaunchChannels = 128;
// Loads of a thread in flight.
inline constexpr int kLoads = 4;

// Passed by value: neither a copy to the device nor another launch comes before.
template <class T>
struct Constants {
  StandardizeCoefficients<T, compute_t<T>> channel[kLaunchChannels];
};

struct Tiles {
  int64_t channels, pixels;  // of an image
  int64_t first, last;       // channels of the launch
  int width, length;         // channels and pixels of a tile
  int64_t across, along;     // tiles over channels and over pixels
  bool input_is_last, output_is_last;

  int64_t blocks(int64_t images) const { return images * across * along; }
};

// For channels first to last.
inline Tiles tiles_of(const Standardize& args, int64_t first, int64_t last) {
  const int64_t width = args.channels < kImageTileChannels ? args.channels : kImageTileChannels;
  const int64_t length = kImageTileValues / width / kMaxValues * kMaxValues;
  return {args.channels,
          args.pixels,
          first,
          last,
          static_cast<int>(width),
          static_cast<int>(length),
          (last - first + width - 1) / width,
          (args.pixels + length - 1) / length,
          args.input_is_last,
          args.output_is_last};
}

// Calls take(i, vector) for i < count, with the vectors at offset_of(i).
template <class V, class T, class Offset, class Take>
NF_DEVICE void read_vectors(const T* input, int count, const Offset& offset_of, const Take& take) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads * kLoads) {
    V vectors[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      if (i + k * kThreads < count) vectors[k] = V::load_last(input + offset_of(i + k * kThreads));
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      if (i + k * kThreads < count) take(i + k * kThreads, vectors[k]);
  }
}

// Vectors of more than one value lie in one row, and tiles have all channels.
template <class T, class Output, int kValues>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    standardize_tiles(const T* input, Output* output, const Tiles tiles, const Constants<T> constants) {
  using S = compute_t<T>;
  using In = Vector<T, kValues>;
  NF_SHARED(T, turned, [kImageTileValues]);  // (pixels, channels)
  const auto tiles_along = static_cast<unsigned>(tiles.along), tiles_across = static_cast<unsigned>(tiles.across);
  const unsigned tile = blockIdx.x % tiles_along, row = blockIdx.x / tiles_along;
  const int64_t p0 = int64_t{tile} * tiles.length, c0 = tiles.first + int64_t{row % tiles_across} * tiles.width;
  const int64_t image = int64_t{row / tiles_across} * tiles.channels * tiles.pixels;
  const int length = static_cast<int>(tiles.pixels - p0 < tiles.length ? tiles.pixels - p0 : tiles.length);
  const int width = static_cast<int>(tiles.last - c0 < tiles.width ? tiles.last - c0 : tiles.width);
  const int across = length / kValues, count = across * width;  // vectors of a row, and of the tile
  const int from = static_cast<int>(c0 - tiles.first);

  // Vector i of the rows, and of the pixels.
  const auto row_of = [&](int i) { return i / across; };
  const auto pixel_of = [&](int i) { return i % across * kValues; };
  const auto in_rows = [&](int i) { return image + (c0 + row_of(i)) * tiles.pixels + p0 + pixel_of(i); };
  const auto in_pixels = [&](int i) {
    const int at = i * kValues;
    return image + (p0 + at / width) * tiles.channels + c0 + at % width;
  };
  const auto write = [&](int64_t offset, const auto& value_of, const auto& channel_of) {
    Vector<Output, kValues> out;
#pragma unroll
    for (int j = 0; j < kValues; ++j)
      out.value[j] = narrow<Output>(applied(constants.channel[from + channel_of(j)], widen<S>(value_of(j))));
    out.store(output + offset, true);
  };
  const auto write_rows = [&](int i, const auto& value_of) {
    const int channel = row_of(i);
    write(in_rows(i), value_of, [&](int) { return channel; });
  };
  const auto write_pixels = [&](int i, const auto& value_of) {
    write(in_pixels(i), value_of, [&](int j) { return (i * kValues + j) % width; });
  };

  if (tiles.input_is_last == tiles.output_is_last) {
    if (tiles.input_is_last)
      return read_vectors<In>(input, count, in_pixels,
                              [&](int i, const In& in) { write_pixels(i, [&](int j) { return in.value[j]; }); });
    return read_vectors<In>(input, count, in_rows,
                            [&](int i, const In& in) { write_rows(i, [&](int j) { return in.value[j]; }); });
  }
  const auto turned_at = [&](int i, int j) { return (pixel_of(i) + j) * width + row_of(i); };
  if (tiles.input_is_last) {
    read_vectors<In>(input, count, in_pixels, [&](int i, const In& in) {
#pragma unroll
      for (int j = 0; j < kValues; ++j) turned[i * kValues + j] = in.value[j];
    });
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads)
      write_rows(i, [&](int j) { return turned[turned_at(i, j)]; });
  } else {
    read_vectors<In>(input, count, in_rows, [&](int i, const In& in) {
#pragma unroll
      for (int j = 0; j < kValues; ++j) turned[turned_at(i, j)] = in.value[j];
    });
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads)
      write_pixels(i, [&](int j) { return turned[i * kValues + j]; });
  }
}

}  // namespace normfused::cuda
