// How a product reads its operands: in which type a panel of the weight and x stand side by side, and in which order
// their products are summed. Include a simd header first.
#ifndef POLYBIT_CPU_PANEL_H
#define POLYBIT_CPU_PANEL_H

#include "dtype.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t panel_columns = 1024;

// fp32 by fused multiply-adds into sixteen partial sums, column c into sum c % 16, then their tree sum. Sixteen on
// every instruction set, so that all of them give the same bits.
struct Float32Panel {
  typedef float Element;
  enum { step = 16, vectors = 16 / simd::W, tile = simd::W == 16 ? 4 : 2 };
  struct Values {
    simd::F v[vectors];
  };
  typedef Values Sums;

  static Sums zero() {
    Sums sums;
    for (int i = 0; i < vectors; i++) sums.v[i] = simd::zero();
    return sums;
  }
  static Values load(const float *p) {
    Values values;
    for (int i = 0; i < vectors; i++) values.v[i] = simd::load(p + i * simd::W);
    return values;
  }
  static Values load_n(const float *p, int64_t n) {
    Values values;
    for (int i = 0; i < vectors; i++) {
      const int64_t left = n - i * simd::W;
      values.v[i] = left <= 0 ? simd::zero() : simd::load_n(p + i * simd::W, (int)min64(left, simd::W));
    }
    return values;
  }
  static void add_products(Sums &sums, const Values &a, const Values &b) {
    for (int i = 0; i < vectors; i++) sums.v[i] = simd::fma(a.v[i], b.v[i], sums.v[i]);
  }
  static float total(const Sums &sums) {
    float part[vectors];
    for (int i = 0; i < vectors; i++) part[i] = simd::reduce_add(sums.v[i]);
    for (int width = vectors; width > 1; width /= 2)
      for (int i = 0; i < width / 2; i++) part[i] = part[2 * i] + part[2 * i + 1];
    return part[0];
  }
  template <class Weight>
  static void decode(const Weight &weight, int64_t row, int64_t begin, int64_t count, float *out) {
    weight.decode(row, begin, count, out);
  }
};

#ifdef __AVX512BF16__
// bf16 x: W is rounded to bf16, too; products in pairs and sums in fp32 by the processor's dot product.
struct BFloat16Panel {
  typedef uint16_t Element;
  enum { step = 32, tile = 4 };
  typedef __m512bh Values;
  typedef __m512 Sums;

  static Sums zero() { return _mm512_setzero_ps(); }
  static Values load(const uint16_t *p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Values load_n(const uint16_t *p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(((__mmask32)1 << n) - 1, p);
  }
  static void add_products(Sums &sums, Values a, Values b) { sums = _mm512_dpbf16_ps(sums, a, b); }
  static float total(Sums sums) { return simd::reduce_add(sums); }
  template <class Weight>
  static void decode(const Weight &weight, int64_t row, int64_t begin, int64_t count, uint16_t *out) {
    weight.decode_bf16(row, begin, count, out);
  }
};
#endif

// run(D(), Panel()) for the dtype of x. The dot product of bf16 has an order of its own, so not in deterministic mode.
template <class Run>
inline pb_status with_panel(pb_context *ctx, const char *op, const DLTensor *x, const Run &run) {
#ifdef __AVX512BF16__
  if (x->dtype.code == kDLBfloat && x->dtype.bits == 16 && !ctx->deterministic) return run(BFloat16(), BFloat16Panel());
#endif
  return with_dtype(ctx, op, x, [&](auto dtype) { return run(dtype, Float32Panel()); });
}

}  // namespace
#endif
