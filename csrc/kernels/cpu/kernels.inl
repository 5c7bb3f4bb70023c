// All CPU kernels of one instruction set. A file that includes this defines NF_ISA, the namespace of the instruction
// set, and NF_VECTOR_BYTES, the size of its vectors, and includes target.h first.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/batch_norm.inl"
#include "kernels/cpu/channel_stats.inl"
#include "kernels/cpu/integer_sums.inl"
#include "kernels/cpu/local_response_norm.inl"
#include "kernels/cpu/standardize.inl"
#include "kernels/cpu/sync_moments.inl"

namespace normfused::cpu::NF_ISA {
namespace {

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
