// y = x W^T for bf16 x with the bf16 dot product: W is rounded to bf16 panel by panel, sums stay in fp32.
#include <immintrin.h>

namespace {

inline bool is_bf16(const DLTensor *t) { return t->dtype.code == kDLBfloat && t->dtype.bits == 16; }

inline __m512bh load_pairs(const uint16_t *p, int64_t rest) {
  if (rest >= 32) return (__m512bh)_mm512_loadu_si512(p);
  return (__m512bh)_mm512_maskz_loadu_epi16(((__mmask32)1 << rest) - 1, p);
}

// acc[m][r] += sum over c of x[m][c] * w[r][c], for ROWS rows of x and R of w.
template <int ROWS, int R>
inline void dot_tile_bf16(const uint16_t *x, int64_t ldx, const uint16_t *w, int64_t count, float *acc, int64_t ldacc) {
  __m512 sum[ROWS][R];
  for (int m = 0; m < ROWS; m++)
    for (int r = 0; r < R; r++) sum[m][r] = _mm512_setzero_ps();
  for (int64_t c = 0; c < count; c += 32) {
    __m512bh value[R];
    for (int r = 0; r < R; r++) value[r] = load_pairs(w + r * panel_columns + c, count - c);
    for (int m = 0; m < ROWS; m++) {
      const __m512bh a = load_pairs(x + m * ldx + c, count - c);
      for (int r = 0; r < R; r++) sum[m][r] = _mm512_dpbf16_ps(sum[m][r], a, value[r]);
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int r = 0; r < R; r++) acc[m * ldacc + r] += simd::reduce_add(sum[m][r]);
}

template <int R>
inline void dot_rows_bf16(const uint16_t *x, int64_t ldx, int64_t rows, const uint16_t *w, int64_t count, float *acc,
                          int64_t ldacc) {
  int64_t m = 0;
  for (; m + row_tile <= rows; m += row_tile)
    dot_tile_bf16<row_tile, R>(x + m * ldx, ldx, w, count, acc + m * ldacc, ldacc);
  for (; m < rows; m++) dot_tile_bf16<1, R>(x + m * ldx, ldx, w, count, acc + m * ldacc, ldacc);
}

// As multiply of matmul_core.inl.
template <class Weight>
inline void multiply_bf16(pb_context *ctx, const Weight &weight, int64_t first, const uint16_t *x, int64_t rows,
                          int64_t n, int64_t k, float *acc) {
  parallel(ctx, ceil_div(n, panel_rows), grain_of(panel_rows * k * rows), [&](int64_t begin, int64_t end) {
    alignas(64) uint16_t panel[panel_rows * panel_columns];
    for (int64_t tile = begin; tile < end; tile++) {
      const int64_t row = tile * panel_rows, height = min64(panel_rows, n - row);
      for (int64_t c = 0; c < k; c += panel_columns) {
        const int64_t count = min64(panel_columns, k - c);
        for (int64_t r = 0; r < height; r++) weight.decode_bf16(first + row + r, c, count, panel + r * panel_columns);
        if (height == panel_rows)
          dot_rows_bf16<panel_rows>(x + c, k, rows, panel, count, acc + row, n);
        else
          for (int64_t r = 0; r < height; r++)
            dot_rows_bf16<1>(x + c, k, rows, panel + r * panel_columns, count, acc + row + r, n);
      }
    }
  });
}

// As kbit_product of matmul_kbit.inl, but x stays bf16.
template <class Product>
inline pb_status kbit_product_bf16(pb_context *ctx, const DLTensor *in, const DLTensor *bias, DLTensor *out,
                                   int64_t out_width, const Product &product) {
  const int64_t rows = out_width ? numel(out) / out_width : 0;
  if (!rows) return PB_OK;
  float *acc = 0;
  if (!take_scratch(ctx, [&](Scratch &s) { acc = s.take<float>(rows * out_width); })) return PB_SCRATCH;
  clear(ctx, acc, rows * out_width);
  product(data<const uint16_t>(in), rows, acc);
  finish(ctx, BFloat16(), acc, bias ? data<const uint16_t>(bias) : (const uint16_t *)0, rows, out_width,
         data<uint16_t>(out));
  return PB_OK;
}

}  // namespace
