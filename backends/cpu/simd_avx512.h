// Sixteen lanes: AVX512 F, BW and VL. simd_scalar.h says what each function means.
#ifndef POLYBIT_CPU_SIMD_AVX512_H
#define POLYBIT_CPU_SIMD_AVX512_H

// GCC 12 warns of the undefined values inside its own intrinsics (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#include <stddef.h>
#include <stdint.h>

namespace {
namespace simd {

constexpr int W = 16;
typedef __m512 F;
typedef __m512i I;
typedef __mmask16 M;

struct Table16 {
  __m512 values;
};
struct Table16i {
  __m512i values;
};

inline I as_int(F a) { return _mm512_castps_si512(a); }
inline F as_float(I a) { return _mm512_castsi512_ps(a); }
inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float a) { return _mm512_set1_ps(a); }
inline I set1i(int32_t a) { return _mm512_set1_epi32(a); }
inline M first(int n) { return (M)((1u << n) - 1); }

inline F load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, F a) { _mm512_storeu_ps(p, a); }
inline void stream(float *p, F a) { _mm512_stream_ps(p, a); }
inline void fence() { _mm_sfence(); }
inline F load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store_n(float *p, F a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
inline I load_i(const int32_t *p) { return _mm512_loadu_si512(p); }
inline void store_i(int32_t *p, I a) { _mm512_storeu_si512(p, a); }

inline I load_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
inline I load_s8(const int8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
inline I load_u8_n(const uint8_t *p, int n) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)); }
inline I load_s8_n(const int8_t *p, int n) { return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)); }
inline void store_u8(uint8_t *p, I a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a)); }
inline void store_u8x4(uint8_t *p, const I (&a)[4]) {
  const I b = _mm512_packus_epi32(a[0], a[1]), c = _mm512_packus_epi32(a[2], a[3]);
  const I quarters =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // packus takes them by turns
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(quarters, _mm512_packus_epi16(b, c)));
}
inline void store_u8_n(uint8_t *p, I a, int n) { _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(a)); }

inline F widen_bf16(__m256i a) { return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)); }
inline __m256i narrow_bf16(F a) {
  const I x = as_int(a);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), set1i(1));
  const I r = _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(odd, set1i(0x7fff))), 16);
  const I quiet = _mm512_or_si512(_mm512_srli_epi32(x, 16), set1i(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet));
}
inline F load_bf16(const uint16_t *p) { return widen_bf16(_mm256_loadu_si256((const __m256i *)p)); }
inline F load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
inline F load_bf16_n(const uint16_t *p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
inline F load_f16_n(const uint16_t *p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
inline void store_bf16(uint16_t *p, F a) { _mm256_storeu_si256((__m256i *)p, narrow_bf16(a)); }
inline void store_f16(uint16_t *p, F a) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline void stream_bf16(uint16_t *p, F a) { _mm256_stream_si256((__m256i *)p, narrow_bf16(a)); }
inline void stream_f16(uint16_t *p, F a) {
  _mm256_stream_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_bf16_n(uint16_t *p, F a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(a)); }
inline void store_f16_n(uint16_t *p, F a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F sqrt(F a) { return _mm512_sqrt_ps(a); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F abs_(F a) { return as_float(_mm512_and_si512(as_int(a), set1i(0x7fffffff))); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline M gt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline M ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline M gti(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b); }
inline F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
inline I selecti(M m, I a, I b) { return _mm512_mask_blend_epi32(m, b, a); }
inline unsigned bits(M m) { return m; }

inline I and_(I a, I b) { return _mm512_and_si512(a, b); }
inline I or_(I a, I b) { return _mm512_or_si512(a, b); }
inline I addi(I a, I b) { return _mm512_add_epi32(a, b); }
inline I subi(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I maxi(I a, I b) { return _mm512_max_epi32(a, b); }
inline I shr(I a, int n) { return _mm512_srli_epi32(a, (unsigned)n); }
inline I rotate1(I a) { return _mm512_rol_epi32(a, 1); }
inline I negate_if(I sign, I a) {
  return _mm512_mask_sub_epi32(a, _mm512_cmplt_epi32_mask(sign, set1i(0)), set1i(0), a);
}
inline I shrv(I a, I n) { return _mm512_srlv_epi32(a, n); }
inline I descend(I a, M m) {
  const I twice = _mm512_add_epi32(a, a);
  return _mm512_mask_add_epi32(twice, m, twice, set1i(1));
}
inline I cvt_rn(F a) { return _mm512_cvtps_epi32(a); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }

typedef Table16 Table8;
inline Table8 table8(const float *p) {
  const I twice = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm512_i32gather_ps(twice, p, 4)};
}
inline F lookup8(const Table8 &t, I i) { return _mm512_permutexvar_ps(i, t.values); }

inline Table16 table16(const float *p) { return {load(p)}; }
inline Table16i table16i(const int32_t *p) { return {load_i(p)}; }
inline F lookup16(const Table16 &t, I i) { return _mm512_permutexvar_ps(i, t.values); }
inline I lookup16i(const Table16i &t, I i) { return _mm512_permutexvar_epi32(i, t.values); }
inline F gather(const float *p, I i) { return _mm512_i32gather_ps(i, p, 4); }
inline F gather_u8(const float *p, const uint8_t *q) { return gather(p, load_u8(q)); }

#ifdef __AVX512VBMI__
#define PB_SIMD_TABLE256
struct Table256 {
  I parts[4][4];  // byte k of the values, 64 codes at a time
};
inline Table256 table256(const float *p) {
  Table256 t;
  for (int code = 0; code < 256; code++)
    for (int k = 0; k < 4; k++) ((uint8_t *)t.parts[k])[code] = ((const uint8_t *)(p + code))[k];
  return t;
}
inline void lookup256(const Table256 &t, const uint8_t *q, F (&values)[4]) {
  // The unpacking of bytes to floats goes by quarters.
  const I quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const I codes = _mm512_permutexvar_epi32(quarters, _mm512_loadu_si512(q));
  const __mmask64 bit7 = _mm512_movepi8_mask(codes), bit6 = _mm512_movepi8_mask(_mm512_add_epi8(codes, codes));
  I bytes[4];
  for (int k = 0; k < 4; k++) {
    bytes[k] = _mm512_permutexvar_epi8(codes, t.parts[k][0]);
    bytes[k] = _mm512_mask_permutexvar_epi8(bytes[k], ~bit7 & bit6, codes, t.parts[k][1]);
    bytes[k] = _mm512_mask_permutexvar_epi8(bytes[k], bit7 & ~bit6, codes, t.parts[k][2]);
    bytes[k] = _mm512_mask_permutexvar_epi8(bytes[k], bit7 & bit6, codes, t.parts[k][3]);
  }
  const I low[2] = {_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[0], bytes[1])};
  const I high[2] = {_mm512_unpacklo_epi8(bytes[2], bytes[3]), _mm512_unpackhi_epi8(bytes[2], bytes[3])};
  for (int i = 0; i < 2; i++) {
    values[2 * i] = as_float(_mm512_unpacklo_epi16(low[i], high[i]));
    values[2 * i + 1] = as_float(_mm512_unpackhi_epi16(low[i], high[i]));
  }
}
#endif

inline F hadd(F a, F b) {
  const I even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const I odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
}
inline float reduce_add(F a) {
  a = _mm512_add_ps(a, _mm512_permute_ps(a, 0xb1));
  a = _mm512_add_ps(a, _mm512_permute_ps(a, 0x4e));
  a = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0xb1));
  a = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0x4e));
  return _mm512_cvtss_f32(a);
}
inline int32_t reduce_maxi(I a) { return _mm512_reduce_max_epi32(a); }

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
  const uint32_t low = load_word<BITS>(q + i * BITS / 8), high = load_word<BITS>(q + i * BITS / 8 + BITS);
  const I shifts = BITS == 4   ? _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24)
                   : BITS == 3 ? _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 0, 3, 6, 9, 12, 15, 18, 21)
                               : _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
  const I words = _mm512_mask_set1_epi32(set1i((int32_t)low), 0xff00, (int32_t)high);
  return and_(shrv(words, shifts), set1i((1 << BITS) - 1));
}

}  // namespace simd
}  // namespace
#endif
