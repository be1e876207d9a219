// The words that core/ is written in. Without an adaptor of core/simt this is plain C++14 for the host; an adaptor
// defines PB_ADAPTOR and supplies all of this itself before it includes the rest.
#ifndef PB_MATH_BASE_H
#define PB_MATH_BASE_H

#ifndef PB_CONSTEXPR
#define PB_CONSTEXPR static constexpr  // a function that a launcher calls, too
#endif

#ifndef PB_ADAPTOR
#include <stdint.h>

#ifndef PB_FN
#define PB_FN static inline  // internal linkage: a file compiled for one instruction set must not export weak copies
#endif
#ifndef PB_GLOBAL
#define PB_GLOBAL
#endif
#ifndef PB_LOCAL
#define PB_LOCAL
#endif
#ifndef PB_UNROLL
#define PB_UNROLL
#endif

namespace pb {
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef int64_t i64;

PB_FN float as_float(u32 bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
PB_FN u32 as_u32(float x) {
  u32 bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
// Built without fast-math flags, so correctly rounded.
PB_FN float div_rn(float a, float b) { return a / b; }
PB_FN float sqrt_rn(float a) { return __builtin_sqrtf(a); }
}  // namespace pb
#endif
#endif
