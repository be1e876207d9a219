// The table of a backend that is made of core/kernels: every op of the op table, or it does not compile.
#ifndef PB_LAUNCH_TABLE_H
#define PB_LAUNCH_TABLE_H

#include "blockwise.h"
#include "gather.h"
#include "int8.h"
#include "kbit.h"
#include "matmul.h"
#include "multi.h"
#include "optim.h"
#include "pack.h"

// A test that needs a few ops builds quicker with a file that lists those alone: PB_OP(op, ).
#ifndef PB_TABLE_OPS
#define PB_TABLE_OPS "../ops.def"
#endif

namespace pb {
namespace launch {

template <class Device>
constexpr pb_backend table(const char *name, DLDeviceType device_type, int64_t (*probe)(char *, uint64_t)) {
  pb_backend b = {};
  b.abi = PB_ABI;
  b.size = sizeof(pb_backend);
  b.name = name;
  b.device_type = device_type;
  b.probe = probe;
#define PB_OP(op, arguments) b.op = launch::op<Device>;
#include PB_TABLE_OPS
#undef PB_OP
  return b;
}

}  // namespace launch
}  // namespace pb
#endif
