// The operands of a product, read in units of neighbours along a row: what gemm.h and gemv.h multiply. An operand is a
// struct of kernel arguments with static members:
//
//   enum : u32 { unit }                     neighbours read at once, 8 or 16
//   struct Raw                              a unit as it was read: registers that wait for their turn
//   Raw fetch(operand, i64 row, i64 first)  any row and first: behind the end there are zeros
//   values(Raw)                             F8 or Bits8 for a float tile, U4 (sixteen signed bytes) for an int8 tile
//
// and a weight has values(operand, PB_LOCAL Local *, Raw), and:
//
//   struct Local, prepare(Wave, PB_LOCAL Local *, operand)   its codebook in the memory of the group; a barrier follows
//   in_stack(operand, i64 e)                                 the weight e of a stack
//   typedef ... Values, Sum                                  what values() and dot() give
//   enum : u32 { wide }                                      units that 16 bytes of it hold, 0: it is never wide
//   bool is_wide(operand), struct Wide { Raw of[wide]; }, fetch_wide(operand, i64 row, i64 first)
//                                                            to read them at once, where all of them can be
//
// An operand that meets a wide one is read by fetch_whole(operand, i64 row, i64 first): no row or unit is out of
// bounds.
#ifndef PB_KERNELS_OPERANDS_H
#define PB_KERNELS_OPERANDS_H

#include "int8.h"
#include "weight.h"
#include "../simt/tile.h"

namespace pb {

PB_FN F8 zeros8() {
  F8 r;
  PB_UNROLL
  for (u32 k = 0; k < 8; k++) r.v[k] = 0.0f;
  return r;
}

// Bytes first ... first + 15 of n, zeros behind the end; none of them unless `there`. aligned: p to 16 bytes, first
// being a multiple of 16.
PB_FN U4 load_bytes16(PB_GLOBAL const u8 *p, i64 first, i64 n, bool there, bool aligned) {
  U4 r = {{0, 0, 0, 0}};
  const i64 left = there ? n - first : 0;
  if (aligned && left >= 16) return load16((PB_GLOBAL const u32 *)(p + first));
  if (left > 0) {
    const u32 count = left < 16 ? u32(left) : 16u;
    PB_UNROLL
    for (u32 k = 0; k < 16; k++)
      r.v[k / 4u] |= (u32(p[first + min_u32(k, count - 1)]) & below(k, count)) << (k % 4u * 8u);
  }
  return r;
}

// Activations [rows, columns] of fp32, fp16 or bf16.
template <class T>
struct Dense {
  PB_GLOBAL const T *x;
  i64 rows, columns;
  i64 aligned;  // each row to 16 bytes
  enum : u32 { unit = 8 };
  typedef Bits8<T> Raw;

  PB_FN Raw fetch(Dense d, i64 row, i64 first) {
    return load_bits8(d.x + row * d.columns, first, d.columns, row < d.rows, d.aligned != 0);
  }
  PB_FN Raw fetch_whole(Dense d, i64 row, i64 first) { return load_whole8(d.x + row * d.columns + first); }
  PB_FN Bits8<T> values(Raw raw) { return raw; }
};

// int8 [rows, columns], rows `pitch` bytes apart. As a weight it is a plain matrix.
struct Bytes {
  PB_GLOBAL const u8 *x;
  i64 rows, columns, pitch;
  i64 aligned;  // each row to 16 bytes
  enum : u32 { unit = 16, wide = 1 };
  typedef U4 Values;
  typedef i32 Sum;
  typedef U4 Raw;
  struct Wide {
    Raw of[wide];
  };
  typedef NoLocal Local;

  PB_FN void prepare(Wave, PB_LOCAL Local *, Bytes) {}
  PB_FN Bytes in_stack(Bytes b, i64) { return b; }
  PB_FN Raw fetch(Bytes b, i64 row, i64 first) {
    return load_bytes16(b.x + row * b.pitch, first, b.columns, row < b.rows, b.aligned != 0);
  }
  PB_FN Raw fetch_whole(Bytes b, i64 row, i64 first) {
    return load16((PB_GLOBAL const u32 *)(b.x + row * b.pitch + first));
  }
  PB_FN bool is_wide(Bytes b) { return b.aligned && b.pitch == b.columns; }
  PB_FN Wide fetch_wide(Bytes b, i64 row, i64 first) {
    Wide r = {};
    if (row < b.rows) r.of[0] = fetch_whole(b, row, first);
    return r;
  }
  PB_FN U4 values(Raw raw) { return raw; }
  PB_FN U4 values(Bytes, PB_LOCAL Local *, Raw raw) { return raw; }
};

// int8 activations [rows, columns] as floats.
struct ByteFloats {
  PB_GLOBAL const u8 *x;
  i64 rows, columns;
  enum : u32 { unit = 8 };
  typedef F8 Raw;

  PB_FN Raw fetch(ByteFloats b, i64 row, i64 first) {
    F8 r = zeros8();
    if (row < b.rows && first < b.columns) {
      PB_UNROLL
      for (u32 k = 0; k < 8; k++) {
        const bool there = first + k < b.columns;
        const u32 q = b.x[row * b.columns + (there ? first + k : first)];
        r.v[k] = there ? float(signed_byte(q, 0)) : 0.0f;
      }
    }
    return r;
  }
  PB_FN F8 values(Raw raw) { return raw; }
};

// An int8 weight [rows, columns] times the step of its row.
struct ScaledBytes {
  PB_GLOBAL const u8 *q;
  PB_GLOBAL const float *absmax;
  i64 rows, columns;
  i64 aligned;  // each row to 4 bytes, and columns a multiple of 8
  enum : u32 { unit = 8 };
  struct Raw {
    u32 q[2];
    float scale;
  };
  typedef NoLocal Local;

  PB_FN void prepare(Wave, PB_LOCAL Local *, ScaledBytes) {}
  PB_FN ScaledBytes in_stack(ScaledBytes s, i64) { return s; }
  PB_FN Raw fetch(ScaledBytes s, i64 row, i64 first) {
    Raw r = {{0, 0}, 0.0f};
    if (row >= s.rows || first >= s.columns) return r;
    PB_GLOBAL const u8 *p = s.q + row * s.columns + first;
    r.scale = int8_scale(s.absmax[row]);
    PB_UNROLL
    for (u32 h = 0; h < 2; h++) {
      if (s.aligned) {
        r.q[h] = load4(p + 4 * h);
      } else {
        PB_UNROLL
        for (u32 k = 0; k < 4; k++)
          if (first + i64(4 * h + k) < s.columns) r.q[h] |= u32(p[4 * h + k]) << (8u * k);
      }
    }
    return r;
  }
  PB_FN F8 values(ScaledBytes, PB_LOCAL Local *, Raw raw) {
    F8 r;
    PB_UNROLL
    for (u32 k = 0; k < 8; k++) r.v[k] = float(signed_byte(raw.q[k / 4u], k % 4u)) * raw.scale;
    return r;
  }
};

// Eight codes of 2 or 3 bits laid out as those of 4.
PB_FN u32 as_nibbles(u32 word, u32 bits) {
  if (bits == 4u) return word;
  u32 r = 0;
  PB_UNROLL
  for (u32 k = 0; k < 8; k++) r |= ((word >> (bits * k)) & ((1u << bits) - 1u)) << packed_shift(k, 4);
  return r;
}

// A k-bit weight, or a stack of them, [rows, columns] each, dequantized.
struct Kbit {
  KbitWeight weight;
  i64 rows, columns;
  i64 first_row;  // of this weight in the stack
  i64 whole;      // columns is a multiple of 8: then no unit straddles a block
  i64 aligned;    // each unit to 4 bytes
  i64 aligned16;  // and each run of 32 codes of 4 bits to 16, all of one block
  enum : u32 { unit = 8, wide = 4 };
  typedef F8 Values;
  typedef float Sum;
  struct Raw {
    u32 codes;
    float scale;
    float next_scale;  // from element `split` on; used where !whole
    u32 split, there;
  };
  struct Wide {
    Raw of[wide];
  };
  typedef CodebookLocal Local;

  PB_FN void prepare(Wave w, PB_LOCAL Local *local, Kbit b) { load_codebook(w, local, b.weight); }
  PB_FN Kbit in_stack(Kbit b, i64 e) {
    b.first_row = e * b.rows;
    return b;
  }

  PB_FN Raw fetch(Kbit b, i64 row, i64 first) {
    Raw r = {0, 0.0f, 0.0f, 8, 0};
    if (row >= b.rows || first >= b.columns) return r;
    const u32 bits = u32(b.weight.bits);
    const i64 at = (b.first_row + row) * b.columns + first;
    const i64 block = at >> b.weight.block_log2;
    if (b.whole) {
      r.scale = weight_scale(b.weight, block);
      r.codes = as_nibbles(weight_codes8(b.weight, at, at + 8, b.aligned != 0), bits);
      return r;
    }
    // Whole blocks have whole units: here the places are consecutive.
    const i64 left = b.columns - first, run = ((block + 1) << b.weight.block_log2) - at;
    r.there = left < 8 ? u32(left) : 8u;
    r.split = run < 8 ? u32(run) : 8u;
    r.scale = weight_scale_in_sequence(b.weight, block);
    if (r.split < r.there) r.next_scale = weight_scale_in_sequence(b.weight, block + 1);
    for (u32 k = 0; k < r.there; k++) r.codes |= packed_code(b.weight.q, at + k, bits) << packed_shift(k, 4);
    return r;
  }
  PB_FN bool is_wide(Kbit b) { return b.aligned16 != 0; }
  PB_FN Wide fetch_wide(Kbit b, i64 row, i64 first) {
    Wide r = {};
    if (row < b.rows) {
      const i64 at = (b.first_row + row) * b.columns + first;
      const U4 codes = load16((PB_GLOBAL const u32 *)(b.weight.q + at / 2));
      const float scale = weight_scale(b.weight, at >> b.weight.block_log2);
      PB_UNROLL
      for (u32 i = 0; i < wide; i++) r.of[i] = Raw{codes.v[i], scale, 0.0f, 8, 0};
    }
    return r;
  }
  PB_FN F8 values(Kbit b, PB_LOCAL Local *local, Raw raw) {
    F8 r;
    if (b.whole) {
      PB_UNROLL
      for (u32 k = 0; k < 8; k++) r.v[k] = local->code[code_of(raw.codes, k, 4)] * raw.scale;
      return r;
    }
    PB_UNROLL
    for (u32 k = 0; k < 8; k++) {
      const float value = local->code[code_of(raw.codes, k, 4)] * (k < raw.split ? raw.scale : raw.next_scale);
      r.v[k] = k < raw.there ? value : 0.0f;
    }
    return r;
  }
};

// A k-bit weight whose codebook is int8, sixteen codes at a time; its columns are a multiple of 16.
struct KbitBytes {
  KbitWeight weight;  // with the values of RoundCodebook
  i64 rows, columns;
  i64 aligned;    // each unit to 4 bytes
  i64 aligned16;  // and each run of 32 codes of 4 bits to 16, all of one block
  i64 run_words;  // of four codes that a tile may sum up at once, all of one block: a power of two
  enum : u32 { unit = 16, wide = 2 };
  typedef float Sum;
  struct Raw {
    u32 codes[2];
    float scale;
  };
  struct Wide {
    Raw of[wide];
  };
  struct Local {
    u32 code[16];
  };
  struct Values {
    U4 bytes;
    float scale;
  };

  PB_FN void prepare(Wave w, PB_LOCAL Local *local, KbitBytes b) {
    if (w.tid() < 16)
      local->code[w.tid()] = w.tid() < (1u << b.weight.bits) ? u32(i32(b.weight.code[w.tid()])) & 255u : 0u;
  }
  PB_FN KbitBytes in_stack(KbitBytes b, i64) { return b; }
  PB_FN Raw fetch(KbitBytes b, i64 row, i64 first) {
    Raw r = {{0, 0}, 0.0f};
    if (row >= b.rows || first >= b.columns) return r;
    const i64 at = row * b.columns + first;
    PB_UNROLL
    for (u32 h = 0; h < 2; h++)
      r.codes[h] = as_nibbles(weight_codes8(b.weight, at + 8 * h, at + 16, b.aligned != 0), u32(b.weight.bits));
    r.scale = weight_scale(b.weight, at >> b.weight.block_log2);
    return r;
  }
  PB_FN bool is_wide(KbitBytes b) { return b.aligned16 != 0; }
  PB_FN Wide fetch_wide(KbitBytes b, i64 row, i64 first) {
    Wide r = {};
    if (row < b.rows) {
      const i64 at = row * b.columns + first;
      const U4 codes = load16((PB_GLOBAL const u32 *)(b.weight.q + at / 2));
      const float scale = weight_scale(b.weight, at >> b.weight.block_log2);
      PB_UNROLL
      for (u32 i = 0; i < wide; i++) r.of[i] = Raw{{codes.v[2 * i], codes.v[2 * i + 1]}, scale};
    }
    return r;
  }
  PB_FN Values values(KbitBytes, PB_LOCAL Local *local, Raw raw) {
    Values r;
    r.scale = raw.scale;
    PB_UNROLL
    for (u32 i = 0; i < 4; i++) {
      r.bytes.v[i] = 0;
      PB_UNROLL
      for (u32 k = 0; k < 4; k++)
        r.bytes.v[i] |= local->code[code_of(raw.codes[i / 2u], i % 2u * 4u + k, 4)] << (8u * k);
    }
    return r;
  }
};

// The codebook of a k-bit weight rounded to int8, as floats, and behind its sixteen values what a step of it is worth.
struct RoundCodebook {
  enum : u32 { group_max = 64 };
  struct Args {
    PB_GLOBAL const float *code;
    PB_GLOBAL float *rounded;
    i64 count;
  };
  typedef NoLocal Local;
  PB_FN void run(Wave w, PB_LOCAL Local *, Args a) {
    float largest = 0.0f;
    for (i64 i = 0; i < a.count; i++) {
      const float magnitude = as_float(magnitude_bits(a.code[i]));
      if (magnitude > largest) largest = magnitude;
    }
    if (w.tid() < a.count) a.rounded[w.tid()] = float(round_rn(a.code[w.tid()] * div_rn(127.0f, largest)));
    if (w.tid() == 16) a.rounded[16] = div_rn(largest, 127.0f);
  }
};

// Column i of a list, or of all columns where there is none.
PB_FN i64 listed(PB_GLOBAL const i32 *list, i64 i) { return list ? i64(list[i]) : i; }

// The elements of x in the outlier columns, side by side.
template <class T>
struct OutlierColumns {
  PB_GLOBAL const T *x;
  i64 rows, columns;
  PB_GLOBAL const i32 *list;
  i64 count;           // of the list, which is known on the device alone
  i64 threshold_bits;  // of the fp32
  i64 by_row;          // only what is an outlier itself; elsewhere a zero
  enum : u32 { unit = 8 };
  typedef F8 Raw;

  PB_FN Raw fetch(OutlierColumns o, i64 row, i64 first) {
    const float threshold = as_float(u32(o.threshold_bits));
    F8 r = zeros8();
    if (row < o.rows && first < o.count) {
      PB_UNROLL
      for (u32 k = 0; k < 8; k++) {
        const bool there = first + k < o.count;
        const float x = float_of(bits1(o.x + row * o.columns + listed(o.list, there ? first + k : first)), T());
        r.v[k] = there && (!o.by_row || is_outlier(x, threshold)) ? x : 0.0f;
      }
    }
    return r;
  }
  PB_FN F8 values(Raw raw) { return raw; }
};

// The same columns of an int8 weight, times the step of each row.
struct OutlierWeight {
  PB_GLOBAL const u8 *q;
  PB_GLOBAL const float *absmax;
  i64 rows, columns;
  PB_GLOBAL const i32 *list;
  i64 count;
  enum : u32 { unit = 8, wide = 0 };
  typedef F8 Values;
  typedef float Sum;
  typedef F8 Raw;
  typedef NoLocal Local;

  PB_FN Raw fetch(OutlierWeight o, i64 row, i64 first) {
    F8 r = zeros8();
    if (row < o.rows && first < o.count) {
      const float scale = int8_scale(o.absmax[row]);
      PB_UNROLL
      for (u32 k = 0; k < 8; k++) {
        const bool there = first + k < o.count;
        const u32 q = o.q[row * o.columns + listed(o.list, there ? first + k : first)];
        r.v[k] = there ? float(signed_byte(q, 0)) * scale : 0.0f;
      }
    }
    return r;
  }
  PB_FN F8 values(OutlierWeight, PB_LOCAL Local *, Raw raw) { return raw; }
};

}  // namespace pb
#endif
