// All CPU kernels for one instruction set: define NF_ISA, its namespace, and NF_VECTOR_BYTES, and include this.
#define NF_INLINE inline __attribute__((always_inline))
#define NF_NOINLINE static __attribute__((noinline))

#include "kernels/math.h"  // for these instructions too: what it is given to call is

namespace normfused::cpu::NF_ISA {
namespace {

#include "kernels/cpu/vec.inl"

#include "kernels/cpu/elementary.inl"

#include "kernels/cpu/block.inl"

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
constexpr DTypeKernels make_kernels() {
  return {
#define NF_DTYPE_KERNEL(name, Args) name<T>,
#define NF_UNTYPED_KERNEL(name, Args)
#include "kernels/list.h"
  };
}

constexpr DTypeKernels make_integer_kernels() {
  DTypeKernels kernels{};
  kernels.channel_sums = integer_sums_of;
  return kernels;
}

}  // namespace

const KernelTable& kernels() {
  static constexpr KernelTable table{
      make_kernels<float>(),    make_kernels<double>(), make_kernels<Half>(),
      make_kernels<BFloat16>(), make_integer_kernels(),
#define NF_DTYPE_KERNEL(name, Args)
#define NF_UNTYPED_KERNEL(name, Args) name,
#include "kernels/list.h"
  };
  return table;
}

}  // namespace normfused::cpu::NF_ISA
