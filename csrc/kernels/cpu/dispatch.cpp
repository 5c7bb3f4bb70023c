// Selects an instruction set once for each process, and a kernel by dtype for each call.
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

// The widest supported set that is not wider than the one NORMFUSED_CPU_CAPABILITY names.
InstructionSet choose() {
#if defined(__x86_64__)
  const char* const requested = std::getenv("NORMFUSED_CPU_CAPABILITY");
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("bmi2");
  const auto allowed = [&](const char* narrower) {
    return requested == nullptr || std::strcmp(requested, narrower) != 0;
  };
  if (has_avx512 && allowed("avx2") && allowed("baseline")) return {"avx512", avx512::kernels};
  if (has_avx2 && allowed("baseline")) return {"avx2", avx2::kernels};
#endif
  return {"baseline", baseline::kernels};
}

const InstructionSet& chosen() {
  static const InstructionSet set = choose();
  return set;
}

template <class Args>
const KernelTable& table_for(const Args&) {
  return chosen().kernels();
}

// Without fused multiply-add: ranks on machines of different kinds must compute bitwise identical statistics.
const KernelTable& table_for(const MergeRanks&) { return baseline::kernels(); }

}  // namespace

#define NF_DTYPE_KERNEL(name, Args) \
  void name(const Args& args, const Parallel& parallel) { table_for(args).of(args.dtype).name(args, parallel); }
#define NF_UNTYPED_KERNEL(name, Args) \
  void name(const Args& args, const Parallel& parallel) { table_for(args).name(args, parallel); }
#include "kernels/list.h"

const char* capability() { return chosen().name; }

}  // namespace normfused::cpu
