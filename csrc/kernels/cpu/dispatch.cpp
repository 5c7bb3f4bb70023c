// Selects an instruction set once for each process, and a kernel by dtype for each call.
#include <cstdlib>
#include <cstring>

#include "kernels/cpu/cpuid.h"
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
  const InstructionSets supported = query_instruction_sets();
  const auto allowed = [&](const char* narrower) {
    return requested == nullptr || std::strcmp(requested, narrower) != 0;
  };
  if (supported.avx512 && allowed("avx2") && allowed("baseline")) return {"avx512", avx512::kernels};
  if (supported.avx2 && allowed("baseline")) return {"avx2", avx2::kernels};
#endif
  return {"baseline", baseline::kernels};
}

const InstructionSet& chosen() {
  static const InstructionSet set = choose();
  return set;
}

}  // namespace

#define NF_DTYPE_KERNEL(name, Args) \
  void name(const Args& args, const Parallel& parallel) { chosen().kernels().of(args.dtype).name(args, parallel); }
#define NF_UNTYPED_KERNEL(name, Args) \
  void name(const Args& args, const Parallel& parallel) { chosen().kernels().name(args, parallel); }
#define NF_PORTABLE_KERNEL(name, Args) \
  void name(const Args& args, const Parallel& parallel) { portable::name(args, parallel); }
#include "kernels/list.h"

const char* capability() { return chosen().name; }

}  // namespace normfused::cpu
