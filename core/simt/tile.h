// How the waves of a group multiply two slabs in the memory of the group: the part of a tiled product that an
// architecture replaces by its matrix instruction. What is around it (core/kernels/gemm.h) stays the same.
//
// A slab is rows of 32-bit words along k: A [group_rows][stride] and B [group_columns][stride]. A word holds `per_word`
// neighbouring values of k, the first in its lowest bits: one of 32 bits, two of 16 or four of 8. The group computes
// C[m][n] = sum over k of A[m][k] B[n][k]; a wave has a rectangle of C, which is repeat_m x repeat_n tiles; a tile is
// the C of one multiply(), rows(w) x columns elements over `words` words of k. A Tile is a type of static members:
//
//   enum : u32 {
//     per_word, words,            of a tile, along k
//     threads,                    of a group: a multiple of every width the tile is for
//     group_rows, group_columns,  of C
//     slab_words,                 of k that are in the memory of the group at once: a multiple of words
//     chain_words,                of a slab that are summed up before they are added to the total; they divide it
//     stride,                     of a slab's rows: slab_words and what avoids bank conflicts, a multiple of 4
//     columns, repeat_m, repeat_n,
//     sums                        of C in one lane, for one tile
//   };
//   u32 rows(Wave w)              a tile's rows of C; columns must not depend on the width
//   typedef ... Sum               float or i32
//   struct Sums { Sum v[sums]; }
//   struct A, struct B            a lane's share of the operands of one multiply()
//   A load_a(Wave w, PB_LOCAL const u32 *a, u32 stride)        a: the tile's first row and word
//   B load_b(Wave w, PB_LOCAL const u32 *b, u32 stride)        b: the tile's first column and word
//   Sums multiply(Wave w, A a, B b, Sums c)                    c + A B^T
//   u32 row(Wave w, u32 i), column(Wave w, u32 i)              where in the tile the lane's sum i belongs
//   void put(PB_LOCAL u32 *p, F8 or Bits8<T> x)                eight neighbours of k, p 16-byte aligned (float tiles)
//   u32 word(float x, float y)                                 one word; y counts where it holds two (float tiles)
//   void put(PB_LOCAL u32 *p, U4 x)                            sixteen neighbours of k, p 16-byte aligned (int8 tiles)
//
// All lanes of a wave call each of these at the same place, so that multiply() may shuffle. The lanes of an emulated
// matrix instruction hold what the hardware's would and exchange it by shuffles alone.
//
// group_rows = threads / width / (group_columns / (repeat_n * columns)) * repeat_m * rows(w), for every width.
// A float tile and an int8 tile that work on one C (linear_int8) must have the same shape and places of C.
#ifndef PB_SIMT_TILE_H
#define PB_SIMT_TILE_H

#include "wave.h"

namespace pb {

PB_FN u32 bits1(PB_GLOBAL const float *p) { return as_u32(*p); }
PB_FN u32 bits1(PB_GLOBAL const Bf16 *p) { return p->bits; }
PB_FN u32 bits1(PB_GLOBAL const Fp16 *p) { return p->bits; }
PB_FN float float_of(u32 bits, float) { return as_float(bits); }
PB_FN float float_of(u32 bits, Bf16) { return bf16_to_float(u16(bits)); }
PB_FN float float_of(u32 bits, Fp16) { return widen_half(u16(bits)); }

// All ones if a < b, else 0, for numbers below 2^31: what is not there is read from where something is, and masked off.
// Branches around so many loads would need more masks of lanes than an AMD wave has registers for.
PB_FN u32 below(u32 a, u32 b) { return u32(i32(a - b) >> 31); }

// Eight neighbours as they are in memory: what waits in registers, and what a tile of 16-bit words takes as it is.
template <class T>
struct Bits8 {
  enum : u32 { size = 8u * sizeof(T), of_word = 32u / size, words = 8u / of_word };
  u32 v[words];
};
template <class T>
PB_FN Bits8<T> load_whole8(PB_GLOBAL const T *p) {
  Bits8<T> r;
  PB_UNROLL
  for (u32 h = 0; h < Bits8<T>::words / 4u; h++) {
    const U4 a = load16((PB_GLOBAL const u32 *)p + 4u * h);
    PB_UNROLL
    for (u32 k = 0; k < 4; k++) r.v[4u * h + k] = a.v[k];
  }
  return r;
}
// Elements first ... first + 7 of n, zeros behind the end; none of them unless `there`. aligned: p to 16 bytes. The
// slow way loads without branches: an element that is not there is read from the first place.
template <class T>
PB_FN Bits8<T> load_bits8(PB_GLOBAL const T *p, i64 first, i64 n, bool there, bool aligned) {
  const i64 left = there ? n - first : 0;
  if (aligned && left >= 8) return load_whole8(p + first);
  Bits8<T> r;
  PB_UNROLL
  for (u32 k = 0; k < Bits8<T>::words; k++) r.v[k] = 0;
  if (left > 0) {
    const u32 count = left < 8 ? u32(left) : 8u;
    PB_UNROLL
    for (u32 k = 0; k < 8; k++)
      r.v[k / Bits8<T>::of_word] |= (bits1(p + first + min_u32(k, count - 1)) & below(k, count))
                                    << (k % Bits8<T>::of_word * Bits8<T>::size);
  }
  return r;
}
template <class T>
PB_FN F8 floats8(Bits8<T> x) {
  F8 r;
  PB_UNROLL
  for (u32 k = 0; k < 8; k++)
    r.v[k] = float_of(x.v[k / Bits8<T>::of_word] >> (k % Bits8<T>::of_word * Bits8<T>::size), T());
  return r;
}

// The arithmetic of one word.
struct FmaWord {
  typedef float Sum;
  enum : u32 { per_word = 1, slab_words = 32, chain_words = 16 };  // a longer chain of fp32 sums is less exact
  PB_FN float add(u32 a, u32 b, float c) { return fma_rn(as_float(a), as_float(b), c); }
};
struct Dot4Word {
  typedef i32 Sum;
  enum : u32 { per_word = 4, slab_words = 16, chain_words = 16 };
  PB_FN i32 add(u32 a, u32 b, i32 c) { return dot4(a, b, c); }
};

// No matrix instruction: the lanes are width / 8 rows of eight, each with 4 x 4 sums, added up in the order of k. For
// every width; what a sum is does not depend on it.
template <class Word>
struct LaneTile {
  enum : u32 {
    per_word = Word::per_word,
    words = 4,
    threads = 256,
    group_rows = 64,
    group_columns = 64,
    slab_words = Word::slab_words,
    chain_words = Word::chain_words,
    stride = slab_words + 4,  // eight rows of four words touch each bank once
    columns = 32,
    repeat_m = 1,
    repeat_n = 1,
    sums = 16
  };
  PB_FN u32 rows(Wave w) { return w.width() / 2u; }
  typedef typename Word::Sum Sum;
  struct Sums {
    Sum v[sums];
  };
  struct Words {
    U4 of[4];  // of each of four rows or columns
  };
  typedef Words A;
  typedef Words B;

  PB_FN u32 row(Wave w, u32 i) { return w.lane() / 8u + i / 4u * (w.width() / 8u); }
  PB_FN u32 column(Wave w, u32 i) { return w.lane() % 8u + i % 4u * 8u; }

  PB_FN A load_a(Wave w, PB_LOCAL const u32 *a, u32 stride_a) {
    A r;
    PB_UNROLL
    for (u32 i = 0; i < 4; i++) r.of[i] = load16(a + row(w, 4u * i) * stride_a);
    return r;
  }
  PB_FN B load_b(Wave w, PB_LOCAL const u32 *b, u32 stride_b) {
    B r;
    PB_UNROLL
    for (u32 i = 0; i < 4; i++) r.of[i] = load16(b + column(w, i) * stride_b);
    return r;
  }
  PB_FN Sums multiply(Wave, A a, B b, Sums c) {
    PB_UNROLL
    for (u32 k = 0; k < words; k++) {
      PB_UNROLL
      for (u32 i = 0; i < sums; i++) c.v[i] = Word::add(a.of[i / 4u].v[k], b.of[i % 4u].v[k], c.v[i]);
    }
    return c;
  }

  PB_FN void put(PB_LOCAL u32 *p, F8 x) {
    U4 low, high;
    PB_UNROLL
    for (u32 k = 0; k < 4; k++) {
      low.v[k] = as_u32(x.v[k]);
      high.v[k] = as_u32(x.v[4 + k]);
    }
    store16(p, low);
    store16(p + 4, high);
  }
  template <class T>
  PB_FN void put(PB_LOCAL u32 *p, Bits8<T> x) {
    put(p, floats8(x));
  }
  PB_FN u32 word(float x, float) { return as_u32(x); }
  PB_FN void put(PB_LOCAL u32 *p, U4 x) { store16(p, x); }
};

typedef LaneTile<FmaWord> FmaTile;
typedef LaneTile<Dot4Word> Dot4Tile;

// What a device multiplies with: for x of type T the tile of floats, and that of bytes, both with the same C.
struct LaneTiles {
  template <class T>
  using Floats = FmaTile;
  template <class T>
  using Bytes = Dot4Tile;
};

}  // namespace pb
#endif
