// What the tiles of matrix instructions share (tile.h has their contract): 32-bit words of two halves or of four bytes.
#ifndef PB_SIMT_TILE_MATRIX_H
#define PB_SIMT_TILE_MATRIX_H

#include "tile.h"

namespace pb {

// add() is what an emulated instruction does to one word, in fp32 or int32. The hardware's order of a sum is its own.
struct Fp16Word {
  typedef float Sum;
  enum : u32 { per_word = 2 };
  PB_FN u32 pair(float x, float y) { return pack_fp16(x, y); }
  PB_FN float add(u32 a, u32 b, float c) {
    c = fma_rn(half_to_float(u16(a)), half_to_float(u16(b)), c);
    return fma_rn(half_to_float(u16(a >> 16)), half_to_float(u16(b >> 16)), c);
  }
};
struct Bf16Word {
  typedef float Sum;
  enum : u32 { per_word = 2 };
  PB_FN u32 pair(float x, float y) { return pack_bf16(x, y); }
  PB_FN float add(u32 a, u32 b, float c) {
    c = fma_rn(bf16_to_float(u16(a)), bf16_to_float(u16(b)), c);
    return fma_rn(bf16_to_float(u16(a >> 16)), bf16_to_float(u16(b >> 16)), c);
  }
};
struct Int8Word {
  typedef i32 Sum;
  enum : u32 { per_word = 4 };
  PB_FN u32 pair(float, float) { return 0; }  // an int8 tile is filled with bytes
  PB_FN i32 add(u32 a, u32 b, i32 c) { return dot4(a, b, c); }
};

// The word of 16-bit activations; fp32 has none and stays with LaneTile.
template <class T>
struct WordOf;
template <>
struct WordOf<Fp16> {
  typedef Fp16Word Type;
};
template <>
struct WordOf<Bf16> {
  typedef Bf16Word Type;
};

template <class Word>
struct MatrixTile {
  typedef typename Word::Sum Sum;
  PB_FN void put(PB_LOCAL u32 *p, F8 x) {
    U4 words;
    PB_UNROLL
    for (u32 k = 0; k < 4; k++) words.v[k] = Word::pair(x.v[2 * k], x.v[2 * k + 1]);
    store16(p, words);
  }
  template <class T>
  PB_FN void put(PB_LOCAL u32 *p, Bits8<T> x) {  // they are words already
    U4 words;
    PB_UNROLL
    for (u32 k = 0; k < 4; k++) words.v[k] = x.v[k];
    store16(p, words);
  }
  PB_FN u32 word(float x, float y) { return Word::pair(x, y); }
  PB_FN void put(PB_LOCAL u32 *p, U4 x) { store16(p, x); }
};

// The tiles of a device (LaneTiles in tile.h) that has TILE for words of 16 bits and of bytes.
template <template <class> class TILE, class T>
struct MatrixTilesOf {
  typedef TILE<typename WordOf<T>::Type> Floats;
  typedef TILE<Int8Word> Bytes;
};
template <template <class> class TILE>
struct MatrixTilesOf<TILE, float> {
  typedef FmaTile Floats;
  typedef Dot4Tile Bytes;
};
template <template <class> class TILE>
struct MatrixTiles {
  template <class T>
  using Floats = typename MatrixTilesOf<TILE, T>::Floats;
  template <class T>
  using Bytes = typename MatrixTilesOf<TILE, T>::Bytes;
};

}  // namespace pb
#endif
