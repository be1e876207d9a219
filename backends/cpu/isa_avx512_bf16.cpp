#include "simd_avx512.h"

#include "kernels.inl"

#define PB_CPU_OPS(OP) OP(matmul_kbit) OP(matmul_kbit_grouped)
#define PB_CPU_VARIANT avx512_bf16
#include "table.inl"
