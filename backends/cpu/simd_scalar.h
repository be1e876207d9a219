// One lane: the variant that runs everywhere, and the definition that the vector variants must match bit for bit.
#ifndef POLYBIT_CPU_SIMD_SCALAR_H
#define POLYBIT_CPU_SIMD_SCALAR_H

#include <stddef.h>
#include <stdint.h>

#include "math/float16.h"

namespace {
namespace simd {

constexpr int W = 1;
typedef float F;
typedef int32_t I;
typedef bool M;

struct Table16 {
  const float *values;
};
struct Table16i {
  const int32_t *values;
};

inline I as_int(F a) {
  I r;
  __builtin_memcpy(&r, &a, 4);
  return r;
}
inline F as_float(I a) {
  F r;
  __builtin_memcpy(&r, &a, 4);
  return r;
}

inline F zero() { return 0.0f; }
inline F set1(float a) { return a; }
inline I set1i(int32_t a) { return a; }

inline F load(const float *p) { return *p; }
inline void store(float *p, F a) { *p = a; }
// stream...: store past the caches. p is aligned to the vector stored, and a fence() follows the last one.
inline void stream(float *p, F a) { *p = a; }
inline void fence() {}
// The address need not be a multiple of 4: the words of a packed weight are read so.
inline I load_i(const int32_t *p) {
  I r;
  __builtin_memcpy(&r, p, 4);
  return r;
}
inline void store_i(int32_t *p, I a) { *p = a; }
inline I load_u8(const uint8_t *p) { return *p; }
inline I load_s8(const int8_t *p) { return *p; }
inline void store_u8(uint8_t *p, I a) { *p = (uint8_t)a; }
// Values up to 255; those below 0 become 0.
inline void store_u8x4(uint8_t *p, const I (&a)[4]) {
  for (int k = 0; k < 4; k++) store_u8(p + k * W, a[k] < 0 ? 0 : a[k]);
}
inline F load_bf16(const uint16_t *p) { return pb::bf16_to_float(*p); }
inline F load_f16(const uint16_t *p) { return pb::half_to_float(*p); }
inline void store_bf16(uint16_t *p, F a) { *p = pb::float_to_bf16(a); }
inline void store_f16(uint16_t *p, F a) { *p = pb::float_to_half(a); }

inline void stream_bf16(uint16_t *p, F a) { store_bf16(p, a); }
inline void stream_f16(uint16_t *p, F a) { store_f16(p, a); }

// The partial forms exist for generic code: with one lane, n is 0 or 1.
inline F load_n(const float *p, int n) { return n ? *p : 0.0f; }
inline I load_u8_n(const uint8_t *p, int n) { return n ? *p : 0; }
inline I load_s8_n(const int8_t *p, int n) { return n ? *p : 0; }
inline F load_bf16_n(const uint16_t *p, int n) { return n ? load_bf16(p) : 0.0f; }
inline F load_f16_n(const uint16_t *p, int n) { return n ? load_f16(p) : 0.0f; }
inline void store_n(float *p, F a, int n) {
  if (n) *p = a;
}
inline void store_u8_n(uint8_t *p, I a, int n) {
  if (n) store_u8(p, a);
}
inline void store_bf16_n(uint16_t *p, F a, int n) {
  if (n) store_bf16(p, a);
}
inline void store_f16_n(uint16_t *p, F a, int n) {
  if (n) store_f16(p, a);
}

inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F sqrt(F a) { return __builtin_sqrtf(a); }
inline F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
inline F abs_(F a) { return as_float(as_int(a) & 0x7fffffff); }
// Where one is NaN, b.
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
inline M gt(F a, F b) { return a > b; }
inline M ge(F a, F b) { return a >= b; }
inline M gti(I a, I b) { return a > b; }
inline F select(M m, F a, F b) { return m ? a : b; }
inline I selecti(M m, I a, I b) { return m ? a : b; }
inline unsigned bits(M m) { return m; }

inline I and_(I a, I b) { return a & b; }
inline I or_(I a, I b) { return a | b; }
inline I addi(I a, I b) { return (I)((uint32_t)a + (uint32_t)b); }
inline I subi(I a, I b) { return (I)((uint32_t)a - (uint32_t)b); }
inline I maxi(I a, I b) { return a > b ? a : b; }
inline I shr(I a, int n) { return (I)((uint32_t)a >> n); }
// Its sign becomes the lowest bit.
inline I rotate1(I a) { return (I)((uint32_t)a << 1 | (uint32_t)a >> 31); }
// -a where sign is negative, else a.
inline I negate_if(I sign, I a) { return sign < 0 ? subi(0, a) : a; }
inline I shrv(I a, I n) { return (I)((uint32_t)a >> n); }
// 2 * a + (m ? 1 : 0): one step down a heap-ordered search tree.
inline I descend(I a, M m) { return 2 * a + m; }

// Nearest, ties to even; the low byte of the result is 0 for NaN.
inline I cvt_rn(F a) { return (I)__builtin_lrintf(a); }
inline F to_float(I a) { return (F)a; }

struct Table8 {
  const float *values;
};
inline Table8 table8(const float *p) { return {p}; }
inline F lookup8(const Table8 &t, I i) { return t.values[i & 7]; }

inline Table16 table16(const float *p) { return {p}; }
inline Table16i table16i(const int32_t *p) { return {p}; }
inline F lookup16(const Table16 &t, I i) { return t.values[i & 15]; }
inline I lookup16i(const Table16i &t, I i) { return t.values[i & 15]; }
inline F gather(const float *p, I i) { return p[i]; }
// p[q[0]], p[q[1]], ...
inline F gather_u8(const float *p, const uint8_t *q) { return p[*q]; }

// W lanes of the sums of neighbours of (a, b): one level of a tree sum.
inline F hadd(F a, F b) { return a + b; }
// The tree sum of the lanes.
inline F reduce_add(F a) { return a; }
inline I reduce_maxi(I a) { return a; }

// W packed codes from element i on; i is a multiple of 8 in the vector variants.
template <int BITS>
inline I load_codes(const uint8_t *q, int64_t i) {
  if (BITS == 4) return q[i >> 1] >> (i & 1 ? 0 : 4) & 15;
  if (BITS == 2) return q[i >> 2] >> 2 * (i & 3) & 3;
  const int64_t bit = 3 * i;
  const int shift = (int)(bit & 7);
  const unsigned high = shift > 5 ? q[(bit >> 3) + 1] : 0u;
  return (I)((q[bit >> 3] | high << 8) >> shift & 7);
}

}  // namespace simd
}  // namespace
#endif
