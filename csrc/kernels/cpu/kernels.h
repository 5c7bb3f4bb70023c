// The interface of the CPU kernels. Each kernel selects its instruction set at run time; kernels/list.h documents them.
#pragma once

#include "kernels/cpu/parallel.h"
#include "kernels/types.h"

namespace normfused::cpu {

#define NF_KERNEL(name, Args) void name(const Args& args, const Parallel& parallel);
#include "kernels/list.h"

// "avx512", "avx2" or "baseline": the widest instruction set that both the machine and the library support, or the
// narrower one named by the environment variable NORMFUSED_CPU_CAPABILITY.
const char* capability();

}  // namespace normfused::cpu
