// A map of 256 ascending values and the way back (docs/numerics.md, "8-bit blockwise"), for kernels whose threads own 8
// neighbours each.
#ifndef PB_KERNELS_CODE256_H
#define PB_KERNELS_CODE256_H

#include "../simt/wave.h"

namespace pb {

// The midpoints are a search tree: node i has the children 2i and 2i + 1. So the nodes of a level lie side by side, and
// lanes that are at different ones of 32 meet different banks.
struct Code256 {
  float value[256];
  float tree[256];
};

// Into the memory of the group; a barrier must follow. keep_positive: no positive value becomes the code of zero.
PB_FN void load_code256(Wave w, PB_LOCAL Code256 *local, PB_GLOBAL const float *code, bool keep_positive) {
  for (u32 i = w.tid(); i < 256u; i += w.group_dim()) {
    const float value = code[i];
    local->value[i] = value;
    if (i < 255u) {
      // Midpoint i is at the level that the zeros at the end of i + 1 say: 0 of them for the leaves.
      u32 node = 257u + i;
      while (!(node & 1u)) node >>= 1;
      local->tree[node >> 1] = keep_positive && value == 0.0f ? 0.0f : (value + code[i + 1u]) * 0.5f;
    }
  }
}

// The codes of x * inverse, one a byte: how many midpoints are below each; a NaN is above none. Level by level, because
// each step waits for the one before.
PB_FN U2 code256_of8(PB_LOCAL const Code256 *local, F8 x, float inverse) {
  u32 node[8];
  PB_UNROLL
  for (u32 k = 0; k < 8; k++) {
    x.v[k] = x.v[k] * inverse;
    node[k] = 1;
  }
  PB_UNROLL
  for (u32 level = 0; level < 8; level++) {
    PB_UNROLL
    for (u32 k = 0; k < 8; k++) node[k] = 2u * node[k] + u32(x.v[k] > local->tree[node[k]]);
  }
  U2 q = {{0u, 0u}};
  PB_UNROLL
  for (u32 k = 0; k < 8; k++) q.v[k / 4] |= (node[k] - 256u) << (8u * (k % 4u));
  return q;
}

PB_FN u32 byte_of(U2 q, u32 k) { return (q.v[k / 4u] >> (8u * (k % 4u))) & 255u; }

// The values of eight codes, of a map in the memory of the group.
PB_FN F8 values8(PB_LOCAL const float *value, U2 q, float scale) {
  F8 y;
  PB_UNROLL
  for (u32 k = 0; k < 8; k++) y.v[k] = value[byte_of(q, k)] * scale;
  return y;
}

// Codes first ... first + 7 of n; those behind the end are 0. aligned: p to 8 bytes, first being a multiple of 8.
PB_FN U2 load_codes8(PB_GLOBAL const u8 *p, i64 first, i64 n, bool aligned) {
  if (aligned && first + 8 <= n) return load8(p + first);
  U2 q = {{0u, 0u}};
  PB_UNROLL
  for (u32 k = 0; k < 8; k++)
    if (first + k < n) q.v[k / 4] |= u32(p[first + k]) << (8u * (k % 4u));
  return q;
}
PB_FN void store_codes8(PB_GLOBAL u8 *p, i64 first, i64 n, bool aligned, U2 q) {
  if (aligned && first + 8 <= n) {
    store8(p + first, q);
    return;
  }
  PB_UNROLL
  for (u32 k = 0; k < 8; k++)
    if (first + k < n) p[first + k] = u8(byte_of(q, k));
}

}  // namespace pb
#endif
