// The kernels of one instruction set, written once on its simd interface. An isa file includes its simd header first.

// clang-format off
#include "parallel.h"
#include "dtype.h"
#include "weight.h"
#include "reduce.h"
#include "code256.h"
#include "table256.h"

#include "kernels_blockwise.inl"
#include "kernels_kbit.inl"
#include "kernels_int8.inl"
#include "kernels_gather.inl"
#include "kernels_multi.inl"

#include "pack.inl"
#include "matmul_kbit.inl"
#include "matmul_int8.inl"

#include "kernels_optim.inl"
// clang-format on
