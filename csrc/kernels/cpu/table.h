// Function pointers to the kernels of one instruction set.
#pragma once

#include "kernels/cpu/parallel.h"
#include "kernels/types.h"

namespace normfused::cpu {

struct DTypeKernels {
#define NF_DTYPE_KERNEL(name, Args) void (*name)(const Args&, const Parallel&);
#define NF_UNTYPED_KERNEL(name, Args)
#include "kernels/list.h"
};

struct KernelTable {
  DTypeKernels float32, float64, float16, bfloat16;
#define NF_DTYPE_KERNEL(name, Args)
#define NF_UNTYPED_KERNEL(name, Args) void (*name)(const Args&, const Parallel&);
#include "kernels/list.h"

  // Precondition: a floating-point dtype.
  constexpr const DTypeKernels& of(DType dtype) const {
    switch (dtype) {
      case DType::kFloat64:
        return float64;
      case DType::kFloat16:
        return float16;
      case DType::kBFloat16:
        return bfloat16;
      default:
        return float32;
    }
  }
};

namespace portable {
#define NF_PORTABLE_KERNEL(name, Args) void name(const Args&, const Parallel&);
#include "kernels/list.h"
}  // namespace portable
namespace baseline {
const KernelTable& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const KernelTable& kernels();
}
namespace avx512 {
const KernelTable& kernels();
}
#endif

}  // namespace normfused::cpu
