// Launchers of quantize_int8 and dequantize_int8.
#ifndef PB_LAUNCH_INT8_H
#define PB_LAUNCH_INT8_H

#include <cstring>

#include "launch.h"
#include "../kernels/int8.h"

namespace pb {
namespace launch {

// How many threads, a power of two, share a row: one for each 8 of its elements, up to a group.
inline i64 row_threads_log2(i64 columns) {
  i64 log2 = 0;
  while (log2 < log2_of(row_group) && (i64(8) << log2) < columns) log2++;
  return log2;
}

template <class Device, class K>
pb_status launch_rows(pb_context *ctx, typename K::Args args) {
  args.threads_log2 = row_threads_log2(args.columns);
  return Device::template launch<K>(ctx, ceil_div(args.rows << args.threads_log2, row_group), row_group, args);
}

inline i64 fp32_bits(double x) {
  const float f = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

// q [rows, pitch], absmax [rows] and the marks of outlier columns of x [rows, columns].
template <class Device, class T>
pb_status quantize_int8_rows(pb_context *ctx, const T *x, i64 rows, i64 columns, double threshold, bool by_row, u8 *q,
                             i64 pitch, float *absmax, u8 *outlier) {
  const i64 bits = fp32_bits(threshold);
  const bool any = static_cast<float>(threshold) > 0.0f;
  const bool aligned_x = columns % 8 == 0 && aligned(16, x);
  PB_TRY(Device::template launch<ClearFlags>(ctx, ceil_div(columns, row_group), row_group, {outlier, columns}));
  if (any) PB_TRY((launch_rows<Device, MarkOutliers<T>>(ctx, {x, outlier, rows, columns, 0, bits, aligned_x})));
  return launch_rows<Device, QuantizeInt8<T>>(
      ctx, {x, q, absmax, any && !by_row ? outlier : nullptr, rows, columns, 0, pitch, bits, any && by_row,
            aligned_x && pitch % 8 == 0 && aligned(8, q)});
}

template <class Device>
pb_status quantize_int8(pb_context *ctx, const pb_quantize_int8_args *a) {
  return with_float(ctx, a->x, [&](auto dtype) {
    typedef decltype(dtype) T;
    const i64 columns = last_dimension(a->x);
    return quantize_int8_rows<Device>(ctx, data<const T>(a->x), numel(a->absmax), columns, a->threshold, false,
                                      data<u8>(a->q), columns, data<float>(a->absmax), data<u8>(a->outlier));
  });
}

template <class Device>
pb_status dequantize_int8(pb_context *ctx, const pb_dequantize_int8_args *a) {
  return with_float(ctx, a->y, [&](auto dtype) {
    typedef DequantizeInt8<decltype(dtype)> K;
    typename K::Args args = {};
    args.q = data<const u8>(a->q);
    args.absmax = data<const float>(a->absmax);
    args.y = data<decltype(dtype)>(a->y);
    args.rows = numel(a->absmax);
    args.columns = last_dimension(a->q);
    args.aligned = args.columns % 8 == 0 && aligned(8, args.q) && aligned(16, args.y);
    return launch_rows<Device, K>(ctx, args);
  });
}

}  // namespace launch
}  // namespace pb
#endif
