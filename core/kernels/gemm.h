// C = A B^T in tiles, for any Tile of core/simt/tile.h, any operands of operands.h and any way to finish a sum.
//
// A group walks along k in slabs: while it multiplies one slab in its memory it has the next in registers.
#ifndef PB_KERNELS_GEMM_H
#define PB_KERNELS_GEMM_H

#include "operands.h"
#include "../simt/tile.h"

namespace pb {

template <class Tile>
struct Slabs {
  alignas(16) u32 a[Tile::group_rows * Tile::stride];
  alignas(16) u32 b[Tile::group_columns * Tile::stride];
};

// A lane's sums of all tiles of its wave.
template <class Tile>
struct TileSums {
  typename Tile::Sums of[Tile::repeat_m * Tile::repeat_n];
};
template <class Tile>
PB_FN TileSums<Tile> zero_sums() {
  TileSums<Tile> c;
  PB_UNROLL
  for (u32 t = 0; t < Tile::repeat_m * Tile::repeat_n; t++) {
    PB_UNROLL
    for (u32 i = 0; i < Tile::sums; i++) c.of[t].v[i] = 0;
  }
  return c;
}

// Where in the group's C the sum i of tile t of this lane is.
template <class Tile>
PB_FN u32 wave_row(Wave w) {
  return w.tid() / w.width() / (Tile::group_columns / (Tile::repeat_n * Tile::columns)) * Tile::repeat_m *
         Tile::rows(w);
}
template <class Tile>
PB_FN u32 wave_column(Wave w) {
  return w.tid() / w.width() % (Tile::group_columns / (Tile::repeat_n * Tile::columns)) * Tile::repeat_n *
         Tile::columns;
}
template <class Tile>
PB_FN u32 sum_row(Wave w, u32 t, u32 i) {
  return wave_row<Tile>(w) + t / Tile::repeat_n * Tile::rows(w) + Tile::row(w, i);
}
template <class Tile>
PB_FN u32 sum_column(Wave w, u32 t, u32 i) {
  return wave_column<Tile>(w) + t % Tile::repeat_n * Tile::columns + Tile::column(w, i);
}

// c + A B^T over the words [first, last) of the slabs, a whole number of multiplies.
template <class Tile>
PB_FN TileSums<Tile> multiply_slabs(Wave w, PB_LOCAL Slabs<Tile> *slabs, u32 first, u32 last, TileSums<Tile> c) {
  PB_LOCAL const u32 *a = slabs->a + wave_row<Tile>(w) * Tile::stride;
  PB_LOCAL const u32 *b = slabs->b + wave_column<Tile>(w) * Tile::stride;
  PB_NO_UNROLL
  for (u32 k = first; k < last; k += Tile::words) {
    typename Tile::B right[Tile::repeat_n];
    PB_UNROLL
    for (u32 n = 0; n < Tile::repeat_n; n++)
      right[n] = Tile::load_b(w, b + n * Tile::columns * Tile::stride + k, Tile::stride);
    PB_UNROLL
    for (u32 m = 0; m < Tile::repeat_m; m++) {
      const typename Tile::A left = Tile::load_a(w, a + m * Tile::rows(w) * Tile::stride + k, Tile::stride);
      PB_UNROLL
      for (u32 n = 0; n < Tile::repeat_n; n++)
        c.of[m * Tile::repeat_n + n] = Tile::multiply(w, left, right[n], c.of[m * Tile::repeat_n + n]);
    }
  }
  return c;
}

// The share of one thread in filling a slab whose rows lie along k: unit u is that of one row.
template <class Tile, class Operand, u32 ROWS>
struct RowUnits {
  enum : u32 {
    words = Operand::unit / Tile::per_word,
    of_row = Tile::slab_words / words,
    count = ROWS * of_row / Tile::threads  // of a thread
  };
  static_assert(ROWS * of_row % Tile::threads == 0, "a slab is shared evenly");
  struct Raw {
    typename Operand::Raw of[count];
  };
  PB_FN u32 row(Wave w, u32 i) { return (w.tid() + i * Tile::threads) / of_row; }
  PB_FN u32 unit(Wave w, u32 i) { return (w.tid() + i * Tile::threads) % of_row; }
  PB_FN Raw fetch(Wave w, Operand x, i64 first_row, i64 k) {
    Raw r;
    PB_UNROLL
    for (u32 i = 0; i < count; i++) r.of[i] = Operand::fetch(x, first_row + row(w, i), k + unit(w, i) * Operand::unit);
    return r;
  }
  PB_FN u32 place(Wave w, u32 i) { return row(w, i) * Tile::stride + unit(w, i) * words; }
};

// The same where k is the row of the operand: B as it is in dy W. A unit becomes one word in each of eight rows of the
// slab. Neighbouring threads have neighbouring words, so that no two of them meet in a bank.
template <class Tile, class Operand>
struct ColumnUnits {
  enum : u32 { count = Tile::group_columns / 8 * Tile::slab_words / Tile::threads };
  static_assert(Operand::unit == 8, "columns are read in units of 8");
  static_assert(Tile::group_columns / 8 * Tile::slab_words % Tile::threads == 0, "a slab is shared evenly");
  struct Raw {
    typename Operand::Raw of[count * Tile::per_word];
  };
  PB_FN u32 word(Wave w, u32 i) { return (w.tid() + i * Tile::threads) % Tile::slab_words; }
  PB_FN u32 column(Wave w, u32 i) { return (w.tid() + i * Tile::threads) / Tile::slab_words * 8u; }
  PB_FN Raw fetch(Wave w, Operand x, i64 first_column, i64 k) {
    Raw r;
    PB_UNROLL
    for (u32 i = 0; i < count * Tile::per_word; i++)
      r.of[i] = Operand::fetch(x, k + word(w, i / Tile::per_word) * Tile::per_word + i % Tile::per_word,
                               first_column + column(w, i / Tile::per_word));
    return r;
  }
};

template <class Tile, class A>
PB_FN void put_a(Wave w, PB_LOCAL Slabs<Tile> *slabs, typename RowUnits<Tile, A, Tile::group_rows>::Raw raw) {
  typedef RowUnits<Tile, A, Tile::group_rows> Units;
  PB_UNROLL
  for (u32 i = 0; i < Units::count; i++) Tile::put(slabs->a + Units::place(w, i), A::values(raw.of[i]));
}

// How B is read: as rows of the weight (y = x W^T) or across them (dx = dy W).
template <class Tile, class B, bool TRANSPOSED>
struct SlabB : RowUnits<Tile, B, Tile::group_columns> {
  typedef RowUnits<Tile, B, Tile::group_columns> Units;
  PB_FN void put(Wave w, PB_LOCAL Slabs<Tile> *slabs, B b, PB_LOCAL typename B::Local *local, typename Units::Raw raw) {
    PB_UNROLL
    for (u32 i = 0; i < Units::count; i++) Tile::put(slabs->b + Units::place(w, i), B::values(b, local, raw.of[i]));
  }
};
template <class Tile, class B>
struct SlabB<Tile, B, true> : ColumnUnits<Tile, B> {
  typedef ColumnUnits<Tile, B> Units;
  PB_FN void put(Wave w, PB_LOCAL Slabs<Tile> *slabs, B b, PB_LOCAL typename B::Local *local, typename Units::Raw raw) {
    PB_UNROLL
    for (u32 i = 0; i < Units::count; i++) {
      const F8 x = B::values(b, local, raw.of[i * Tile::per_word]);
      const F8 y = Tile::per_word == 1u ? x : B::values(b, local, raw.of[i * Tile::per_word + Tile::per_word - 1]);
      PB_UNROLL
      for (u32 c = 0; c < 8; c++)
        slabs->b[(Units::column(w, i) + c) * Tile::stride + Units::word(w, i)] = Tile::word(x.v[c], y.v[c]);
    }
  }
};

template <class Tile>
PB_FN TileSums<Tile> add_sums(TileSums<Tile> a, TileSums<Tile> b) {
  PB_UNROLL
  for (u32 t = 0; t < Tile::repeat_m * Tile::repeat_n; t++) {
    PB_UNROLL
    for (u32 i = 0; i < Tile::sums; i++) a.of[t].v[i] += b.of[t].v[i];
  }
  return a;
}

// A B^T over all of k for the rows from `row` and the columns from `column` on. Every thread of the group calls it,
// with the same k. What was written to the memory of the group before is there when the weight's values are made.
template <class Tile, class A, class B, bool TRANSPOSED>
PB_FN TileSums<Tile> accumulate(Wave w, PB_LOCAL Slabs<Tile> *slabs, PB_LOCAL typename B::Local *local, A a, B b,
                                i64 row, i64 column, i64 k) {
  typedef RowUnits<Tile, A, Tile::group_rows> Left;
  typedef SlabB<Tile, B, TRANSPOSED> Right;
  enum : u32 { slab = Tile::slab_words * Tile::per_word };
  TileSums<Tile> c = zero_sums<Tile>();
  for (i64 at = 0;; at += slab) {
    const typename Left::Raw left = Left::fetch(w, a, row, at);  // on its way while the slab before is multiplied
    const typename Right::Raw right = Right::fetch(w, b, column, at);
    if (at > 0) {
      PB_UNROLL
      for (u32 first = 0; first < Tile::slab_words; first += Tile::chain_words)
        c = add_sums<Tile>(c, multiply_slabs<Tile>(w, slabs, first, first + Tile::chain_words, zero_sums<Tile>()));
    }
    if (at >= k) break;
    w.barrier();
    put_a<Tile, A>(w, slabs, left);
    Right::put(w, slabs, b, local, right);
    w.barrier();
  }
  return c;
}

// Rows of A in runs, run e meeting the weight e of a stack: rows [end[e-1], end[e]); end is on the device.
struct Runs {
  PB_GLOBAL const i32 *end;
  i64 count;  // -1: all rows are one run
};
struct Run {
  i64 begin, end, weight;  // rows of the group's tile, and which weight; none (= count) behind the last run
};
// The rows of the tile that a group is for: each run is cut into tiles of its own. A launch has
// rows / tile_rows + count + 1 of them, which is enough for any ends.
PB_FN Run find_run(Runs runs, i64 rows, i64 tile, u32 tile_rows) {
  i64 begin = 0;
  if (runs.count < 0) return Run{tile * tile_rows, rows, 0};
  for (i64 e = 0; e < runs.count; e++) {
    i64 end = runs.end[e];
    end = end < begin ? begin : end < rows ? end : rows;
    const i64 tiles = (end - begin + tile_rows - 1) / tile_rows;
    if (tile < tiles) return Run{begin + tile * tile_rows, end, e};
    tile -= tiles;
    begin = end;
  }
  return Run{begin + tile * tile_rows, rows, runs.count};
}

// The ways to finish a sum: y[row][column] of y [rows, columns].
template <class T>
struct AddBias {
  PB_GLOBAL T *y;
  PB_GLOBAL const T *bias;  // or null
  i64 columns;
  typedef float Sum;
  PB_FN void store(AddBias f, i64 row, i64 column, float sum) {
    store1(f.y + row * f.columns + column, f.bias ? sum + load1(f.bias + column) : sum);
  }
};
template <class T>
struct ScaleRows {
  AddBias<T> out;
  PB_GLOBAL const float *absmax;  // of the rows
  PB_GLOBAL const float *step;
  typedef float Sum;
  PB_FN void store(ScaleRows f, i64 row, i64 column, float sum) {
    AddBias<T>::store(f.out, row, column, sum * (int8_scale(f.absmax[row]) * *f.step));
  }
};
struct StoreInt {
  PB_GLOBAL i32 *y;
  i64 columns;
  PB_FN void store(StoreInt f, i64 row, i64 column, i32 sum) { f.y[row * f.columns + column] = sum; }
};

template <class Tile, class Finish>
PB_FN void store_sums(Wave w, Finish finish, i64 row, i64 rows, i64 column, i64 columns, TileSums<Tile> c) {
  PB_UNROLL
  for (u32 t = 0; t < Tile::repeat_m * Tile::repeat_n; t++) {
    PB_UNROLL
    for (u32 i = 0; i < Tile::sums; i++) {
      const i64 m = row + sum_row<Tile>(w, t, i), n = column + sum_column<Tile>(w, t, i);
      if (m < rows && n < columns) Finish::store(finish, m, n, c.of[t].v[i]);
    }
  }
}

// Groups are row tiles of one column tile, then of the next, so that a weight is read by neighbours.
PB_FN i64 column_tile(Wave w, i64 row_tiles) { return w.group() / u32(row_tiles); }
PB_FN i64 row_tile(Wave w, i64 row_tiles) { return w.group() % u32(row_tiles); }

// The arguments of a product, tiled or not.
template <class A, class B, class Finish>
struct ProductArgs {
  A a;
  B b;
  Finish finish;
  Runs runs;
  i64 rows, columns, k;  // of y, and what is summed over
  i64 row_tiles;
};

// y = A B^T, or A B where TRANSPOSED.
template <class Tile, class A, class B, bool TRANSPOSED, class Finish>
struct Gemm {
  enum : u32 { group_max = Tile::threads, group_rows = Tile::group_rows, group_columns = Tile::group_columns };
  typedef ProductArgs<A, B, Finish> Args;
  struct Local {
    Slabs<Tile> slabs;
    typename B::Local b;
  };

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    const i64 column = column_tile(w, a.row_tiles) * Tile::group_columns;
    const Run run = find_run(a.runs, a.rows, row_tile(w, a.row_tiles), Tile::group_rows);
    const bool behind = run.weight == a.runs.count;
    B::prepare(w, &local->b, a.b);
    const TileSums<Tile> c =
        accumulate<Tile, A, B, TRANSPOSED>(w, &local->slabs, &local->b, a.a, B::in_stack(a.b, behind ? 0 : run.weight),
                                           run.begin, column, behind ? 0 : a.k);
    store_sums<Tile>(w, a.finish, run.begin, run.end, column, a.columns, c);
  }
};

template <class T, class Tiles = LaneTiles>
using MatmulKbit = Gemm<typename Tiles::template Floats<T>, Dense<T>, Kbit, false, AddBias<T>>;
template <class T, class Tiles = LaneTiles>
using MatmulKbitTransposed = Gemm<typename Tiles::template Floats<T>, Dense<T>, Kbit, true, AddBias<T>>;
template <class Tiles = LaneTiles>
using MatmulInt8 = Gemm<typename Tiles::template Bytes<Fp16>, Bytes, Bytes, false, StoreInt>;
template <class T, class Tiles = LaneTiles>
using LinearInt8Transposed = Gemm<typename Tiles::template Floats<T>, Dense<T>, ScaledBytes, true, AddBias<T>>;
template <class T>
using MatmulKbitInt8Any = Gemm<FmaTile, ByteFloats, Kbit, false, ScaleRows<T>>;  // K of any length

}  // namespace pb
#endif
