#include "simd_avx2.h"

#include "kernels.inl"

#include "pack.inl"

#include "matmul_kbit.inl"

#include "matmul_int8.inl"

#define PB_CPU_VARIANT avx2
#include "table.inl"
