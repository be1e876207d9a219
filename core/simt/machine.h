// What a kernel may ask of the emulated machine, backends/emulator/engine.cpp.
#ifndef PB_SIMT_MACHINE_H
#define PB_SIMT_MACHINE_H

#include <stddef.h>
#include <stdint.h>

namespace pb {
namespace emulator {
struct Place {
  const char *file;
  int line;
};
struct Ids {
  uint32_t tid, group, group_dim, width;
};
constexpr uint64_t every_lane = ~uint64_t(0);
Ids ids();
void barrier(Place place);
uint32_t shuffle_xor(uint32_t value, uint32_t mask, uint64_t members, Place place);
uint32_t shuffle(uint32_t value, uint32_t source_lane, uint64_t members, Place place);
void *local_memory(size_t bytes, Place place);  // the one array of the group; starts as 0xFF in every byte
void misaligned(const char *what, size_t bytes, Place place);  // an error
static inline void check_aligned(const void *p, size_t bytes, Place place, const char *what = "an access") {
  if (reinterpret_cast<uintptr_t>(p) % bytes) misaligned(what, bytes, place);
}
}  // namespace emulator
}  // namespace pb
#endif
