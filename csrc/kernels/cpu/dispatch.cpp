#include <cstdlib>
#include <cstring>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/table.h"

namespace normfused::cpu {

namespace {

struct InstructionSet {
  const char* name;
  const KernelTable& (*kernels)();
};

// The widest supported set that is not wider than what NORMFUSED_CPU_CAPABILITY names.
InstructionSet choose() {
#if defined(__x86_64__)
  const char* const wanted = std::getenv("NORMFUSED_CPU_CAPABILITY");
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("bmi2");
  const auto allowed = [&](const char* narrower) { return wanted == nullptr || std::strcmp(wanted, narrower) != 0; };
  if (has_avx512 && allowed("avx2") && allowed("baseline")) return {"avx512", avx512::kernels};
  if (has_avx2 && allowed("baseline")) return {"avx2", avx2::kernels};
#endif
  return {"baseline", baseline::kernels};
}

const InstructionSet& chosen() {
  static const InstructionSet set = choose();
  return set;
}

const KernelsOf& kernels_for(DType dtype) {
  const KernelTable& table = chosen().kernels();
  switch (dtype) {
    case DType::kFloat64:
      return table.float64;
    case DType::kFloat16:
      return table.float16;
    case DType::kBFloat16:
      return table.bfloat16;
    default:
      return table.float32;
  }
}

}  // namespace

void batch_norm_training(const BatchNormForward& args, const Parallel& parallel) {
  kernels_for(args.dtype).batch_norm_training(args, parallel);
}

void batch_norm_inference(const BatchNormForward& args, const Parallel& parallel) {
  kernels_for(args.dtype).batch_norm_inference(args, parallel);
}

void batch_norm_backward(const BatchNormBackward& args, const Parallel& parallel) {
  kernels_for(args.dtype).batch_norm_backward(args, parallel);
}

void channel_moments(const ChannelStats& args, const Parallel& parallel) {
  kernels_for(args.dtype).channel_moments(args, parallel);
}

void channel_sums(const ChannelStats& args, const Parallel& parallel) {
  const auto kernel = is_integer(args.dtype) ? chosen().kernels().integer_sums : kernels_for(args.dtype).channel_sums;
  kernel(args, parallel);
}

void standardize(const Standardize& args, const Parallel& parallel) { chosen().kernels().standardize(args, parallel); }

void pack_moments(const PackMoments& args, const Parallel& parallel) {
  kernels_for(args.dtype).pack_moments(args, parallel);
}

// Never with fused multiplications: on machines of different kinds, too, ranks are to come to the same bits.
void merge_ranks(const MergeRanks& args, const Parallel&) { baseline::kernels().merge_ranks(args); }

void local_response_norm(const LocalResponseNorm& args, const Parallel& parallel) {
  kernels_for(args.dtype).local_response_norm(args, parallel);
}

const char* capability() { return chosen().name; }

}  // namespace normfused::cpu
