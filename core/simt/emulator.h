// The adaptor for the emulated machine, whose engine is backends/emulator/engine.cpp. It is stricter than the hardware:
// every lane of a wave, or every member of a call, must reach the same call at the same place; a call that one of them
// misses is an error that names both places.
#ifndef PB_SIMT_EMULATOR_H
#define PB_SIMT_EMULATOR_H

#include "machine.h"

#define PB_ADAPTOR
#define PB_FN static inline
#define PB_GLOBAL
#define PB_LOCAL
#define PB_PRIVATE
#define PB_SHARED(T, name) T *name = static_cast<T *>(::pb::emulator::local_memory(sizeof(T), {__FILE__, __LINE__}))
#define PB_UNROLL
#define PB_NO_UNROLL

namespace pb {
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef int32_t i32;
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
PB_FN float div_rn(float a, float b) { return a / b; }
PB_FN float sqrt_rn(float a) { return __builtin_sqrtf(a); }
PB_FN float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
PB_FN i32 round_rn(float x) { return i32(__builtin_rintf(x)); }

struct U4 {
  u32 v[4];
};
PB_FN U4 load16(const u32 *p, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::check_aligned(p, 16, {file, line});
  U4 r;
  __builtin_memcpy(&r, p, 16);
  return r;
}
PB_FN void store16(u32 *p, U4 a, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::check_aligned(p, 16, {file, line});
  __builtin_memcpy(p, &a, 16);
}
struct U2 {
  u32 v[2];
};
PB_FN U2 load8(const u8 *p, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::check_aligned(p, 8, {file, line});
  U2 r;
  __builtin_memcpy(&r, p, 8);  // little-endian, as every target is
  return r;
}
PB_FN void store8(u8 *p, U2 a, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::check_aligned(p, 8, {file, line});
  __builtin_memcpy(p, &a, 8);
}
PB_FN u32 load4(const u8 *p, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::check_aligned(p, 4, {file, line});
  u32 word;
  __builtin_memcpy(&word, p, 4);
  return word;
}
PB_FN void store4(u8 *p, u32 word, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::check_aligned(p, 4, {file, line});
  __builtin_memcpy(p, &word, 4);
}

PB_FN void set_flag(u8 *p) { __atomic_store_n(p, u8(1), __ATOMIC_RELAXED); }
PB_FN i32 dot4(u32 a, u32 b, i32 c) {
  for (u32 k = 0; k < 32; k += 8) c += i32(int8_t(a >> k)) * i32(int8_t(b >> k));
  return c;
}

// Return the value before. Groups run on several OS threads, so these are as atomic as a GPU's.
PB_FN u32 atomic_add(u32 *p, u32 v, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::check_aligned(p, 4, {file, line}, "an atomic");
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
PB_FN u32 atomic_or(u32 *p, u32 v, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::check_aligned(p, 4, {file, line}, "an atomic");
  return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);
}

// `members` is a bit for each lane that takes part in a shuffle, all of them calling with the same; the other lanes
// need not come, and must not be read.
struct Wave {
  emulator::Ids ids = emulator::ids();
  u32 tid() const { return ids.tid; }
  u32 group() const { return ids.group; }
  u32 group_dim() const { return ids.group_dim; }
  u32 lane() const { return ids.tid % ids.width; }
  u32 width() const { return ids.width; }
  void barrier(const char *file = __builtin_FILE(), int line = __builtin_LINE()) const {
#ifdef PB_MUTATE_NO_BARRIER  // a test's mutation: what depends on barriers must then go wrong
    (void)file, (void)line;
#else
    emulator::barrier({file, line});
#endif
  }
  u32 shuffle_xor(u32 value, u32 mask, uint64_t members = emulator::every_lane, const char *file = __builtin_FILE(),
                  int line = __builtin_LINE()) const {
    return emulator::shuffle_xor(value, mask, members, {file, line});
  }
  u32 shuffle(u32 value, u32 source_lane, uint64_t members = emulator::every_lane, const char *file = __builtin_FILE(),
              int line = __builtin_LINE()) const {
    return emulator::shuffle(value, source_lane, members, {file, line});
  }
};

template <class K>
PB_FN void entry(const typename K::Args &args) {
  PB_SHARED(typename K::Local, local);
  K::run(Wave(), local, args);
}
}  // namespace pb

#include "wave.h"
#endif
