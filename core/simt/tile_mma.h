// NVIDIA's mma.sync, for waves of 32: 16 x 8 of C from eight words of k, that is m16n8k16 of halves and m16n8k32 of
// bytes (PTX ISA, "Warp-level matrix instructions"). With g = lane / 4 and t = lane % 4 a lane holds
//
//   A  four words   row g and g + 8, word t, then the same rows, word t + 4
//   B  two words    column g, word t and t + 4
//   C  four sums    row g, columns 2t and 2t + 1, then row g + 8
//
// sm_75 has half the k, and bytes in halves of the rows. It has no bf16: there the lanes exchange words, as they do in
// the emulator.
#ifndef PB_SIMT_TILE_MMA_H
#define PB_SIMT_TILE_MMA_H

#include "tile_matrix.h"

namespace pb {

template <class Word>
struct MmaTile : MatrixTile<Word> {
  enum : u32 {
    per_word = Word::per_word,
    words = 8,
    threads = 256,
    group_rows = 64,
    group_columns = 128,
    slab_words = 16,
    chain_words = slab_words,
    stride = slab_words + 4,  // the 32 words of a load lie in 32 banks
    columns = 8,
    repeat_m = 1,
    repeat_n = 8,
    sums = 4
  };
  PB_FN u32 rows(Wave) { return 16; }
  PB_FN u32 row(Wave w, u32 i) { return w.lane() / 4u + i / 2u * 8u; }
  PB_FN u32 column(Wave w, u32 i) { return w.lane() % 4u * 2u + i % 2u; }
  struct Sums {
    typename Word::Sum v[sums];
  };
  struct A {
    u32 of[4];
  };
  struct B {
    u32 of[2];
  };

  PB_FN A load_a(Wave w, PB_LOCAL const u32 *a, u32 pitch) {
    PB_LOCAL const u32 *p = a + w.lane() / 4u * pitch + w.lane() % 4u;
    return A{{p[0], p[8u * pitch], p[4], p[8u * pitch + 4u]}};
  }
  PB_FN B load_b(Wave w, PB_LOCAL const u32 *b, u32 pitch) {
    PB_LOCAL const u32 *p = b + w.lane() / 4u * pitch + w.lane() % 4u;
    return B{{p[0], p[4]}};
  }

  PB_FN Sums exchanged(Wave w, A a, B b, Sums c) {
    const u32 row = w.lane() / 4u * 4u, column = w.lane() % 4u * 8u;
    PB_UNROLL
    for (u32 k = 0; k < words; k++) {
      const u32 from = k % 4u, half = k / 4u;
      const u32 upper = w.shuffle(a.of[2u * half], row + from), lower = w.shuffle(a.of[2u * half + 1u], row + from);
      const u32 left = w.shuffle(b.of[half], column + from), right = w.shuffle(b.of[half], column + 4u + from);
      c.v[0] = Word::add(upper, left, c.v[0]);
      c.v[1] = Word::add(upper, right, c.v[1]);
      c.v[2] = Word::add(lower, left, c.v[2]);
      c.v[3] = Word::add(lower, right, c.v[3]);
    }
    return c;
  }

#ifdef __CUDA_ARCH__
#define PB_MMA(name, constraint, c0, c1, c2, c3) \
  asm("mma.sync.aligned." name " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+" constraint(c0), "+" constraint(c1), "+" constraint(c2), "+" constraint(c3) \
      : "r"(a.of[0]), "r"(a.of[1]), "r"(a.of[2]), "r"(a.of[3]), "r"(b.of[0]), "r"(b.of[1]))
  PB_FN Sums instruction(Fp16Word, Wave, A a, B b, Sums c) {
#if __CUDA_ARCH__ >= 800
    PB_MMA("m16n8k16.row.col.f32.f16.f16.f32", "f", c.v[0], c.v[1], c.v[2], c.v[3]);
#else
    PB_UNROLL
    for (u32 half = 0; half < 2; half++)
      asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
          : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
          : "r"(a.of[2u * half]), "r"(a.of[2u * half + 1u]), "r"(b.of[half]));
#endif
    return c;
  }
  PB_FN Sums instruction(Bf16Word, Wave w, A a, B b, Sums c) {
#if __CUDA_ARCH__ >= 800
    PB_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "f", c.v[0], c.v[1], c.v[2], c.v[3]);
    return c;
#else
    return exchanged(w, a, b, c);
#endif
  }
  PB_FN Sums instruction(Int8Word, Wave, A a, B b, Sums c) {
#if __CUDA_ARCH__ >= 800
    PB_MMA("m16n8k32.row.col.s32.s8.s8.s32", "r", c.v[0], c.v[1], c.v[2], c.v[3]);
#else
    PB_UNROLL
    for (u32 i = 0; i < 4; i++)  // upper rows with both halves of k, then lower rows
      asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
          : "+r"(c.v[i / 2u * 2u]), "+r"(c.v[i / 2u * 2u + 1u])
          : "r"(a.of[i % 2u * 2u + i / 2u]), "r"(b.of[i % 2u]));
#endif
    return c;
  }
#undef PB_MMA
  PB_FN Sums multiply(Wave w, A a, B b, Sums c) { return instruction(Word(), w, a, b, c); }
#else
  PB_FN Sums multiply(Wave w, A a, B b, Sums c) { return exchanged(w, a, b, c); }
#endif
};

}  // namespace pb
#endif
