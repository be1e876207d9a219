#include "simd_neon.h"

#include "kernels.inl"

#define PB_CPU_VARIANT neon
#include "table.inl"
