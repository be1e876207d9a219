// From values to the codes of an ascending map of 256 values (docs/numerics.md, "8-bit blockwise").
#ifndef POLYBIT_CPU_CODE256_H
#define POLYBIT_CPU_CODE256_H

#include "math/encode.h"
#include "parallel.h"

namespace {

// The code of a value is the number of the 255 midpoints between neighbouring codes that are below. Two ways to it:
// - search, for every map: the midpoints are a tree in heap order, node i has children 2i and 2i + 1.
// - compute, for the dynamic maps. Their levels are evenly spaced within a decade, twice as many as in the one below,
// so
//   the number u of a level, counted such that decade i begins at 2^i, is a float with a decimal exponent:
//   u = floor(2^i * h), h = size * factor[i] + 8/9 in [1, 2). Close to an integer this is not certain: search.
// Whether a map is dynamic is not told but found, by a proof over all midpoints (is_exact).
struct Code256 {
  static constexpr int fraction = 14;  // bits of 2^i * h behind the point
  static constexpr float unit = 1.0f / (1 << fraction);
  static constexpr int32_t certain = (1 << fraction) - 3;  // the last fraction that is not close, less 1 (position)
  static constexpr int64_t worthwhile = 1 << 12;           // values, for which the proof pays

  float tree[256], midpoint[256];
  simd::Table8 top, level3;
  simd::Table16 level4, level5a, level5b;

  bool computed;                 // whether compute is right
  bool mirrored;                 // whether negative values have codes like positive ones; then there is none of -1
  float boundary[8], factor[8];  // of decade i, at i & 7: the midpoint at its upper end, and its factor
  simd::Table8 boundaries, factors;
  float smallest;       // what is smaller counts as this
  float guess, origin;  // what position adds

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
    mirrored = code[127] == 0.0f;
    computed = count >= worthwhile && find_decades(code) && is_exact();
  }

  // Zero is u = 0 of a mirrored map and u = 1 of the other: a decade of its own. 1, above all decades, is compute's.
  bool find_decades(const float *code) {
    const int zero = mirrored ? -1 : 0, first = mirrored ? 127 : -1;  // the decade of zero, and the code of u = 0
    for (int k = 0; mirrored && k < 127; k++)
      if (midpoint[126 - k] != -midpoint[127 + k]) return false;
    const auto begin = [&](int i) { return first + (1 << i); };  // the first code of a decade
    for (int i = zero; i < zero + 8; i++) {
      boundary[i & 7] = i < zero + 7 ? midpoint[begin(i + 1) - 1] : __builtin_inff();
      if (i > zero) factor[i & 7] = (10.0f / 9 - 0.5f / (float)(1 << i)) / code[begin(i + 1) - 1];
    }
    const float low = 0.17f / factor[zero + 1];
    smallest = boundary[zero & 7] > low ? boundary[zero & 7] : low;
    factor[zero & 7] = 0.6f / smallest;
    boundaries = simd::table8(boundary);
    factors = simd::table8(factor);
    guess = 0x1.8p23f + (float)(zero - 31);  // the bits of 1 become 38 - 31, its decade
    origin = 0x1p23f * unit + (float)first - unit;
    return true;
  }

  // 2^i * h + first in fixed point, less 1, behind the exponent of a float; i in the three lowest bits of decade.
  simd::I position(simd::F size, simd::I &decade) const {
    using namespace simd;
    const F x = max(size, set1(smallest));
    // The bits of a float are about its logarithm. They tell the decade, or the one below.
    decade = as_int(madd(to_float(as_int(x)), set1(37.8f / (127 << 23)), set1(guess)));
    decade = increment(decade, gt(size, lookup8(boundaries, decade)));
    // h reaches 2 between the last level of a decade and its boundary.
    const F h = min(madd(x, lookup8(factors, decade), set1(8.0f / 9)), set1(2.0f - 0x1p-8f));
    return as_int(add(as_float(addi(as_int(h), shl(decade, 23))), set1(origin)));
  }

  // Whether position is right, or close to right, at both ends of what each code stands for. Within a decade it rises
  // with size, and the guess of the decade rises as well, so all between two ends of the same decade is right, too.
  bool is_exact() const {
    using namespace simd;
    const int zero = mirrored ? 127 : 0;
    for (int begin = zero; begin < 256; begin += W) {
      float low[W], high[W];
      int32_t want[W];
      for (int k = 0; k < W; k++) {
        const int c = begin + k < 255 ? begin + k : 255;
        low[k] = c == zero ? 0.0f : midpoint[c - 1] > 0.0f ? pb::as_float(pb::as_u32(midpoint[c - 1]) + 1) : 0x1p-126f;
        high[k] = c == 255 ? 2.0f : midpoint[c];
        want[k] = ((127 + 23 - fraction) << 23) + ((c < 255 ? c : 254) << fraction);
      }
      I decade, other;
      const I at_low = position(load(low), decade), at_high = position(load(high), other), from = load_i(want);
      const M wrong[] = {gti(addi(from, set1i(-2)), at_low), gti(at_high, addi(from, set1i((1 << fraction) - 1))),
                         gti(and_(xor_(decade, other), set1i(7)), set1i(0))};
      if (bits(wrong[0]) | bits(wrong[1]) | bits(wrong[2])) return false;
    }
    return true;
  }

  // The position of n <= 256 numbers x * inv. A tie goes to the lower code: where that is the one of the larger size,
  // it counts as one bit larger.
  template <bool MIRRORED>
  void locate(const float *x, simd::F inv, int64_t n, int32_t *positions) const {
    using namespace simd;
    for (int64_t i = 0; i < n; i += W) {
      const F s = mul(i + W <= n ? load(x + i) : load_n(x + i, (int)(n - i)), inv);
      I decade;
      const F size = MIRRORED ? as_float(subi(as_int(abs_(s)), sar(as_int(s), 31))) : s;
      store_i(positions + i, position(size, decade));
    }
  }

  // The codes of N * W numbers from their positions; whether all are certain.
  template <bool MIRRORED, int N>
  bool compute(const simd::F (&s)[N], const int32_t *positions, simd::I (&codes)[N]) const {
    using namespace simd;
    I closest = set1i(0);
    for (int k = 0; k < N; k++) {
      const I p = load_i(positions + k * W), sign = sar(as_int(s[k]), 31);
      closest = maxi(closest, and_(p, set1i((1 << fraction) - 1)));
      codes[k] = increment(shr(p, fraction), gt(s[k], set1(midpoint[254])));
      if (MIRRORED) codes[k] = xor_(subi(codes[k], sign), sign);  // in its low byte ~(127 + u + 1) is 127 - u
    }
    return !bits(gti(closest, set1i(certain)));
  }

  // The codes of N * W values, side by side, because each step waits for the one before. NaN is above no midpoint and
  // ends at 0.
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
  }

  template <int N>
  void rank(const simd::F (&s)[N], const int32_t *positions, simd::I (&codes)[N]) const {
    if (positions && (mirrored ? compute<true>(s, positions, codes) : compute<false>(s, positions, codes))) return;
    search(s, codes);
  }

  // The codes of n values x * inv, which are all numbers or not.
  void quantize(const float *x, simd::F inv, bool numbers, int64_t n, uint8_t *q) const {
    using namespace simd;
    constexpr int64_t chunk = 256;
    int32_t buffer[chunk];
    for (int64_t begin = 0; begin < n; begin += chunk) {
      const int64_t count = min64(chunk, n - begin);
      const float *from = x + begin;
      uint8_t *to = q + begin;
      const int32_t *positions = nullptr;
      if (computed && numbers) {
        // A loop of its own, because a processor has more of two short chains of steps in flight than of a long one.
        mirrored ? locate<true>(from, inv, count, buffer) : locate<false>(from, inv, count, buffer);
        positions = buffer;
      }
      int64_t i = 0;
      for (; i + 4 * W <= count; i += 4 * W) {
        F s[4];
        I codes[4];
        for (int k = 0; k < 4; k++) s[k] = mul(load(from + i + k * W), inv);
        rank(s, positions ? positions + i : nullptr, codes);
        store_u8x4(to + i, codes);
      }
      for (; i < count; i += W) {
        const int left = (int)min64(count - i, W);
        const F s[1] = {mul(load_n(from + i, left), inv)};
        I codes[1];
        rank(s, positions ? positions + i : nullptr, codes);
        store_u8_n(to + i, codes[0], left);
      }
    }
  }
};

}  // namespace
#endif
