// Tiled int8 products that are more than a Gemm: matmul_kbit_int8, whose sums are scaled block by block, and
// linear_int8, which adds the outlier columns.
#ifndef PB_KERNELS_GEMM_INT8_H
#define PB_KERNELS_GEMM_INT8_H

#include "gemm.h"

namespace pb {

// y = x c8^T, the int32 sum of each run of columns inside a block times the scale of the block.
template <class Tile, class T>
struct GemmKbitInt8 {
  enum : u32 {
    group_max = Tile::threads,
    group_rows = Tile::group_rows,
    group_columns = Tile::group_columns,
    slab = Tile::slab_words * Tile::per_word,
    of_row = slab / KbitBytes::unit
  };
  typedef ProductArgs<Bytes, KbitBytes, ScaleRows<T>> Args;
  struct Local {
    Slabs<Tile> slabs;
    KbitBytes::Local b;
    float scale[Tile::group_columns * of_row];
  };

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    typedef RowUnits<Tile, Bytes, Tile::group_rows> Left;
    typedef RowUnits<Tile, KbitBytes, Tile::group_columns> Right;
    const i64 column = column_tile(w, a.row_tiles) * Tile::group_columns;
    const i64 row = row_tile(w, a.row_tiles) * Tile::group_rows;
    KbitBytes::prepare(w, &local->b, a.b);
    Totals c = zero_totals();
    for (i64 at = 0;; at += slab) {
      const typename Left::Raw left = Left::fetch(w, a.a, row, at);
      const typename Right::Raw right = Right::fetch(w, a.b, column, at);
      if (at > 0) {
        for (u32 first = 0; first < Tile::slab_words; first += u32(a.b.run_words))
          c = add_scaled(w, local, first,
                         multiply_slabs<Tile>(w, &local->slabs, first, first + u32(a.b.run_words), zero_sums<Tile>()),
                         c);
      }
      if (at >= a.k) break;
      w.barrier();
      put_a<Tile, Bytes>(w, &local->slabs, left);
      PB_UNROLL
      for (u32 i = 0; i < Right::count; i++) {
        const KbitBytes::Values values = KbitBytes::values(a.b, &local->b, right.of[i]);
        Tile::put(local->slabs.b + Right::place(w, i), values.bytes);
        local->scale[Right::row(w, i) * of_row + Right::unit(w, i)] = values.scale;
      }
      w.barrier();
    }
    PB_UNROLL
    for (u32 t = 0; t < Tile::repeat_m * Tile::repeat_n; t++) {
      PB_UNROLL
      for (u32 i = 0; i < Tile::sums; i++) {
        const i64 m = row + sum_row<Tile>(w, t, i), n = column + sum_column<Tile>(w, t, i);
        if (m < a.rows && n < a.columns) ScaleRows<T>::store(a.finish, m, n, c.of[t][i]);
      }
    }
  }

 private:
  struct Totals {
    float of[Tile::repeat_m * Tile::repeat_n][Tile::sums];
  };
  PB_FN Totals zero_totals() {
    Totals c;
    PB_UNROLL
    for (u32 t = 0; t < Tile::repeat_m * Tile::repeat_n; t++) {
      PB_UNROLL
      for (u32 i = 0; i < Tile::sums; i++) c.of[t][i] = 0.0f;
    }
    return c;
  }
  PB_FN Totals add_scaled(Wave w, PB_LOCAL Local *local, u32 first, TileSums<Tile> sums, Totals c) {
    PB_UNROLL
    for (u32 t = 0; t < Tile::repeat_m * Tile::repeat_n; t++) {
      PB_UNROLL
      for (u32 i = 0; i < Tile::sums; i++) {
        const float scale = local->scale[sum_column<Tile>(w, t, i) * of_row + first * Tile::per_word / KbitBytes::unit];
        c.of[t][i] = fma_rn(float(sums.of[t].v[i]), scale, c.of[t][i]);
      }
    }
    return c;
  }
};

// How linear_int8 finishes: the exact int32 sum, the sum over the outlier columns, the bias.
template <class T>
struct FinishLinear {
  AddBias<T> out;
  PB_GLOBAL const float *x_absmax;
  PB_GLOBAL const float *weight_absmax;
  PB_FN void store(FinishLinear f, i64 row, i64 column, i32 sum, float outliers) {
    const float scale = int8_scale(f.x_absmax[row]) * int8_scale(f.weight_absmax[column]);
    AddBias<T>::store(f.out, row, column, float(sum) * scale + outliers);
  }
};

// The arguments of both kernels of linear_int8, here and in gemv.h.
template <class T>
struct LinearArgs {
  Bytes a, b;
  OutlierColumns<T> outlier_x;
  OutlierWeight outlier_weight;
  PB_GLOBAL const i32 *outlier_count;  // or null: the operands know it
  FinishLinear<T> finish;
  Runs runs;  // one
  i64 rows, columns, k;
  i64 row_tiles;
};

template <class IntTile, class FloatTile, class T>
struct GemmLinearInt8 {
  enum : u32 { group_max = IntTile::threads, group_rows = IntTile::group_rows, group_columns = IntTile::group_columns };
  typedef LinearArgs<T> Args;
  struct Local {
    union {  // one product after the other
      Slabs<IntTile> ints;
      Slabs<FloatTile> floats;
    };
    NoLocal none;
  };

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    const i64 column = column_tile(w, a.row_tiles) * IntTile::group_columns;
    const i64 row = row_tile(w, a.row_tiles) * IntTile::group_rows;
    const TileSums<IntTile> c =
        accumulate<IntTile, Bytes, Bytes, false>(w, &local->ints, &local->none, a.a, a.b, row, column, a.k);
    OutlierColumns<T> outlier_x = a.outlier_x;  // changed in place, the arguments would lose their address spaces
    OutlierWeight outlier_weight = a.outlier_weight;
    if (a.outlier_count) outlier_x.count = outlier_weight.count = *a.outlier_count;
    const TileSums<FloatTile> outliers = accumulate<FloatTile, OutlierColumns<T>, OutlierWeight, false>(
        w, &local->floats, &local->none, outlier_x, outlier_weight, row, column, outlier_x.count);
    PB_UNROLL
    for (u32 t = 0; t < IntTile::repeat_m * IntTile::repeat_n; t++) {
      PB_UNROLL
      for (u32 i = 0; i < IntTile::sums; i++) {
        const i64 m = row + sum_row<IntTile>(w, t, i), n = column + sum_column<IntTile>(w, t, i);
        if (m < a.rows && n < a.columns) FinishLinear<T>::store(a.finish, m, n, c.of[t].v[i], outliers.of[t].v[i]);
      }
    }
  }
};

template <class T, class Tiles = LaneTiles>
using MatmulKbitInt8 = GemmKbitInt8<typename Tiles::template Bytes<T>, T>;
template <class T, class Tiles = LaneTiles>
using LinearInt8 = GemmLinearInt8<typename Tiles::template Bytes<T>, typename Tiles::template Floats<T>, T>;

}  // namespace pb
#endif
