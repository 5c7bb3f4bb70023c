// Local response normalization.
#pragma once

#include "values.h"

namespace normfused::testing {

// next() cycles through window sizes and exponents.
struct Window {
  int64_t size;
  double beta;

  static Window next(int64_t channels) {
    static int turn = 0;
    const int64_t sizes[] = {5, 1, 2, 9, 4, channels < 20 ? 2 * channels + 3 : 3};
    const double betas[] = {0.75, 0.6, 0.5, 1, 2.3};
    const Window window{sizes[turn % 6], betas[turn % 5]};
    ++turn;
    return window;
  }
};

// Forward and backward.
template <class T, class Backend>
void run_local_response_norm(Backend& backend, const Window& window, const Case<T>& data, int64_t offset) {
  const ChannelView& view = data.view;
  const int64_t n = view.numel(), size = window.size;
  const double alpha = 1.5, beta = window.beta, k = 0.5, scale = alpha / static_cast<double>(size);
  current += " window " + std::to_string(size) + " beta " + std::to_string(beta);
  const auto channel = [&](int64_t i, int64_t by) {
    return i + by * view.inner;
  };  // the same position, `by` channels further
  // Sums f over the channels c - left, …, c + right, where c is the channel of element i.
  const auto window_sum = [&](int64_t i, int64_t left, int64_t right, const auto& f) {
    double sum = 0;
    for (int64_t by = -left; by <= right; ++by)
      if (data.channel(i) + by >= 0 && data.channel(i) + by < view.channels) sum += f(channel(i, by));
    return sum;
  };
  const int64_t left = size / 2, right = (size - 1) / 2;
  std::vector<double> base(n);
  for (int64_t i = 0; i < n; ++i)
    base[i] = k + scale * window_sum(i, left, right, [&](int64_t j) { return data.x(j) * data.x(j); });
  std::vector<double> share(n);
  for (int64_t i = 0; i < n; ++i) share[i] = data.g(i) * data.x(i) * std::pow(base[i], -beta - 1);

  const double epsilon = Format<T>::epsilon, rounding = Format<T>::dtype == DType::kFloat64 ? 6e-16 : 6e-8;
  Buffer<T> output(n, offset);
  for (const bool backward : {false, true}) {
    backend.local_response_norm({view, Format<T>::dtype, data.input.data, backward ? data.grad.data : nullptr,
                                 output.data, size, alpha, beta, k});
    for (int64_t i = 0; i < n; ++i) {
      const double factor = std::pow(base[i], -beta), direct = (backward ? data.g(i) : data.x(i)) * factor;
      double want = direct, magnitude = std::abs(direct);
      if (backward) {
        const double times = 2 * scale * beta * data.x(i);
        want -= times * window_sum(i, right, left, [&](int64_t j) { return share[j]; });
        magnitude += times * window_sum(i, right, left, [&](int64_t j) { return std::abs(share[j]); });
      }
      expect_near(backward ? "gradient" : "output", i, decode(output.data + i), want,
                  1.1 * epsilon * std::abs(want) + rounding * (1 + 6 * magnitude));
    }
  }
}

}  // namespace normfused::testing
