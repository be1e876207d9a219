// 2, 3 and 4-bit quantization (docs/numerics.md, "k-bit" and "Scale search").

namespace {

struct KbitCode {
  float tree_values[16];  // thresholds as a search tree in heap order
  int32_t order_values[16];
  float code_values[16];  // the value of each rank
  simd::Table16 tree, value;
  simd::Table16i order;

  KbitCode(const float *code, const float *thresholds, const uint8_t *stored, int bits) {
    for (int i = 0; i < 16; i++) tree_values[i] = code_values[i] = 0.0f, order_values[i] = 0;
    for (int level = 0; level < bits; level++)
      for (int k = 0; k < 1 << level; k++)
        tree_values[(1 << level) + k] = thresholds[((2 * k + 1) << (bits - 1 - level)) - 1];
    for (int r = 0; r < 1 << bits; r++) {
      order_values[r] = stored[r];
      code_values[r] = code[stored[r]];
    }
    tree = simd::table16(tree_values);
    value = simd::table16(code_values);
    order = simd::table16i(order_values);
  }

  // The rank, plus 1 << BITS: the low bits are what the lookups need.
  template <int BITS>
  simd::I rank(simd::F s) const {
    simd::I i = simd::set1i(1);
    for (int level = 0; level < BITS; level++) i = simd::descend(i, simd::gt(s, simd::lookup16(tree, i)));
    return BITS == 4 ? i : simd::and_(i, simd::set1i((1 << BITS) - 1));
  }
};

// Packs n codes of a byte each; `codes` is readable, and holds the code of zero, up to a multiple of 8.
template <int BITS>
inline void pack_codes(const uint8_t *codes, int64_t n, uint8_t *q) {
  const int64_t bytes = ceil_div(n * BITS, 8);
  if (BITS == 4) {
    for (int64_t i = 0; i < bytes; i++) q[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
  } else if (BITS == 2) {
    for (int64_t i = 0; i < bytes; i++)
      q[i] = (uint8_t)(codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 | codes[4 * i + 3] << 6);
  } else {
    for (int64_t i = 0; i < bytes; i += 3) {
      const uint8_t *c = codes + i / 3 * 8;
      uint32_t word = 0;
      for (int k = 0; k < 8; k++) word |= (uint32_t)c[k] << 3 * k;
      for (int64_t k = 0; k < min64(3, bytes - i); k++) q[i + k] = (uint8_t)(word >> 8 * k);
    }
  }
}

// The block in the order of the search: lane l of vector v holds element l * vectors + v, so that neighbours meet in
// the same lane and the tree sum needs only whole-vector additions until the last vector.
struct SearchBlock {
  float u[4096];
  float inside[4096];  // 1 where there is an element, else 0
  int64_t vectors;

  SearchBlock(const float *x, int64_t n, float inv) {
    vectors = 1;
    while (vectors * simd::W < n) vectors *= 2;
    for (int64_t v = 0; v < vectors; v++)
      for (int64_t l = 0; l < simd::W; l++) {
        const int64_t i = l * vectors + v;
        u[v * simd::W + l] = i < n ? x[i] * inv : 0.0f;
        inside[v * simd::W + l] = i < n ? 1.0f : 0.0f;
      }
  }
};

// The factor num / den of the best candidate, or 0 if none wins.
template <int BITS>
inline float search_scale(const KbitCode &code, const SearchBlock &s) {
  float best = 0.0f, factor = 0.0f;
  for (int j = 0; j < 32; j++) {
    const simd::F g = simd::set1(1.0f / ((float)(j + 13) * 0.03125f));
    simd::F nums[16], dens[16], num = simd::zero(), den = num;
    for (int64_t v = 0; v < s.vectors; v++) {
      const simd::F u = simd::load(s.u + v * simd::W);
      simd::F c = simd::lookup16(code.value, code.rank<BITS>(simd::mul(u, g)));
      c = simd::select(simd::gt(simd::load(s.inside + v * simd::W), simd::zero()), c, simd::zero());
      num = simd::mul(u, c);
      den = simd::mul(c, c);
      int k = 0;
      for (; v >> k & 1; k++) {
        num = simd::add(nums[k], num);
        den = simd::add(dens[k], den);
      }
      nums[k] = num;
      dens[k] = den;
    }
    const float n = simd::reduce_add(num), d = simd::reduce_add(den);
    const float gain = d > 0.0f && n > 0.0f ? (n * n) / d : 0.0f;
    if (gain > best) {
      best = gain;
      factor = n / d;
    }
  }
  return factor;
}

// One block of n values; returns what to store as absmax.
template <int BITS>
inline float quantize_kbit_block(const KbitCode &code, const float *x, int64_t n, bool search, uint8_t zero,
                                 uint8_t *q) {
  uint32_t bits = absmax_bits(x, n);
  if (search && !pb::is_zero_block(bits) && bits < 0x7f800000u) {
    const SearchBlock block(x, n, pb::inverse_absmax(bits));
    const uint32_t better = pb::as_u32(pb::as_float(bits) * search_scale<BITS>(code, block));
    if (!pb::is_zero_block(better) && better < 0x7f800000u) bits = better;
  }
  const simd::F inv = simd::set1(pb::inverse_absmax(bits));
  uint8_t codes[4096 + 16];
  int64_t i = 0;
  for (; i + simd::W <= n; i += simd::W)
    simd::store_u8(codes + i, simd::lookup16i(code.order, code.rank<BITS>(simd::mul(simd::load(x + i), inv))));
  if (i < n) {
    const simd::F s = simd::mul(simd::load_n(x + i, (int)(n - i)), inv);
    simd::store_u8(codes + i, simd::lookup16i(code.order, code.rank<BITS>(s)));
  }
  for (int64_t k = n; k < (n + 7) / 8 * 8; k++) codes[k] = zero;
  pack_codes<BITS>(codes, n, q);
  return pb::stored_absmax(bits);
}

template <int BITS, class D>
void quantize_kbit_as(pb_context *ctx, const pb_quantize_kbit_args *a, D dtype) {
  const int64_t n = numel(a->x), block = a->block;
  const typename D::type *x = data<const typename D::type>(a->x);
  const float *thresholds = data<const float>(a->thresholds);
  const uint8_t *order = data<const uint8_t>(a->order);
  const KbitCode code(data<const float>(a->code), thresholds, order, BITS);
  const uint8_t zero = order[pb::rank_of(thresholds, (1u << BITS) - 1, 0.0f)];
  uint8_t *q = data<uint8_t>(a->q);
  float *absmax = data<float>(a->absmax);
  const bool search = a->search != 0;
  parallel(ctx, ceil_div(n, block), grain_of(search ? 32 * block : block), [&](int64_t begin, int64_t end) {
    float buffer[4096];
    for (int64_t b = begin; b < end; b++) {
      const int64_t start = b * block, count = min64(block, n - start);
      const float *values = as_float32(dtype, x + start, count, buffer);
      absmax[b] = quantize_kbit_block<BITS>(code, values, count, search, zero, q + start / 8 * BITS);
    }
  });
}

pb_status quantize_kbit(pb_context *ctx, const pb_quantize_kbit_args *a) {
  return with_dtype(ctx, "quantize_kbit", a->x, [&](auto dtype) {
    if (a->bits == 4)
      quantize_kbit_as<4>(ctx, a, dtype);
    else if (a->bits == 3)
      quantize_kbit_as<3>(ctx, a, dtype);
    else
      quantize_kbit_as<2>(ctx, a, dtype);
    return (pb_status)PB_OK;
  });
}

pb_status dequantize_kbit(pb_context *ctx, const pb_dequantize_kbit_args *a) {
  return with_output(ctx, "dequantize_kbit", a->y, true, [&](auto dtype) {
    typedef decltype(dtype) D;
    const int64_t n = numel(a->y);
    if (n == 0) return (pb_status)PB_OK;
    const KbitWeight weight = kbit_weight(a, last_dim(a->y));
    typename D::type *y = data<typename D::type>(a->y);
    // Parts of whole vectors, so that streamed stores stay aligned.
    const int64_t part = 4096;
    parallel(ctx, ceil_div(n, part), grain_of(part), [&](int64_t begin, int64_t end) {
      const int64_t start = begin * part;
      weight.decode_as(dtype, start, min64(end * part, n) - start, y + start);
      finish(dtype);
    });
    return (pb_status)PB_OK;
  });
}

}  // namespace
