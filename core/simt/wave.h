// What a kernel of core/kernels is written against, and what follows from it for every target; docs/simt.md has the
// rules. An adaptor (cuda_hip.h, metal.h, emulator.h) is included first, defines PB_ADAPTOR and supplies:
//
//   PB_FN                a device function
//   PB_GLOBAL PB_LOCAL   address spaces: every pointer that is not to a private variable names one
//   PB_SHARED(T, name)   declares memory of the group, in an entry point only; `name` is a PB_LOCAL T *
//   PB_UNROLL            stands before a loop
//   u8 u16 u32 i64       as_float as_u32 (bit casts)   div_rn (correctly rounded)
//   U4 load16(PB_GLOBAL const u32 *)   one 16-byte access, 16-byte aligned
//   store4(PB_GLOBAL u8 *, u32)        one 4-byte access, 4-byte aligned
//   Wave                 passed by value: tid() group() group_dim() lane() width() barrier() shuffle_xor(u32, u32)
//
// shuffle_xor needs every lane of the wave, barrier every thread of the group: guard memory accesses, never return
// early. `thread kernel device constant half uint` are words of the Metal language and may not be names here.
#ifndef PB_SIMT_WAVE_H
#define PB_SIMT_WAVE_H

#ifndef PB_ADAPTOR
#error "include an adaptor of core/simt first"
#endif
#include "../math/float16.h"

namespace pb {

// Elements of a tensor that are not fp32: their bits, told apart by type.
struct Bf16 {
  u16 bits;
};
struct Fp16 {
  u16 bits;
};

struct F8 {
  float v[8];
};

PB_FN float load1(PB_GLOBAL const float *p) { return *p; }
PB_FN float load1(PB_GLOBAL const Bf16 *p) { return bf16_to_float(p->bits); }
PB_FN float load1(PB_GLOBAL const Fp16 *p) { return half_to_float(p->bits); }

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

PB_FN u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }

// The maximum over each aligned run of `lanes` lanes, a power of two up to the width, in every lane of the run.
PB_FN u32 lanes_max(Wave w, u32 value, u32 lanes) {
  for (u32 mask = 1; mask < lanes; mask <<= 1) value = max_u32(value, w.shuffle_xor(value, mask));
  return value;
}

}  // namespace pb
#endif
