// From a value to its code (docs/numerics.md, "Blocks" and "k-bit").
#ifndef PB_MATH_ENCODE_H
#define PB_MATH_ENCODE_H

#include "base.h"

namespace pb {

// The absmax of a block is an integer maximum of these: exact in any order, and a NaN beats infinity.
PB_FN u32 magnitude_bits(float x) { return as_u32(x) & 0x7fffffffu; }

PB_FN bool is_zero_block(u32 absmax_bits) { return absmax_bits < 0x00800000u; }  // below the smallest normal

// What is stored: 0 for a zero block, the one quiet NaN for any NaN.
PB_FN float stored_absmax(u32 absmax_bits) {
  return as_float(is_zero_block(absmax_bits) ? 0u : absmax_bits > 0x7f800000u ? 0x7fc00000u : absmax_bits);
}

// The factor that brings the block to [-1, 1]; 0 for a zero block, so that every element gets the code of zero.
PB_FN float inverse_absmax(u32 absmax_bits) {
  return is_zero_block(absmax_bits) ? 0.0f : div_rn(1.0f, stored_absmax(absmax_bits));
}

// How many of `count` ascending thresholds lie below s; a NaN is above none. `Values` is anything with [u32] -> float:
// a pointer of any address space, or an array.
template <class Values>
PB_FN u32 rank_of(Values thresholds, u32 count, float s) {
  u32 rank = 0;
  PB_UNROLL
  for (u32 i = 0; i < count; i++) rank += u32(s > thresholds[i]);
  return rank;
}

}  // namespace pb
#endif
