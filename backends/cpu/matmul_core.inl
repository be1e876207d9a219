// The loops that every product shares: panels of a weight are decoded on the stack, never the whole of it.
// A weight is anything with decode(row, begin, count, float *out).
#include "panel.h"

namespace {

constexpr int64_t panel_rows_most = 16;

// acc[m][r] += sum over c of x[m][c] * w[r][c], for ROWS rows of x and R of w.
template <class P, int ROWS, int R>
inline void dot_tile(const typename P::Element *x, int64_t ldx, const typename P::Element *w, int64_t count, float *acc,
                     int64_t ldacc) {
  typename P::Sums sums[ROWS][R];
  for (int m = 0; m < ROWS; m++)
    for (int r = 0; r < R; r++) sums[m][r] = P::zero();
  int64_t c = 0;
  for (; c + P::step <= count; c += P::step) {
    typename P::Values value[R];
    for (int r = 0; r < R; r++) value[r] = P::load(w + r * panel_columns + c);
    for (int m = 0; m < ROWS; m++) {
      const typename P::Values a = P::load(x + m * ldx + c);
      for (int r = 0; r < R; r++) P::add_products(sums[m][r], a, value[r]);
    }
  }
  if (c < count) {
    for (int r = 0; r < R; r++) {
      const typename P::Values value = P::load_n(w + r * panel_columns + c, count - c);
      for (int m = 0; m < ROWS; m++) P::add_products(sums[m][r], P::load_n(x + m * ldx + c, count - c), value);
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int r = 0; r < R; r++) acc[m * ldacc + r] += P::total(sums[m][r]);
}

// ROWS rows of x with all `height` rows of a panel.
template <class P, int ROWS>
inline void dot_panel(const typename P::Element *x, int64_t ldx, const typename P::Element *panel, int64_t height,
                      int64_t count, float *acc, int64_t ldacc) {
  int64_t r = 0;
  for (; r + P::tile <= height; r += P::tile)
    dot_tile<P, ROWS, P::tile>(x, ldx, panel + r * panel_columns, count, acc + r, ldacc);
  for (; r < height; r++) dot_tile<P, ROWS, 1>(x, ldx, panel + r * panel_columns, count, acc + r, ldacc);
}

// acc [rows, n] += x [rows, k] W^T, for the rows of W from first on. acc starts at zero.
template <class P, class Weight>
inline void multiply(pb_context *ctx, P, const Weight &weight, int64_t first, const typename P::Element *x,
                     int64_t rows, int64_t n, int64_t k, float *acc) {
  // A tall panel saves passes over x, a low one stays in the first-level cache. Neither changes a sum.
  const int64_t panel_rows = rows < P::tile ? 4 : panel_rows_most;
  parallel(ctx, ceil_div(n, panel_rows), grain_of(panel_rows * k * rows), [&](int64_t begin, int64_t end) {
    alignas(64) typename P::Element panel[panel_rows_most * panel_columns];
    for (int64_t tile = begin; tile < end; tile++) {
      const int64_t row = tile * panel_rows, height = min64(panel_rows, n - row);
      for (int64_t c = 0; c < k; c += panel_columns) {
        const int64_t count = min64(panel_columns, k - c);
        for (int64_t r = 0; r < height; r++) P::decode(weight, first + row + r, c, count, panel + r * panel_columns);
        int64_t m = 0;
        for (; m + P::tile <= rows; m += P::tile)
          dot_panel<P, P::tile>(x + m * k + c, k, panel, height, count, acc + m * n + row, n);
        for (; m < rows; m++) dot_panel<P, 1>(x + m * k + c, k, panel, height, count, acc + m * n + row, n);
      }
    }
  });
}

// acc[m][c] += sum over r of dy[m][r] * w[r][c], r ascending, for ROWS rows of dy and V vectors of columns.
template <int ROWS, int V>
inline void add_tile(const float *dy, int64_t n, const float *w, int64_t height, float *acc, int64_t k) {
  simd::F sums[ROWS][V];
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < V; v++) sums[m][v] = simd::load(acc + m * k + v * simd::W);
  for (int64_t r = 0; r < height; r++) {
    simd::F value[V];
    for (int v = 0; v < V; v++) value[v] = simd::load(w + r * panel_columns + v * simd::W);
    for (int m = 0; m < ROWS; m++) {
      const simd::F factor = simd::set1(dy[m * n + r]);
      for (int v = 0; v < V; v++) sums[m][v] = simd::fma(factor, value[v], sums[m][v]);
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < V; v++) simd::store(acc + m * k + v * simd::W, sums[m][v]);
}

// The same for `count` columns, whole vectors or not.
template <int ROWS>
inline void add_rows(const float *dy, int64_t n, const float *w, int64_t height, int64_t count, float *acc, int64_t k) {
  constexpr int vectors = 4;
  int64_t c = 0;
  for (; c + vectors * simd::W <= count; c += vectors * simd::W)
    add_tile<ROWS, vectors>(dy, n, w + c, height, acc + c, k);
  for (; c + simd::W <= count; c += simd::W) add_tile<ROWS, 1>(dy, n, w + c, height, acc + c, k);
  if (c == count) return;
  const int lanes = (int)(count - c);
  for (int m = 0; m < ROWS; m++) {
    simd::F sum = simd::load_n(acc + m * k + c, lanes);
    for (int64_t r = 0; r < height; r++)
      sum = simd::fma(simd::set1(dy[m * n + r]), simd::load_n(w + r * panel_columns + c, lanes), sum);
    simd::store_n(acc + m * k + c, sum, lanes);
  }
}

// acc [rows, k] += dy [rows, n] W. Threads share the columns, so no sum is split between them.
template <class Weight>
inline void multiply_transposed(pb_context *ctx, const Weight &weight, int64_t first, const float *dy, int64_t rows,
                                int64_t n, int64_t k, float *acc) {
  const int64_t strip = 256;
  constexpr int tile = Float32Panel::tile;
  parallel(ctx, ceil_div(k, strip), grain_of(strip * n * rows), [&](int64_t begin, int64_t end) {
    alignas(64) float panel[panel_rows_most * panel_columns];
    for (int64_t column = begin * strip; column < min64(end * strip, k); column += panel_columns) {
      const int64_t count = min64(panel_columns, min64(end * strip, k) - column);
      for (int64_t row = 0; row < n; row += panel_rows_most) {
        const int64_t height = min64(panel_rows_most, n - row);
        for (int64_t r = 0; r < height; r++) weight.decode(first + row + r, column, count, panel + r * panel_columns);
        int64_t m = 0;
        for (; m + tile <= rows; m += tile)
          add_rows<tile>(dy + m * n + row, n, panel, height, count, acc + m * k + column, k);
        for (; m < rows; m++) add_rows<1>(dy + m * n + row, n, panel, height, count, acc + m * k + column, k);
      }
    }
  });
}

// Scratch handed out piece by piece; the first pass (base null) only counts.
struct Scratch {
  char *base;
  uint64_t used;

  template <class T>
  T *take(int64_t count) {
    T *piece = base ? (T *)(base + used) : (T *)0;
    used += ((uint64_t)count * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

// Runs layout(Scratch &) once to count and, if there is enough, once more to hand out the pieces.
template <class Layout>
inline bool take_scratch(pb_context *ctx, const Layout &layout) {
  Scratch counted = {(char *)0, 0};
  layout(counted);
  if (counted.used > ctx->scratch_size) {
    ctx->scratch_needed = counted.used;
    return false;
  }
  Scratch real = {(char *)ctx->scratch, 0};
  layout(real);
  return true;
}

inline void clear(pb_context *ctx, float *p, int64_t n) {
  parallel(ctx, n, 32768, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) p[i] = 0.0f;
  });
}

// n values of x in the type of the panel: x itself, or a converted copy in buffer.
template <class D>
inline const float *to_elements(pb_context *ctx, D dtype, const typename D::type *x, int64_t n, float *buffer) {
  parallel(ctx, n, 32768,
           [&](int64_t begin, int64_t end) { as_float32(dtype, x + begin, end - begin, buffer + begin); });
  return buffer;
}
inline const float *to_elements(pb_context *, Float32, const float *x, int64_t, float *) { return x; }
#ifdef __AVX512BF16__
inline const uint16_t *to_elements(pb_context *, BFloat16, const uint16_t *x, int64_t, uint16_t *) { return x; }
#endif

// y = acc + bias, rounded once.
template <class D>
inline void finish(pb_context *ctx, D, const float *acc, const typename D::type *bias, int64_t rows, int64_t n,
                   typename D::type *y) {
  parallel(ctx, rows, grain_of(n), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++)
      for (int64_t c = 0; c < n; c += simd::W) {
        const int lanes = (int)min64(simd::W, n - c);
        simd::F value = simd::load_n(acc + m * n + c, lanes);
        if (bias) value = simd::add(value, D::load_n(bias + c, lanes));
        D::store_n(y + m * n + c, value, lanes);
      }
  });
}

// out = sum + bias, where body(x, rows, acc) adds the sums to zeros; x comes in the type of the panel P.
template <class D, class P, class Body>
inline pb_status product(pb_context *ctx, D dtype, P, const DLTensor *in, int64_t in_width, const DLTensor *bias,
                         DLTensor *out, int64_t out_width, const Body &body) {
  typedef typename P::Element Element;
  const int64_t rows = out_width ? numel(out) / out_width : 0;
  if (!rows) return PB_OK;
  const bool convert = sizeof(typename D::type) != sizeof(Element);
  Element *buffer = 0;
  float *acc = 0;
  if (!take_scratch(ctx, [&](Scratch &s) {
        buffer = s.take<Element>(convert ? rows * in_width : 0);
        acc = s.take<float>(rows * out_width);
      }))
    return PB_SCRATCH;
  clear(ctx, acc, rows * out_width);
  body(to_elements(ctx, dtype, data<const typename D::type>(in), rows * in_width, buffer), rows, acc);
  finish(ctx, dtype, acc, bias ? data<const typename D::type>(bias) : (const typename D::type *)0, rows, out_width,
         data<typename D::type>(out));
  return PB_OK;
}

}  // namespace
