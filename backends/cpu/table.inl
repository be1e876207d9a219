// The table of the variant PB_CPU_VARIANT: the ops of PB_CPU_OPS where that is defined, the rest being inherited from
// the next variant; else every op of the op table, where one without a kernel does not compile.

#include "probe.h"

#define PB_CPU_JOIN_(a, b) a##b
#define PB_CPU_JOIN(a, b) PB_CPU_JOIN_(a, b)
#define PB_CPU_TEXT_(a) #a
#define PB_CPU_TEXT(a) PB_CPU_TEXT_(a)

namespace {

constexpr pb_backend make_table() {
  pb_backend table = {};
  table.abi = PB_ABI;
  table.size = sizeof(pb_backend);
  table.name = "cpu:" PB_CPU_TEXT(PB_CPU_VARIANT);
  table.device_type = kDLCPU;
  table.probe = PB_CPU_JOIN(pb_cpu_probe_, PB_CPU_VARIANT);
#define PB_CPU_SET(op) table.op = op;
#if defined(PB_CPU_OPS)
  PB_CPU_OPS(PB_CPU_SET)
// The kernels that are not taken count as used, so that the compiler does not warn of each.
#define PB_OP(name, arguments) (void)name;
#include "ops.def"
#undef PB_OP
#else
#define PB_OP(name, arguments) PB_CPU_SET(name)
#include "ops.def"
#undef PB_OP
#endif
#undef PB_CPU_SET
  return table;
}

}  // namespace

extern "C" constexpr pb_backend PB_CPU_JOIN(pb_cpu_, PB_CPU_VARIANT) = make_table();
