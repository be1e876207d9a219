// Row-wise int8 quantization with outlier columns (docs/numerics.md, "int8").
#include "math/int8.h"

namespace {

// Marks the columns of [begin, end) that hold an outlier in any row.
template <class D>
inline void mark_outliers(D, const typename D::type *x, int64_t rows, int64_t k, int64_t begin, int64_t end,
                          float threshold, uint8_t *outlier) {
  const simd::F limit = simd::set1(threshold);
  for (int64_t c = begin; c < end; c++) outlier[c] = 0;
  for (int64_t r = 0; r < rows; r++) {
    const typename D::type *row = x + r * k;
    for (int64_t c = begin; c < end; c += simd::W) {
      const int left = (int)min64(end - c, simd::W);
      const simd::F v = left == simd::W ? D::load(row + c) : D::load_n(row + c, left);
      // Rare, so that lanes are taken one by one; a lane behind the end is 0 and the threshold is positive.
      for (unsigned m = simd::bits(simd::ge(simd::abs_(v), limit)); m; m &= m - 1) outlier[c + __builtin_ctz(m)] = 1;
    }
  }
}

// absmax over the elements of a row that are not outliers themselves.
template <class D>
inline uint32_t row_absmax_bits(D, const typename D::type *row, int64_t k, bool skip, float threshold) {
  const simd::F limit = simd::set1(threshold);
  simd::I most = simd::set1i(0);
  for (int64_t c = 0; c < k; c += simd::W) {
    const int left = (int)min64(k - c, simd::W);
    simd::F v = simd::abs_(left == simd::W ? D::load(row + c) : D::load_n(row + c, left));
    if (skip) v = simd::select(simd::ge(v, limit), simd::zero(), v);
    most = simd::maxi(most, simd::as_int(v));
  }
  return (uint32_t)simd::reduce_maxi(most);
}

// q = rint(x * r); outlier may be null. Lanes that are NaN become 0 (simd::cvt_rn).
template <class D>
inline void quantize_row(D, const typename D::type *row, int64_t k, float r, const uint8_t *outlier, int8_t *q) {
  // r is infinite for the smallest absmax. The clamp keeps NaN.
  const simd::F factor = simd::set1(r), low = simd::set1(-127.0f), high = simd::set1(127.0f);
  for (int64_t c = 0; c < k; c += simd::W) {
    const int left = (int)min64(k - c, simd::W);
    const bool whole = left == simd::W;
    const simd::F x = simd::mul(whole ? D::load(row + c) : D::load_n(row + c, left), factor);
    simd::I v = simd::cvt_rn(simd::min(high, simd::max(low, x)));
    if (outlier) {
      const simd::I marked = whole ? simd::load_u8(outlier + c) : simd::load_u8_n(outlier + c, left);
      v = simd::selecti(simd::gti(marked, simd::set1i(0)), simd::set1i(0), v);
    }
    if (whole)
      simd::store_u8((uint8_t *)q + c, v);
    else
      simd::store_u8_n((uint8_t *)q + c, v, left);
  }
}

// Shared with linear_int8. x is [rows, k]; outlier is [k] and always written.
template <class D>
inline void quantize_int8_rows(pb_context *ctx, D dtype, const typename D::type *x, int64_t rows, int64_t k,
                               float threshold, int8_t *q, float *absmax, uint8_t *outlier) {
  const bool skip = threshold > 0.0f;
  if (skip) {
    // Columns are split among threads, not rows: no two threads write one flag.
    const int64_t strip = 256;
    parallel(ctx, ceil_div(k, strip), grain_of(strip * rows), [&](int64_t begin, int64_t end) {
      mark_outliers(dtype, x, rows, k, begin * strip, min64(end * strip, k), threshold, outlier);
    });
  } else {
    for (int64_t c = 0; c < k; c++) outlier[c] = 0;
  }
  parallel(ctx, rows, grain_of(k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const typename D::type *row = x + r * k;
      const uint32_t bits = row_absmax_bits(dtype, row, k, skip, threshold);
      absmax[r] = pb::stored_absmax(bits);
      quantize_row(dtype, row, k, pb::int8_factor(bits), skip ? outlier : nullptr, q + r * k);
    }
  });
}

pb_status quantize_int8(pb_context *ctx, const pb_quantize_int8_args *a) {
  return with_dtype(ctx, "quantize_int8", a->x, [&](auto dtype) {
    typedef decltype(dtype) D;
    const int64_t k = last_dim(a->x), rows = numel(a->absmax);
    quantize_int8_rows(ctx, dtype, data<const typename D::type>(a->x), rows, k, (float)a->threshold, data<int8_t>(a->q),
                       data<float>(a->absmax), data<uint8_t>(a->outlier));
    return (pb_status)PB_OK;
  });
}

template <class D>
inline void dequantize_row(D, const int8_t *q, int64_t k, float absmax, typename D::type *y) {
  const simd::F scale = simd::set1(absmax), step = simd::set1(pb::inverse_127());
  int64_t c = 0;
  for (; c + simd::W <= k; c += simd::W)
    D::store(y + c, simd::mul(simd::mul(simd::to_float(simd::load_s8(q + c)), scale), step));
  if (c < k) {
    const int left = (int)(k - c);
    D::store_n(y + c, simd::mul(simd::mul(simd::to_float(simd::load_s8_n(q + c, left)), scale), step), left);
  }
}

pb_status dequantize_int8(pb_context *ctx, const pb_dequantize_int8_args *a) {
  return with_output(ctx, "dequantize_int8", a->y, last_dim(a->q) % 16 == 0, [&](auto dtype) {
    typedef decltype(dtype) D;
    const int64_t k = last_dim(a->q), rows = k ? numel(a->q) / k : 0;
    const int8_t *q = data<const int8_t>(a->q);
    const float *absmax = data<const float>(a->absmax);
    typename D::type *y = data<typename D::type>(a->y);
    parallel(ctx, rows, grain_of(k), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) dequantize_row(dtype, q + r * k, k, absmax[r], y + r * k);
      finish(dtype);
    });
    return (pb_status)PB_OK;
  });
}

}  // namespace
