// Products with int8 operands: exact int32 sums, scaled in fp32.
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace {

inline int32_t dot_int8(const int8_t *a, const int8_t *b, int64_t count) {
  int64_t c = 0;
  int32_t sum = 0;
#ifdef __AVX512VNNI__
  // vpdpbusd multiplies unsigned by signed: a + 128 is unsigned, and 128 * sum(b) is taken off again. Sums wrap, so the
  // difference is exact whenever the result fits.
  const __m512i bias = _mm512_set1_epi8((char)0x80);
  __m512i products = _mm512_setzero_si512(), sums = _mm512_setzero_si512();
  for (; c + 64 <= count; c += 64) {
    const __m512i x = _mm512_loadu_si512(a + c), y = _mm512_loadu_si512(b + c);
    products = _mm512_dpbusd_epi32(products, _mm512_xor_si512(x, bias), y);
    sums = _mm512_dpbusd_epi32(sums, bias, y);
  }
  sum = _mm512_reduce_add_epi32(_mm512_sub_epi32(products, sums));
#endif
  for (; c < count; c++) sum += (int32_t)a[c] * b[c];
  return sum;
}

// emit(m, n, sum) for every element of a [rows, k] b^T [n, k]; threads share the rows of b.
template <class Emit>
inline void each_dot(pb_context *ctx, const int8_t *a, const int8_t *b, int64_t rows, int64_t n, int64_t k,
                     const Emit &emit) {
  parallel(ctx, n, grain_of(rows * k), [&](int64_t begin, int64_t end) {
    const int64_t strip = 32;  // rows of b that stay in cache while all of a passes by
    for (int64_t first = begin; first < end; first += strip)
      for (int64_t m = 0; m < rows; m++)
        for (int64_t r = first; r < min64(first + strip, end); r++) emit(m, r, dot_int8(a + m * k, b + r * k, k));
  });
}

pb_status matmul_int8(pb_context *ctx, const pb_matmul_int8_args *a) {
  const int64_t k = last_dim(a->a), n = a->b->shape[0], rows = n ? numel(a->y) / n : 0;
  int32_t *y = data<int32_t>(a->y);
  each_dot(ctx, data<const int8_t>(a->a), data<const int8_t>(a->b), rows, n, k,
           [=](int64_t m, int64_t r, int32_t sum) { y[m * n + r] = sum; });
  return PB_OK;
}

struct Int8Rows {
  const int8_t *q;
  const float *absmax;
  int64_t k;
  void decode(int64_t row, int64_t begin, int64_t count, float *out) const {
    const float scale = pb::int8_scale(absmax[row]);
    const int8_t *from = q + row * k + begin;
    for (int64_t c = 0; c < count; c++) out[c] = (float)from[c] * scale;
  }
};

// The outlier columns of an Int8Rows weight, side by side.
struct OutlierColumns {
  Int8Rows weight;
  const int32_t *columns;
  void decode(int64_t row, int64_t begin, int64_t count, float *out) const {
    const float scale = pb::int8_scale(weight.absmax[row]);
    for (int64_t c = 0; c < count; c++) out[c] = (float)weight.q[row * weight.k + columns[begin + c]] * scale;
  }
};

template <class D>
inline float load_one(const typename D::type *p) {
  float value;
  simd::store_n(&value, D::load_n(p, 1), 1);
  return value;
}

// What linear_int8 needs beside its arguments, in scratch.
struct Int8Scratch {
  int8_t *q;
  uint8_t *outlier;
  int32_t *columns;
  float *absmax, *acc, *outlier_x;
};

// The LLM.int8() product of `rows` rows of x, whose outlier columns are found over these rows alone.
template <class D>
inline void multiply_int8(pb_context *ctx, D dtype, const Int8Rows &weight, const typename D::type *x, int64_t rows,
                          int64_t n, float threshold, const Int8Scratch &s) {
  const int64_t k = weight.k;
  quantize_int8_rows(ctx, dtype, x, rows, k, threshold, s.q, s.absmax, s.outlier);
  each_dot(ctx, s.q, weight.q, rows, n, k, [&](int64_t m, int64_t r, int32_t sum) {
    s.acc[m * n + r] = (float)sum * (pb::int8_scale(s.absmax[m]) * pb::int8_scale(weight.absmax[r]));
  });
  int64_t count = 0;
  for (int64_t c = 0; c < k; c++)
    if (s.outlier[c]) s.columns[count++] = (int32_t)c;
  if (!count) return;
  parallel(ctx, rows, grain_of(count), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++)
      for (int64_t c = 0; c < count; c++) s.outlier_x[m * count + c] = load_one<D>(x + m * k + s.columns[c]);
  });
  multiply(ctx, Float32Panel(), OutlierColumns{weight, s.columns}, 0, s.outlier_x, rows, n, count, s.acc);
}

pb_status linear_int8(pb_context *ctx, const pb_linear_int8_args *a) {
  const int64_t k = last_dim(a->x), n = a->weight->shape[0], rows = n ? numel(a->y) / n : 0;
  if (!rows) return PB_OK;
  const Int8Rows weight = {data<const int8_t>(a->weight), data<const float>(a->weight_absmax), k};
  const int64_t together = a->row_outliers ? 1 : rows;
  Int8Scratch scratch = {};
  float *acc = 0;
  if (!take_scratch(ctx, [&](Scratch &s) {
        scratch.q = s.take<int8_t>(together * k);
        scratch.outlier = s.take<uint8_t>(k);
        scratch.columns = s.take<int32_t>(k);
        scratch.absmax = s.take<float>(together);
        scratch.outlier_x = s.take<float>(a->threshold > 0 ? together * k : 0);  // only the part in use is ever touched
        acc = s.take<float>(rows * n);
      }))
    return PB_SCRATCH;
  return with_dtype(ctx, "linear_int8", a->x, [&](auto dtype) {
    typedef typename decltype(dtype)::type T;
    for (int64_t m = 0; m < rows; m += together) {
      scratch.acc = acc + m * n;
      multiply_int8(ctx, dtype, weight, data<const T>(a->x) + m * k, together, n, (float)a->threshold, scratch);
    }
    finish(ctx, dtype, acc, a->bias ? data<const T>(a->bias) : (const T *)0, rows, n, data<T>(a->y));
    return (pb_status)PB_OK;
  });
}

pb_status linear_int8_transposed(pb_context *ctx, const pb_linear_int8_transposed_args *a) {
  const int64_t n = last_dim(a->dy), k = a->weight->shape[1];
  const Int8Rows weight = {data<const int8_t>(a->weight), data<const float>(a->weight_absmax), k};
  return with_dtype(ctx, "linear_int8_transposed", a->dy, [&](auto dtype) {
    return product(ctx, dtype, Float32Panel(), a->dy, n, 0, a->dx, k, [&](const float *dy, int64_t rows, float *acc) {
      multiply_transposed(ctx, weight, 0, dy, rows, n, k, acc);
    });
  });
}

// The codebook of a k-bit weight rounded to int8.
struct Int8Code {
  int8_t value[16];
  float largest;

  Int8Code(const float *code, int count) : largest(0.0f) {
    for (int i = 0; i < count; i++) {
      const float magnitude = code[i] < 0 ? -code[i] : code[i];
      if (magnitude > largest) largest = magnitude;
    }
    float rounded[16] = {};
    for (int i = 0; i < count; i++) rounded[i] = code[i] * (127.0f / largest);
    for (int i = 0; i < 16; i += simd::W) {
      int32_t whole[16];
      simd::store_i(whole, simd::cvt_rn(simd::load(rounded + i)));
      for (int j = 0; j < simd::W; j++) value[i + j] = (int8_t)whole[j];
    }
  }
};

// Sums over maximal runs of one block inside a row.
inline void accumulate_blocks(const KbitWeight &weight, const int8_t *x, int64_t rows, int64_t k, int64_t row,
                              const int8_t *codes, float *acc, int64_t n) {
  const int64_t block = (int64_t)1 << weight.block_shift, end = (row + 1) * k;
  for (int64_t i = row * k; i < end;) {
    const int64_t stop = min64((i / block + 1) * block, end), c = i - row * k;
    const float scale = weight.scale(i / block);
    for (int64_t m = 0; m < rows; m++) acc[m * n + row] += (float)dot_int8(x + m * k + c, codes + c, stop - i) * scale;
    i = stop;
  }
}

pb_status matmul_kbit_int8(pb_context *ctx, const pb_matmul_kbit_int8_args *a) {
  const int64_t k = last_dim(a->x), n = a->n, rows = n ? numel(a->y) / n : 0;
  if (!rows) return PB_OK;
  const KbitWeight weight = kbit_weight(a, k);
  const Int8Code code(weight.code, 1 << weight.bits);
  const int8_t *x = data<const int8_t>(a->x);
  const float *x_absmax = data<const float>(a->x_absmax);
  float *acc = 0;
  int8_t *codes = 0;
  const int64_t strips = min64(n, 2 * (int64_t)(ctx->thread_count ? ctx->thread_count : 1));
  if (!take_scratch(ctx, [&](Scratch &s) {
        acc = s.take<float>(rows * n);
        codes = s.take<int8_t>(strips * k);  // one row of codes for each strip of output rows
      }))
    return PB_SCRATCH;
  clear(ctx, acc, rows * n);
  parallel(ctx, strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; strip++)
      for (int64_t row = n * strip / strips; row < n * (strip + 1) / strips; row++) {
        for (int64_t c = 0; c < k; c++) codes[strip * k + c] = code.value[weight.stored_code(row * k + c)];
        accumulate_blocks(weight, x, rows, k, row, codes + strip * k, acc, n);
      }
  });
  const float step = code.largest / 127.0f;
  parallel(ctx, rows, grain_of(n), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      const float scale = pb::int8_scale(x_absmax[m]) * step;
      for (int64_t r = 0; r < n; r++) acc[m * n + r] *= scale;
    }
  });
  return with_dtype(ctx, "matmul_kbit_int8", a->y, [&](auto dtype) {
    typedef typename decltype(dtype)::type T;
    finish(ctx, dtype, acc, a->bias ? data<const T>(a->bias) : (const T *)0, rows, n, data<T>(a->y));
    return (pb_status)PB_OK;
  });
}

}  // namespace
