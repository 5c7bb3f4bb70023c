// Standardization of images from one layout and dtype to another, in one launch. A block processes a tile: some pixels
// of some channels of one image. If input and output differ in layout, it transposes the tile in shared memory.
#pragma once

#include "kernels/cuda/plan.h"
#include "kernels/cuda/vector.cuh"
#include "kernels/math.h"

namespace normfused::cuda {

// Values of a tile: at most 32 KiB, for double.
inline constexpr int kImageTileValues = 4096;
// Channels of a tile. With 32 its pixels cover at least a cache line in either layout.
inline constexpr int kImageTileChannels = 32;
// Channels per launch: their coefficients, in double, take 3 of the 4 KiB that kernel arguments may have.
inline constexpr int kLaunchChannels = 128;
// Loads that a thread has in flight.
inline constexpr int kLoads = 4;

// The coefficients of a launch, passed by value: no copy to the device and no other launch is needed before.
template <class T>
struct Constants {
  StandardizeCoefficients<T, compute_t<T>> channel[kLaunchChannels];
};

// The tiles of a launch.
struct Tiles {
  int64_t channels, pixels;            // of an image
  int64_t first, last;                 // channels of the launch
  int width, length;                   // channels and pixels of a tile
  int64_t channel_tiles, pixel_tiles;  // of an image
  bool input_is_last, output_is_last;  // whether the layout is channels last

  int64_t blocks(int64_t images) const { return images * channel_tiles * pixel_tiles; }
};

// The tiles of a launch for the channels [first, last).
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

// The tile of this block and the offsets of its vectors. Vector i lies at `first_layout(i)` if the layout is channels
// first, at `last_layout(i)` if it is channels last. Vectors of more than one value need tiles with all channels and
// whole vectors of pixels.
template <int kValues>
struct ImageTile {
  int64_t channels, pixels;       // of the image
  int64_t image, channel, pixel;  // offset of the image, first channel and first pixel of the tile
  int width, row_vectors;         // channels, and vectors per channel
  int vectors;                    // of the tile

  NF_DEVICE explicit ImageTile(const Tiles& tiles) : channels(tiles.channels), pixels(tiles.pixels) {
    const auto pixel_tiles = static_cast<unsigned>(tiles.pixel_tiles);
    const auto channel_tiles = static_cast<unsigned>(tiles.channel_tiles);
    const unsigned pixel_tile = blockIdx.x % pixel_tiles, row = blockIdx.x / pixel_tiles;
    pixel = int64_t{pixel_tile} * tiles.length;
    channel = tiles.first + int64_t{row % channel_tiles} * tiles.width;
    image = int64_t{row / channel_tiles} * channels * pixels;
    const int length = static_cast<int>(pixels - pixel < tiles.length ? pixels - pixel : tiles.length);
    width = static_cast<int>(tiles.last - channel < tiles.width ? tiles.last - channel : tiles.width);
    row_vectors = length / kValues;
    vectors = row_vectors * width;
  }

  // Channels first: the channel, the first pixel and the offset of vector i.
  NF_DEVICE int channel_of(int i) const { return i / row_vectors; }
  NF_DEVICE int pixel_of(int i) const { return i % row_vectors * kValues; }
  NF_DEVICE int64_t first_layout(int i) const {
    return image + (channel + channel_of(i)) * pixels + pixel + pixel_of(i);
  }
  // Channels last: the offset of vector i, and the channel of its value j.
  NF_DEVICE int64_t last_layout(int i) const {
    const int value = i * kValues;
    return image + (pixel + value / width) * channels + channel + value % width;
  }
  NF_DEVICE int channel_of(int i, int j) const { return (i * kValues + j) % width; }
  // The place of value j of vector i, channels first, in the tile's channels last order.
  NF_DEVICE int transposed(int i, int j) const { return (pixel_of(i) + j) * width + channel_of(i); }
};

// Block-wide: calls consume(i, vector) for every vector i < count of the tile, with kLoads loads in flight per thread.
template <class V, class T, class Offset, class Consume>
NF_DEVICE void read_vectors(const T* input, int count, const Offset& offset_of, const Consume& consume) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads * kLoads) {
    V vectors[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      if (i + k * kThreads < count) vectors[k] = V::load_streaming(input + offset_of(i + k * kThreads));
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      if (i + k * kThreads < count) consume(i + k * kThreads, vectors[k]);
  }
}

// Standardizes and stores one vector: value_of(j) is its value j, channel_of(j) that value's channel, counted from the
// first channel of the launch.
template <int kValues, class T, class Output, class ValueOf, class ChannelOf>
NF_DEVICE void write_vector(Output* target, const Constants<T>& constants, const ValueOf& value_of,
                            const ChannelOf& channel_of) {
  Vector<Output, kValues> out;
#pragma unroll
  for (int j = 0; j < kValues; ++j)
    out.value[j] = narrow<Output>(applied(constants.channel[channel_of(j)], widen<compute_t<T>>(value_of(j))));
  out.store(target, true);
}

// Kernel: a block per tile. The barrier separates the two halves of a transposition.
template <class T, class Output, int kValues>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    standardize_tiles(const T* input, Output* output, const Tiles tiles, const Constants<T> constants) {
  using In = Vector<T, kValues>;
  NF_SHARED(T, transposed, [kImageTileValues]);  // (pixels, channels)
  const ImageTile<kValues> tile(tiles);
  const int c0 = static_cast<int>(tile.channel - tiles.first);
  const auto in_first = [&](int i) { return tile.first_layout(i); };
  const auto in_last = [&](int i) { return tile.last_layout(i); };
  const auto write_first = [&](int i, const auto& value_of) {
    const int channel = c0 + tile.channel_of(i);
    write_vector<kValues>(output + tile.first_layout(i), constants, value_of, [&](int) { return channel; });
  };
  const auto write_last = [&](int i, const auto& value_of) {
    write_vector<kValues>(output + tile.last_layout(i), constants, value_of,
                          [&](int j) { return c0 + tile.channel_of(i, j); });
  };

  if (tiles.input_is_last == tiles.output_is_last) {
    if (tiles.input_is_last)
      return read_vectors<In>(input, tile.vectors, in_last,
                              [&](int i, const In& in) { write_last(i, [&](int j) { return in.value[j]; }); });
    return read_vectors<In>(input, tile.vectors, in_first,
                            [&](int i, const In& in) { write_first(i, [&](int j) { return in.value[j]; }); });
  }
  if (tiles.input_is_last) {
    read_vectors<In>(input, tile.vectors, in_last, [&](int i, const In& in) {
#pragma unroll
      for (int j = 0; j < kValues; ++j) transposed[i * kValues + j] = in.value[j];
    });
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < tile.vectors; i += kThreads)
      write_first(i, [&](int j) { return transposed[tile.transposed(i, j)]; });
  } else {
    read_vectors<In>(input, tile.vectors, in_first, [&](int i, const In& in) {
#pragma unroll
      for (int j = 0; j < kValues; ++j) transposed[tile.transposed(i, j)] = in.value[j];
    });
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < tile.vectors; i += kThreads)
      write_last(i, [&](int j) { return transposed[i * kValues + j]; });
  }
}

}  // namespace normfused::cuda
