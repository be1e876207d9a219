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
#endif

// Of an entry point. One group per multiprocessor is enough: with no such bound ptxas spills for the sake of occupancy.
#ifdef __HIP__
#define PB_GROUP_MAX(threads) __attribute__((amdgpu_flat_work_group_size(1, threads)))
#else
#define PB_GROUP_MAX(threads) __launch_bounds__(threads, 1)
#endif

#define PB_ADAPTOR
#define PB_FN static __device__ __forceinline__
#define PB_CONSTEXPR static constexpr __host__ __device__
#define PB_GLOBAL
#define PB_LOCAL
#define PB_PRIVATE
#define PB_SHARED(T, name) \
  __shared__ T name##_; \
  T *name = &name##_
#define PB_UNROLL _Pragma("unroll")
#ifdef __HIP__
#define PB_NO_UNROLL _Pragma("unroll 1")  // else clang holds several rounds of loads in registers, and spills on RDNA
#else
#define PB_NO_UNROLL
#endif

namespace pb {
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef int32_t i32;
typedef int64_t i64;

struct U2 {
  u32 v[2];
};
struct U4 {
  u32 v[4];
};

#define PB_WIDEN_HALF
#ifdef __HIP__
PB_FN float widen_half(u16 bits) { return float(__builtin_bit_cast(_Float16, bits)); }
PB_FN float as_float(u32 bits) { return __builtin_bit_cast(float, bits); }
PB_FN u32 as_u32(float x) { return __builtin_bit_cast(u32, x); }
PB_FN float div_rn(float a, float b) { return a / b; }  // clang's HIP rounds both correctly unless told not to
PB_FN float sqrt_rn(float a) { return __builtin_sqrtf(a); }
PB_FN float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
PB_FN i32 round_rn(float x) { return i32(__builtin_rintf(x)); }

typedef u32 Words4 __attribute__((ext_vector_type(4), may_alias));
typedef u32 Words2 __attribute__((ext_vector_type(2), may_alias));
typedef u32 Word __attribute__((may_alias));
PB_FN U4 load16(const u32 *p) {
  const Words4 a = *(const Words4 *)p;
  return U4{{a.x, a.y, a.z, a.w}};
}
PB_FN void store16(u32 *p, U4 a) { *(Words4 *)p = Words4{a.v[0], a.v[1], a.v[2], a.v[3]}; }
PB_FN U2 load8(const u8 *p) {
  const Words2 a = *(const Words2 *)p;
  return U2{{a.x, a.y}};
}
PB_FN void store8(u8 *p, U2 a) { *(Words2 *)p = Words2{a.v[0], a.v[1]}; }
PB_FN u32 load4(const u8 *p) { return *(const Word *)p; }
PB_FN void store4(u8 *p, u32 word) { *(Word *)p = word; }
PB_FN i32 dot4(u32 a, u32 b, i32 c) {
#if defined(__GFX11__) || defined(__GFX12__)
  return __builtin_amdgcn_sudot4(true, i32(a), true, i32(b), c, false);
#else
  return __builtin_amdgcn_sdot4(i32(a), i32(b), c, false);
#endif
}

struct Wave {
  __device__ u32 tid() const { return __builtin_amdgcn_workitem_id_x(); }
  __device__ u32 group() const { return __builtin_amdgcn_workgroup_id_x(); }
  __device__ u32 group_dim() const { return __builtin_amdgcn_workgroup_size_x(); }
  __device__ u32 lane() const { return tid() % width(); }
#if __clang_major__ >= 18  // 64 on CDNA, 32 on RDNA
  __device__ u32 width() const { return __builtin_amdgcn_wavefrontsize(); }
#else
  __device__ u32 width() const { return __AMDGCN_WAVEFRONT_SIZE; }
#endif
  __device__ void barrier() const {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
  }
  __device__ u32 shuffle_xor(u32 value, u32 mask) const { return shuffle(value, lane() ^ mask); }
  __device__ u32 shuffle(u32 value, u32 source) const {
    return u32(__builtin_amdgcn_ds_bpermute(int(source * 4u), int(value)));  // addressed in bytes
  }
};
#else
PB_FN float widen_half(u16 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
PB_FN float as_float(u32 bits) { return __uint_as_float(bits); }
PB_FN u32 as_u32(float x) { return __float_as_uint(x); }
PB_FN float div_rn(float a, float b) { return __fdiv_rn(a, b); }  // also under -prec-div=false
PB_FN float sqrt_rn(float a) { return __fsqrt_rn(a); }
PB_FN float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PB_FN i32 round_rn(float x) { return __float2int_rn(x); }

PB_FN U4 load16(const u32 *p) {
  const uint4 a = *(const uint4 *)p;
  return U4{{a.x, a.y, a.z, a.w}};
}
PB_FN void store16(u32 *p, U4 a) { *(uint4 *)p = make_uint4(a.v[0], a.v[1], a.v[2], a.v[3]); }
PB_FN U2 load8(const u8 *p) {
  const uint2 a = *(const uint2 *)p;
  return U2{{a.x, a.y}};
}
PB_FN void store8(u8 *p, U2 a) { *(uint2 *)p = make_uint2(a.v[0], a.v[1]); }
PB_FN u32 load4(const u8 *p) { return *(const u32 *)p; }
PB_FN void store4(u8 *p, u32 word) { *(u32 *)p = word; }
PB_FN i32 dot4(u32 a, u32 b, i32 c) { return __dp4a(i32(a), i32(b), c); }

struct Wave {
  __device__ u32 tid() const { return threadIdx.x; }
  __device__ u32 group() const { return blockIdx.x; }
  __device__ u32 group_dim() const { return blockDim.x; }
  __device__ u32 lane() const { return threadIdx.x % 32u; }
  __device__ u32 width() const { return 32u; }
  __device__ void barrier() const { __syncthreads(); }
  __device__ u32 shuffle_xor(u32 value, u32 mask) const { return __shfl_xor_sync(0xffffffffu, value, int(mask)); }
  __device__ u32 shuffle(u32 value, u32 source) const { return __shfl_sync(0xffffffffu, value, int(source)); }
};
#endif

#define PB_PACK16
PB_FN u16 float_to_bf16(float x);
PB_FN u32 pack_fp16(float x, float y) {
#ifdef __HIP__
  const _Float16 pair[2] = {_Float16(x), _Float16(y)};
  return __builtin_bit_cast(u32, pair);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  return pair;
#else
  u16 low, high;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(low) : "f"(x));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(high) : "f"(y));
  return low | (u32(high) << 16);
#endif
}
PB_FN u32 pack_bf16(float x, float y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  return pair;
#else
  return float_to_bf16(x) | (u32(float_to_bf16(y)) << 16);
#endif
}
PB_FN void set_flag(u8 *p) { *(volatile u8 *)p = 1; }

// The one entry point; a launch of the kernel K is a launch of entry<K>.
template <class K>
__global__ void PB_GROUP_MAX(K::group_max) entry(typename K::Args args) {
  PB_SHARED(typename K::Local, local);
  K::run(Wave(), local, args);
}
}  // namespace pb

#include "wave.h"
#endif
