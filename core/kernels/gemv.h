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

// Threads of a group; rows of the weight and, at most, of x in a wave: more of them would need more masks of lanes than
// an AMD wave has registers for. Up to gemv_most rows of x are two waves' work, which meet in the cache.
enum : u32 { gemv_group = 256, gemv_features = 2, gemv_rows = 4, gemv_most = 8 };

// The first row of the weight that the wave is for.
PB_FN i64 gemv_feature(Wave w, i64 row_tiles) {
  return (column_tile(w, row_tiles) * (w.group_dim() / w.width()) + w.tid() / w.width()) * gemv_features;
}

template <class Number, u32 ROWS>
struct WaveSums {
  Number of[gemv_features * ROWS];
};

// How the operands are read: a weight 16 bytes at a time and without bounds, or unit by unit. A lane has the same share
// of k either way, a chunk of each run of chunks, so a sum does not depend on how tensors are aligned.
template <class A, class B>
struct Wide {
  enum : u32 { units = B::wide, chunk = B::unit * units };
  typedef typename B::Wide Raw;
  PB_FN i64 next(Wave w, i64 at) { return at + i64(w.width()) * chunk; }
  PB_FN Raw fetch(B b, i64 row, i64 first) { return B::fetch_wide(b, row, first); }
  PB_FN typename A::Raw fetch_a(A a, i64 row, i64 first) { return A::fetch_whole(a, row, first); }
  PB_FN typename B::Raw unit_of(Raw raw, u32 u) { return raw.of[u]; }
};
template <class A, class B>
struct Narrow {
  enum : u32 { units = 1, chunk = B::unit * (u32(B::wide) ? u32(B::wide) : 1u) };
  typedef typename B::Raw Raw;
  PB_FN i64 next(Wave w, i64 at) {
    at += B::unit;
    return at % chunk ? at : at + i64(w.width() - 1u) * chunk;
  }
  PB_FN Raw fetch(B b, i64 row, i64 first) { return B::fetch(b, row, first); }
  PB_FN typename A::Raw fetch_a(A a, i64 row, i64 first) { return A::fetch(a, row, first); }
  PB_FN typename B::Raw unit_of(Raw raw, u32) { return raw; }
};

// Sums over a lane's share of k of ROWS rows of A times gemv_features rows of B, which is read as Read says.
template <class A, class B, class Read, u32 ROWS>
PB_FN WaveSums<typename B::Sum, ROWS> walk(Wave w, PB_LOCAL typename B::Local *local, A a, B b, i64 row, i64 rows,
                                           i64 feature, i64 k) {
  static_assert(u32(A::unit) == u32(B::unit), "operands are read in step");
  WaveSums<typename B::Sum, ROWS> c;
  PB_UNROLL
  for (u32 i = 0; i < gemv_features * ROWS; i++) c.of[i] = 0;
  const i64 left = rows - row;
  const u32 there = left < ROWS ? (left < 0 ? 0u : u32(left)) : u32(ROWS);
  for (i64 at = i64(w.lane()) * Read::chunk; at < k; at = Read::next(w, at)) {
    typename Read::Raw raw[gemv_features];
    PB_UNROLL
    for (u32 f = 0; f < gemv_features; f++) raw[f] = Read::fetch(b, feature + f, at);
    PB_UNROLL
    for (u32 u = 0; u < Read::units; u++) {
      typename B::Values weight[gemv_features];
      PB_UNROLL
      for (u32 f = 0; f < gemv_features; f++) weight[f] = B::values(b, local, Read::unit_of(raw[f], u));
      PB_UNROLL
      for (u32 m = 0; m < ROWS; m++) {
        if (m < there) {
          const typename A::Raw x = Read::fetch_a(a, row + m, at + u * B::unit);
          PB_UNROLL
          for (u32 f = 0; f < gemv_features; f++) c.of[f * ROWS + m] = dot(A::values(x), weight[f], c.of[f * ROWS + m]);
        }
      }
    }
  }
  return c;
}
template <class Number, u32 ROWS>
PB_FN WaveSums<Number, ROWS> add_lanes(Wave w, WaveSums<Number, ROWS> c) {
  PB_UNROLL
  for (u32 i = 0; i < gemv_features * ROWS; i++) c.of[i] = wave_sum(w, c.of[i]);
  return c;
}

// Sum i, which differs from lane to lane: by masks, as nothing may index registers.
PB_FN u32 bits_of(float x) { return as_u32(x); }
PB_FN u32 bits_of(i32 x) { return u32(x); }
PB_FN float number_of(u32 bits, float) { return as_float(bits); }
PB_FN i32 number_of(u32 bits, i32) { return i32(bits); }
template <class Number, u32 ROWS>
PB_FN Number sum_of(WaveSums<Number, ROWS> c, u32 i) {
  u32 bits = 0;
  PB_UNROLL
  for (u32 k = 0; k < gemv_features * ROWS; k++) bits |= bits_of(c.of[k]) & below(i ^ k, 1);
  return number_of(bits, Number());
}

// The best way to read a weight.
template <u32 WIDE>
struct Reader {
  template <class A, class B, u32 ROWS>
  PB_FN WaveSums<typename B::Sum, ROWS> read(Wave w, PB_LOCAL typename B::Local *local, A a, B b, i64 row, i64 rows,
                                             i64 feature, i64 k) {
    if (a.aligned && B::is_wide(b)) return walk<A, B, Wide<A, B>, ROWS>(w, local, a, b, row, rows, feature, k);
    return walk<A, B, Narrow<A, B>, ROWS>(w, local, a, b, row, rows, feature, k);
  }
};
template <>
struct Reader<0> {
  template <class A, class B, u32 ROWS>
  PB_FN WaveSums<typename B::Sum, ROWS> read(Wave w, PB_LOCAL typename B::Local *local, A a, B b, i64 row, i64 rows,
                                             i64 feature, i64 k) {
    return walk<A, B, Narrow<A, B>, ROWS>(w, local, a, b, row, rows, feature, k);
  }
};

// Sums over k of ROWS rows of A times gemv_features rows of B; every lane of the wave calls it and gets all of them.
template <class A, class B, u32 ROWS>
PB_FN WaveSums<typename B::Sum, ROWS> multiply_rows(Wave w, PB_LOCAL typename B::Local *local, A a, B b, i64 row,
                                                    i64 rows, i64 feature, i64 k) {
  return add_lanes<typename B::Sum, ROWS>(
      w, Reader<B::wide>::template read<A, B, ROWS>(w, local, a, b, row, rows, feature, k));
}

// As Gemm, with the same arguments; ROWS is 1 or gemv_rows.
template <class A, class B, class Finish, u32 ROWS>
struct Gemv {
  enum : u32 { group_max = gemv_group, group_rows = ROWS };
  typedef ProductArgs<A, B, Finish> Args;
  typedef typename B::Local Local;

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    const Run run = find_run(a.runs, a.rows, row_tile(w, a.row_tiles), ROWS);
    const bool behind = run.weight == a.runs.count;
    const i64 feature = gemv_feature(w, a.row_tiles);
    B::prepare(w, local, a.b);
    w.barrier();
    const WaveSums<typename B::Sum, ROWS> c = multiply_rows<A, B, ROWS>(
        w, local, a.a, B::in_stack(a.b, behind ? 0 : run.weight), run.begin, run.end, feature, behind ? 0 : a.k);
    for (u32 i = w.lane(); i < gemv_features * ROWS; i += w.width()) {
      const i64 m = run.begin + i % ROWS, n = feature + i / ROWS;
      if (m < run.end && n < a.columns) Finish::store(a.finish, m, n, sum_of<typename B::Sum, ROWS>(c, i));
    }
  }
};

template <class T, u32 ROWS>
struct GemvLinearInt8 {
  enum : u32 { group_max = gemv_group, group_rows = ROWS };
  typedef LinearArgs<T> Args;
  typedef NoLocal Local;

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    const i64 feature = gemv_feature(w, a.row_tiles), row = row_tile(w, a.row_tiles) * ROWS;
    const WaveSums<i32, ROWS> c = multiply_rows<Bytes, Bytes, ROWS>(w, local, a.a, a.b, row, a.rows, feature, a.k);
    OutlierColumns<T> outlier_x = a.outlier_x;  // changed in place, the arguments would lose their address spaces
    OutlierWeight outlier_weight = a.outlier_weight;
    if (a.outlier_count) outlier_x.count = outlier_weight.count = *a.outlier_count;
    const WaveSums<float, ROWS> outliers = multiply_rows<OutlierColumns<T>, OutlierWeight, ROWS>(
        w, local, outlier_x, outlier_weight, row, a.rows, feature, outlier_x.count);
    for (u32 i = w.lane(); i < gemv_features * ROWS; i += w.width()) {
      const i64 m = row + i % ROWS, n = feature + i / ROWS;
      if (m < a.rows && n < a.columns)
        FinishLinear<T>::store(a.finish, m, n, sum_of<i32, ROWS>(c, i), sum_of<float, ROWS>(outliers, i));
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
