// TODO: take the products that use these instructions.
#define PB_CPU_OPS(OP)
#define PB_CPU_VARIANT avx512_bf16
#include "table.inl"
