// Launchers of gather_kbit and gather_int8.
#ifndef PB_LAUNCH_GATHER_H
#define PB_LAUNCH_GATHER_H

#include "kbit.h"
#include "../kernels/gather.h"

namespace pb {
namespace launch {

// On a device an index that is out of range makes a row of NaN; the host, where it can look, refuses it.
template <class Device>
pb_status check_indices(pb_context *ctx, const char *op, const DLTensor *index, i64 n) {
  if constexpr (host_memory<Device>) {
    for (i64 i = 0; i < numel(index); i++) {
      const i64 row = index->dtype.bits == 64 ? data<const i64>(index)[i] : data<const i32>(index)[i];
      if (row < 0 || row >= n)
        return fail(ctx, PB_BAD_INDEX, "%s: index %lld at position %lld is out of range for %lld rows", op,
                    static_cast<long long>(row), static_cast<long long>(i), static_cast<long long>(n));
    }
  }
  return PB_OK;
}

template <class Device, class Table>
pb_status gather(pb_context *ctx, const char *op, const Table &table, i64 n, i64 k, const DLTensor *index,
                 const DLTensor *y) {
  PB_TRY(check_indices<Device>(ctx, op, index, n));
  return with_float(ctx, y, [&](auto dtype) {
    typedef Gather<decltype(dtype), Table> K;
    typename K::Args args = {};
    args.table = table;
    args.n = n;
    args.k = k;
    if (index->dtype.bits == 64)
      args.index64 = data<const i64>(index);
    else
      args.index32 = data<const i32>(index);
    args.y = data<decltype(dtype)>(y);
    args.count = numel(y);
    args.aligned = aligned(16, args.y);
    return Device::template launch<K>(ctx, ceil_div(args.count, K::group_max * 8), K::group_max, args);
  });
}

template <class Device>
pb_status gather_kbit(pb_context *ctx, const pb_gather_kbit_args *a) {
  KbitTable table = {};
  table.weight = kbit_weight(a, a->k);
  table.elements = a->n * a->k;
  table.aligned = aligned(4, table.weight.q);
  return gather<Device>(ctx, "gather_kbit", table, a->n, a->k, a->index, a->y);
}

template <class Device>
pb_status gather_int8(pb_context *ctx, const pb_gather_int8_args *a) {
  Int8Table table = {};
  table.q = data<const u8>(a->q);
  table.absmax = data<const float>(a->absmax);
  table.elements = numel(a->q);
  table.aligned = aligned(8, table.q);
  return gather<Device>(ctx, "gather_int8", table, a->q->shape[0], a->q->shape[1], a->index, a->y);
}

}  // namespace launch
}  // namespace pb
#endif
