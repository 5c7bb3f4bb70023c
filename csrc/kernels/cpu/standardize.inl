// Standardization of images: (x * scale - mean) / std, from one layout and dtype to another in one pass.

// n neighbouring values of one channel.
template <bool kStream, class T, class Output>
void standardize_row(const T* input, Output* output, int64_t n, const StandardizeCoefficients<T, compute_t<T>> c) {
  const auto put = [&](int64_t i, auto width) __attribute__((always_inline)) {
    const auto y = applied(c, load<compute_t<T>>(input + i, width));
    if constexpr (kStream && std::is_same_v<decltype(width), Whole>)
      stream_raw(output + i, stored<Output>(y));
    else
      store(output + i, y, width);
  };
  constexpr int64_t kLanesOf = kLanes<compute_t<Output>>;
  int64_t i = 0;
  if (kStream) {
    i = least(n, bytes_to_alignment(output, kLanesOf * sizeof(Output)) / static_cast<int64_t>(sizeof(Output)));
    if (i > 0) put(0, Part{i});
  }
  for (; i + kLanesOf <= n; i += kLanesOf) put(i, Whole{});
  if (i < n) put(i, Part{n - i});
}

template <bool kStream, class T, class Output>
void standardize_tiles(const Standardize& args, const Parallel& parallel) {
  const int64_t channels = args.channels, pixels = args.pixels;
  const Workspace workspace(0, channels * static_cast<int64_t>(sizeof(StandardizeCoefficients<T, compute_t<T>>)));
  auto* const coefficients = static_cast<StandardizeCoefficients<T, compute_t<T>>*>(workspace.table);
  for (int64_t c = 0; c < channels; ++c) prepare(normalization_of(args, c), coefficients[c]);

  const bool by_rows = !args.input_is_last && !args.output_is_last;
  const int64_t width = by_rows ? 1 : least(channels, kTileChannels);  // channels of a tile
  const int64_t length = least(pixels, kTileValues / width / kLanes<uint8_t> * kLanes<uint8_t>);
  const int64_t across = (channels + width - 1) / width, along = (pixels + length - 1) / length;
  const int64_t tile_bytes = length * width * static_cast<int64_t>(sizeof(T) + sizeof(Output));
  parallel(args.images * across * along, (32 << 10) / tile_bytes + 1, [&](int64_t tile) {
    const int64_t p0 = tile % along * length, n = least(length, pixels - p0);
    const int64_t c0 = tile / along % across * width, count = least(width, channels - c0);
    const int64_t image = tile / along / across * channels * pixels;
    const int64_t in_rows = image + c0 * pixels + p0, in_pixels = image + p0 * channels + c0;
    const T* input = static_cast<const T*>(args.input) + (args.input_is_last ? in_pixels : in_rows);
    Output* const output = static_cast<Output*>(args.output) + (args.output_is_last ? in_pixels : in_rows);
    alignas(64) T apart[kTileValues];
    alignas(64) Output rows[kTileValues], together[kTileValues];
    if (args.input_is_last) {
      take_apart(input, channels, count, n, apart);
      input = apart;
    }
    for (int64_t c = 0; c < count; ++c) {
      const T* const from = input + c * (args.input_is_last ? n : pixels);
      if (args.output_is_last)
        standardize_row<false>(from, rows + c * n, n, coefficients[c0 + c]);
      else
        standardize_row<kStream>(from, output + c * pixels, n, coefficients[c0 + c]);
    }
    if (args.output_is_last && kStream) {
      put_together(rows, count, count, n, together);
      stream_tile(together, n * count, output);
    } else if (args.output_is_last) {
      put_together(rows, channels, count, n, output);
    }
    if (kStream) finish_streams();
  });
}

template <class T, class Output>
void standardize_as(const Standardize& args, const Parallel& parallel) {
  const int64_t bytes = args.images * args.channels * args.pixels * static_cast<int64_t>(sizeof(Output));
  const bool in_place = args.input == args.output;
  const bool in_runs = !args.output_is_last || args.channels <= kTileChannels;  // tiles are written as
  if (kVectorBytes > 16 && bytes >= kStreamBytes && !in_place && in_runs)
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
