// The entry points of a SYCL backend: text that tests/simt/sycl_compile.cpp compiles at run time.
#include "core/simt/sycl.h"
#include "core/kernels/kernels.h"

#define PB_ENTRY PB_SYCL_ENTRY
#include "core/kernels/entries.def"
