// The adaptor for nvcc. Compile with -fmad=false: a product and a sum are two roundings unless fma is written.
#ifndef PB_SIMT_CUDA_HIP_H
#define PB_SIMT_CUDA_HIP_H

#include <stdint.h>

#define PB_ADAPTOR
#define PB_FN static __device__ __forceinline__
#define PB_GLOBAL
#define PB_LOCAL
#define PB_SHARED(T, name) \
  __shared__ T name##_;    \
  T *name = &name##_
#define PB_UNROLL _Pragma("unroll")

namespace pb {
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef int64_t i64;

PB_FN float as_float(u32 bits) { return __uint_as_float(bits); }
PB_FN u32 as_u32(float x) { return __float_as_uint(x); }
PB_FN float div_rn(float a, float b) { return __fdiv_rn(a, b); }  // also under -prec-div=false

struct U4 {
  u32 v[4];
};
PB_FN U4 load16(const u32 *p) {
  const uint4 a = *(const uint4 *)p;
  return U4{{a.x, a.y, a.z, a.w}};
}
PB_FN void store4(u8 *p, u32 word) { *(u32 *)p = word; }

struct Wave {
  __device__ u32 tid() const { return threadIdx.x; }
  __device__ u32 group() const { return blockIdx.x; }
  __device__ u32 group_dim() const { return blockDim.x; }
  __device__ u32 lane() const { return threadIdx.x % 32u; }
  __device__ u32 width() const { return 32u; }
  __device__ void barrier() const { __syncthreads(); }
  __device__ u32 shuffle_xor(u32 value, u32 mask) const { return __shfl_xor_sync(0xffffffffu, value, int(mask)); }
};
}  // namespace pb

#include "wave.h"
#endif
