// Local response normalization. A block loads a tile of positions and channels into shared memory and sums over windows
// of channels there: squares in forward, and in backward also the channels' shares of the gradient. It writes the
// channels whose whole window lies in the tile.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/elementary.cuh"
#include "kernels/cuda/vector.cuh"

namespace normfused::cuda {

// The channels [begin, end).
struct Channels {
  int64_t begin, end;

  // Extended by up to `left` and `right` neighbouring channels.
  NF_DEVICE Channels with(int64_t left, int64_t right, int64_t channels) const {
    return {begin > left ? begin - left : 0, end + right < channels ? end + right : channels};
  }
};

// A tile of kWarp positions by the channels from `first` on. The threads of a warp access consecutive memory: positions
// if the layout is channels first, channels if it is channels last (kLast).
template <class T, bool kLast>
class Tile {
 public:
  using S = compute_t<T>;
  static constexpr int kValues = kWarp * kTileChannels<S>;

  NF_DEVICE Tile(const ChannelView& view, int64_t position, int64_t first)
      : view_(view), position_(position), first_(first) {}

  // Block-wide: calls f(channel, place in shared memory, offset in the tensor) for every position of the tile and every
  // one of the channels, each call in one thread.
  template <class F>
  NF_DEVICE void for_each(const Channels& channels, const F& f) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if constexpr (kLast) {
      for (int m = warp; m < kWarp && position_ + m < view_.positions(); m += kWarps) {
        const int64_t offset = (position_ + m) * view_.channels;
        for (int64_t c = channels.begin + lane; c < channels.end; c += kWarp)
          f(c, m * kTileChannels<S> + static_cast<int>(c - first_), offset + c);
      }
    } else {
      const int64_t m = position_ + lane;
      if (m >= view_.positions()) return;
      const int64_t offset = m / view_.inner * view_.channels * view_.inner + m % view_.inner;
      for (int64_t c = channels.begin + warp; c < channels.end; c += kWarps)
        f(c, static_cast<int>(c - first_) * kWarp + lane, offset + c * view_.inner);
    }
  }

  // The sum over the window of channel c, at `place`: `left` channels, itself and `right` channels, clipped to
  // `channels`.
  static NF_DEVICE S window_sum(const S* values, const Channels& channels, int64_t c, int place, int64_t left,
                                int64_t right) {
    constexpr int kStep = kLast ? 1 : kWarp;
    const Channels window = Channels{c, c + 1}.with(left, right, channels.end);
    const int from = static_cast<int>((window.begin > channels.begin ? window.begin : channels.begin) - c);
    const int to = static_cast<int>(window.end - c);
    S sum = 0;
    for (int i = from; i < to; ++i) sum += values[place + i * kStep];
    return sum;
  }

 private:
  ChannelView view_;
  int64_t position_, first_;
};

// The channels that this block writes.
NF_DEVICE Channels chunk_of(const WindowPlan& plan, int64_t channels) {
  const int64_t begin = blockIdx.x % plan.chunks * plan.chunk;
  return {begin, begin + plan.chunk < channels ? begin + plan.chunk : channels};
}

// Kernel: output = input * (k + scale * sum of squares)^-beta. A block per tile of positions and chunk of channels.
template <class T, bool kLast>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    response_forward(const LocalResponseNorm args, const WindowPlan plan, const Response<compute_t<T>> response) {
  using S = compute_t<T>;
  NF_SHARED(S, squares, [Tile<T, kLast>::kValues]);
  const T* const input = static_cast<const T*>(args.input);
  T* const output = static_cast<T*>(args.output);
  const int64_t left = args.left(), right = args.right();
  const Channels written = chunk_of(plan, args.view.channels);
  const Channels read = written.with(left, right, args.view.channels);
  const Tile<T, kLast> tile(args.view, blockIdx.x / plan.chunks * kWarp, read.begin);

  tile.for_each(read, [&](int64_t, int place, int64_t offset) {
    const S x = widen<S>(input[offset]);
    squares[place] = x * x;
  });
  __syncthreads();
  tile.for_each(written, [&](int64_t c, int place, int64_t offset) {
    const S base = response_base(response, tile.window_sum(squares, read, c, place, left, right));
    output[offset] = narrow<T>(widen<S>(input[offset]) * response_factor<Elementary>(response, base));
  });
}

// Kernel: the gradient of the input, by the formula in math.h. The two barriers separate the phases: squares, then
// shares (sums of squares), then gradients (sums of shares).
template <class T, bool kLast>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    response_backward(const LocalResponseNorm args, const WindowPlan plan, const Response<compute_t<T>> response) {
  using S = compute_t<T>;
  NF_SHARED(S, squares, [Tile<T, kLast>::kValues]);
  NF_SHARED(S, shares, [Tile<T, kLast>::kValues]);
  NF_SHARED(S, direct, [Tile<T, kLast>::kValues]);
  const T* const input = static_cast<const T*>(args.input);
  const T* const grad_output = static_cast<const T*>(args.grad_output);
  T* const grad_input = static_cast<T*>(args.output);
  const int64_t left = args.left(), right = args.right();
  const Channels written = chunk_of(plan, args.view.channels);
  const Channels sharing = written.with(right, left, args.view.channels);  // their windows contain a written channel
  const Channels read = sharing.with(left, right, args.view.channels);
  const Tile<T, kLast> tile(args.view, blockIdx.x / plan.chunks * kWarp, read.begin);

  tile.for_each(read, [&](int64_t, int place, int64_t offset) {
    const S x = widen<S>(input[offset]);
    squares[place] = x * x;
  });
  __syncthreads();
  tile.for_each(sharing, [&](int64_t c, int place, int64_t offset) {
    const S x = widen<S>(input[offset]), grad = widen<S>(grad_output[offset]);
    const S base = response_base(response, tile.window_sum(squares, read, c, place, left, right));
    const S factor = response_factor<Elementary>(response, base);
    shares[place] = response_share(grad, x, base, factor);
    direct[place] = grad * factor;
  });
  __syncthreads();
  tile.for_each(written, [&](int64_t c, int place, int64_t offset) {
    const S sum = tile.window_sum(shares, sharing, c, place, right, left);
    grad_input[offset] = narrow<T>(response_gradient(response, direct[place], widen<S>(input[offset]), sum));
  });
}

}  // namespace normfused::cuda
