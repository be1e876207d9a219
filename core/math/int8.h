// Symmetric int8 by rows (docs/numerics.md, "int8").
#ifndef PB_MATH_INT8_H
#define PB_MATH_INT8_H

#include "encode.h"

namespace pb {

PB_FN float inverse_127() { return as_float(0x3c010204u); }  // the fp32 nearest 1/127

// What one step of a row is worth inside a product.
PB_FN float int8_scale(float absmax) { return absmax * inverse_127(); }

// The value of a code.
PB_FN float int8_value(float q, float absmax) { return (q * absmax) * inverse_127(); }

// The factor that brings a row to [-127, 127]; 0 for a zero row.
PB_FN float int8_factor(u32 absmax_bits) {
  return is_zero_block(absmax_bits) ? 0.0f : div_rn(127.0f, stored_absmax(absmax_bits));
}

// Byte k of a little-endian word of four.
PB_FN int signed_byte(u32 word, u32 k) { return int(word << (24u - 8u * k)) >> 24; }

}  // namespace pb
#endif
