// The kernels of one instruction set, written once on its simd interface. An isa file includes its simd header first.

// clang-format off
#include "parallel.h"
#include "dtype.h"
#include "weight.h"
#include "reduce.h"

#include "kernels_blockwise.inl"
#include "kernels_kbit.inl"
#include "kernels_int8.inl"
#include "kernels_gather.inl"
#include "kernels_multi.inl"

#if __has_include("matmul_kbit.inl") && __has_include("matmul_int8.inl") && __has_include("pack.inl")
#include "pack.inl"
#include "matmul_kbit.inl"
#include "matmul_int8.inl"
#else
// TODO: remove with the products in place.
#define PB_CPU_OPS(OP) \
  OP(quantize_blockwise) OP(dequantize_blockwise) OP(quantize_kbit) OP(dequantize_kbit) OP(quantize_absmax) \
  OP(dequantize_absmax) OP(quantize_int8) OP(dequantize_int8) OP(gather_kbit) OP(gather_int8) OP(sum_squares_multi) \
  OP(scale_multi)
#endif
// clang-format on
