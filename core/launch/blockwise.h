// Launchers of quantize_blockwise, dequantize_blockwise, quantize_absmax and dequantize_absmax.
#ifndef PB_LAUNCH_BLOCKWISE_H
#define PB_LAUNCH_BLOCKWISE_H

#include "multi.h"
#include "../kernels/blockwise.h"

namespace pb {
namespace launch {

inline BlockwiseOut blockwise_out(const void *x, const DLTensor *q, const DLTensor *absmax, i64 block) {
  BlockwiseOut out = {};
  out.q = data<u8>(q);
  out.absmax = data<float>(absmax);
  out.n = numel(q);
  out.block_log2 = log2_of(block);
  out.aligned = aligned(16, x) && aligned(8, out.q);
  return out;
}

template <class Device>
pb_status quantize_blockwise(pb_context *ctx, const pb_quantize_blockwise_args *a) {
  return with_float(ctx, a->x, [&](auto dtype) {
    typedef QuantizeBlockwise<decltype(dtype)> K;
    typename K::Args args = {};
    args.x = data<const decltype(dtype)>(a->x);
    args.code = data<const float>(a->code);
    args.out = blockwise_out(args.x, a->q, a->absmax, a->block);
    const i64 threads = a->block / 8 > 256 ? a->block / 8 : 256;
    return Device::template launch<K>(ctx, ceil_div(args.out.n, threads * 8), static_cast<u32>(threads), args);
  });
}

template <class Device>
pb_status dequantize_blockwise(pb_context *ctx, const pb_dequantize_blockwise_args *a) {
  return with_float(ctx, a->y, [&](auto dtype) {
    typedef DequantizeBlockwise<decltype(dtype)> K;
    typename K::Args args = {};
    args.q = data<const u8>(a->q);
    args.absmax = data<const float>(a->absmax);
    args.code = data<const float>(a->code);
    args.y = data<decltype(dtype)>(a->y);
    args.n = numel(a->y);
    args.block_log2 = log2_of(a->block);
    args.aligned = aligned(8, args.q) && aligned(16, args.y);
    return Device::template launch<K>(ctx, ceil_div(args.n, K::group_max * 8), K::group_max, args);
  });
}

template <class Device>
pb_status quantize_absmax(pb_context *ctx, const pb_quantize_absmax_args *a) {
  const Summed whole = {data<const float>(a->absmax), dtype_fp32, numel(a->absmax)};
  const auto summed = [&](i64) { return whole; };
  Scratch scratch(ctx);
  float *sum = scratch.take<float>(1), *room = scratch.take<float>(tree_sums_scratch(1, summed));
  PB_TRY(scratch.status());
  PB_TRY(tree_sums<Device>(ctx, 1, summed, false, sum, room));
  QuantizeAbsmax::Args args = {};
  args.absmax = data<const float>(a->absmax);
  args.sum = sum;
  args.code = data<const float>(a->code);
  args.nested_offset = data<float>(a->nested_offset);
  args.out = blockwise_out(args.absmax, a->q, a->nested_absmax, 256);
  const i64 groups =
      args.out.n ? ceil_div(args.out.n, QuantizeAbsmax::group_max * 8) : 1;  // the offset of nothing is 0
  return Device::template launch<QuantizeAbsmax>(ctx, groups, QuantizeAbsmax::group_max, args);
}

template <class Device>
pb_status dequantize_absmax(pb_context *ctx, const pb_dequantize_absmax_args *a) {
  typedef DequantizeAbsmax K;
  K::Args args = {};
  args.weight.absmax_q = data<const u8>(a->q);
  args.weight.nested_absmax = data<const float>(a->nested_absmax);
  args.weight.nested_code = data<const float>(a->nested_code);
  args.weight.nested_offset = data<const float>(a->nested_offset);
  args.weight.block_offset = a->block_offset;
  args.weight.block_stride = a->block_stride;
  args.weight.row_blocks = a->row_blocks > 0 ? a->row_blocks : 1;
  args.absmax = data<float>(a->absmax);
  args.n = numel(a->absmax);
  args.aligned = aligned(8, args.weight.absmax_q) && aligned(16, args.absmax);
  return Device::template launch<K>(ctx, ceil_div(args.n, K::group_max * 8), K::group_max, args);
}

}  // namespace launch
}  // namespace pb
#endif
