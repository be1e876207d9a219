// gather_kbit and gather_int8 (docs/numerics.md, "Gather"). Where the rows are whole eights of elements a thread owns 8
// neighbours of y; else its elements are apart, so that a wave reads and writes neighbours.
#ifndef PB_KERNELS_GATHER_H
#define PB_KERNELS_GATHER_H

#include "code256.h"
#include "weight.h"
#include "../math/int8.h"

namespace pb {

struct KbitTable {
  KbitWeight weight;
  i64 elements;
  i64 aligned;  // q to 4 bytes
  typedef CodebookLocal Local;

  PB_FN void prepare(Wave w, PB_LOCAL Local *local, KbitTable t) {
    load_codebook(w, local, t.weight);
    w.barrier();
  }
  PB_FN float one(PB_LOCAL const Local *local, KbitTable t, i64, i64 i) {
    return local->code[packed_code(t.weight.q, i, u32(t.weight.bits))] *
           weight_scale(t.weight, i >> t.weight.block_log2);
  }
  PB_FN F8 eight(PB_LOCAL const Local *local, KbitTable t, i64, i64 first) {
    const u32 word = weight_codes8(t.weight, first, t.elements, t.aligned != 0), bits = u32(t.weight.bits);
    const float scale = weight_scale(t.weight, first >> t.weight.block_log2);
    F8 y;
    PB_UNROLL
    for (u32 k = 0; k < 8; k++) y.v[k] = local->code[code_of(word, k, bits)] * scale;
    return y;
  }
};

struct Int8Table {
  PB_GLOBAL const u8 *q;
  PB_GLOBAL const float *absmax;
  i64 elements;
  i64 aligned;  // q to 8 bytes
  typedef NoLocal Local;

  PB_FN void prepare(Wave, PB_LOCAL Local *, Int8Table) {}
  PB_FN float one(PB_LOCAL const Local *, Int8Table t, i64 row, i64 i) {
    return int8_value(float(i32(u32(t.q[i]) << 24) >> 24), t.absmax[row]);
  }
  PB_FN F8 eight(PB_LOCAL const Local *, Int8Table t, i64 row, i64 first) {
    const U2 q = load_codes8(t.q, first, t.elements, t.aligned != 0);
    const float absmax = t.absmax[row];
    F8 y;
    PB_UNROLL
    for (u32 k = 0; k < 8; k++) y.v[k] = int8_value(float(i32(byte_of(q, k) << 24) >> 24), absmax);
    return y;
  }
};

template <class T, class Table>
struct Gather {
  enum : u32 { group_max = 256 };
  struct Args {
    Table table;
    i64 n, k;  // its rows and columns
    PB_GLOBAL const i64 *index64;
    PB_GLOBAL const i32 *index32;  // where index64 is null
    PB_GLOBAL T *y;
    i64 count;    // elements of y
    i64 aligned;  // y to 16 bytes
  };
  typedef typename Table::Local Local;

  // The row of the table that row i of y is, or -1.
  PB_FN i64 row_of(Args a, i64 i) {
    const i64 row = a.index64 ? a.index64[i] : i64(a.index32[i]);
    return row >= 0 && row < a.n ? row : -1;
  }

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    Table::prepare(w, local, a.table);
    const float nan = as_float(0x7fc00000u);
    const i64 start = i64(w.group()) * w.group_dim() * 8;
    if (a.k % 8 == 0) {
      const i64 first = start + 8 * w.tid();
      if (first < a.count) {
        const i64 i = first / a.k, row = row_of(a, i);
        F8 y = {{nan, nan, nan, nan, nan, nan, nan, nan}};
        if (row >= 0) y = Table::eight(local, a.table, row, row * a.k + (first - i * a.k));
        store_part(a.y, first, a.count, a.aligned != 0, y);
      }
    } else {
      for (u32 part = 0; part < 8; part++) {
        const i64 at = start + part * w.group_dim() + w.tid();
        if (at < a.count) {
          const i64 i = at / a.k, row = row_of(a, i);
          store1(a.y + at, row >= 0 ? Table::one(local, a.table, row, row * a.k + (at - i * a.k)) : nan);
        }
      }
    }
  }
};

}  // namespace pb
#endif
