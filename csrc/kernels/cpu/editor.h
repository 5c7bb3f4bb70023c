// For editors and clangd only. An .inl file includes this header if NF_ISA is not defined, that is, if the file is
// parsed alone. A build defines NF_ISA in baseline.cpp, avx2.cpp and avx512.cpp and never reads this header.
//
// The instruction set follows from the compiler's flags; .clangd passes those of AVX2.
#pragma once

#include "kernels/cpu/target.h"

#define NF_ISA editor
#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__BMI2__)
#define NF_VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define NF_VECTOR_BYTES 32
#else
#define NF_VECTOR_BYTES 16
#endif
