// Apple's simdgroup_matrix, for waves of 32: 8 x 8 of C from eight values of k, every GPU of family Apple7 or later has
// it (all of the M series). A lane holds two neighbours of a row of a matrix:
//
//   row     4 (lane / 16) + lane / 2 % 4
//   column  4 (lane / 8 % 2) + 2 (lane % 2), and the next
//
// The Metal specification has thread_elements() but not these places; they are those of Apple's MLX (steel/gemm/mma.h).
// All matrices are of fp32, so values of fp16, bf16 and bytes are what they were. The hardware's order of a sum is its
// own. Slabs and the shape of C are those of LaneTile; the host needs no more of these tiles than that.
#ifndef PB_SIMT_TILE_SIMDGROUP_H
#define PB_SIMT_TILE_SIMDGROUP_H

#include "tile.h"
#include "../math/int8.h"

namespace pb {

template <class Word, u32 WORDS>
struct SimdgroupTile : LaneTile<Word> {
  enum : u32 { words = WORDS, columns = 8, repeat_m = 4, repeat_n = 2, sums = 2 };
  PB_FN u32 rows(Wave) { return 8; }
  PB_FN u32 row(Wave w, u32) { return w.lane() / 16u * 4u + w.lane() / 2u % 4u; }
  PB_FN u32 column(Wave w, u32 i) { return w.lane() / 8u % 2u * 4u + w.lane() % 2u * 2u + i; }
  struct Sums {
    typename Word::Sum v[sums];
  };
};

#ifdef PB_SIMDGROUP_MATRIX
// The lane's two.
struct Elements {
  float v[2];
};
PB_FN metal::simdgroup_float8x8 matrix_of(Elements x) {
  metal::simdgroup_float8x8 m;
  m.thread_elements()[0] = x.v[0];
  m.thread_elements()[1] = x.v[1];
  return m;
}
PB_FN Elements multiply_matrices(Elements a, Elements b, Elements c) {
  metal::simdgroup_float8x8 sum = matrix_of(c);
  metal::simdgroup_multiply_accumulate(sum, matrix_of(a), matrix_of(b), sum);
  return Elements{{sum.thread_elements()[0], sum.thread_elements()[1]}};
}
#endif

struct SimdgroupFloats : SimdgroupTile<FmaWord, 8> {
#ifdef PB_SIMDGROUP_MATRIX
  typedef Elements A, B;
  PB_FN A load_a(Wave w, PB_LOCAL const u32 *a, u32 pitch) {
    PB_LOCAL const u32 *p = a + row(w, 0) * pitch + column(w, 0);
    return A{{as_float(p[0]), as_float(p[1])}};
  }
  PB_FN B load_b(Wave w, PB_LOCAL const u32 *b, u32 pitch) {  // its rows are k
    PB_LOCAL const u32 *p = b + column(w, 0) * pitch + row(w, 0);
    return B{{as_float(p[0]), as_float(p[pitch])}};
  }
  PB_FN Sums multiply(Wave, A a, B b, Sums c) {
    const Elements sum = multiply_matrices(a, b, Elements{{c.v[0], c.v[1]}});
    return Sums{{sum.v[0], sum.v[1]}};
  }
#endif
};

// Sixteen bytes of k are two multiplications: one with the first two bytes of each word, one with the others. A sum of
// sixteen products is below 2^18, so fp32 has it exactly in whatever order it is added up.
struct SimdgroupBytes : SimdgroupTile<Dot4Word, 4> {
#ifdef PB_SIMDGROUP_MATRIX
  struct A {
    u32 word;
  };
  struct B {
    u32 of[2];  // of two columns, the bytes of the lane's k shifted to places 0 and 2
  };
  PB_FN A load_a(Wave w, PB_LOCAL const u32 *a, u32 pitch) { return A{a[row(w, 0) * pitch + column(w, 0) / 2u]}; }
  PB_FN B load_b(Wave w, PB_LOCAL const u32 *b, u32 pitch) {
    PB_LOCAL const u32 *p = b + column(w, 0) * pitch + row(w, 0) / 2u;
    const u32 shift = row(w, 0) % 2u * 8u;
    return B{{p[0] >> shift, p[pitch] >> shift}};
  }
  PB_FN Sums multiply(Wave, A a, B b, Sums c) {
    Elements sum = {{0.0f, 0.0f}};
    PB_UNROLL
    for (u32 k = 0; k < 4; k += 2)
      sum = multiply_matrices(Elements{{float(signed_byte(a.word, k)), float(signed_byte(a.word, k + 1u))}},
                              Elements{{float(signed_byte(b.of[0], k)), float(signed_byte(b.of[1], k))}}, sum);
    return Sums{{c.v[0] + i32(sum.v[0]), c.v[1] + i32(sum.v[1])}};
  }
#endif
};

struct SimdgroupTiles {
  template <class T>
  using Floats = SimdgroupFloats;
  template <class T>
  using Bytes = SimdgroupBytes;
};

}  // namespace pb
#endif
