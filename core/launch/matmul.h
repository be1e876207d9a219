// Launchers of the products with a k-bit weight.
#ifndef PB_LAUNCH_MATMUL_H
#define PB_LAUNCH_MATMUL_H

#include "kbit.h"
#include "../kernels/gemm.h"

namespace pb {
namespace launch {

// The bits of a weight, or of a stack, of [rows, columns] each.
template <class Args>
Kbit kbit_operand(const Args *args, i64 rows, i64 columns) {
  Kbit b = {};
  b.weight = kbit_weight(args, columns);
  b.rows = rows;
  b.columns = columns;
  b.whole = columns % 8 == 0;
  b.aligned = aligned(4, b.weight.q);
  b.aligned16 = args->bits == 4 && args->block >= 32 && columns % 32 == 0 && aligned(16, b.weight.q);
  return b;
}

template <class T>
Dense<T> dense(const DLTensor *x, i64 rows, i64 columns) {
  const T *p = data<const T>(x);
  return Dense<T>{p, rows, columns, columns % 8 == 0 && aligned(16, p)};
}

inline Runs runs(const DLTensor *group_end) { return Runs{data<const i32>(group_end), numel(group_end)}; }
inline Runs one_run() { return Runs{nullptr, -1}; }

// Groups for every tile of y; K is a Gemm.
template <class Device, class K>
pb_status launch_gemm(pb_context *ctx, typename K::Args args) {
  args.row_tiles =
      args.runs.count >= 0 ? args.rows / K::group_rows + args.runs.count + 1 : ceil_div(args.rows, K::group_rows);
  if (!args.rows || !args.columns) return PB_OK;
  return Device::template launch<K>(ctx, args.row_tiles * ceil_div(args.columns, K::group_columns), K::group_max, args);
}

// y [rows, columns] = x [rows, k] W^T + bias, or x W where TRANSPOSED; W is [weight_rows, weight_columns].
template <class Device, bool TRANSPOSED, class Args>
pb_status launch_kbit(pb_context *ctx, const Args *a, const DLTensor *x, const DLTensor *bias, DLTensor *y, i64 columns,
                      Runs groups) {
  const i64 k = last_dimension(x), rows = columns ? numel(y) / columns : 0;
  return with_float(ctx, x, [&](auto dtype) {
    typedef decltype(dtype) T;
    typedef Gemm<FmaTile, Dense<T>, Kbit, TRANSPOSED, AddBias<T>> K;
    typename K::Args args = {};
    args.a = dense<T>(x, rows, k);
    args.b = TRANSPOSED ? kbit_operand(a, k, columns) : kbit_operand(a, columns, k);
    args.finish = {data<T>(y), data<const T>(bias), columns};
    args.runs = groups;
    args.rows = rows;
    args.columns = columns;
    args.k = k;
    return launch_gemm<Device, K>(ctx, args);
  });
}

template <class Device>
pb_status matmul_kbit(pb_context *ctx, const pb_matmul_kbit_args *a) {
  return launch_kbit<Device, false>(ctx, a, a->x, a->bias, a->y, a->n, one_run());
}

template <class Device>
pb_status matmul_kbit_transposed(pb_context *ctx, const pb_matmul_kbit_transposed_args *a) {
  return launch_kbit<Device, true>(ctx, a, a->dy, nullptr, a->dx, a->k, one_run());
}

template <class Device>
pb_status matmul_kbit_grouped(pb_context *ctx, const pb_matmul_kbit_grouped_args *a) {
  return launch_kbit<Device, false>(ctx, a, a->x, nullptr, a->y, a->n, runs(a->group_end));
}

template <class Device>
pb_status matmul_kbit_grouped_transposed(pb_context *ctx, const pb_matmul_kbit_grouped_transposed_args *a) {
  return launch_kbit<Device, true>(ctx, a, a->dy, nullptr, a->dx, a->k, runs(a->group_end));
}

}  // namespace launch
}  // namespace pb
#endif
