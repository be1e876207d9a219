// 8-bit blockwise quantization and the double quantization of absmax (docs/numerics.md).

namespace {

// The codes of values: how many of the 255 midpoints between neighbouring codes are below. The midpoints are a search
// tree in heap order: node i has children 2i and 2i + 1. For many values a faster way is worth its preparation: bins by
// sign, exponent and seven bits of the mantissa, each with the number of midpoints below all of it, so that one
// comparison is left. It takes a map with at most one midpoint in a bin, as the dynamic and the linear ones are.
struct Code256 {
  static constexpr int side = 4096;               // room for the bins of one sign
  static constexpr int32_t first = 103 << 7;      // of 2^-24, the high half of its bits; what is smaller shares its bin
  static constexpr int32_t last = 127 << 7;       // of 1, and of what is larger
  static constexpr int64_t worthwhile = 1 << 14;  // values, for which bins are filled

  float tree[256], midpoint[256], bins[2 * side];
  simd::Table8 top, level3;
  simd::Table16 level4, level5a, level5b;
  bool binned;

  // keep_positive: no positive value becomes the code of zero. count: of the values to come.
  Code256(const float *code, int64_t count, bool keep_positive = false) {
    for (int i = 0; i < 255; i++)
      midpoint[i] = keep_positive && code[i] == 0.0f ? 0.0f : (code[i] + code[i + 1]) * 0.5f;
    midpoint[255] = __builtin_inff();
    tree[0] = 0.0f;
    for (int level = 0; level < 8; level++)
      for (int k = 0; k < 1 << level; k++) tree[(1 << level) + k] = midpoint[((2 * k + 1) << (7 - level)) - 1];
    top = simd::table8(tree);
    level3 = simd::table8(tree + 8);
    level4 = simd::table16(tree + 16);
    level5a = simd::table16(tree + 32);
    level5b = simd::table16(tree + 48);
    binned = count >= worthwhile && fill_bins();
  }

  // false: a bin has more than one midpoint, or they are not in order.
  bool fill_bins() {
    for (int i = 0; i < 255; i++)
      if (!(midpoint[i] <= midpoint[i + 1])) return false;
    const auto edge = [](int k) { return pb::as_float((pb::u32)(first + k) << 16); };
    const auto above = [](int k) { return pb::as_float(((pb::u32)(first + k) << 16) | 0xffff); };
    const int count = last - first;
    int below = 0;
    const auto fill = [&](int bin, float low, float high) {
      while (low > midpoint[below]) below++;
      bins[bin] = (float)below;
      return below == 255 || !(high > midpoint[below + 1]);
    };
    bool single = true;
    for (int k = count; k >= 0; k--)
      single &= fill(side + k, k == count ? -__builtin_inff() : -above(k), k ? -edge(k) : 0.0f);
    for (int k = 0; k <= count; k++) single &= fill(k, k ? edge(k) : 0.0f, k == count ? __builtin_inff() : above(k));
    return single;
  }

  // The codes of N * W values, side by side, because each step waits for the one before. NaN is above no midpoint and
  // ends at 0.
  template <int N>
  void rank(const simd::F (&s)[N], simd::I (&i)[N]) const {
    binned ? look_up(s, i) : search(s, i);
  }

  template <int N>
  void look_up(const simd::F (&s)[N], simd::I (&i)[N]) const {
    using namespace simd;
    for (int k = 0; k < N; k++) {
      const F size = min(max(abs_(s[k]), set1(0x1p-24f)), set1(1.0f));
      const I bin = or_(addi(shr(as_int(size), 16), set1i(-first)), and_(shr(as_int(s[k]), 19), set1i(side)));
      i[k] = cvt_rn(gather(bins, bin));
    }
    for (int k = 0; k < N; k++) {
      i[k] = selecti(gt(s[k], gather(midpoint, i[k])), addi(i[k], set1i(1)), i[k]);
      i[k] = selecti(ge(s[k], s[k]), i[k], set1i(0));
    }
  }

  template <int N>
  void search(const simd::F (&s)[N], simd::I (&i)[N]) const {
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
