// Products with few rows of x: a wave has a few rows of the weight, reads each of them once, its lanes side by side,
// and adds up what the lanes have.
#ifndef PB_KERNELS_GEMV_H
#define PB_KERNELS_GEMV_H

#include "block.h"
#include "gemm_int8.h"

namespace pb {

PB_FN float dot(F8 a, F8 b, float c) {
  PB_UNROLL
  for (u32 k = 0; k < 8; k++) c = fma_rn(a.v[k], b.v[k], c);
  return c;
}
template <class T>
PB_FN float dot(Bits8<T> a, F8 b, float c) {
  return dot(floats8(a), b, c);
}
PB_FN i32 dot(U4 a, U4 b, i32 c) {
  PB_UNROLL
  for (u32 k = 0; k < 4; k++) c = dot4(a.v[k], b.v[k], c);
  return c;
}
PB_FN float dot(U4 a, KbitBytes::Values b, float c) { return fma_rn(float(dot(a, b.bytes, 0)), b.scale, c); }

struct AddInts {
  PB_FN u32 of(u32 a, u32 b) { return a + b; }
};
PB_FN float wave_sum(Wave w, float x) { return as_float(wave_reduce<Sum>(w, as_u32(x), w.width())); }
PB_FN i32 wave_sum(Wave w, i32 x) { return i32(wave_reduce<AddInts>(w, u32(x), w.width())); }

enum : u32 { gemv_group = 256, gemv_features = 2, gemv_rows = 8 };  // threads; rows of the weight and of x in a wave

// The first row of the weight that the wave is for.
PB_FN i64 gemv_feature(Wave w, i64 row_tiles) {
  return (i64(w.group()) / row_tiles * (w.group_dim() / w.width()) + w.tid() / w.width()) * gemv_features;
}

template <class Number, u32 ROWS>
struct WaveSums {
  Number of[gemv_features * ROWS];
};

// Sums over k of ROWS rows of A times gemv_features rows of B; every lane gets all of them.
template <class A, class B, u32 ROWS>
PB_FN WaveSums<typename B::Sum, ROWS> walk(Wave w, PB_LOCAL typename B::Local *local, A a, B b, i64 row, i64 rows,
                                           i64 feature, i64 k) {
  static_assert(u32(A::unit) == u32(B::unit), "operands are read in step");
  const i64 chunk = i64(B::unit) * B::wide;
  WaveSums<typename B::Sum, ROWS> c;
  PB_UNROLL
  for (u32 i = 0; i < gemv_features * ROWS; i++) c.of[i] = 0;
  for (i64 at = w.lane() * chunk; at < k; at += w.width() * chunk) {
    typename B::Wide raw[gemv_features];
    PB_UNROLL
    for (u32 f = 0; f < gemv_features; f++) raw[f] = B::fetch_wide(b, feature + f, at);
    PB_UNROLL
    for (u32 u = 0; u < B::wide; u++) {
      typename B::Values weight[gemv_features];
      PB_UNROLL
      for (u32 f = 0; f < gemv_features; f++) weight[f] = B::values(b, local, raw[f].of[u]);
      PB_UNROLL
      for (u32 m = 0; m < ROWS; m++) {
        if (m == 0 || row + m < rows) {
          const typename A::Raw x = A::fetch(a, row + m, at + u * B::unit);
          PB_UNROLL
          for (u32 f = 0; f < gemv_features; f++) c.of[f * ROWS + m] = dot(A::values(x), weight[f], c.of[f * ROWS + m]);
        }
      }
    }
  }
  PB_UNROLL
  for (u32 i = 0; i < gemv_features * ROWS; i++) c.of[i] = wave_sum(w, c.of[i]);
  return c;
}

// As Gemm, with the same arguments; ROWS is 1 or gemv_rows.
template <class A, class B, class Finish, u32 ROWS>
struct Gemv {
  enum : u32 { group_max = gemv_group, group_rows = ROWS };
  typedef ProductArgs<A, B, Finish> Args;
  typedef typename B::Local Local;

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    const Run run = find_run(a.runs, a.rows, i64(w.group()) % a.row_tiles, ROWS);
    const bool behind = run.weight == a.runs.count;
    const i64 feature = gemv_feature(w, a.row_tiles);
    B::prepare(w, local, a.b);
    w.barrier();
    const WaveSums<typename B::Sum, ROWS> c = walk<A, B, ROWS>(w, local, a.a, B::in_stack(a.b, behind ? 0 : run.weight),
                                                               run.begin, run.end, feature, behind ? 0 : a.k);
    PB_UNROLL
    for (u32 i = 0; i < gemv_features * ROWS; i++) {
      const i64 m = run.begin + i % ROWS, n = feature + i / ROWS;
      if (w.lane() == i % w.width() && m < run.end && n < a.columns) Finish::store(a.finish, m, n, c.of[i]);
    }
  }
};

template <class T, u32 ROWS>
struct GemvLinearInt8 {
  enum : u32 { group_max = gemv_group, group_rows = ROWS };
  typedef LinearArgs<T> Args;
  typedef NoLocal Local;

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    const i64 feature = gemv_feature(w, a.row_tiles), row = i64(w.group()) % a.row_tiles * ROWS;
    const WaveSums<i32, ROWS> c = walk<Bytes, Bytes, ROWS>(w, local, a.a, a.b, row, a.rows, feature, a.k);
    a.outlier_x.count = a.outlier_weight.count = a.outlier_count ? i64(*a.outlier_count) : 0;
    const WaveSums<float, ROWS> outliers = walk<OutlierColumns<T>, OutlierWeight, ROWS>(
        w, local, a.outlier_x, a.outlier_weight, row, a.rows, feature, a.outlier_x.count);
    PB_UNROLL
    for (u32 i = 0; i < gemv_features * ROWS; i++) {
      const i64 m = row + i % ROWS, n = feature + i / ROWS;
      if (w.lane() == i % w.width() && m < a.rows && n < a.columns)
        FinishLinear<T>::store(a.finish, m, n, c.of[i], outliers.of[i]);
    }
  }
};

template <class T, u32 ROWS>
using GemvKbit = Gemv<Dense<T>, Kbit, AddBias<T>, ROWS>;
template <u32 ROWS>
using GemvInt8 = Gemv<Bytes, Bytes, StoreInt, ROWS>;
template <class T, u32 ROWS>
using GemvKbitInt8 = Gemv<Bytes, KbitBytes, ScaleRows<T>, ROWS>;

}  // namespace pb
#endif
