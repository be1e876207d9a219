// 8-bit blockwise quantization and the double quantization of absmax (docs/numerics.md).

namespace {

// The 255 midpoints between neighbouring codes as a search tree in heap order: node i has children 2i and 2i + 1.
struct Code256 {
  float tree[256];
  simd::Table8 top, level3;
  simd::Table16 level4, level5a, level5b;

  // keep_positive: no positive value becomes the code of zero.
  explicit Code256(const float *code, bool keep_positive = false) {
    tree[0] = 0.0f;
    for (int level = 0; level < 8; level++)
      for (int k = 0; k < 1 << level; k++) {
        const int i = ((2 * k + 1) << (7 - level)) - 1;
        tree[(1 << level) + k] = keep_positive && code[i] == 0.0f ? 0.0f : (code[i] + code[i + 1]) * 0.5f;
      }
    top = simd::table8(tree);
    level3 = simd::table8(tree + 8);
    level4 = simd::table16(tree + 16);
    level5a = simd::table16(tree + 32);
    level5b = simd::table16(tree + 48);
  }

  // The codes of N * W values, side by side, because each level waits for the one before. NaN is above no threshold and
  // ends at 0.
  template <int N>
  void rank(const simd::F (&s)[N], simd::I (&i)[N]) const {
    using namespace simd;
    for (int k = 0; k < N; k++) i[k] = set1i(1);
    for (int level = 0; level < 3; level++)
      for (int k = 0; k < N; k++) i[k] = descend(i[k], gt(s[k], lookup8(top, i[k])));
    for (int k = 0; k < N; k++) i[k] = descend(i[k], gt(s[k], lookup8(level3, i[k])));
    for (int k = 0; k < N; k++) i[k] = descend(i[k], gt(s[k], lookup16(level4, i[k])));
    for (int k = 0; k < N; k++) {
      const M right = gti(i[k], set1i(47));
      i[k] = descend(i[k], gt(s[k], select(right, lookup16(level5b, i[k]), lookup16(level5a, i[k]))));
    }
    for (int level = 6; level < 8; level++)
      for (int k = 0; k < N; k++) i[k] = descend(i[k], gt(s[k], gather(tree, i[k])));
    for (int k = 0; k < N; k++) i[k] = addi(i[k], set1i(-256));
  }
};

// One block; returns what to store as absmax.
inline float quantize_block(const Code256 &code, const float *x, int64_t n, uint8_t *q) {
  const uint32_t bits = absmax_bits(x, n);
  const simd::F inv = simd::set1(pb::inverse_absmax(bits));
  constexpr int many = 4;
  int64_t i = 0;
  for (; i + many * simd::W <= n; i += many * simd::W) {
    simd::F s[many];
    simd::I codes[many];
    for (int k = 0; k < many; k++) s[k] = simd::mul(simd::load(x + i + k * simd::W), inv);
    code.rank(s, codes);
    for (int k = 0; k < many; k++) simd::store_u8(q + i + k * simd::W, codes[k]);
  }
  for (; i < n; i += simd::W) {
    const int left = (int)min64(n - i, simd::W);
    const simd::F s[1] = {simd::mul(simd::load_n(x + i, left), inv)};
    simd::I codes[1];
    code.rank(s, codes);
    simd::store_u8_n(q + i, codes[0], left);
  }
  return pb::stored_absmax(bits);
}

pb_status quantize_blockwise(pb_context *ctx, const pb_quantize_blockwise_args *a) {
  return with_dtype(ctx, "quantize_blockwise", a->x, [&](auto dtype) {
    typedef decltype(dtype) D;
    const int64_t n = numel(a->x), block = a->block;
    const typename D::type *x = data<const typename D::type>(a->x);
    uint8_t *q = data<uint8_t>(a->q);
    float *absmax = data<float>(a->absmax);
    const Code256 code(data<const float>(a->code));
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
  const Code256 code(data<const float>(a->code));
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
