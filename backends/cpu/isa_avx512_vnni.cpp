#include "simd_avx512.h"

#include "kernels.inl"

#define PB_CPU_OPS(OP) OP(matmul_int8) OP(linear_int8) OP(matmul_kbit_int8)
#define PB_CPU_VARIANT avx512_vnni
#include "table.inl"
