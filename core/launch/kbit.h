// Launchers of quantize_kbit and dequantize_kbit.
#ifndef PB_LAUNCH_KBIT_H
#define PB_LAUNCH_KBIT_H

#include "launch.h"
#include "../kernels/kbit.h"

namespace pb {
namespace launch {

// `args` is any argument struct with the run of a quantized weight; row is the weight's last dimension.
template <class Args>
KbitWeight kbit_weight(const Args *args, i64 row) {
  KbitWeight w = {};
  w.q = data<const u8>(args->q);
  w.code = data<const float>(args->code);
  if (args->nested_absmax) {
    w.absmax_q = data<const u8>(args->absmax);
    w.nested_absmax = data<const float>(args->nested_absmax);
    w.nested_code = data<const float>(args->nested_code);
    w.nested_offset = data<const float>(args->nested_offset);
  } else {
    w.absmax = data<const float>(args->absmax);
  }
  w.bits = args->bits;
  w.block_log2 = log2_of(args->block);
  w.block_offset = args->block_offset;
  w.block_stride = args->block_stride;
  w.row_blocks = row / args->block > 0 ? row / args->block : 1;
  return w;
}

template <class Device, u32 BITS, bool SEARCH>
pb_status quantize_kbit_in(pb_context *ctx, const pb_quantize_kbit_args *a) {
  return with_float(ctx, a->x, [&](auto dtype) {
    typedef QuantizeKbit<decltype(dtype), BITS, SEARCH> K;
    typename K::Args args = {};
    args.x = data<const decltype(dtype)>(a->x);
    args.code = data<const float>(a->code);
    args.thresholds = data<const float>(a->thresholds);
    args.order = data<const u8>(a->order);
    args.q = data<u8>(a->q);
    args.absmax = data<float>(a->absmax);
    args.n = numel(a->x);
    args.block_log2 = log2_of(a->block);
    args.aligned = aligned(16, args.x) && aligned(4, args.q);
    const i64 threads = a->block / 8 > 128 ? a->block / 8 : 128;
    return Device::template launch<K>(ctx, ceil_div(args.n, threads * 8), static_cast<u32>(threads), args);
  });
}

template <class Device>
pb_status quantize_kbit(pb_context *ctx, const pb_quantize_kbit_args *a) {
  if (a->bits == 2)
    return a->search ? quantize_kbit_in<Device, 2, true>(ctx, a) : quantize_kbit_in<Device, 2, false>(ctx, a);
  if (a->bits == 3)
    return a->search ? quantize_kbit_in<Device, 3, true>(ctx, a) : quantize_kbit_in<Device, 3, false>(ctx, a);
  return a->search ? quantize_kbit_in<Device, 4, true>(ctx, a) : quantize_kbit_in<Device, 4, false>(ctx, a);
}

template <class Device>
pb_status dequantize_kbit(pb_context *ctx, const pb_dequantize_kbit_args *a) {
  return with_float(ctx, a->y, [&](auto dtype) {
    typedef DequantizeKbit<decltype(dtype)> K;
    typename K::Args args = {};
    args.weight = kbit_weight(a, last_dimension(a->y));
    args.y = data<decltype(dtype)>(a->y);
    args.n = numel(a->y);
    args.aligned = aligned(16, args.y) && aligned(4, args.weight.q);
    return Device::template launch<K>(ctx, ceil_div(args.n, K::group_max * 8), K::group_max, args);
  });
}

}  // namespace launch
}  // namespace pb
#endif
