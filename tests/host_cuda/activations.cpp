// Activations and their gradients with the formulas of the CUDA kernels, as a library for benchmarks/ulp.py. The C
// library's functions replace those of CUDA's math library.
#include "kernels/cuda/elementary.cuh"
#include "kernels/cuda/vector.cuh"

namespace normfused {

namespace {

template <class T>
void evaluate(const Activation& activation, const T* z, T* output, T* gradient, int64_t count) {
  using S = cuda::compute_t<T>;
  using E = cuda::elementary_t<T>;
  for (int64_t i = 0; i < count; ++i) {
    const S wide = cuda::widen<S>(z[i]);
    output[i] = cuda::narrow<T>(activated<E, S>(activation, wide));
    gradient[i] = cuda::narrow<T>(activation_gradient<E, S>(activation, wide, S(1)));
  }
}

}  // namespace

// `approximation` is the direction in which CUDA's approximate intrinsics err (see cuda_host.h). Returns 0 for a dtype
// that is not floating.
extern "C" int evaluate_activation(int dtype, int kind, double parameter, int approximation, const void* z,
                                   void* output, void* gradient, int64_t count) {
  cudahost::approximation = approximation;
  const Activation activation{static_cast<ActivationKind>(kind), parameter};
  const auto run = [&]<class T>(T) {
    evaluate(activation, static_cast<const T*>(z), static_cast<T*>(output), static_cast<T*>(gradient), count);
    return 1;
  };
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat64:
      return run(double{});
    case DType::kFloat16:
      return run(__half{});
    case DType::kBFloat16:
      return run(__nv_bfloat16{});
    default:
      return 0;
  }
}

}  // namespace normfused
