#include "kernels/cpu/target.h"

#if defined(__x86_64__)
NF_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi2,fma,f16c")
#define NF_ISA avx512
#define NF_VECTOR_BYTES 64
#include "kernels/cpu/kernels.inl"
NF_TARGET_END
#endif
