#include "simd_avx512.h"

#include "kernels.inl"

#define PB_CPU_OPS(OP) OP(optimizer_8bit)
#define PB_CPU_VARIANT avx512_vbmi
#include "table.inl"
