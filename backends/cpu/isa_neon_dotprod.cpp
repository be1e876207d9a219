#include "simd_neon.h"

#include "kernels.inl"

// The compiler makes dot_int8's loop of sdot.
#define PB_CPU_OPS(OP) OP(matmul_int8) OP(linear_int8) OP(matmul_kbit_int8)
#define PB_CPU_VARIANT neon_dotprod
#include "table.inl"
