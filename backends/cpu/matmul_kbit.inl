// Products with a k-bit weight.
#include "matmul_core.inl"
#include "matmul_tiled.inl"
#ifdef __AVX512BF16__
#include "matmul_bf16.inl"
#endif

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

template <class D, class Product>
inline pb_status kbit_product(pb_context *ctx, D dtype, const DLTensor *in, int64_t in_width, const DLTensor *bias,
                              DLTensor *out, int64_t out_width, const Product &product) {
  const int64_t rows = out_width ? numel(out) / out_width : 0;
  if (!rows) return PB_OK;
  const bool convert = sizeof(typename D::type) != sizeof(float);
  float *buffer = 0, *acc = 0;
  if (!take_scratch(ctx, [&](Scratch &s) {
        buffer = s.take<float>(convert ? rows * in_width : 0);
        acc = s.take<float>(rows * out_width);
      }))
    return PB_SCRATCH;
  clear(ctx, acc, rows * out_width);
  product(to_float32(ctx, dtype, data<typename D::type>(in), rows * in_width, buffer), rows, acc);
  finish(ctx, dtype, acc, bias ? data<const typename D::type>(bias) : (const typename D::type *)0, rows, out_width,
         data<typename D::type>(out));
  return PB_OK;
}

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
  const bool tiled = a->packed && is_tiled(k, a->block, a->bits) && numel(a->x) <= most_tiled_rows * k;
#ifdef __AVX512BF16__
  if (!tiled && is_bf16(a->x))
    return kbit_product_bf16(ctx, a->x, a->bias, a->y, n, [&](const uint16_t *x, int64_t rows, float *acc) {
      multiply_bf16(ctx, weight, 0, x, rows, n, k, acc);
    });
#endif
  return with_dtype(ctx, "matmul_kbit", a->x, [&](auto dtype) {
    return kbit_product(ctx, dtype, a->x, k, a->bias, a->y, n, [&](const float *x, int64_t rows, float *acc) {
      if (tiled)
        multiply_tiled(ctx, weight.weight, data<const uint32_t>(a->packed), x, rows, n, k, acc);
      else
        multiply(ctx, weight, 0, x, rows, n, k, acc);
    });
  });
}

pb_status matmul_kbit_transposed(pb_context *ctx, const pb_matmul_kbit_transposed_args *a) {
  const int64_t n = last_dim(a->dy), k = a->k;
  const KbitRows weight = {kbit_weight(a, k), k};
  return with_dtype(ctx, "matmul_kbit_transposed", a->dy, [&](auto dtype) {
    return kbit_product(ctx, dtype, a->dy, n, 0, a->dx, k, [&](const float *dy, int64_t rows, float *acc) {
      multiply_transposed(ctx, weight, 0, dy, rows, n, k, acc);
    });
  });
}

pb_status matmul_kbit_grouped(pb_context *ctx, const pb_matmul_kbit_grouped_args *a) {
  const int64_t k = last_dim(a->x), n = a->n;
  const KbitRows weight = {kbit_weight(a, k), k};
#ifdef __AVX512BF16__
  if (is_bf16(a->x))
    return kbit_product_bf16(ctx, a->x, 0, a->y, n, [&](const uint16_t *x, int64_t rows, float *acc) {
      each_group(a->group_end, rows, [&](int64_t begin, int64_t count, int64_t e) {
        multiply_bf16(ctx, weight, e * n, x + begin * k, count, n, k, acc + begin * n);
      });
    });
#endif
  return with_dtype(ctx, "matmul_kbit_grouped", a->x, [&](auto dtype) {
    return kbit_product(ctx, dtype, a->x, k, 0, a->y, n, [&](const float *x, int64_t rows, float *acc) {
      each_group(a->group_end, rows, [&](int64_t begin, int64_t count, int64_t e) {
        multiply(ctx, weight, e * n, x + begin * k, count, n, k, acc + begin * n);
      });
    });
  });
}

pb_status matmul_kbit_grouped_transposed(pb_context *ctx, const pb_matmul_kbit_grouped_transposed_args *a) {
  const int64_t n = last_dim(a->dy), k = a->k;
  const KbitRows weight = {kbit_weight(a, k), k};
  return with_dtype(ctx, "matmul_kbit_grouped_transposed", a->dy, [&](auto dtype) {
    return kbit_product(ctx, dtype, a->dy, n, 0, a->dx, k, [&](const float *dy, int64_t rows, float *acc) {
      each_group(a->group_end, rows, [&](int64_t begin, int64_t count, int64_t e) {
        multiply_transposed(ctx, weight, e * n, dy + begin * n, count, n, k, acc + begin * k);
      });
    });
  });
}

}  // namespace
