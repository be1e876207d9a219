// A SIMT machine on the CPU: every thread of a group is a fiber, switched only at barriers and wave operations.
// Source-level conformance of kernels, not a model of any GPU; docs/simt.md says what it cannot show.
#ifndef PB_EMULATOR_ENGINE_H
#define PB_EMULATOR_ENGINE_H

#include <cstdint>
#include <functional>
#include <string>

namespace pb {
namespace emulator {

struct Order {
  enum Kind { ascending, descending, shuffled } kind = ascending;
  uint32_t seed = 1;
};

// "ascending", "descending", "shuffled" or "shuffled:SEED"; null and "" are ascending. False if it is none of these.
bool parse_order(const char *text, Order *order);

struct Launch {
  int64_t groups;
  uint32_t group_dim;  // a multiple of width
  uint32_t width;      // of a wave, a power of two up to 64
  Order order;
};

// Runs the groups [begin, end) of a launch on the calling OS thread; returns what went wrong, or "".
std::string run_groups(const Launch &launch, int64_t begin, int64_t end, const std::function<void()> &kernel);

}  // namespace emulator
}  // namespace pb
#endif
