// Four lanes: the NEON of every 64-bit ARM. simd_scalar.h says what each function means.
#ifndef POLYBIT_CPU_SIMD_NEON_H
#define POLYBIT_CPU_SIMD_NEON_H

#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>

namespace {
namespace simd {

constexpr int W = 4;
typedef float32x4_t F;
typedef int32x4_t I;
typedef uint32x4_t M;

struct Table16 {
  uint8x16x4_t bytes;
};
struct Table16i {
  uint8x16x4_t bytes;
};
struct Table8 {
  uint8x16x2_t bytes;
};

inline I as_int(F a) { return vreinterpretq_s32_f32(a); }
inline F as_float(I a) { return vreinterpretq_f32_s32(a); }
inline uint32x4_t as_unsigned(I a) { return vreinterpretq_u32_s32(a); }
inline I as_signed(uint32x4_t a) { return vreinterpretq_s32_u32(a); }

inline F zero() { return vdupq_n_f32(0.0f); }
inline F set1(float a) { return vdupq_n_f32(a); }
inline I set1i(int32_t a) { return vdupq_n_s32(a); }

inline F load(const float *p) { return vld1q_f32(p); }
inline void store(float *p, F a) { vst1q_f32(p, a); }
inline I load_i(const int32_t *p) { return vld1q_s32(p); }
inline void store_i(int32_t *p, I a) { vst1q_s32(p, a); }

// The four bytes of p, in the low half of a register.
inline uint8x8_t load_bytes(const void *p) {
  uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return vreinterpret_u8_u32(vdup_n_u32(word));
}
inline I load_u8(const uint8_t *p) { return as_signed(vmovl_u16(vget_low_u16(vmovl_u8(load_bytes(p))))); }
inline I load_s8(const int8_t *p) { return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_bytes(p))))); }
inline void store_u8(uint8_t *p, I a) {
  const uint16x4_t halves = vmovn_u32(as_unsigned(a));
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(halves, halves));
  const uint32_t word = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
  __builtin_memcpy(p, &word, 4);
}
inline void store_u8x4(uint8_t *p, const I (&a)[4]) {
  const uint16x8_t b = vcombine_u16(vqmovun_s32(a[0]), vqmovun_s32(a[1]));
  const uint16x8_t c = vcombine_u16(vqmovun_s32(a[2]), vqmovun_s32(a[3]));
  vst1q_u8(p, vcombine_u8(vqmovn_u16(b), vqmovn_u16(c)));
}

inline F load_bf16(const uint16_t *p) { return as_float(as_signed(vshll_n_u16(vld1_u16(p), 16))); }
inline F load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void store_bf16(uint16_t *p, F a) {
  const uint32x4_t x = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
  const uint32x4_t r = vaddq_u32(x, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(x, vdupq_n_u32(0x400000));
  vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), r, quiet), 16));
}
inline void store_f16(uint16_t *p, F a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }

inline void stream(float *p, F a) { store(p, a); }
inline void stream_bf16(uint16_t *p, F a) { store_bf16(p, a); }
inline void stream_f16(uint16_t *p, F a) { store_f16(p, a); }
inline void fence() {}

// There are no masked accesses: a partial one goes through a buffer.
template <class T>
inline void copy_n(T *to, const T *from, int n) {
  for (int i = 0; i < n; i++) to[i] = from[i];
}
inline F load_n(const float *p, int n) {
  float b[W] = {};
  copy_n(b, p, n);
  return load(b);
}
inline I load_u8_n(const uint8_t *p, int n) {
  uint8_t b[W] = {};
  copy_n(b, p, n);
  return load_u8(b);
}
inline I load_s8_n(const int8_t *p, int n) {
  int8_t b[W] = {};
  copy_n(b, p, n);
  return load_s8(b);
}
inline F load_bf16_n(const uint16_t *p, int n) {
  uint16_t b[W] = {};
  copy_n(b, p, n);
  return load_bf16(b);
}
inline F load_f16_n(const uint16_t *p, int n) {
  uint16_t b[W] = {};
  copy_n(b, p, n);
  return load_f16(b);
}
inline void store_n(float *p, F a, int n) {
  float b[W];
  store(b, a);
  copy_n(p, b, n);
}
inline void store_u8_n(uint8_t *p, I a, int n) {
  uint8_t b[W];
  store_u8(b, a);
  copy_n(p, b, n);
}
inline void store_bf16_n(uint16_t *p, F a, int n) {
  uint16_t b[W];
  store_bf16(b, a);
  copy_n(p, b, n);
}
inline void store_f16_n(uint16_t *p, F a, int n) {
  uint16_t b[W];
  store_f16(b, a);
  copy_n(p, b, n);
}

inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F sub(F a, F b) { return vsubq_f32(a, b); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F div(F a, F b) { return vdivq_f32(a, b); }
inline F sqrt(F a) { return vsqrtq_f32(a); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F abs_(F a) { return vabsq_f32(a); }
inline M gt(F a, F b) { return vcgtq_f32(a, b); }
inline M ge(F a, F b) { return vcgeq_f32(a, b); }
inline M gti(I a, I b) { return vcgtq_s32(a, b); }
inline F select(M m, F a, F b) { return vbslq_f32(m, a, b); }
inline I selecti(M m, I a, I b) { return vbslq_s32(m, a, b); }
// fmax and fmin would give a NaN where one is NaN.
inline F max(F a, F b) { return select(gt(a, b), a, b); }
inline F min(F a, F b) { return select(gt(b, a), a, b); }
inline unsigned bits(M m) {
  const uint32x4_t weight = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(m, weight));
}

inline I and_(I a, I b) { return vandq_s32(a, b); }
inline I or_(I a, I b) { return vorrq_s32(a, b); }
inline I addi(I a, I b) { return vaddq_s32(a, b); }
inline I subi(I a, I b) { return vsubq_s32(a, b); }
inline I maxi(I a, I b) { return vmaxq_s32(a, b); }
inline I rotate1(I a) {
  const uint32x4_t u = as_unsigned(a);
  return as_signed(vsliq_n_u32(vshrq_n_u32(u, 31), u, 1));
}
inline I negate_if(I sign, I a) { return vbslq_s32(vcltzq_s32(sign), vnegq_s32(a), a); }
inline I shrv(I a, I n) { return as_signed(vshlq_u32(as_unsigned(a), vnegq_s32(n))); }
inline I shr(I a, int n) { return shrv(a, vdupq_n_s32(n)); }
inline I descend(I a, M m) { return vsubq_s32(vaddq_s32(a, a), as_signed(m)); }
inline I cvt_rn(F a) { return vcvtnq_s32_f32(a); }
inline F to_float(I a) { return vcvtq_f32_s32(a); }

inline uint8x16x4_t table_bytes(const void *p) {
  const uint8_t *from = (const uint8_t *)p;
  return {{vld1q_u8(from), vld1q_u8(from + 16), vld1q_u8(from + 32), vld1q_u8(from + 48)}};
}
inline Table16 table16(const float *p) { return {table_bytes(p)}; }
inline Table16i table16i(const int32_t *p) { return {table_bytes(p)}; }
// Entry i of a table is its bytes 4i ... 4i + 3.
inline uint8x16_t bytes_of_entry(I i) {
  return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100), as_unsigned(i), 0x04040404));
}
inline uint8x16_t lookup_bytes(const uint8x16x4_t &table, I i) {
  return vqtbl4q_u8(table, bytes_of_entry(and_(i, set1i(15))));
}
inline F lookup16(const Table16 &t, I i) { return vreinterpretq_f32_u8(lookup_bytes(t.bytes, i)); }
inline I lookup16i(const Table16i &t, I i) { return vreinterpretq_s32_u8(lookup_bytes(t.bytes, i)); }
inline Table8 table8(const float *p) {
  const uint8_t *from = (const uint8_t *)p;
  return {{{vld1q_u8(from), vld1q_u8(from + 16)}}};
}
inline F lookup8(const Table8 &t, I i) {
  return vreinterpretq_f32_u8(vqtbl2q_u8(t.bytes, bytes_of_entry(and_(i, set1i(7)))));
}
inline F gather(const float *p, I i) {
  const F r = {p[vgetq_lane_s32(i, 0)], p[vgetq_lane_s32(i, 1)], p[vgetq_lane_s32(i, 2)], p[vgetq_lane_s32(i, 3)]};
  return r;
}
inline F gather_u8(const float *p, const uint8_t *q) {
  const F r = {p[q[0]], p[q[1]], p[q[2]], p[q[3]]};
  return r;
}

inline F hadd(F a, F b) { return vpaddq_f32(a, b); }
inline float reduce_add(F a) {
  a = vpaddq_f32(a, a);
  return vpadds_f32(vget_low_f32(a));
}
inline int32_t reduce_maxi(I a) { return vmaxvq_s32(a); }

// i is a multiple of 4: the codes lie in BITS * 4 bits from a nibble on.
template <int BITS>
inline I load_codes(const uint8_t *q, int64_t i) {
  const uint8_t *from = q + i * BITS / 8;
  uint16_t word = *from;
  if (BITS > 2) __builtin_memcpy(&word, from, 2);
  const I four = {4, 0, 12, 8}, three = {0, 3, 6, 9}, two = {0, 2, 4, 6};
  const int32_t whole = BITS == 3 ? word >> (i & 4) : word;
  return and_(shrv(set1i(whole), BITS == 4 ? four : BITS == 3 ? three : two), set1i((1 << BITS) - 1));
}

}  // namespace simd
}  // namespace
#endif
