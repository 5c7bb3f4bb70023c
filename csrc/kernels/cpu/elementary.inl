// Elementary functions of vectors. In double, which need not be fast, they are the C library's.
template <class F>
NF_FN Vec<double> lane_by_lane(const Vec<double>& x, const F& f) {
  Vec<double> result{};
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) result[lane] = f(x[lane]);
  return result;
}

// 2^n, for whole n in [-126, 127].
NF_FN Vec<float> power_of_two(Vec<float> n) {
  const Vec<float> shifted = n + 12582912.f;  // 1.5 * 2^23: the integer is then in the low bits
  const Vec<int32_t> bits = (read_as<Vec<int32_t>>(&shifted) << 23) + (127 << 23);
  return read_as<Vec<float>>(&bits);
}

// x = n ln 2 + r, and exp(r) - 1 by its Taylor polynomial: |r| < 0.35, so what it leaves out is below 5e-9 of it.
struct Reduced {
  Vec<float> n, expm1;
};
NF_FN Reduced reduced(Vec<float> x) {
  const Vec<float> n = (x * 1.44269504f + 12582912.f) - 12582912.f;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = r * (1.f / 5040) + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  return {n, p * (r * r) + r};
}

struct Elementary {
  static NF_INLINE Vec<float> exp(Vec<float> x) {
    x = x > 89.f ? Vec<float>{} + 89.f : (x < -104.f ? Vec<float>{} - 104.f : x);
    const Reduced e = reduced(x);
#if NF_VECTOR_BYTES == 64
    return (Vec<float>)_mm512_scalef_ps((__m512)(e.expm1 + 1.f), (__m512)e.n);
#else
    // In two factors, for neither infinity nor the subnormals are one.
    const Vec<float> half = (e.n * 0.5f + 12582912.f) - 12582912.f;
    return (e.expm1 + 1.f) * power_of_two(half) * power_of_two(e.n - half);
#endif
  }

  static NF_INLINE Vec<float> expm1(Vec<float> x) {
    x = x < -20.f ? Vec<float>{} - 20.f : x;
    const Reduced e = reduced(x);
    const Vec<float> power = power_of_two(e.n);
    return e.expm1 * power + (power - 1.f);
  }

  // The tail beyond u is exp(-u^2 / 2) t P(t) with t = 1 / (1 + 0.35 u); P is the minimax fit up to u = 14.5, beyond
  // which the tail is zero in float. Its relative error is below 5e-8.
  static NF_INLINE Normal<Vec<float>> normal(Vec<float> x) {
    const Vec<float> u = x < 0.f ? -x : x;
    const Vec<float> t = 1.f / (u * 0.35f + 1.f);
    Vec<float> p = t * -0.029158112f + 0.14403266f;
    p = p * t - 0.25584397f;
    p = p * t + 0.1593269f;
    p = p * t - 0.023218188f;
    p = p * t + 0.10555522f;
    p = p * t + 0.11982057f;
    p = p * t + 0.13986361f;
    p = p * t + 0.1396213f;
    const Vec<float> e = exp(u * u * -0.5f), tail = e * (p * t);
    return {x > 0.f ? 1.f - tail : tail, e * 0.39894228f};
  }

  static NF_INLINE Vec<double> exp(Vec<double> x) {
    return lane_by_lane(x, [](double v) { return std::exp(v); });
  }
  static NF_INLINE Vec<double> expm1(Vec<double> x) {
    return lane_by_lane(x, [](double v) { return std::expm1(v); });
  }
  static NF_INLINE Normal<Vec<double>> normal(Vec<double> x) {
    return {lane_by_lane(x, [](double v) { return 0.5 * std::erfc(v * -0.70710678118654752); }),
            exp(x * x * -0.5) * 0.3989422804014327};
  }
};
