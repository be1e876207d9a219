#include "simd_avx512.h"

#include "kernels.inl"

#define PB_CPU_VARIANT avx512
#include "table.inl"
