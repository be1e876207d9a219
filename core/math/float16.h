// bf16 and fp16 to and from fp32 by their bits: the same result on every target, whatever its conversion instructions,
// rounding mode or treatment of subnormals. To 16 bits: round to nearest even. A NaN stays a NaN, made quiet.
#ifndef PB_MATH_FLOAT16_H
#define PB_MATH_FLOAT16_H

#include "base.h"

namespace pb {

PB_FN float bf16_to_float(u16 h) { return as_float(u32(h) << 16); }

PB_FN u16 float_to_bf16(float x) {
  const u32 b = as_u32(x);
  if ((b & 0x7fffffffu) > 0x7f800000u) return u16((b >> 16) | 0x40u);  // rounding up could carry a NaN into infinity
  return u16((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

PB_FN float half_to_float(u16 h) {
  const u32 sign = u32(h & 0x8000u) << 16, exponent = (u32(h) >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 31u) return as_float(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
  if (exponent) return as_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  // Zero and subnormals: mantissa * 2^-24 as an exact difference of two normal numbers, so no loop and no flushing.
  return as_float(sign | as_u32(as_float(0x38800000u | (mantissa << 13)) - as_float(0x38800000u)));
}

PB_FN u16 float_to_half(float x) {
  const u32 b = as_u32(x), m = b & 0x7fffffffu;
  const u16 sign = u16((b >> 16) & 0x8000u);
  if (m > 0x7f800000u) return u16(sign | 0x7e00u | ((m >> 13) & 0x1ffu));
  if (m >= 0x477ff000u) return u16(sign | 0x7c00u);  // 65520 is a tie that goes to infinity
  if (m >= 0x38800000u) return u16(sign | ((m - 0x38000000u + 0xfffu + ((m >> 13) & 1u)) >> 13));  // may carry up
  if (m < 0x33000000u) return sign;  // below half the smallest subnormal
  const u32 shift = 126u - (m >> 23), value = (m & 0x7fffffu) | 0x800000u;
  const u32 kept = value >> shift, rest = value & ((1u << shift) - 1u), tie = 1u << (shift - 1u);
  return u16(sign | (kept + u32(rest > tie || (rest == tie && (kept & 1u)))));
}

}  // namespace pb
#endif
