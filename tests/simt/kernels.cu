// The kernels under plain names, to compile them for real architectures and to read what came out.
#include "../../core/simt/cuda_hip.h"
#include "../../core/kernels/kernels.h"

#define PB_ENTRY(name, ...) \
  typedef __VA_ARGS__ name##_kernel; \
  extern "C" __global__ void PB_GROUP_MAX(name##_kernel::group_max) name(name##_kernel::Args args) { \
    PB_SHARED(name##_kernel::Local, local); \
    name##_kernel::run(pb::Wave(), local, args); \
  }
#include "../../core/kernels/entries.def"
