// A minimal reduction, with only the members that reduce_phases.cuh requires. The test of the contracts removes members
// and expects the compiler to name them.
#include "kernels/cuda/reduce.cuh"

using namespace normfused;

namespace {

struct SumOp {
  using T = float;
  using S = float;
  using Sum = double;
  using State = float;
  static constexpr int kInputs = 1, kRequiredInputs = 1, kSums = 1;
  static constexpr bool kRecomputes = false, kStartsFromMemory = false;

  const float* tensor;

  const float* input(int) const { return tensor; }
  template <int>
  uint32_t mask_bits(int64_t) const {
    return 0;
  }
  State start(int64_t) const { return 0; }
  template <int n, bool kMasked>
  void accumulate(State& state, const float (&values)[1][n], uint32_t valid, uint32_t, bool) const {
    for (int i = 0; i < n; ++i)
      if (!kMasked || (valid >> i & 1)) state += values[0][i];
  }
  void fold(const State& state, int64_t, int64_t, Sum (&sums)[1]) const { sums[0] = state; }
  static Sum identity(int) { return 0; }
  static Sum merge(int, Sum a, Sum b) { return a + b; }
  void finalize(int64_t, Sum (&)[1]) const {}
};

struct WriteSum {
  double* sums;

  using Preloaded = cuda::NoPreload;
  Preloaded preload(int64_t) const { return {}; }
  void prefetch(int64_t) const {}
  void operator()(int64_t channel, const double (&results)[1], const Preloaded&) const { sums[channel] = results[0]; }
};

}  // namespace

cudaError_t sum(const float* tensor, double* sums, const cuda::ReductionPlan& plan,
                const cuda::Partials<double>& partials) {
  return cuda::reduce(SumOp{tensor}, WriteSum{sums}, cuda::NoApply{}, plan, partials, nullptr);
}
