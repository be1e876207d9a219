// Eight lanes: AVX2, FMA and F16C. simd_scalar.h says what each function means.
#ifndef POLYBIT_CPU_SIMD_AVX2_H
#define POLYBIT_CPU_SIMD_AVX2_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

namespace {
namespace simd {

constexpr int W = 8;
typedef __m256 F;
typedef __m256i I;
typedef __m256 M;

struct Table16 {
  __m256 low, high;
};
struct Table16i {
  __m256i low, high;
};

inline I as_int(F a) { return _mm256_castps_si256(a); }
inline F as_float(I a) { return _mm256_castsi256_ps(a); }
inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float a) { return _mm256_set1_ps(a); }
inline I set1i(int32_t a) { return _mm256_set1_epi32(a); }
inline I lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline I first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes()); }

inline F load(const float *p) { return _mm256_loadu_ps(p); }
inline void store(float *p, F a) { _mm256_storeu_ps(p, a); }
inline void stream(float *p, F a) { _mm256_stream_ps(p, a); }
inline void fence() { _mm_sfence(); }
inline F load_n(const float *p, int n) { return _mm256_maskload_ps(p, first(n)); }
inline void store_n(float *p, F a, int n) { _mm256_maskstore_ps(p, first(n), a); }
inline I load_i(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
inline void store_i(int32_t *p, I a) { _mm256_storeu_si256((__m256i *)p, a); }

inline I load_u8(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
inline I load_s8(const int8_t *p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
inline __m128i low_bytes(I a) {
  const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                        0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8(a, pick);
  return _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
}
inline void store_u8(uint8_t *p, I a) { _mm_storel_epi64((__m128i *)p, low_bytes(a)); }
inline void store_u8x4(uint8_t *p, const I (&a)[4]) {
  const I b = _mm256_packus_epi32(a[0], a[1]), c = _mm256_packus_epi32(a[2], a[3]);
  const I halves = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packus takes them by turns
  _mm256_storeu_si256((I *)p, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(b, c), halves));
}

inline F load_bf16(const uint16_t *p) {
  return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
inline F load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
inline __m128i narrow_bf16(F a) {
  const I x = as_int(a);
  const I odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  I r = _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const I nan = as_int(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const I quiet = _mm256_or_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(0x40));
  r = _mm256_blendv_epi8(r, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
inline __m128i narrow_f16(F a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
inline void store_bf16(uint16_t *p, F a) { _mm_storeu_si128((__m128i *)p, narrow_bf16(a)); }
inline void stream_bf16(uint16_t *p, F a) { _mm_stream_si128((__m128i *)p, narrow_bf16(a)); }
inline void stream_f16(uint16_t *p, F a) { _mm_stream_si128((__m128i *)p, narrow_f16(a)); }
inline void store_f16(uint16_t *p, F a) { _mm_storeu_si128((__m128i *)p, narrow_f16(a)); }

// A partial access of a narrow type goes through a buffer: AVX2 masks only 32- and 64-bit elements.
template <class T>
inline void copy_n(T *to, const T *from, int n) {
  for (int i = 0; i < n; i++) to[i] = from[i];
}
inline I load_u8_n(const uint8_t *p, int n) {
  uint8_t b[8] = {};
  copy_n(b, p, n);
  return load_u8(b);
}
inline I load_s8_n(const int8_t *p, int n) {
  int8_t b[8] = {};
  copy_n(b, p, n);
  return load_s8(b);
}
inline F load_bf16_n(const uint16_t *p, int n) {
  uint16_t b[8] = {};
  copy_n(b, p, n);
  return load_bf16(b);
}
inline F load_f16_n(const uint16_t *p, int n) {
  uint16_t b[8] = {};
  copy_n(b, p, n);
  return load_f16(b);
}
inline void store_u8_n(uint8_t *p, I a, int n) {
  uint8_t b[8];
  store_u8(b, a);
  copy_n(p, b, n);
}
inline void store_bf16_n(uint16_t *p, F a, int n) {
  uint16_t b[8];
  store_bf16(b, a);
  copy_n(p, b, n);
}
inline void store_f16_n(uint16_t *p, F a, int n) {
  uint16_t b[8];
  store_f16(b, a);
  copy_n(p, b, n);
}

inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F sqrt(F a) { return _mm256_sqrt_ps(a); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F abs_(F a) { return _mm256_and_ps(a, as_float(set1i(0x7fffffff))); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline M gt(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
inline M ge(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
inline M gti(I a, I b) { return as_float(_mm256_cmpgt_epi32(a, b)); }
inline F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
inline I selecti(M m, I a, I b) { return as_int(select(m, as_float(a), as_float(b))); }
inline unsigned bits(M m) { return (unsigned)_mm256_movemask_ps(m); }

inline I and_(I a, I b) { return _mm256_and_si256(a, b); }
inline I or_(I a, I b) { return _mm256_or_si256(a, b); }
inline I addi(I a, I b) { return _mm256_add_epi32(a, b); }
inline I subi(I a, I b) { return _mm256_sub_epi32(a, b); }
inline I maxi(I a, I b) { return _mm256_max_epi32(a, b); }
inline I shr(I a, int n) { return _mm256_srli_epi32(a, n); }
inline I rotate1(I a) { return _mm256_sub_epi32(_mm256_add_epi32(a, a), _mm256_srai_epi32(a, 31)); }
inline I negate_if(I sign, I a) {
  const I minus = _mm256_srai_epi32(sign, 31);
  return _mm256_sub_epi32(_mm256_xor_si256(a, minus), minus);
}
inline I shrv(I a, I n) { return _mm256_srlv_epi32(a, n); }
inline I descend(I a, M m) { return _mm256_sub_epi32(_mm256_add_epi32(a, a), as_int(m)); }
inline I cvt_rn(F a) { return _mm256_cvtps_epi32(a); }
inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }

struct Table8 {
  __m256 values;
};
inline Table8 table8(const float *p) { return {load(p)}; }
inline F lookup8(const Table8 &t, I i) { return _mm256_permutevar8x32_ps(t.values, i); }

inline Table16 table16(const float *p) { return {load(p), load(p + 8)}; }
inline Table16i table16i(const int32_t *p) { return {load_i(p), load_i(p + 8)}; }
inline F lookup16(const Table16 &t, I i) {
  const F low = _mm256_permutevar8x32_ps(t.low, i), high = _mm256_permutevar8x32_ps(t.high, i);
  return _mm256_blendv_ps(low, high, as_float(_mm256_slli_epi32(i, 28)));
}
inline I lookup16i(const Table16i &t, I i) { return as_int(lookup16(Table16{as_float(t.low), as_float(t.high)}, i)); }
inline F gather(const float *p, I i) { return _mm256_i32gather_ps(p, i, 4); }
// Loads one by one: faster than a gather where the indices lie in memory.
inline F gather_u8(const float *p, const uint8_t *q) {
  uint32_t low, high;
  __builtin_memcpy(&low, q, 4);
  __builtin_memcpy(&high, q + 4, 4);
  const auto at = [p](uint32_t i) { return _mm256_broadcast_ss(p + (i & 255)); };
  const F a = _mm256_blend_ps(at(low), at(low >> 8), 0x02), b = _mm256_blend_ps(at(low >> 16), at(low >> 24), 0x08);
  const F c = _mm256_blend_ps(at(high), at(high >> 8), 0x20), d = _mm256_blend_ps(at(high >> 16), at(high >> 24), 0x80);
  return _mm256_blend_ps(_mm256_blend_ps(a, b, 0x0c), _mm256_blend_ps(c, d, 0xc0), 0xf0);
}

inline F hadd(F a, F b) {
  const F even = _mm256_shuffle_ps(a, b, 0x88), odd = _mm256_shuffle_ps(a, b, 0xdd);
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_add_ps(even, odd)), 0xd8));
}
inline float reduce_add(F a) {
  a = _mm256_add_ps(a, _mm256_permute_ps(a, 0xb1));
  a = _mm256_add_ps(a, _mm256_permute_ps(a, 0x4e));
  return _mm_cvtss_f32(_mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
}
inline int32_t reduce_maxi(I a) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}

// N bytes as a little-endian number, without a detour over the stack.
template <int N>
inline uint32_t load_word(const uint8_t *p) {
  if (N == 4) {
    uint32_t word;
    __builtin_memcpy(&word, p, 4);
    return word;
  }
  uint16_t half;
  __builtin_memcpy(&half, p, 2);
  return N == 3 ? half | (uint32_t)p[2] << 16 : half;
}

template <int BITS>
inline I load_codes(const uint8_t *q, int64_t i) {
  const uint32_t word = load_word<BITS>(q + i * BITS / 8);
  const I shifts = BITS == 4   ? _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24)
                   : BITS == 3 ? _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21)
                               : _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  return and_(shrv(set1i((int32_t)word), shifts), set1i((1 << BITS) - 1));
}

}  // namespace simd
}  // namespace
#endif
