// The kernels of one instruction set, as function pointers by dtype.
#pragma once

#include "kernels/cpu/parallel.h"
#include "kernels/types.h"

namespace normfused::cpu {

struct KernelsOf {
  void (*batch_norm_training)(const BatchNormForward&, const Parallel&);
  void (*batch_norm_inference)(const BatchNormForward&, const Parallel&);
  void (*batch_norm_backward)(const BatchNormBackward&, const Parallel&);
  void (*channel_moments)(const ChannelStats&, const Parallel&);
  void (*channel_sums)(const ChannelStats&, const Parallel&);
  void (*pack_moments)(const PackMoments&, const Parallel&);
  void (*local_response_norm)(const LocalResponseNorm&, const Parallel&);
};

struct KernelTable {
  KernelsOf float32, float64, float16, bfloat16;
  void (*integer_sums)(const ChannelStats&, const Parallel&);
  void (*standardize)(const Standardize&, const Parallel&);
  void (*merge_ranks)(const MergeRanks&);
};

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
