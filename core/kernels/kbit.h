// quantize_kbit for 4 bits, without search (docs/numerics.md, "k-bit").
//
// A thread owns 8 neighbouring values, so block / 8 threads share a block. Up to the width of a wave they find the
// absmax with shuffles; beyond it the waves of a block also meet in the memory of the group.
#ifndef PB_KERNELS_KBIT_H
#define PB_KERNELS_KBIT_H

#include "../simt/wave.h"
#include "../math/encode.h"
#include "../math/packing.h"

namespace pb {

enum : u32 {
  kbit4_values = 8,  // per thread: 16 bytes of a 16-bit type, 4 bytes of codes
  kbit4_group_min = 128,
  kbit4_group_max = 512,  // a block of 4096
  kbit4_waves_max = 32,   // of the widest group at the narrowest wave, 16
};

// How many threads a group must have: a multiple of the threads that share a block, and of every wave's width.
PB_FN u32 kbit4_group(u32 block) {
  return block / kbit4_values > kbit4_group_min ? block / kbit4_values : kbit4_group_min;
}

struct Kbit4Local {
  u32 wave_max[kbit4_waves_max];
  float thresholds[15];
  u32 order[16];  // words, so that lanes with different ranks meet no bank twice
};

// By value, as every private struct: Metal wants an address space on each reference.
struct Kbit4Thresholds {
  float t[15];
};

// The rank among 15 thresholds that lie in registers: 4 compares and 11 selects, nothing indexed by a variable.
PB_FN u32 kbit4_rank(Kbit4Thresholds r, float s) {
  const bool b3 = s > r.t[7];
  const bool b2 = s > (b3 ? r.t[11] : r.t[3]);
  const bool b1 = s > (b3 ? (b2 ? r.t[13] : r.t[9]) : (b2 ? r.t[5] : r.t[1]));
  const float high = b2 ? (b1 ? r.t[14] : r.t[12]) : (b1 ? r.t[10] : r.t[8]);
  const float low = b2 ? (b1 ? r.t[6] : r.t[4]) : (b1 ? r.t[2] : r.t[0]);
  return (u32(b3) << 3) | (u32(b2) << 2) | (u32(b1) << 1) | u32(s > (b3 ? high : low));
}

// One thread per 8 of the n values, groups of kbit4_group(block). The block comes as its logarithm, because a GPU has
// no instruction to divide by it. aligned: x to 16 bytes and q to 4.
template <class T>
PB_FN void quantize_kbit4(Wave w, PB_LOCAL Kbit4Local *local, PB_GLOBAL const T *x, PB_GLOBAL const float *thresholds,
                          PB_GLOBAL const u8 *order, PB_GLOBAL u8 *q, PB_GLOBAL float *absmax, i64 n, u32 block_log2,
                          bool aligned) {
  const i64 first = (i64(w.group()) * w.group_dim() + w.tid()) * kbit4_values;
  const bool whole = first + kbit4_values <= n;
  F8 values;
  if (whole && aligned) {
    values = load8(x + first);
  } else {
    PB_UNROLL
    for (u32 k = 0; k < kbit4_values; k++) values.v[k] = first + k < n ? load1(x + first + k) : 0.0f;
  }

  // The absmax of the block, and the codebook into the memory of the group; one barrier serves both.
  u32 bits = 0;
  PB_UNROLL
  for (u32 k = 0; k < kbit4_values; k++) bits = max_u32(bits, magnitude_bits(values.v[k]));
  const u32 lanes_log2 = block_log2 - 3u, lanes = 1u << lanes_log2;
  const u32 waves = lanes / w.width();  // of one block; 0 or 1 if a wave holds whole blocks
  bits = lanes_max(w, bits, waves ? w.width() : lanes);
  if (w.lane() == 0) local->wave_max[w.tid() / w.width()] = bits;
  if (w.tid() < 15) local->thresholds[w.tid()] = thresholds[w.tid()];
  if (w.tid() < 16) local->order[w.tid()] = order[w.tid()];
  w.barrier();
  const u32 start = (w.tid() >> lanes_log2) * waves;  // the first wave of this block
  for (u32 k = 0; k < waves; k++) bits = max_u32(bits, local->wave_max[start + k]);

  // Scale and encode. What lies behind the end counts as 0 here, also in a block whose absmax is NaN.
  Kbit4Thresholds ranks;
  PB_UNROLL
  for (u32 k = 0; k < 15; k++) ranks.t[k] = local->thresholds[k];
  const float inverse = inverse_absmax(bits);
  u32 word = 0;
  PB_UNROLL
  for (u32 k = 0; k < kbit4_values; k++) {
    const float s = first + k < n ? values.v[k] * inverse : 0.0f;
    word |= local->order[kbit4_rank(ranks, s)] << packed_shift(k, 4);
  }

  if (whole && aligned) {
    store4(q + first / 2, word);
  } else {
    PB_UNROLL
    for (u32 k = 0; k < kbit4_values / 2; k++)
      if (first + 2 * k < n) q[first / 2 + k] = u8(word >> (8 * k));
  }
  if (first < n && (w.tid() & (lanes - 1u)) == 0) absmax[first >> block_log2] = stored_absmax(bits);
}

}  // namespace pb
#endif
