// A k-bit quantized weight as every op that reads one sees it (docs/numerics.md, "k-bit" and "Double quantization").
#ifndef PB_KERNELS_WEIGHT_H
#define PB_KERNELS_WEIGHT_H

#include "../simt/wave.h"
#include "../math/packing.h"

namespace pb {

struct KbitWeight {
  PB_GLOBAL const u8 *q;
  PB_GLOBAL const float *code;           // by stored code
  PB_GLOBAL const float *absmax;         // one per block, or null
  PB_GLOBAL const u8 *absmax_q;          // one code per block where absmax is null
  PB_GLOBAL const float *nested_absmax;  // one per 256 places
  PB_GLOBAL const float *nested_code;    // 256 entries
  PB_GLOBAL const float *nested_offset;  // one
  i64 bits, block_log2;
  i64 block_offset;  // place of the first block
  i64 block_stride;  // places between rows, or 0: the places are consecutive
  i64 row_blocks;    // blocks in a row; used where block_stride is not 0
};

// The scale of a block from its code. `place`: of the block, in the whole that was quantized.
PB_FN float scale_at(KbitWeight w, u32 code, i64 place) {
  return w.nested_code[code] * w.nested_absmax[place >> 8] + *w.nested_offset;
}
PB_FN float nested_scale(KbitWeight w, u32 code, i64 block) {
  const i64 skipped = w.block_stride ? block / w.row_blocks * (w.block_stride - w.row_blocks) : 0;
  return scale_at(w, code, w.block_offset + block + skipped);
}

PB_FN float weight_scale(KbitWeight w, i64 block) {
  return w.absmax ? w.absmax[block] : nested_scale(w, w.absmax_q[block], block);
}
// The same for a weight without block_stride.
PB_FN float weight_scale_in_sequence(KbitWeight w, i64 block) {
  return w.absmax ? w.absmax[block] : scale_at(w, w.absmax_q[block], w.block_offset + block);
}

// The codes of elements first ... first + 7, packed; first is a multiple of 8. Codes behind the last of n are 0.
PB_FN u32 weight_codes8(KbitWeight w, i64 first, i64 n, bool aligned) {
  const u32 bits = u32(w.bits);
  PB_GLOBAL const u8 *p = w.q + first / 8 * w.bits;
  if (aligned && bits == 4u && first + 8 <= n) return load4(p);
  const i64 there = packed_bytes(n, bits) - first / 8 * w.bits;
  u32 word = 0;
  for (u32 k = 0; k < bits; k++)
    if (i64(k) < there) word |= u32(p[k]) << (8u * k);
  return word;
}

PB_FN u32 code_of(u32 word, u32 k, u32 bits) { return (word >> packed_shift(k, bits)) & ((1u << bits) - 1u); }

// The codebook in the memory of the group; the entries behind 2^bits are 0. A barrier must follow.
struct CodebookLocal {
  float code[16];
};
PB_FN void load_codebook(Wave w, PB_LOCAL CodebookLocal *local, KbitWeight weight) {
  if (w.tid() < 16) local->code[w.tid()] = w.tid() < (1u << weight.bits) ? weight.code[w.tid()] : 0.0f;
}

}  // namespace pb
#endif
