#include "kernels/cpu/target.h"

#define NF_ISA baseline
#define NF_VECTOR_BYTES 16
#include "kernels/cpu/kernels.inl"
