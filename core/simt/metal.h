// The adaptor for the Metal Shading Language. Compile with -fno-fast-math (or MTLMathModeSafe).
#ifndef PB_SIMT_METAL_H
#define PB_SIMT_METAL_H

#include <metal_stdlib>
#pragma clang fp contract(off)

#define PB_ADAPTOR
#define PB_FN static inline
#define PB_GLOBAL device
#define PB_LOCAL threadgroup
#ifndef PB_SHARED  // the type check has its own: standard C++ knows no automatic variable in an address space
#define PB_SHARED(T, name) \
  threadgroup T name##_; \
  threadgroup T *name = &name##_
#endif
#define PB_UNROLL _Pragma("unroll")

namespace pb {
typedef uchar u8;
typedef ushort u16;
typedef uint u32;
typedef long i64;

PB_FN float as_float(u32 bits) { return metal::as_type<float>(bits); }
PB_FN u32 as_u32(float x) { return metal::as_type<u32>(x); }
PB_FN float div_rn(float a, float b) { return a / b; }

struct U4 {
  u32 v[4];
};
PB_FN U4 load16(device const u32 *p) {
  const uint4 a = *(device const uint4 *)p;
  U4 r;
  r.v[0] = a.x;
  r.v[1] = a.y;
  r.v[2] = a.z;
  r.v[3] = a.w;
  return r;
}
PB_FN void store4(device u8 *p, u32 word) { *(device u32 *)p = word; }

struct Wave {  // a kernel gets the ids as parameters: carry them
  u32 tid_, group_, group_dim_, lane_;
  u32 tid() const { return tid_; }
  u32 group() const { return group_; }
  u32 group_dim() const { return group_dim_; }
  u32 lane() const { return lane_; }
  u32 width() const { return 32u; }
  void barrier() const { metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup); }
  u32 shuffle_xor(u32 value, u32 mask) const { return metal::simd_shuffle_xor(value, u16(mask)); }
};
}  // namespace pb

#include "wave.h"
#endif
