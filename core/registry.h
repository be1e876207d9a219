// registry.h: load a backend library, probe it, call it. No policy: order and selection are Python's.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "polybit.h"

namespace pb {

using Kernel = pb_status (*)(pb_context *, const void *);

// kinds: one letter per argument of the op table, those of op_kinds.h.
struct Op {
  const char *name;
  const char *kinds;
};
const std::vector<Op> &op_table();

struct Backend {
  std::string name;
  int64_t device_type;
  bool usable;
  std::string reason;           // why not, when not usable
  std::vector<Kernel> kernels;  // by op; null is "not implemented"
};

// Loads the library and probes its backends, best first. Throws std::runtime_error, saying why, and leaves nothing
// behind.
std::vector<Backend> load(const std::string &path);

}  // namespace pb
