// The adaptor for nvcc and for clang's HIP. A product and a sum are two roundings unless fma is written: compile with
// -fmad=false and -ffp-contract=off. HIP is reached through the compiler's own builtins and needs no ROCm header.
#ifndef PB_SIMT_CUDA_HIP_H
#define PB_SIMT_CUDA_HIP_H

#include <stdint.h>

#if defined(__HIP__) && !defined(__device__)
#define __host__ __attribute__((host))
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads) __attribute__((amdgpu_flat_work_group_size(1, threads)))
#endif

#define PB_ADAPTOR
#define PB_FN static __device__ __forceinline__
#define PB_GLOBAL
#define PB_LOCAL
#define PB_SHARED(T, name) \
  __shared__ T name##_; \
  T *name = &name##_
#define PB_UNROLL _Pragma("unroll")

namespace pb {
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef int64_t i64;

struct U4 {
  u32 v[4];
};

#ifdef __HIP__
PB_FN float as_float(u32 bits) { return __builtin_bit_cast(float, bits); }
PB_FN u32 as_u32(float x) { return __builtin_bit_cast(u32, x); }
PB_FN float div_rn(float a, float b) { return a / b; }  // clang's HIP rounds it correctly unless told not to

typedef u32 Words4 __attribute__((ext_vector_type(4), may_alias));
typedef u32 Word __attribute__((may_alias));
PB_FN U4 load16(const u32 *p) {
  const Words4 a = *(const Words4 *)p;
  return U4{{a.x, a.y, a.z, a.w}};
}
PB_FN void store4(u8 *p, u32 word) { *(Word *)p = word; }

struct Wave {
  __device__ u32 tid() const { return __builtin_amdgcn_workitem_id_x(); }
  __device__ u32 group() const { return __builtin_amdgcn_workgroup_id_x(); }
  __device__ u32 group_dim() const { return __builtin_amdgcn_workgroup_size_x(); }
  __device__ u32 lane() const { return tid() % width(); }
#if __has_builtin(__builtin_amdgcn_wavefrontsize)  // 64 on CDNA, 32 on RDNA
  __device__ u32 width() const { return __builtin_amdgcn_wavefrontsize(); }
#else  // older than clang 18
  __device__ u32 width() const { return __AMDGCN_WAVEFRONT_SIZE; }
#endif
  __device__ void barrier() const {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
  }
  __device__ u32 shuffle_xor(u32 value, u32 mask) const {
    return u32(__builtin_amdgcn_ds_bpermute(int((lane() ^ mask) * 4u), int(value)));  // addressed in bytes
  }
};
#else
PB_FN float as_float(u32 bits) { return __uint_as_float(bits); }
PB_FN u32 as_u32(float x) { return __float_as_uint(x); }
PB_FN float div_rn(float a, float b) { return __fdiv_rn(a, b); }  // also under -prec-div=false

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
#endif
}  // namespace pb

#include "wave.h"
#endif
