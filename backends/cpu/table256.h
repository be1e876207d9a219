// The values of 4 * W codes of 8 bits at a time; gathered, where the simd header has no better way (PB_SIMD_TABLE256).
#ifndef POLYBIT_CPU_TABLE256_H
#define POLYBIT_CPU_TABLE256_H

#ifndef PB_SIMD_TABLE256
namespace {
namespace simd {

struct Table256 {
  const float *values;
};
inline Table256 table256(const float *p) { return {p}; }
inline void lookup256(const Table256 &t, const uint8_t *q, F (&values)[4]) {
  for (int i = 0; i < 4; i++) values[i] = gather_u8(t.values, q + i * W);
}

}  // namespace simd
}  // namespace
#endif
#endif
