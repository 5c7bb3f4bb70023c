// Checks the activations of 16-bit data and their gradients with the approximations of elementary.cuh, at every value
// of both formats. The error must stay below half a unit in the last place of the 16-bit result, whichever direction
// CUDA's approximate intrinsics err in.
#include <cstdio>

#include "kernels/cuda/elementary.cuh"
#include "kernels/cuda/vector.cuh"

using namespace normfused;

namespace {

// Half a unit in the last place at a value, for a format with these mantissa digits and minimum exponent.
double half_unit(double value, int digits, int min_exponent) {
  const int exponent = value == 0 ? min_exponent : std::max(std::ilogb(value), min_exponent);
  return std::ldexp(0.5, exponent - digits);
}

double worst = 0;  // error as a fraction of half a unit
int64_t checks = 0, failures = 0;

void check(bool slope, ActivationKind kind, float z, double got, double expected, double half) {
  ++checks;
  // The slopes 1 - t * t and s * (1 - s) cancel near 1 in any float arithmetic: 1e-6. Underflow to 0 is accepted:
  // 1e-34.
  const double allowed = half + (slope ? 1e-6 : 0) + 1e-34, error = std::abs(got - expected);
  if (error <= allowed || (std::isnan(got) && std::isnan(expected))) {
    if (std::abs(expected) > 1e-3) worst = std::max(worst, error / half);
    return;
  }
  if (failures++ < 20)
    std::printf("FAILED %s of activation %d at %.9g: %.9g, expected %.9g\n", slope ? "slope" : "value",
                static_cast<int>(kind), z, got, expected);
}

template <class T>
void check_all(int digits, int min_exponent) {
  for (int kind = static_cast<int>(ActivationKind::kElu); kind <= static_cast<int>(ActivationKind::kGeluTanh); ++kind)
    for (unsigned bits = 0; bits < 65536; ++bits) {
      T value;
      const auto pattern = static_cast<uint16_t>(bits);
      std::memcpy(static_cast<void*>(&value), &pattern, sizeof value);
      const auto z = cuda::widen<float>(value);
      if (std::fabs(z) > 1e9f) continue;  // the cube in GELU overflows float, approximate or not
      const Activation activation{static_cast<ActivationKind>(kind), 0.3};
      const auto half = [&](double exact) { return half_unit(std::isnan(exact) ? 0 : exact, digits, min_exponent); };
      const double exact = activated<cuda::Elementary, double>(activation, static_cast<double>(z));
      check(false, activation.kind, z, activated<cuda::Approximate, float>(activation, z), exact, half(exact));
      const double slope = activation_gradient<cuda::Elementary, double>(activation, static_cast<double>(z), 1.0);
      check(true, activation.kind, z, activation_gradient<cuda::Approximate, float>(activation, z, 1.f), slope,
            half(slope));
    }
}

}  // namespace

int main() {
  for (cudahost::approximation = -1; cudahost::approximation <= 1; ++cudahost::approximation) {
    check_all<__half>(10, -14);
    check_all<__nv_bfloat16>(7, -126);
  }
  std::printf("%lld values, largest error %.3f of half a unit, %lld failures\n", static_cast<long long>(checks), worst,
              static_cast<long long>(failures));
  return failures > 0;
}
