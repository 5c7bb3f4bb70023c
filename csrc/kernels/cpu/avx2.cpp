#include "kernels/cpu/target.h"

#if defined(__x86_64__)
NF_TARGET_BEGIN("avx2,fma,f16c")
#define NF_ISA avx2
#define NF_VECTOR_BYTES 32
#include "kernels/cpu/kernels.inl"
NF_TARGET_END
#endif
