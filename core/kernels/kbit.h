// quantize_kbit and dequantize_kbit (docs/numerics.md, "k-bit"). A thread owns 8 neighbouring values, so block / 8
// threads share a block.
#ifndef PB_KERNELS_KBIT_H
#define PB_KERNELS_KBIT_H

#include "block.h"
#include "weight.h"

namespace pb {

// Thresholds in registers. By value, as every private struct: Metal wants an address space on each reference.
struct Thresholds {
  float t[15];
};

// The rank among 2^BITS - 1 thresholds: compares and selects, nothing indexed by a variable.
template <u32 BITS>
PB_FN u32 rank_in(Thresholds r, float s) {
  if (BITS == 2) {
    const bool b1 = s > r.t[1];
    return (u32(b1) << 1) | u32(s > (b1 ? r.t[2] : r.t[0]));
  }
  if (BITS == 3) {
    const bool b2 = s > r.t[3];
    const bool b1 = s > (b2 ? r.t[5] : r.t[1]);
    return (u32(b2) << 2) | (u32(b1) << 1) | u32(s > (b2 ? (b1 ? r.t[6] : r.t[4]) : (b1 ? r.t[2] : r.t[0])));
  }
  const bool b3 = s > r.t[7];
  const bool b2 = s > (b3 ? r.t[11] : r.t[3]);
  const bool b1 = s > (b3 ? (b2 ? r.t[13] : r.t[9]) : (b2 ? r.t[5] : r.t[1]));
  const float high = b2 ? (b1 ? r.t[14] : r.t[12]) : (b1 ? r.t[10] : r.t[8]);
  const float low = b2 ? (b1 ? r.t[6] : r.t[4]) : (b1 ? r.t[2] : r.t[0]);
  return (u32(b3) << 3) | (u32(b2) << 2) | (u32(b1) << 1) | u32(s > (b3 ? high : low));
}

template <class T, u32 BITS, bool SEARCH>
struct QuantizeKbit {
  enum : u32 { group_max = block_group_max, levels = 1u << BITS, candidates = 32 };
  struct Args {
    PB_GLOBAL const T *x;
    PB_GLOBAL const float *code, *thresholds;
    PB_GLOBAL const u8 *order;
    PB_GLOBAL u8 *q;
    PB_GLOBAL float *absmax;
    i64 n, block_log2;
    i64 aligned;  // x to 16 bytes and q to 4
  };
  struct Local {
    BlockLocal block;
    float thresholds[16];
    u32 order[16];    // words, so that lanes with different ranks meet no bank twice
    float value[16];  // by rank
  };

  // The scale that brings this thread's block nearest to its values, and what 1 / scale is; every thread calls it.
  struct Scale {
    float absmax, inverse;
  };
  PB_FN Scale searched(Wave w, PB_LOCAL Local *local, Thresholds thresholds, F8 x, i64 there, u32 bits, u32 lanes) {
    const Scale plain = {stored_absmax(bits), inverse_absmax(bits)};
    float best_gain = 0.0f, best_ratio = 1.0f;
    for (u32 j = 0; j < candidates; j++) {
      const float g = div_rn(1.0f, float(j + 13u) * 0.03125f);
      F8 num, den;
      PB_UNROLL
      for (u32 k = 0; k < 8; k++) {
        const float u = x.v[k] * plain.inverse;
        const float c = i64(k) < there ? local->value[rank_in<BITS>(thresholds, u * g)] : 0.0f;
        num.v[k] = u * c;
        den.v[k] = c * c;
      }
      const float a = block_sum(w, &local->block, sum8(num), lanes), b = block_sum(w, &local->block, sum8(den), lanes);
      const float gain = b > 0.0f && a > 0.0f ? div_rn(a * a, b) : 0.0f;
      if (gain > best_gain) {
        best_gain = gain;
        best_ratio = div_rn(a, b);
      }
    }
    const float scale = plain.absmax * best_ratio;
    const u32 found = as_u32(scale);
    const bool usable = !is_zero_block(bits) && bits < 0x7f800000u;
    if (!usable || !(best_gain > 0.0f) || !(found >= 0x00800000u && found < 0x7f800000u)) return plain;
    return Scale{scale, div_rn(1.0f, scale)};
  }

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    const i64 first = (i64(w.group()) * w.group_dim() + w.tid()) * 8, there = a.n - first;
    const F8 x = load_part(a.x, first, a.n, a.aligned != 0);

    // The codebook into the memory of the group, then the absmax of the block.
    if (w.tid() < levels) {
      local->thresholds[w.tid()] = w.tid() < levels - 1u ? a.thresholds[w.tid()] : 0.0f;
      local->order[w.tid()] = a.order[w.tid()];
      if (SEARCH) local->value[w.tid()] = a.code[a.order[w.tid()]];
    }
    w.barrier();
    Thresholds thresholds;
    PB_UNROLL
    for (u32 k = 0; k < levels - 1u; k++) thresholds.t[k] = local->thresholds[k];
    const u32 lanes = u32(1) << (a.block_log2 - 3);
    const u32 bits = block_reduce<Max>(w, &local->block, magnitude_bits8(x), lanes);
    Scale scale = {stored_absmax(bits), inverse_absmax(bits)};
    if (SEARCH) scale = searched(w, local, thresholds, x, there, bits, lanes);

    // What lies behind the end has the code of 0, also in a block whose absmax is NaN.
    u32 word = 0;
    PB_UNROLL
    for (u32 k = 0; k < 8; k++) {
      const float s = i64(k) < there ? x.v[k] * scale.inverse : 0.0f;
      word |= local->order[rank_in<BITS>(thresholds, s)] << packed_shift(k, BITS);
    }
    PB_GLOBAL u8 *q = a.q + first / 8 * BITS;
    if (BITS == 4 && a.aligned && there >= 8) {
      store4(q, word);
    } else {
      const i64 bytes = packed_bytes(there < 8 ? there : 8, BITS);
      PB_UNROLL
      for (u32 k = 0; k < BITS; k++)
        if (i64(k) < bytes) q[k] = u8(word >> (8 * k));
    }
    if (there > 0 && (w.tid() & (lanes - 1u)) == 0) a.absmax[first >> a.block_log2] = scale.absmax;
  }
};

template <class T>
struct DequantizeKbit {
  enum : u32 { group_max = 256 };
  struct Args {
    KbitWeight weight;
    PB_GLOBAL T *y;
    i64 n;
    i64 aligned;  // y to 16 bytes and q to 4
  };
  typedef CodebookLocal Local;

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    load_codebook(w, local, a.weight);
    w.barrier();
    const i64 first = (i64(w.group()) * w.group_dim() + w.tid()) * 8;
    if (first < a.n) {
      const u32 word = weight_codes8(a.weight, first, a.n, a.aligned != 0), bits = u32(a.weight.bits);
      const float scale = weight_scale(a.weight, first >> a.weight.block_log2);
      F8 y;
      PB_UNROLL
      for (u32 k = 0; k < 8; k++) y.v[k] = local->code[code_of(word, k, bits)] * scale;
      store_part(a.y, first, a.n, a.aligned != 0, y);
    }
  }
};

}  // namespace pb
#endif
