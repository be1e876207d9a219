// Where a k-bit code lies among the packed bytes (docs/numerics.md, "Packing").
//
//   4 bits   byte i = [ element 2i : 7..4 | element 2i+1 : 3..0 ]
//   2, 3     element i in bits [k*i, k*i + k) of a little-endian bit stream
#ifndef PB_MATH_PACKING_H
#define PB_MATH_PACKING_H

#include "base.h"

namespace pb {

PB_FN i64 packed_bytes(i64 count, u32 bits) { return (count * i64(bits) + 7) / 8; }

// The place of element i of 8 inside the bits*8-bit little-endian word that the eight fill together.
PB_FN u32 packed_shift(u32 i, u32 bits) { return bits == 4u ? 8u * (i / 2u) + (i % 2u ? 0u : 4u) : bits * i; }

// The code of element i. `Bytes` is anything with [i64] -> u8; reads no byte that holds none of the code's bits.
template <class Bytes>
PB_FN u32 packed_code(Bytes q, i64 i, u32 bits) {
  if (bits == 4u) return (u32(q[i >> 1]) >> (i & 1 ? 0u : 4u)) & 15u;
  const i64 at = i * i64(bits);
  const u32 shift = u32(at & 7);
  u32 word = u32(q[at >> 3]);
  if (shift + bits > 8u) word |= u32(q[(at >> 3) + 1]) << 8;
  return (word >> shift) & ((1u << bits) - 1u);
}

}  // namespace pb
#endif
