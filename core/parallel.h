// parallel.h: pb_context.parallel_for on the OpenMP pool that the process already has.
#pragma once
#include <cstdint>

#include "polybit.h"

namespace pb {
// Threads that a parallel_for from this thread would use: 1 without OpenMP, inside a parallel region, or in a forked
// child.
int64_t thread_count();
void parallel_for(int64_t count, int64_t grain, pb_range_body body, void *arg);
// The library whose pool is used, or "" when everything runs serially.
const char *openmp_library();
}  // namespace pb
