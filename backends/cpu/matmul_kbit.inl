// Products with a k-bit weight.
#include "matmul_core.inl"
#include "matmul_tiled.inl"

namespace {

struct KbitRows {
  KbitWeight weight;
  int64_t k;
  void decode(int64_t row, int64_t begin, int64_t count, float *out) const {
    weight.decode_range(row * k + begin, count, out);
  }
  void decode_bf16(int64_t row, int64_t begin, int64_t count, uint16_t *out) const {
    weight.decode_as(BFloat16(), row * k + begin, count, out);
  }
};

// Whole groups of rows, one weight of the stack each: body(first row of x, rows, weight).
template <class Body>
inline void each_group(const DLTensor *group_end, int64_t rows, const Body &body) {
  const int32_t *ends = data<const int32_t>(group_end);
  int64_t begin = 0;
  for (int64_t e = 0; e < numel(group_end); e++) {
    const int64_t end = min64(ends[e], rows);
    if (end > begin) body(begin, end - begin, e);
    if (end > begin) begin = end;
  }
}

pb_status matmul_kbit(pb_context *ctx, const pb_matmul_kbit_args *a) {
  const int64_t k = last_dim(a->x), n = a->n;
  const KbitRows weight = {kbit_weight(a, k), k};
  // The tiles sum in an order of their own, so not in deterministic mode.
  if (a->packed && is_tiled(k, a->block, a->bits) && numel(a->x) <= most_tiled_rows * k && !ctx->deterministic)
    return with_dtype(ctx, "matmul_kbit", a->x, [&](auto dtype) {
      return product(ctx, dtype, Float32Panel(), a->x, k, a->bias, a->y, n,
                     [&](const float *x, int64_t rows, float *acc) {
                       multiply_tiled(ctx, weight.weight, data<const uint32_t>(a->packed), x, rows, n, k, acc);
                     });
    });
  return with_panel(ctx, "matmul_kbit", a->x, [&](auto dtype, auto panel) {
    return product(ctx, dtype, panel, a->x, k, a->bias, a->y, n, [&](const auto *x, int64_t rows, float *acc) {
      multiply(ctx, panel, weight, 0, x, rows, n, k, acc);
    });
  });
}

pb_status matmul_kbit_transposed(pb_context *ctx, const pb_matmul_kbit_transposed_args *a) {
  const int64_t n = last_dim(a->dy), k = a->k;
  const KbitRows weight = {kbit_weight(a, k), k};
  return with_dtype(ctx, "matmul_kbit_transposed", a->dy, [&](auto dtype) {
    return product(ctx, dtype, Float32Panel(), a->dy, n, 0, a->dx, k, [&](const float *dy, int64_t rows, float *acc) {
      multiply_transposed(ctx, weight, 0, dy, rows, n, k, acc);
    });
  });
}

pb_status matmul_kbit_grouped(pb_context *ctx, const pb_matmul_kbit_grouped_args *a) {
  const int64_t k = last_dim(a->x), n = a->n;
  const KbitRows weight = {kbit_weight(a, k), k};
  return with_panel(ctx, "matmul_kbit_grouped", a->x, [&](auto dtype, auto panel) {
    return product(ctx, dtype, panel, a->x, k, 0, a->y, n, [&](const auto *x, int64_t rows, float *acc) {
      each_group(a->group_end, rows, [&](int64_t begin, int64_t count, int64_t e) {
        multiply(ctx, panel, weight, e * n, x + begin * k, count, n, k, acc + begin * n);
      });
    });
  });
}

pb_status matmul_kbit_grouped_transposed(pb_context *ctx, const pb_matmul_kbit_grouped_transposed_args *a) {
  const int64_t n = last_dim(a->dy), k = a->k;
  const KbitRows weight = {kbit_weight(a, k), k};
  return with_dtype(ctx, "matmul_kbit_grouped_transposed", a->dy, [&](auto dtype) {
    return product(ctx, dtype, Float32Panel(), a->dy, n, 0, a->dx, k, [&](const float *dy, int64_t rows, float *acc) {
      each_group(a->group_end, rows, [&](int64_t begin, int64_t count, int64_t e) {
        multiply_transposed(ctx, weight, e * n, dy + begin * n, count, n, k, acc + begin * k);
      });
    });
  });
}

}  // namespace
