// simd::F with operators, for formulas of core/math that are written for one value. Include a simd header first.
#ifndef POLYBIT_CPU_VEC_H
#define POLYBIT_CPU_VEC_H

namespace {

struct Vec {
  simd::F v;
};

inline Vec operator+(Vec a, Vec b) { return {simd::add(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {simd::sub(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {simd::mul(a.v, b.v)}; }
inline Vec div_rn(Vec a, Vec b) { return {simd::div(a.v, b.v)}; }
inline Vec sqrt_rn(Vec a) { return {simd::sqrt(a.v)}; }
inline Vec sign_of(Vec a) {
  const simd::F zero = simd::zero();
  const simd::F negative = simd::select(simd::gt(zero, a.v), simd::set1(-1.0f), a.v);
  return {simd::select(simd::gt(a.v, zero), simd::set1(1.0f), negative)};
}
inline Vec not_negative(Vec a) { return {simd::select(simd::gt(simd::zero(), a.v), simd::zero(), a.v)}; }

inline Vec select(simd::M m, Vec a, Vec b) { return {simd::select(m, a.v, b.v)}; }

}  // namespace
#endif
