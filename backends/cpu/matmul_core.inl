// The loops that every product shares: panels of a weight are decoded to fp32 on the stack, never the whole of it.
// A weight is anything with decode(row, begin, count, float *out).

namespace {

// One lane sums a whole panel in sequence: a short panel keeps its rounding error as small as that of many lanes.
constexpr int64_t panel_rows = 4, panel_columns = simd::W == 1 ? 128 : 1024, row_tile = 4;

// acc[m][r] += sum over c of x[m][c] * w[r][c], for ROWS rows of x and R of w.
template <int ROWS, int R>
inline void dot_tile(const float *x, int64_t ldx, const float *w, int64_t count, float *acc, int64_t ldacc) {
  simd::F sum[ROWS][R];
  for (int m = 0; m < ROWS; m++)
    for (int r = 0; r < R; r++) sum[m][r] = simd::zero();
  int64_t c = 0;
  for (; c + simd::W <= count; c += simd::W) {
    simd::F value[R];
    for (int r = 0; r < R; r++) value[r] = simd::load(w + r * panel_columns + c);
    for (int m = 0; m < ROWS; m++) {
      const simd::F a = simd::load(x + m * ldx + c);
      for (int r = 0; r < R; r++) sum[m][r] = simd::fma(a, value[r], sum[m][r]);
    }
  }
  if (c < count) {
    const int rest = (int)(count - c);
    for (int r = 0; r < R; r++) {
      const simd::F value = simd::load_n(w + r * panel_columns + c, rest);
      for (int m = 0; m < ROWS; m++) sum[m][r] = simd::fma(simd::load_n(x + m * ldx + c, rest), value, sum[m][r]);
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int r = 0; r < R; r++) acc[m * ldacc + r] += simd::reduce_add(sum[m][r]);
}

template <int R>
inline void dot_rows(const float *x, int64_t ldx, int64_t rows, const float *w, int64_t count, float *acc,
                     int64_t ldacc) {
  int64_t m = 0;
  for (; m + row_tile <= rows; m += row_tile) dot_tile<row_tile, R>(x + m * ldx, ldx, w, count, acc + m * ldacc, ldacc);
  for (; m < rows; m++) dot_tile<1, R>(x + m * ldx, ldx, w, count, acc + m * ldacc, ldacc);
}

// acc [rows, n] += x [rows, k] W^T, for the rows of W from first on. acc starts at zero.
template <class Weight>
inline void multiply(pb_context *ctx, const Weight &weight, int64_t first, const float *x, int64_t rows, int64_t n,
                     int64_t k, float *acc) {
  parallel(ctx, ceil_div(n, panel_rows), grain_of(panel_rows * k * rows), [&](int64_t begin, int64_t end) {
    alignas(64) float panel[panel_rows * panel_columns];
    for (int64_t tile = begin; tile < end; tile++) {
      const int64_t row = tile * panel_rows, height = min64(panel_rows, n - row);
      for (int64_t c = 0; c < k; c += panel_columns) {
        const int64_t count = min64(panel_columns, k - c);
        for (int64_t r = 0; r < height; r++) weight.decode(first + row + r, c, count, panel + r * panel_columns);
        if (height == panel_rows)
          dot_rows<panel_rows>(x + c, k, rows, panel, count, acc + row, n);
        else
          for (int64_t r = 0; r < height; r++)
            dot_rows<1>(x + c, k, rows, panel + r * panel_columns, count, acc + row + r, n);
      }
    }
  });
}

// acc[c] += sum over r of dy[r] * w[r][c].
inline void add_rows(const float *dy, const float *w, int64_t height, int64_t count, float *acc) {
  for (int64_t c = 0; c < count; c += simd::W) {
    const int lanes = (int)min64(simd::W, count - c);
    simd::F sum = simd::load_n(acc + c, lanes);
    for (int64_t r = 0; r < height; r++)
      sum = simd::fma(simd::set1(dy[r]), simd::load_n(w + r * panel_columns + c, lanes), sum);
    simd::store_n(acc + c, sum, lanes);
  }
}

// acc [rows, k] += dy [rows, n] W. Threads share the columns, so no sum is split between them.
template <class Weight>
inline void multiply_transposed(pb_context *ctx, const Weight &weight, int64_t first, const float *dy, int64_t rows,
                                int64_t n, int64_t k, float *acc) {
  const int64_t strip = 256;
  parallel(ctx, ceil_div(k, strip), grain_of(strip * n * rows), [&](int64_t begin, int64_t end) {
    alignas(64) float panel[panel_rows * panel_columns];
    for (int64_t column = begin * strip; column < min64(end * strip, k); column += panel_columns) {
      const int64_t count = min64(panel_columns, min64(end * strip, k) - column);
      for (int64_t row = 0; row < n; row += panel_rows) {
        const int64_t height = min64(panel_rows, n - row);
        for (int64_t r = 0; r < height; r++) weight.decode(first + row + r, column, count, panel + r * panel_columns);
        for (int64_t m = 0; m < rows; m++) add_rows(dy + m * n + row, panel, height, count, acc + m * k + column);
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

template <class D>
inline const float *to_float32(pb_context *ctx, D dtype, const typename D::type *x, int64_t n, float *buffer) {
  parallel(ctx, n, 32768,
           [&](int64_t begin, int64_t end) { as_float32(dtype, x + begin, end - begin, buffer + begin); });
  return buffer;
}
inline const float *to_float32(pb_context *, Float32, const float *x, int64_t, float *) { return x; }

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

}  // namespace
