// Standardization of images.
#pragma once

#include "values.h"

namespace normfused::testing {

template <class T, class Output, class Backend>
void run_standardize(Backend& backend, DType dtype, const ChannelView& view, int64_t offset, bool input_is_last,
                     bool output_is_last, std::mt19937& random) {
  current = backend.name() + " standardize " + std::to_string(static_cast<int>(dtype)) + " to " + Format<Output>::name +
            ", images " + std::to_string(view.outer) + " channels " + std::to_string(view.channels) + " pixels " +
            std::to_string(view.inner) + " offset " + std::to_string(offset) + (input_is_last ? " from" : "") +
            (output_is_last ? " to" : "") + " channels last";
  constexpr bool kBytes = std::is_same_v<T, uint8_t>;
  const int64_t channels = view.channels;
  Buffer<T> input(view.numel(), offset);
  Buffer<Output> output(view.numel(), offset);
  std::uniform_int_distribution<int> values(0, kBytes ? 255 : 64);
  for (int64_t i = 0; i < view.numel(); ++i) encode(input.data + i, values(random));
  const double scale = kBytes ? 1 / 255.0 : 0.25;
  std::vector<double> mean(channels), std(channels);
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = 0.1 * static_cast<double>(c % 7);
    std[c] = 0.3 + 0.1 * static_cast<double>(c % 3);
  }
  Standardize args{view.outer, channels,    view.inner,    dtype,          Format<Output>::dtype,
                   input.data, output.data, input_is_last, output_is_last, mean.data(),
                   std.data(), scale};
  const auto offset_of = [&](int64_t image, int64_t c, int64_t p, bool last) {
    return last ? (image * view.inner + p) * channels + c : (image * channels + c) * view.inner + p;
  };
  const auto check = [&](const Output* got) {
    for (int64_t image = 0; image < view.outer; ++image)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t p = 0; p < view.inner; ++p) {
          const double want = (decode(input.data + offset_of(image, c, p, input_is_last)) * scale - mean[c]) / std[c];
          // Bytes are within 1 ulp without fused multiply-add. Near 0, the error is relative to mean / std.
          const double arithmetic = std::is_same_v<T, double> ? 4e-16 : kBytes ? 1e-12 : 2.4e-7;
          const double float_rounding = kBytes ? 6e-8 * std::abs(want) : 0;
          const double bound =
              Format<Output>::epsilon * std::abs(want) + float_rounding + (sizeof(Output) == 2 ? 3e-8 : 1e-15);
          expect_near("output", c, decode(got + offset_of(image, c, p, output_is_last)), want,
                      bound + arithmetic * (std::abs(want) + mean[c] / std[c]));
        }
  };
  backend.standardize(args);
  check(output.data);
  if constexpr (std::is_same_v<T, Output>) {
    if (input_is_last != output_is_last) return;
    Buffer<T> in_place(view.numel(), offset);
    std::memcpy(static_cast<void*>(in_place.data), input.data, static_cast<size_t>(view.numel()) * sizeof(T));
    args.input = args.output = in_place.data;
    backend.standardize(args);
    check(in_place.data);
  }
}

// All pairs of dtypes and of layouts. The view is (images, channels, pixels).
template <class Backend>
void run_standardize(Backend& backend, const ChannelView& view, int64_t offset, std::mt19937& random) {
  for (const int layouts : {0, 1, 2, 3}) {
    const bool from = layouts & 1, to = layouts & 2;
    run_standardize<uint8_t, float>(backend, DType::kUInt8, view, offset, from, to, random);
    run_standardize<uint8_t, Half>(backend, DType::kUInt8, view, offset, from, to, random);
    run_standardize<uint8_t, BFloat16>(backend, DType::kUInt8, view, offset, from, to, random);
    run_standardize<float, float>(backend, DType::kFloat32, view, offset, from, to, random);
    run_standardize<float, Half>(backend, DType::kFloat32, view, offset, from, to, random);
    run_standardize<float, BFloat16>(backend, DType::kFloat32, view, offset, from, to, random);
    run_standardize<double, double>(backend, DType::kFloat64, view, offset, from, to, random);
    run_standardize<Half, Half>(backend, DType::kFloat16, view, offset, from, to, random);
    run_standardize<BFloat16, BFloat16>(backend, DType::kBFloat16, view, offset, from, to, random);
  }
}

}  // namespace normfused::testing
