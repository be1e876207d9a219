#include "simd_scalar.h"

#include "kernels.inl"

#define PB_CPU_VARIANT scalar
#include "table.inl"
