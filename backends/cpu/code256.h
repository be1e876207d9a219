// From values to the codes of an ascending map of 256 values (docs/numerics.md, "8-bit blockwise").
#ifndef POLYBIT_CPU_CODE256_H
#define POLYBIT_CPU_CODE256_H

#include "math/encode.h"
#include "parallel.h"

namespace {

// The code of a value is the number of the 255 midpoints between neighbouring codes that are below.
struct Code256 {
  // Ways to it:
  // - search, for every map: the midpoints are a tree in heap order, node i has children 2i and 2i + 1.
  // - cells, where midpoints are far enough apart: a cell is the floats with the same upper 16 bits, with one midpoint
  //   at most. Its entry holds the code below that and a fraction, less the cell itself, such that adding a float
  //   leaves the code, with a carry where the float is above.
  // - mirrored_cells, where negative values have codes like positive ones, counted down from that of zero.
  enum Way { search, cells, mirrored_cells };

  static constexpr int lower = 17;  // bits below a cell: 16 of the float and, as the lowest, its sign
  static constexpr uint32_t fraction = (1 << lower) - 1;
  static constexpr int last = 0x3f80;             // the cell of 1; what was divided by its absmax is in no higher one
  static constexpr int most = 24 << 7;            // entries: for 24 powers of two
  static constexpr int64_t worthwhile = 1 << 12;  // values, for which it pays to make entries

  float tree[256], midpoint[256];
  simd::Table8 top, level3;
  simd::Table16 level4, level5a, level5b;

  Way way;        // the quickest for numbers
  int first = 0;  // the first cell; what is smaller counts as its smallest float
  int32_t entries[most];

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
    const Way wanted = code[127] == 0.0f ? mirrored_cells : cells;
    way = count >= worthwhile && make_entries(wanted) ? wanted : search;
  }

  // Entries for the positive midpoints, as codes above that of zero; false if this map can have none.
  bool make_entries(Way wanted) {
    for (int k = 0; wanted == mirrored_cells && k < 127; k++)
      if (midpoint[126 - k] != -midpoint[127 + k]) return false;
    const int zero = wanted == mirrored_cells ? 127 : 0;
    int next = zero;
    if (wanted == cells) {  // look_up compares with the first midpoint, which may be 0
      if (!(midpoint[0] >= 0.0f)) return false;
      next++;
    }
    const auto cell_of = [&](int i) { return (int)(pb::as_u32(midpoint[i]) >> 16); };
    if (!(midpoint[next] > 0.0f)) return false;
    first = cell_of(next);
    if (first <= last - most) return false;
    for (int cell = first; cell <= last; cell++) {
      uint32_t entry = (uint32_t)(next - zero) << lower;
      if (cell_of(next) == cell) entry += fraction - ((pb::as_u32(midpoint[next++]) & 0xffff) << 1);
      entries[cell - first] = (int32_t)(entry - ((uint32_t)cell << lower));
      if (!(midpoint[next] > midpoint[next - 1]) || cell_of(next) <= cell) return false;
    }
    return true;
  }

  // What look_up reads, in registers: the stores of codes could change members.
  struct Cells {
    const float *entry;  // by cell, though those below the first have none
    simd::I smallest;    // size of the first cell's smallest float
    simd::F least;
  };
  Cells own_cells() const {
    const uintptr_t entry = (uintptr_t)entries - (uintptr_t)first * sizeof(entries[0]);
    return {(const float *)entry, simd::set1i(first << lower), simd::set1(midpoint[0])};
  }

  // The codes of numbers in [-1, 1], or -1, which is to be stored as 0. A tie goes to the lower code: where that is the
  // one of the larger size, the sign makes the size one bit larger.
  template <Way WAY>
  static simd::I look_up(const Cells &cells, simd::F s) {
    using namespace simd;
    const I size = maxi(rotate1(as_int(s)), cells.smallest);
    const I codes = shr(addi(as_int(gather(cells.entry, shr(size, lower))), size), lower);
    if (WAY == mirrored_cells) return addi(negate_if(as_int(s), codes), set1i(127));  // there is no code of -1
    return selecti(gt(s, cells.least), codes, set1i(0));
  }

  // The codes of N * W values, side by side, because each step waits for the one before. NaN is above no midpoint and
  // ends at 0.
  template <int N>
  void find(const simd::F (&s)[N], simd::I (&i)[N]) const {
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
    for (int k = 0; k < N; k++) i[k] = subi(i[k], set1i(256));  // the first leaf
  }

  template <Way WAY, int N>
  void rank(const Cells &cells, const simd::F (&s)[N], simd::I (&codes)[N]) const {
    if (WAY == search) return find(s, codes);
    for (int k = 0; k < N; k++) codes[k] = look_up<WAY>(cells, s[k]);
  }

  template <Way WAY>
  void quantize_by(const float *x, simd::F inv, int64_t n, uint8_t *q) const {
    using namespace simd;
    const Cells cells = own_cells();
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
      F s[4];
      I codes[4];
      for (int k = 0; k < 4; k++) s[k] = mul(load(x + i + k * W), inv);
      rank<WAY>(cells, s, codes);
      store_u8x4(q + i, codes);
    }
    for (; i < n; i += W) {
      const int left = (int)min64(n - i, W);
      const F s[1] = {mul(load_n(x + i, left), inv)};
      I codes[1];
      rank<WAY>(cells, s, codes);
      store_u8_n(q + i, maxi(codes[0], set1i(0)), left);
    }
  }

  // The codes of n values x * inv, which are all numbers or not.
  void quantize(const float *x, simd::F inv, bool numbers, int64_t n, uint8_t *q) const {
    if (way == mirrored_cells && numbers) return quantize_by<mirrored_cells>(x, inv, n, q);
    if (way == cells && numbers) return quantize_by<cells>(x, inv, n, q);
    quantize_by<search>(x, inv, n, q);
  }
};

}  // namespace
#endif
