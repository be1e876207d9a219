// The entry points a Metal backend would have, for the type check.
#include "../../core/simt/metal.h"
#include "../../core/kernels/kernels.h"

#define PB_ENTRY PB_METAL_ENTRY
#include "../../core/kernels/entries.def"

#ifdef MUTATE_ADDRESS_SPACE  // a test's mutation: the type check must refuse it
kernel void mutation(device float *x [[buffer(0)]]) {
  threadgroup float *p = x;
  *p = 0.0f;
}
#endif
