// All CPU kernels for one instruction set: define NF_ISA, its namespace, and NF_VECTOR_BYTES, and include this.
#define NF_INLINE inline __attribute__((always_inline))
#define NF_NOINLINE static __attribute__((noinline))

#include "kernels/math.h"  // for these instructions too: what it is given to call is

namespace normfused::cpu::NF_ISA {
namespace {

#include "kernels/cpu/vec.inl"

#include "kernels/cpu/elementary.inl"

#include "kernels/cpu/pack.inl"

#include "kernels/cpu/lanes.inl"

#include "kernels/cpu/reduce.inl"

#include "kernels/cpu/channel_vector.inl"

#include "kernels/cpu/apply.inl"

#include "kernels/cpu/channel_stats.inl"

#include "kernels/cpu/planes.inl"

#include "kernels/cpu/integer_sums.inl"

#include "kernels/cpu/standardize.inl"

#include "kernels/cpu/batch_norm.inl"

#include "kernels/cpu/sync_moments.inl"

#include "kernels/cpu/local_response_norm.inl"

template <class T>
constexpr KernelsOf make_kernels() {
  return {batch_norm_training<T>, batch_norm_inference<T>, batch_norm_backward<T>, channel_moments<T>,
          channel_sums<T>,        pack_moments<T>,         local_response_norm<T>};
}

}  // namespace

const KernelTable& kernels() {
  static constexpr KernelTable table{make_kernels<float>(),
                                     make_kernels<double>(),
                                     make_kernels<Half>(),
                                     make_kernels<BFloat16>(),
                                     integer_sums_of,
                                     standardize,
                                     merge_ranks};
  return table;
}

}  // namespace normfused::cpu::NF_ISA
