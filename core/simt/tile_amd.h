// AMD's matrix instructions: 16 x 16 of C, MFMA for waves of 64 (CDNA), WMMA for waves of 32 (RDNA 3 and 4). Which
// words of k a lane holds need only be the same for A and for B; a lane holds those of row (A) or column (B) lane % 16,
// and
//
//   MFMA     eight words of k, those 2q and 2q + 1       sums: row 4q + i      q = lane / 16
//   RDNA 3   halves: eight words, bytes: four; all        sums: row 2i + q
//   RDNA 4   the same, half of them: from q * half on     sums: row 8q + i     column lane % 16
//
// (AMD's matrix instruction calculator; ISA guides of CDNA 2 and 3, RDNA 3 and 4.)
#ifndef PB_SIMT_TILE_AMD_H
#define PB_SIMT_TILE_AMD_H

#include "tile_matrix.h"

namespace pb {

#ifdef __HIP_DEVICE_COMPILE__
typedef float Floats4 __attribute__((ext_vector_type(4)));
typedef float Floats8 __attribute__((ext_vector_type(8)));
typedef i32 Ints2 __attribute__((ext_vector_type(2)));
typedef i32 Ints4 __attribute__((ext_vector_type(4)));
typedef i32 Ints8 __attribute__((ext_vector_type(8)));
typedef short Shorts4 __attribute__((ext_vector_type(4)));
typedef short Shorts8 __attribute__((ext_vector_type(8)));
typedef short Shorts16 __attribute__((ext_vector_type(16)));
typedef _Float16 Halves4 __attribute__((ext_vector_type(4)));
typedef _Float16 Halves8 __attribute__((ext_vector_type(8)));
typedef _Float16 Halves16 __attribute__((ext_vector_type(16)));
// The same bits as another type of the same size.
template <class To, class From>
PB_FN To bits_as(From x) {
  return __builtin_bit_cast(To, x);
}
#endif

// The shape of a group is the same for all of AMD's tiles, LaneTile included: a launch knows the kernel, but not what
// the kernel was compiled to.
enum : u32 { amd_threads = 256, amd_group_rows = 64, amd_group_columns = 64 };

// WORDS of k in a tile, HELD of them in a lane.
template <class Word, u32 WORDS, u32 HELD>
struct AmdMatrixTile : MatrixTile<Word> {
  enum : u32 {
    per_word = Word::per_word,
    words = WORDS,
    held = HELD,
    threads = amd_threads,
    group_rows = amd_group_rows,
    group_columns = amd_group_columns,
    slab_words = 32,
    chain_words = 16,
    stride = slab_words + 4,
    columns = 16
  };
  PB_FN u32 rows(Wave) { return 16; }
  PB_FN u32 column(Wave w, u32) { return w.lane() % 16u; }
  struct Words {
    u32 of[HELD];
  };
  typedef Words A;
  typedef Words B;
  // The lane's first word.
  PB_FN u32 first(Wave w) { return HELD == WORDS ? 0u : w.lane() / 16u * HELD; }
  PB_FN Words load_a(Wave w, PB_LOCAL const u32 *a, u32 pitch) {
    Words r;
    PB_UNROLL
    for (u32 k = 0; k < HELD; k++) r.of[k] = a[w.lane() % 16u * pitch + first(w) + k];
    return r;
  }
  PB_FN Words load_b(Wave w, PB_LOCAL const u32 *b, u32 pitch) { return load_a(w, b, pitch); }
};

template <class Word>
struct MfmaTile : AmdMatrixTile<Word, 8, 2> {
  typedef AmdMatrixTile<Word, 8, 2> Base;
  typedef typename Base::Words Words;
  enum : u32 { repeat_m = 2, repeat_n = 2, sums = 4 };
  struct Sums {
    typename Word::Sum v[sums];
  };
  PB_FN u32 row(Wave w, u32 i) { return w.lane() / 16u * 4u + i; }

#if defined(__HIP_DEVICE_COMPILE__) && defined(__GFX9__)
  PB_FN Floats4 instruction(Fp16Word, Words a, Words b, Floats4 c) {
    return __builtin_amdgcn_mfma_f32_16x16x16f16(bits_as<Halves4>(a), bits_as<Halves4>(b), c, 0, 0, 0);
  }
  PB_FN Floats4 instruction(Bf16Word, Words a, Words b, Floats4 c) {
    return __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(bits_as<Shorts4>(a), bits_as<Shorts4>(b), c, 0, 0, 0);
  }
  PB_FN Ints4 instruction(Int8Word, Words a, Words b, Ints4 c) {
#ifdef __gfx90a__
    c = __builtin_amdgcn_mfma_i32_16x16x16i8(i32(a.of[0]), i32(b.of[0]), c, 0, 0, 0);
    return __builtin_amdgcn_mfma_i32_16x16x16i8(i32(a.of[1]), i32(b.of[1]), c, 0, 0, 0);
#else
    return __builtin_amdgcn_mfma_i32_16x16x32_i8(bits_as<i64>(a), bits_as<i64>(b), c, 0, 0, 0);
#endif
  }
  PB_FN Floats4 vector(Fp16Word, Sums c) { return bits_as<Floats4>(c); }
  PB_FN Floats4 vector(Bf16Word, Sums c) { return bits_as<Floats4>(c); }
  PB_FN Ints4 vector(Int8Word, Sums c) { return bits_as<Ints4>(c); }
  PB_FN Sums multiply(Wave, Words a, Words b, Sums c) {
    return bits_as<Sums>(instruction(Word(), a, b, vector(Word(), c)));
  }
#else
  PB_FN Sums multiply(Wave w, Words a, Words b, Sums c) {
    PB_UNROLL
    for (u32 k = 0; k < 8; k++) {
      const u32 from = k / 2u * 16u, quarter = w.lane() / 16u;
      const u32 right = w.shuffle(b.of[k % 2u], from + w.lane() % 16u);
      PB_UNROLL
      for (u32 i = 0; i < sums; i++)
        c.v[i] = Word::add(w.shuffle(a.of[k % 2u], from + 4u * quarter + i), right, c.v[i]);
    }
    return c;
  }
#endif
};

// GENERATION 3 or 4 of RDNA. A tile has sixteen values of k.
template <class Word, u32 GENERATION>
struct WmmaTile : AmdMatrixTile<Word, 16 / Word::per_word, 16 / Word::per_word / (GENERATION == 3 ? 1 : 2)> {
  typedef AmdMatrixTile<Word, 16 / Word::per_word, 16 / Word::per_word / (GENERATION == 3 ? 1 : 2)> Base;
  typedef typename Base::Words Words;
  enum : u32 { repeat_m = 1, repeat_n = 2, sums = 8 };
  struct Sums {
    typename Word::Sum v[sums];
  };
  PB_FN u32 row(Wave w, u32 i) { return GENERATION == 3 ? 2u * i + w.lane() / 16u : w.lane() / 16u * 8u + i; }

#if defined(__HIP_DEVICE_COMPILE__) && defined(__GFX11__)
  PB_FN Floats8 instruction(Fp16Word, Words a, Words b, Floats8 c) {
    return __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(bits_as<Halves16>(a), bits_as<Halves16>(b), c);
  }
  PB_FN Floats8 instruction(Bf16Word, Words a, Words b, Floats8 c) {
    return __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(bits_as<Shorts16>(a), bits_as<Shorts16>(b), c);
  }
  PB_FN Ints8 instruction(Int8Word, Words a, Words b, Ints8 c) {
    return __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(true, bits_as<Ints4>(a), true, bits_as<Ints4>(b), c, false);
  }
#elif defined(__HIP_DEVICE_COMPILE__) && defined(__GFX12__)
  PB_FN Floats8 instruction(Fp16Word, Words a, Words b, Floats8 c) {
    return __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(bits_as<Halves8>(a), bits_as<Halves8>(b), c);
  }
  PB_FN Floats8 instruction(Bf16Word, Words a, Words b, Floats8 c) {
    return __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(bits_as<Shorts8>(a), bits_as<Shorts8>(b), c);
  }
  PB_FN Ints8 instruction(Int8Word, Words a, Words b, Ints8 c) {
    return __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32_gfx12(true, bits_as<Ints2>(a), true, bits_as<Ints2>(b), c, false);
  }
#endif
#if defined(__HIP_DEVICE_COMPILE__) && (defined(__GFX11__) || defined(__GFX12__))
  PB_FN Floats8 vector(Fp16Word, Sums c) { return bits_as<Floats8>(c); }
  PB_FN Floats8 vector(Bf16Word, Sums c) { return bits_as<Floats8>(c); }
  PB_FN Ints8 vector(Int8Word, Sums c) { return bits_as<Ints8>(c); }
  PB_FN Sums multiply(Wave, Words a, Words b, Sums c) {
    return bits_as<Sums>(instruction(Word(), a, b, vector(Word(), c)));
  }
#else
  PB_FN Sums multiply(Wave w, Words a, Words b, Sums c) {
    PB_UNROLL
    for (u32 k = 0; k < Base::words; k++) {
      const u32 from = Base::held == Base::words ? 0u : k / Base::held * 16u, at = k % Base::held;
      const u32 right = w.shuffle(b.of[at], from + w.lane() % 16u), upper = w.lane() / 16u;
      PB_UNROLL
      for (u32 i = 0; i < sums; i++)
        c.v[i] =
            Word::add(w.shuffle(a.of[at], from + (GENERATION == 3 ? 2u * i + upper : 8u * upper + i)), right, c.v[i]);
    }
    return c;
  }
#endif
};

// What this architecture has. One name for all of them, as the host launches the kernel by its name.
#if defined(__HIP_DEVICE_COMPILE__) && defined(__GFX9__)
template <class Word>
struct AmdTile : MfmaTile<Word> {};
#elif defined(__HIP_DEVICE_COMPILE__) && defined(__GFX11__)
template <class Word>
struct AmdTile : WmmaTile<Word, 3> {};
#elif defined(__HIP_DEVICE_COMPILE__) && defined(__GFX12__)
template <class Word>
struct AmdTile : WmmaTile<Word, 4> {};
#else  // RDNA 2 has no matrix instruction; the host needs the shape alone
template <class Word>
struct AmdTile : FmaTile {};
template <>
struct AmdTile<Int8Word> : Dot4Tile {};
#endif
static_assert(u32(AmdTile<Fp16Word>::threads) == amd_threads && u32(AmdTile<Int8Word>::threads) == amd_threads &&
                  u32(AmdTile<Fp16Word>::group_rows) == amd_group_rows &&
                  u32(AmdTile<Int8Word>::group_rows) == amd_group_rows &&
                  u32(AmdTile<Fp16Word>::group_columns) == amd_group_columns &&
                  u32(AmdTile<Int8Word>::group_columns) == amd_group_columns,
              "the shape of a launch");

}  // namespace pb
#endif
