// All CPU kernels of one instruction set. A file that includes this defines NF_ISA, the namespace of the instruction
// set, and NF_VECTOR_BYTES, the size of its vectors, and includes target.h first.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/batch_norm.inl"
#include "kernels/cpu/channel_stats.inl"
#include "kernels/cpu/group_norm.inl"
#include "kernels/cpu/integer_sums.inl"
#include "kernels/cpu/layer_norm.inl"
#include "kernels/cpu/local_response_norm.inl"
#include "kernels/cpu/standardize.inl"
#include "kernels/cpu/sync_moments.inl"

namespace normfused::cpu::NF_ISA {
namespace {

template <class T>
constexpr DTypeKernels make_kernels() {
  return {
#define NF_DTYPE_KERNEL(name, Args) name<T>,
#define NF_UNTYPED_KERNEL(name, Args)
#include "kernels/list.h"
  };
}

}  // namespace

const KernelTable& kernels() {
  static constexpr KernelTable table{
      make_kernels<float>(),
      make_kernels<double>(),
      make_kernels<Half>(),
      make_kernels<BFloat16>(),
#define NF_DTYPE_KERNEL(name, Args)
#define NF_UNTYPED_KERNEL(name, Args) name,
#include "kernels/list.h"
  };
  return table;
}

}  // namespace normfused::cpu::NF_ISA
