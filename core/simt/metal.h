// The adaptor for the Metal Shading Language. Compile with -fno-fast-math (or MTLMathModeSafe); the pragmas say it to
// a compiler whose options are not ours (MSL specification, "Math Intrinsics Compiler Options").
#ifndef PB_SIMT_METAL_H
#define PB_SIMT_METAL_H

#include <metal_stdlib>
#ifdef __METAL_VERSION__
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#endif
#pragma clang fp contract(off)

#define PB_ADAPTOR
#define PB_FN static inline
#define PB_GLOBAL device
#define PB_LOCAL threadgroup
#define PB_PRIVATE thread
#ifndef PB_SHARED  // the type check has its own: standard C++ knows no automatic variable in an address space
#define PB_SHARED(T, name) \
  threadgroup T name##_; \
  threadgroup T *name = &name##_
#endif
#define PB_UNROLL _Pragma("unroll")
#define PB_NO_UNROLL
#define PB_SIMDGROUP_MATRIX
#ifndef PB_ARGUMENTS  // the type check has its own: standard C++ copies no structure between address spaces
#define PB_ARGUMENTS(T, name) constant T &name
#endif

namespace pb {
typedef uchar u8;
typedef ushort u16;
typedef uint u32;
typedef int i32;
typedef long i64;

PB_FN float as_float(u32 bits) { return metal::as_type<float>(bits); }
PB_FN u32 as_u32(float x) { return metal::as_type<u32>(x); }
PB_FN float div_rn(float a, float b) { return a / b; }
PB_FN float sqrt_rn(float a) { return metal::precise::sqrt(a); }
PB_FN float fma_rn(float a, float b, float c) { return metal::fma(a, b, c); }
PB_FN i32 round_rn(float x) { return i32(metal::rint(x)); }

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
PB_FN void store16(device u32 *p, U4 a) { *(device uint4 *)p = uint4{a.v[0], a.v[1], a.v[2], a.v[3]}; }
struct U2 {
  u32 v[2];
};
PB_FN U2 load8(device const u8 *p) {
  const uint2 a = *(device const uint2 *)p;
  U2 r;
  r.v[0] = a.x;
  r.v[1] = a.y;
  return r;
}
PB_FN void store8(device u8 *p, U2 a) { *(device uint2 *)p = uint2{a.v[0], a.v[1]}; }
PB_FN U4 load16(threadgroup const u32 *p) {
  const uint4 a = *(threadgroup const uint4 *)p;
  U4 r;
  r.v[0] = a.x;
  r.v[1] = a.y;
  r.v[2] = a.z;
  r.v[3] = a.w;
  return r;
}
PB_FN void store16(threadgroup u32 *p, U4 a) { *(threadgroup uint4 *)p = uint4{a.v[0], a.v[1], a.v[2], a.v[3]}; }
PB_FN u32 load4(device const u8 *p) { return *(device const u32 *)p; }
PB_FN void store4(device u8 *p, u32 word) { *(device u32 *)p = word; }
PB_FN void set_flag(device u8 *p) { *p = 1; }
PB_FN i32 dot4(u32 a, u32 b, i32 c) {
  PB_UNROLL
  for (u32 k = 0; k < 32; k += 8) c += (i32(a << (24u - k)) >> 24) * (i32(b << (24u - k)) >> 24);
  return c;
}

struct Wave {  // a kernel gets the ids as parameters: carry them
  u32 tid_, group_, group_dim_, lane_;
  u32 tid() const { return tid_; }
  u32 group() const { return group_; }
  u32 group_dim() const { return group_dim_; }
  u32 lane() const { return lane_; }
  u32 width() const { return 32u; }
  void barrier() const { metal::threadgroup_barrier(metal::mem_flags::mem_device | metal::mem_flags::mem_threadgroup); }
  u32 shuffle(u32 value, u32 source) const { return metal::simd_shuffle(value, u16(source)); }
  u32 shuffle_xor(u32 value, u32 mask) const { return metal::simd_shuffle_xor(value, u16(mask)); }
};
}  // namespace pb

// An entry point of a kernel, its arguments in one buffer.
#define PB_METAL_ENTRY(name, ...) \
  typedef __VA_ARGS__ name##_kernel; \
  [[max_total_threads_per_threadgroup(name##_kernel::group_max)]] kernel void name( \
      PB_ARGUMENTS(name##_kernel::Args, args) [[buffer(0)]], uint tid [[thread_position_in_threadgroup]], \
      uint group [[threadgroup_position_in_grid]], uint group_dim [[threads_per_threadgroup]], \
      uint lane [[thread_index_in_simdgroup]]) { \
    PB_SHARED(name##_kernel::Local, local); \
    name##_kernel::run(pb::Wave{tid, group, group_dim, lane}, local, args); \
  }

#include "wave.h"
#endif
