// Launchers of pack_size_kbit, pack_kbit and unpack_kbit. The products read the canonical bytes, so there is no layout
// to gain from and the size is 0; who packs all the same gets a copy.
#ifndef PB_LAUNCH_PACK_H
#define PB_LAUNCH_PACK_H

#include "launch.h"
#include "../kernels/copy.h"

namespace pb {
namespace launch {

template <class Device>
pb_status pack_size_kbit(pb_context *, const pb_pack_size_kbit_args *a) {
  *data<int64_t>(a->size) = 0;  // a tensor of the host
  return PB_OK;
}

template <class Device>
pb_status copy(pb_context *ctx, const char *op, const DLTensor *from, const DLTensor *to) {
  if (numel(from) != numel(to))
    return fail(ctx, PB_ERROR, "%s: packed has as many bytes as q, got %lld from %lld", op,
                static_cast<long long>(numel(to)), static_cast<long long>(numel(from)));
  CopyBytes::Args args = {};
  args.from = data<const u8>(from);
  args.to = data<u8>(to);
  args.n = numel(to);
  args.aligned = aligned(16, args.from, args.to);
  return Device::template launch<CopyBytes>(ctx, ceil_div(args.n, CopyBytes::group_max * 16), CopyBytes::group_max,
                                            args);
}

template <class Device>
pb_status pack_kbit(pb_context *ctx, const pb_pack_kbit_args *a) {
  return copy<Device>(ctx, "pack_kbit", a->q, a->packed);
}

template <class Device>
pb_status unpack_kbit(pb_context *ctx, const pb_unpack_kbit_args *a) {
  return copy<Device>(ctx, "unpack_kbit", a->packed, a->q);
}

}  // namespace launch
}  // namespace pb
#endif
