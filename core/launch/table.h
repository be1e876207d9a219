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
  b.quantize_blockwise = quantize_blockwise<Device>;
  b.dequantize_blockwise = dequantize_blockwise<Device>;
  b.quantize_kbit = quantize_kbit<Device>;
  b.dequantize_kbit = dequantize_kbit<Device>;
  b.quantize_absmax = quantize_absmax<Device>;
  b.dequantize_absmax = dequantize_absmax<Device>;
  b.pack_size_kbit = pack_size_kbit<Device>;
  b.pack_kbit = pack_kbit<Device>;
  b.unpack_kbit = unpack_kbit<Device>;
  b.gather_kbit = gather_kbit<Device>;
  b.gather_int8 = gather_int8<Device>;
  b.sum_squares_multi = sum_squares_multi<Device>;
  b.scale_multi = scale_multi<Device>;
  b.matmul_kbit = matmul_kbit<Device>;
  b.matmul_kbit_transposed = matmul_kbit_transposed<Device>;
  b.matmul_kbit_grouped = matmul_kbit_grouped<Device>;
  b.matmul_kbit_grouped_transposed = matmul_kbit_grouped_transposed<Device>;
  b.optimizer_32bit = optimizer_32bit<Device>;
  b.optimizer_8bit = optimizer_8bit<Device>;
  b.matmul_kbit_int8 = matmul_kbit_int8<Device>;
  b.quantize_int8 = quantize_int8<Device>;
  b.dequantize_int8 = dequantize_int8<Device>;
  b.matmul_int8 = matmul_int8<Device>;
  b.linear_int8 = linear_int8<Device>;
  b.linear_int8_transposed = linear_int8_transposed<Device>;
  return b;
}

}  // namespace launch
}  // namespace pb
#endif
