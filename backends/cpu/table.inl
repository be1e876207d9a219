// The complete table of the variant PB_CPU_VARIANT, filled by name from the op table: an op without a kernel does not
// compile.

#include "probe.h"

#define PB_CPU_JOIN_(a, b) a##b
#define PB_CPU_JOIN(a, b) PB_CPU_JOIN_(a, b)
#define PB_CPU_TEXT_(a) #a
#define PB_CPU_TEXT(a) PB_CPU_TEXT_(a)

extern "C" const pb_backend PB_CPU_JOIN(pb_cpu_, PB_CPU_VARIANT) = {
    PB_ABI,
    sizeof(pb_backend),
    "cpu:" PB_CPU_TEXT(PB_CPU_VARIANT),
    kDLCPU,
    PB_CPU_JOIN(pb_cpu_probe_, PB_CPU_VARIANT),
#define PB_OP(name, arguments) name,
#include "ops.def"
#undef PB_OP
};
