// What a kernel of core/kernels is written against, and what follows from it for every target; docs/simt.md has the
// rules. An adaptor (cuda_hip.h, metal.h, emulator.h) is included first, defines PB_ADAPTOR and supplies:
//
//   PB_FN                a device function, also as a static member
//   PB_GLOBAL PB_LOCAL   address spaces, and PB_PRIVATE, that of variables: every pointer names one
//   PB_SHARED(T, name)   declares memory of the group, in an entry point only; `name` is a PB_LOCAL T *
//   PB_UNROLL            stands before a loop; PB_NO_UNROLL before one that a compiler should leave alone
//   u8 u16 u32 i32 i64   as_float as_u32 (bit casts)
//   div_rn sqrt_rn       correctly rounded     fma_rn   one rounding     round_rn   to i32, ties to even, |x| < 2^31
//   U4 load16(PB_GLOBAL const u32 *)   store16(PB_GLOBAL u32 *, U4)   one access, 16-byte aligned;
//                                      for words of PB_LOCAL, too
//   U2 load8(PB_GLOBAL const u8 *)     store8(PB_GLOBAL u8 *, U2)     one access, 8-byte aligned
//   u32 load4(PB_GLOBAL const u8 *)    store4(PB_GLOBAL u8 *, u32)    one access, 4-byte aligned
//   PB_NARROWEST         optional: the lanes of the narrowest wave, 16 by default or 8
//   PB_ARGUMENT_BYTES    optional: what the arguments of a launch may take, 4096 by default
//   PB_INDEX_BY_CONSTANTS  optional: arguments are in registers, and only a constant can index them there
//   set_flag(PB_GLOBAL u8 *)           stores 1, whoever else may do so at the same time
//   float widen_half(u16)              optional, with PB_WIDEN_HALF: fp16 to fp32 where the bits of a NaN do not matter
//   i32 dot4(u32 a, u32 b, i32 c)      c + the sum of four products of signed bytes
//   Wave                 passed by value: tid() group() group_dim() lane() width() barrier() shuffle_xor(u32, u32)
//                        shuffle(u32, u32 source_lane)
//
// Shuffles need every lane of the wave, barrier every thread of the group: guard memory accesses, never return
// early. `thread kernel device constant half uint` are words of the Metal language and may not be names here.
//
// A kernel is a type, so that each target needs one entry point for all of them:
//
//   struct Kernel {
//     enum : u32 { group_max = 256 };                    // threads of a group at most
//     struct Args { PB_GLOBAL const float *x; i64 n; };  // fields of eight bytes: pointers, i64, arrays of them
//     struct Local { float sums[16]; };                  // the memory of the group: no more than 32 KiB
//     PB_FN void run(Wave w, PB_LOCAL Local *local, Args a);
//   };
#ifndef PB_SIMT_WAVE_H
#define PB_SIMT_WAVE_H

#ifndef PB_ADAPTOR
#error "include an adaptor of core/simt first"
#endif
#include "../math/float16.h"

#ifndef PB_NARROWEST
#define PB_NARROWEST 16
#endif
#ifndef PB_ARGUMENT_BYTES
#define PB_ARGUMENT_BYTES 4096
#endif

namespace pb {

// Elements of a tensor that are not fp32: their bits, told apart by type.
struct Bf16 {
  u16 bits;
};
struct Fp16 {
  u16 bits;
};

#ifndef PB_WIDEN_HALF
PB_FN float widen_half(u16 bits) { return half_to_float(bits); }
#endif

struct F8 {
  float v[8];
};

#ifndef PB_PACK16  // an adaptor may have instructions for it
// Two halves in a word, x in the lower bits, each rounded to the nearest.
PB_FN u32 pack_fp16(float x, float y) { return float_to_half(x) | (u32(float_to_half(y)) << 16); }
PB_FN u32 pack_bf16(float x, float y) { return float_to_bf16(x) | (u32(float_to_bf16(y)) << 16); }
#endif

// Of a kernel that needs no memory of the group.
struct NoLocal {
  u32 unused;
};

PB_FN float load1(PB_GLOBAL const float *p) { return *p; }
PB_FN float load1(PB_GLOBAL const Bf16 *p) { return bf16_to_float(p->bits); }
PB_FN float load1(PB_GLOBAL const Fp16 *p) { return half_to_float(p->bits); }

PB_FN void store1(PB_GLOBAL float *p, float x) { *p = x; }
PB_FN void store1(PB_GLOBAL Bf16 *p, float x) { p->bits = float_to_bf16(x); }
PB_FN void store1(PB_GLOBAL Fp16 *p, float x) { p->bits = float_to_half(x); }

// Eight neighbours, 16-byte aligned.
PB_FN F8 load8(PB_GLOBAL const float *p) {
  F8 r;
  PB_UNROLL
  for (u32 h = 0; h < 2; h++) {
    const U4 a = load16((PB_GLOBAL const u32 *)p + 4 * h);
    PB_UNROLL
    for (u32 k = 0; k < 4; k++) r.v[4 * h + k] = as_float(a.v[k]);
  }
  return r;
}
PB_FN F8 load8(PB_GLOBAL const Bf16 *p) {
  const U4 a = load16((PB_GLOBAL const u32 *)p);
  F8 r;
  PB_UNROLL
  for (u32 k = 0; k < 4; k++) {
    r.v[2 * k] = bf16_to_float(u16(a.v[k]));
    r.v[2 * k + 1] = bf16_to_float(u16(a.v[k] >> 16));
  }
  return r;
}
PB_FN F8 load8(PB_GLOBAL const Fp16 *p) {
  const U4 a = load16((PB_GLOBAL const u32 *)p);
  F8 r;
  PB_UNROLL
  for (u32 k = 0; k < 4; k++) {
    r.v[2 * k] = half_to_float(u16(a.v[k]));
    r.v[2 * k + 1] = half_to_float(u16(a.v[k] >> 16));
  }
  return r;
}

PB_FN void store8(PB_GLOBAL float *p, F8 x) {
  PB_UNROLL
  for (u32 h = 0; h < 2; h++) {
    U4 a;
    PB_UNROLL
    for (u32 k = 0; k < 4; k++) a.v[k] = as_u32(x.v[4 * h + k]);
    store16((PB_GLOBAL u32 *)p + 4 * h, a);
  }
}
PB_FN void store8(PB_GLOBAL Bf16 *p, F8 x) {
  U4 a;
  PB_UNROLL
  for (u32 k = 0; k < 4; k++) a.v[k] = float_to_bf16(x.v[2 * k]) | (u32(float_to_bf16(x.v[2 * k + 1])) << 16);
  store16((PB_GLOBAL u32 *)p, a);
}
PB_FN void store8(PB_GLOBAL Fp16 *p, F8 x) {
  U4 a;
  PB_UNROLL
  for (u32 k = 0; k < 4; k++) a.v[k] = float_to_half(x.v[2 * k]) | (u32(float_to_half(x.v[2 * k + 1])) << 16);
  store16((PB_GLOBAL u32 *)p, a);
}

// Elements first ... first + 7 of n, zeros behind the end. aligned: p to 16 bytes, first being a multiple of 8.
template <class T>
PB_FN F8 load_part(PB_GLOBAL const T *p, i64 first, i64 n, bool aligned) {
  if (aligned && first + 8 <= n) return load8(p + first);
  F8 r;
  PB_UNROLL
  for (u32 k = 0; k < 8; k++) r.v[k] = first + k < n ? load1(p + first + k) : 0.0f;
  return r;
}
template <class T>
PB_FN void store_part(PB_GLOBAL T *p, i64 first, i64 n, bool aligned, F8 x) {
  if (aligned && first + 8 <= n) {
    store8(p + first, x);
    return;
  }
  PB_UNROLL
  for (u32 k = 0; k < 8; k++)
    if (first + k < n) store1(p + first + k, x.v[k]);
}

PB_FN u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }
PB_FN u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }

}  // namespace pb
#endif
