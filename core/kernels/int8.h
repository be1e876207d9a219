// quantize_int8 and dequantize_int8 (docs/numerics.md, "int8"), and the list of outlier columns of linear_int8. A power
// of two of neighbouring threads has a row, each of them 8 neighbours at a time.
#ifndef PB_KERNELS_INT8_H
#define PB_KERNELS_INT8_H

#include "block.h"
#include "../math/int8.h"

namespace pb {

enum : u32 { row_group = 256 };  // threads of a group, which has one row or several

// Which row a thread is for, and where in it it starts. threads_log2: of a row.
struct RowPlace {
  i64 row, first, step;
};
PB_FN RowPlace row_place(Wave w, i64 threads_log2) {
  const u32 mine = w.tid() & ((1u << threads_log2) - 1u);
  const i64 row = i64(w.group()) * (row_group >> threads_log2) + (w.tid() >> threads_log2);
  return RowPlace{row, i64(mine) * 8, i64(8) << threads_log2};
}

PB_FN bool is_outlier(float x, float threshold) { return as_float(as_u32(x) & 0x7fffffffu) >= threshold; }

// The code of s = x * factor; a NaN has 0.
PB_FN u32 int8_code(float s) {
  const float clamped = s > 127.0f ? 127.0f : s < -127.0f ? -127.0f : s == s ? s : 0.0f;
  return u32(round_rn(clamped)) & 255u;
}

struct ClearFlags {
  enum : u32 { group_max = row_group };
  struct Args {
    PB_GLOBAL u8 *flags;
    i64 n;
  };
  typedef NoLocal Local;
  PB_FN void run(Wave w, PB_LOCAL Local *, Args a) {
    const i64 i = i64(w.group()) * row_group + w.tid();
    if (i < a.n) a.flags[i] = 0;
  }
};

// Marks the columns that hold an outlier in any row.
template <class T>
struct MarkOutliers {
  enum : u32 { group_max = row_group };
  struct Args {
    PB_GLOBAL const T *x;
    PB_GLOBAL u8 *outlier;
    i64 rows, columns, threads_log2;
    i64 threshold_bits;  // of the fp32
    i64 aligned;         // each row to 16 bytes
  };
  typedef NoLocal Local;
  PB_FN void run(Wave w, PB_LOCAL Local *, Args a) {
    const RowPlace at = row_place(w, a.threads_log2);
    const float threshold = as_float(u32(a.threshold_bits));
    if (at.row < a.rows) {
      for (i64 c = at.first; c < a.columns; c += at.step) {
        const F8 x = load_part(a.x + at.row * a.columns, c, a.columns, a.aligned != 0);
        PB_UNROLL
        for (u32 k = 0; k < 8; k++)
          if (c + k < a.columns && is_outlier(x.v[k], threshold)) set_flag(a.outlier + c + k);
      }
    }
  }
};

template <class T>
struct QuantizeInt8 {
  enum : u32 { group_max = row_group };
  struct Args {
    PB_GLOBAL const T *x;
    PB_GLOBAL u8 *q;
    PB_GLOBAL float *absmax;
    PB_GLOBAL const u8 *outlier;  // columns whose elements are 0, or null
    i64 rows, columns, threads_log2;
    i64 pitch;           // bytes between rows of q; what lies behind the columns becomes 0
    i64 threshold_bits;  // of the fp32
    i64 by_row;          // an element is 0 where it is an outlier itself
    i64 aligned;         // each row of x to 16 bytes, of q to 8
  };
  typedef BlockLocal Local;

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    const RowPlace at = row_place(w, a.threads_log2);
    const float threshold = as_float(u32(a.threshold_bits));
    const bool there = at.row < a.rows, skip = threshold > 0.0f;
    PB_GLOBAL const T *x = a.x + at.row * a.columns;

    // The absmax of what is no outlier itself.
    u32 bits = 0;
    for (i64 c = at.first; there && c < a.columns; c += at.step) {
      F8 v = load_part(x, c, a.columns, a.aligned != 0);
      PB_UNROLL
      for (u32 k = 0; k < 8; k++) v.v[k] = skip && is_outlier(v.v[k], threshold) ? 0.0f : v.v[k];
      bits = max_u32(bits, magnitude_bits8(v));
    }
    bits = block_reduce<Max>(w, local, bits, 1u << a.threads_log2);
    if (there && at.first == 0) a.absmax[at.row] = stored_absmax(bits);

    const float factor = int8_factor(bits);
    for (i64 c = at.first; there && c < a.pitch; c += at.step) {
      const F8 v = load_part(x, c, a.columns, a.aligned != 0);
      U2 word = {{0, 0}};
      PB_UNROLL
      for (u32 k = 0; k < 8; k++) {
        const bool marked = a.outlier && c + k < a.columns && a.outlier[c + k];
        const bool dropped = marked || (a.by_row && is_outlier(v.v[k], threshold));
        word.v[k / 4u] |= (dropped ? 0u : int8_code(v.v[k] * factor)) << (k % 4u * 8u);
      }
      PB_GLOBAL u8 *q = a.q + at.row * a.pitch + c;
      if (a.aligned && c + 8 <= a.pitch) {
        store8(q, word);
      } else {
        PB_UNROLL
        for (u32 k = 0; k < 8; k++)
          if (c + k < a.pitch) q[k] = u8(word.v[k / 4u] >> (k % 4u * 8u));
      }
    }
  }
};

template <class T>
struct DequantizeInt8 {
  enum : u32 { group_max = row_group };
  struct Args {
    PB_GLOBAL const u8 *q;
    PB_GLOBAL const float *absmax;
    PB_GLOBAL T *y;
    i64 rows, columns, threads_log2;
    i64 aligned;  // each row of q to 8 bytes, of y to 16
  };
  typedef NoLocal Local;

  PB_FN void run(Wave w, PB_LOCAL Local *, Args a) {
    const RowPlace at = row_place(w, a.threads_log2);
    if (at.row < a.rows) {
      const float absmax = a.absmax[at.row];
      for (i64 c = at.first; c < a.columns; c += at.step) {
        PB_GLOBAL const u8 *q = a.q + at.row * a.columns + c;
        U2 word = {{0, 0}};
        if (a.aligned) {
          word = load8(q);
        } else {
          PB_UNROLL
          for (u32 k = 0; k < 8; k++)
            if (c + k < a.columns) word.v[k / 4u] |= u32(q[k]) << (k % 4u * 8u);
        }
        F8 y;
        PB_UNROLL
        for (u32 k = 0; k < 8; k++) y.v[k] = int8_value(float(signed_byte(word.v[k / 4u], k % 4u)), absmax);
        store_part(a.y + at.row * a.columns, c, a.columns, a.aligned != 0, y);
      }
    }
  }
};

// The marked columns, ascending, and their number; one group, each of its threads for a run of columns.
struct ListOutliers {
  enum : u32 { group_max = row_group };
  struct Args {
    PB_GLOBAL const u8 *outlier;
    PB_GLOBAL i32 *list;
    PB_GLOBAL i32 *count;
    i64 columns;
  };
  struct Local {
    u32 before[row_group];
  };
  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    const i64 share = (a.columns + row_group - 1) / row_group, first = share * w.tid();
    const i64 last = first + share < a.columns ? first + share : a.columns;
    u32 mine = 0;
    for (i64 c = first; c < last; c++) mine += a.outlier[c];
    // The sum over all threads up to this one, twice as many of them each time.
    local->before[w.tid()] = mine;
    for (u32 span = 1; span < row_group; span <<= 1) {
      w.barrier();
      const u32 sum = local->before[w.tid()] + (w.tid() >= span ? local->before[w.tid() - span] : 0u);
      w.barrier();
      local->before[w.tid()] = sum;
    }
    u32 at = local->before[w.tid()] - mine;
    for (i64 c = first; c < last; c++)
      if (a.outlier[c]) a.list[at++] = i32(c);
    if (w.tid() == row_group - 1) *a.count = i32(at);
  }
};

}  // namespace pb
#endif
