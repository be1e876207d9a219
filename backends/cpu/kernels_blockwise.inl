// 8-bit blockwise quantization and the double quantization of absmax (docs/numerics.md).

namespace {

// One block; returns what to store as absmax.
inline float quantize_block(const Code256 &code, const float *x, int64_t n, uint8_t *q) {
  const uint32_t bits = absmax_bits(x, n);
  code.quantize(x, simd::set1(pb::inverse_absmax(bits)), bits < 0x7f800000u, n, q);
  return pb::stored_absmax(bits);
}

pb_status quantize_blockwise(pb_context *ctx, const pb_quantize_blockwise_args *a) {
  return with_dtype(ctx, "quantize_blockwise", a->x, [&](auto dtype) {
    typedef decltype(dtype) D;
    const int64_t n = numel(a->x), block = a->block;
    const typename D::type *x = data<const typename D::type>(a->x);
    uint8_t *q = data<uint8_t>(a->q);
    float *absmax = data<float>(a->absmax);
    const Code256 code(data<const float>(a->code), n);
    parallel(ctx, ceil_div(n, block), grain_of(block), [&](int64_t begin, int64_t end) {
      float buffer[4096];
      for (int64_t b = begin; b < end; b++) {
        const int64_t start = b * block, count = min64(block, n - start);
        absmax[b] = quantize_block(code, as_float32(dtype, x + start, count, buffer), count, q + start);
      }
    });
    return (pb_status)PB_OK;
  });
}

// code[q] * scale for n codes.
template <class D>
inline void dequantize_block(D, const uint8_t *q, int64_t n, const float *code, float scale, typename D::type *y) {
  const simd::F s = simd::set1(scale);
  int64_t i = 0;
  for (; i + simd::W <= n; i += simd::W) D::store(y + i, simd::mul(simd::gather_u8(code, q + i), s));
  if (i < n) {
    const int left = (int)(n - i);
    D::store_n(y + i, simd::mul(simd::gather(code, simd::load_u8_n(q + i, left)), s), left);
  }
}

pb_status dequantize_blockwise(pb_context *ctx, const pb_dequantize_blockwise_args *a) {
  return with_output(ctx, "dequantize_blockwise", a->y, true, [&](auto dtype) {
    typedef decltype(dtype) D;
    const int64_t n = numel(a->y), block = a->block;
    const uint8_t *q = data<const uint8_t>(a->q);
    const float *absmax = data<const float>(a->absmax), *code = data<const float>(a->code);
    typename D::type *y = data<typename D::type>(a->y);
    parallel(ctx, ceil_div(n, block), grain_of(block), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++)
        dequantize_block(dtype, q + b * block, min64(block, n - b * block), code, absmax[b], y + b * block);
      finish(dtype);
    });
    return (pb_status)PB_OK;
  });
}

pb_status quantize_absmax(pb_context *ctx, const pb_quantize_absmax_args *a) {
  const int64_t n = numel(a->absmax), block = 256;
  const float *x = data<const float>(a->absmax);
  const float sum = tree_sum(ctx, Float32(), x, n, [](simd::F v) { return v; });
  const float offset = n ? sum / (float)n : 0.0f;
  *data<float>(a->nested_offset) = offset;
  uint8_t *q = data<uint8_t>(a->q);
  float *nested = data<float>(a->nested_absmax);
  const Code256 code(data<const float>(a->code), n);
  parallel(ctx, ceil_div(n, block), grain_of(block), [&](int64_t begin, int64_t end) {
    float difference[256];
    for (int64_t b = begin; b < end; b++) {
      const int64_t start = b * block, count = min64(block, n - start);
      for (int64_t i = 0; i < count; i++) difference[i] = x[start + i] - offset;
      nested[b] = quantize_block(code, difference, count, q + start);
    }
  });
  return PB_OK;
}

pb_status dequantize_absmax(pb_context *ctx, const pb_dequantize_absmax_args *a) {
  KbitWeight w = {};
  w.absmax_q = data<const uint8_t>(a->q);
  w.nested_absmax = data<const float>(a->nested_absmax);
  w.nested_code = data<const float>(a->nested_code);
  w.nested_offset = *data<const float>(a->nested_offset);
  w.block_offset = a->block_offset;
  w.block_stride = a->block_stride;
  w.row_blocks = a->row_blocks < 1 ? 1 : a->row_blocks;
  float *absmax = data<float>(a->absmax);
  parallel(ctx, numel(a->absmax), grain_of(1), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) absmax[b] = w.scale(b);
  });
  return PB_OK;
}

}  // namespace
