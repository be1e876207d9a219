// Launchers of the products.
#ifndef PB_LAUNCH_MATMUL_H
#define PB_LAUNCH_MATMUL_H

#include "int8.h"
#include "kbit.h"
#include "../kernels/gemv.h"

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

// Groups for every tile of y; K is made of tiles, or a Gemv, and a group of it has `features` columns.
template <class Device, class K>
pb_status launch_tiles(pb_context *ctx, typename K::Args args, i64 features) {
  args.row_tiles =
      args.runs.count >= 0 ? args.rows / K::group_rows + args.runs.count + 1 : ceil_div(args.rows, K::group_rows);
  if (!args.rows || !args.columns) return PB_OK;
  return Device::template launch<K>(ctx, args.row_tiles * ceil_div(args.columns, features), K::group_max, args);
}

// One wave per few rows of the weight: where y has few rows, or few in a run. Sums of a Gemv are ordered otherwise than
// those of a Gemm, so never when they may not depend on the number of rows.
inline bool is_gemv(pb_context *ctx, i64 rows, Runs groups) {
  return !ctx->deterministic && rows <= gemv_most * (groups.count > 0 ? groups.count : 1);
}

// One of three kernels with the same arguments: Tiles, One for a single row, Few.
template <class Device, class Tiles, class One, class Few>
pb_status launch_product(pb_context *ctx, const typename Tiles::Args &args) {
  const i64 features = gemv_group / Device::width(ctx) * gemv_features;
  if (!is_gemv(ctx, args.rows, args.runs)) return launch_tiles<Device, Tiles>(ctx, args, Tiles::group_columns);
  if (args.rows == 1) return launch_tiles<Device, One>(ctx, args, features);
  return launch_tiles<Device, Few>(ctx, args, features);
}

// y [..., n] = x [..., k] W^T + bias.
template <class Device, class Args>
pb_status launch_kbit(pb_context *ctx, const Args *a, const DLTensor *bias, Runs groups) {
  const i64 k = last_dimension(a->x), n = a->n, rows = n ? numel(a->y) / n : 0;
  return with_float(ctx, a->x, [&](auto dtype) {
    typedef decltype(dtype) T;
    const AddBias<T> finish = {data<T>(a->y), data<const T>(bias), n};
    return launch_product<Device, MatmulKbit<T, typename Device::Tiles>, GemvKbit<T, 1>, GemvKbit<T, gemv_rows>>(
        ctx, {dense<T>(a->x, rows, k), kbit_operand(a, n, k), finish, groups, rows, n, k, 0});
  });
}

// dx [..., k] = dy [..., n] W.
template <class Device, class Args>
pb_status launch_kbit_transposed(pb_context *ctx, const Args *a, Runs groups) {
  const i64 n = last_dimension(a->dy), k = a->k, rows = k ? numel(a->dx) / k : 0;
  return with_float(ctx, a->dy, [&](auto dtype) {
    typedef decltype(dtype) T;
    typedef MatmulKbitTransposed<T, typename Device::Tiles> K;
    const AddBias<T> finish = {data<T>(a->dx), nullptr, k};
    return launch_tiles<Device, K>(
        ctx, {dense<T>(a->dy, rows, n), kbit_operand(a, n, k), finish, groups, rows, k, n, 0}, K::group_columns);
  });
}

template <class Device>
pb_status matmul_kbit(pb_context *ctx, const pb_matmul_kbit_args *a) {
  return launch_kbit<Device>(ctx, a, a->bias, one_run());
}

template <class Device>
pb_status matmul_kbit_transposed(pb_context *ctx, const pb_matmul_kbit_transposed_args *a) {
  return launch_kbit_transposed<Device>(ctx, a, one_run());
}

template <class Device>
pb_status matmul_kbit_grouped(pb_context *ctx, const pb_matmul_kbit_grouped_args *a) {
  return launch_kbit<Device>(ctx, a, nullptr, runs(a->group_end));
}

template <class Device>
pb_status matmul_kbit_grouped_transposed(pb_context *ctx, const pb_matmul_kbit_grouped_transposed_args *a) {
  return launch_kbit_transposed<Device>(ctx, a, runs(a->group_end));
}

inline Bytes bytes(const u8 *p, i64 rows, i64 columns, i64 pitch) {
  return Bytes{p, rows, columns, pitch, pitch % 16 == 0 && aligned(16, p)};
}

template <class Device>
pb_status matmul_int8(pb_context *ctx, const pb_matmul_int8_args *a) {
  const i64 k = last_dimension(a->a), n = a->b->shape[0], rows = n ? numel(a->y) / n : 0;
  return launch_product<Device, MatmulInt8<typename Device::Tiles>, GemvInt8<1>, GemvInt8<gemv_rows>>(
      ctx, {bytes(data<const u8>(a->a), rows, k, k),
            bytes(data<const u8>(a->b), n, k, k),
            {data<i32>(a->y), n},
            one_run(),
            rows,
            n,
            k,
            0});
}

// quantize_int8 of x into scratch, a list of the outlier columns, and the product that knows both.
template <class Device>
pb_status linear_int8(pb_context *ctx, const pb_linear_int8_args *a) {
  const i64 k = last_dimension(a->x), n = a->weight->shape[0], rows = n ? numel(a->y) / n : 0;
  if (!rows) return PB_OK;
  const i64 pitch = ceil_div(k, 16) * 16;
  Scratch scratch(ctx);
  u8 *q = scratch.take<u8>(rows * pitch);
  float *absmax = scratch.take<float>(rows);
  u8 *outlier = scratch.take<u8>(k);
  i32 *list = scratch.take<i32>(k), *count = scratch.take<i32>(1);
  PB_TRY(scratch.status());
  const bool any = static_cast<float>(a->threshold) > 0.0f;
  return with_float(ctx, a->x, [&](auto dtype) -> pb_status {
    typedef decltype(dtype) T;
    const T *x = data<const T>(a->x);
    const u8 *weight = data<const u8>(a->weight);
    const float *weight_absmax = data<const float>(a->weight_absmax);
    PB_TRY(quantize_int8_rows<Device>(ctx, x, rows, k, a->threshold, a->row_outliers != 0, q, pitch, absmax, outlier));
    // The place of a column in a list depends on the other rows. Where that may not show in the order of a sum, the sum
    // is over all columns, zeros where they are regular.
    const bool all = any && a->row_outliers && ctx->deterministic;
    if (any && !all) PB_TRY(Device::template launch<ListOutliers>(ctx, 1, row_group, {outlier, list, count, k}));
    LinearArgs<T> args = {};
    args.a = bytes(q, rows, k, pitch);
    args.b = bytes(weight, n, k, k);
    args.outlier_x = {x, rows, k, all ? nullptr : list, all ? k : 0, fp32_bits(a->threshold), a->row_outliers};
    args.outlier_weight = {weight, weight_absmax, n, k, all ? nullptr : list, all ? k : 0};
    args.outlier_count = any && !all ? count : nullptr;
    args.finish = {{data<T>(a->y), data<const T>(a->bias), n}, absmax, weight_absmax};
    args.runs = one_run();
    args.rows = rows;
    args.columns = n;
    args.k = k;
    return launch_product<Device, LinearInt8<T, typename Device::Tiles>, GemvLinearInt8<T, 1>,
                          GemvLinearInt8<T, gemv_rows>>(ctx, args);
  });
}

template <class Device>
pb_status linear_int8_transposed(pb_context *ctx, const pb_linear_int8_transposed_args *a) {
  const i64 n = last_dimension(a->dy), k = a->weight->shape[1], rows = k ? numel(a->dx) / k : 0;
  return with_float(ctx, a->dy, [&](auto dtype) {
    typedef decltype(dtype) T;
    typedef LinearInt8Transposed<T, typename Device::Tiles> K;
    const u8 *q = data<const u8>(a->weight);
    const ScaledBytes weight = {q, data<const float>(a->weight_absmax), n, k, k % 8 == 0 && aligned(4, q)};
    const AddBias<T> finish = {data<T>(a->dx), nullptr, k};
    return launch_tiles<Device, K>(ctx, {dense<T>(a->dy, rows, n), weight, finish, one_run(), rows, k, n, 0},
                                   K::group_columns);
  });
}

template <class Device>
pb_status matmul_kbit_int8(pb_context *ctx, const pb_matmul_kbit_int8_args *a) {
  const i64 k = last_dimension(a->x), n = a->n, rows = n ? numel(a->y) / n : 0;
  if (!rows) return PB_OK;
  Scratch scratch(ctx);
  float *rounded = scratch.take<float>(17);
  PB_TRY(scratch.status());
  return with_float(ctx, a->y, [&](auto dtype) -> pb_status {
    typedef decltype(dtype) T;
    PB_TRY(Device::template launch<RoundCodebook>(ctx, 1, RoundCodebook::group_max,
                                                  {data<const float>(a->code), rounded, i64(1) << a->bits}));
    const u8 *x = data<const u8>(a->x);
    const ScaleRows<T> finish = {
        {data<T>(a->y), data<const T>(a->bias), n}, data<const float>(a->x_absmax), rounded + 16};
    Kbit weight = kbit_operand(a, n, k);
    weight.weight.code = rounded;
    if (k % KbitBytes::unit) {
      typedef MatmulKbitInt8Any<T> K;
      return launch_tiles<Device, K>(ctx, {{x, rows, k}, weight, finish, one_run(), rows, n, k, 0}, K::group_columns);
    }
    i64 run = MatmulKbitInt8<T>::slab;  // columns that lie inside one block wherever they start at a multiple
    while (k % run || a->block % run) run /= 2;
    const KbitBytes codes = {weight.weight, n, k, weight.aligned, weight.aligned16, run / 4};
    const typename MatmulKbitInt8<T>::Args args = {bytes(x, rows, k, k), codes, finish, one_run(), rows, n, k, 0};
    typedef MatmulKbitInt8<T, typename Device::Tiles> Tiles;
    constexpr u32 words = Device::Tiles::template Bytes<T>::words;
    if constexpr (words > KbitBytes::unit / 4u)
      if (codes.run_words % words)  // a block ends inside a tile
        return launch_product<Device, MatmulKbitInt8<T>, GemvKbitInt8<T, 1>, GemvKbitInt8<T, gemv_rows>>(ctx, args);
    return launch_product<Device, Tiles, GemvKbitInt8<T, 1>, GemvKbitInt8<T, gemv_rows>>(ctx, args);
  });
}

}  // namespace launch
}  // namespace pb
#endif
