#include "simd_avx2.h"

#include "kernels.inl"

#define PB_CPU_VARIANT avx2
#include "table.inl"
