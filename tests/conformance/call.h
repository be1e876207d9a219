// One call of one kernel, watched: guard bytes, inputs, the scratch protocol.
#pragma once
#include <string>
#include <vector>

#include "registry.h"
#include "samples.h"

struct Outcome {
  pb_status status;
  std::string problem;                         // what is wrong whatever the values are; empty if nothing
  std::vector<std::vector<uint8_t>> produced;  // the bytes of every output and changed tensor, in order
};

// threads = 0: without parallel_for, and every tensor begins at a 64-byte boundary. Else: a parallel_for of so many
// std::threads, and every tensor begins one element off.
Outcome call(pb::Kernel kernel, const std::vector<Argument> &arguments, int threads);
