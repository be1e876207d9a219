// Lists of tensors in one call (docs/numerics.md, "Lists").

namespace {

pb_status sum_squares_multi(pb_context *ctx, const pb_sum_squares_multi_args *a) {
  float *y = data<float>(a->y);
  for (int64_t t = 0; t < a->xs->count; t++) {
    const DLTensor *x = a->xs->tensors[t];
    const pb_status status = with_dtype(ctx, "sum_squares_multi", x, [&](auto dtype) {
      typedef decltype(dtype) D;
      y[t] = tree_sum(ctx, dtype, data<const typename D::type>(x), numel(x), [](simd::F v) { return simd::mul(v, v); });
      return (pb_status)PB_OK;
    });
    if (status != PB_OK) return status;
  }
  return PB_OK;
}

pb_status scale_multi(pb_context *ctx, const pb_scale_multi_args *a) {
  const simd::F factor = simd::set1(*data<const float>(a->factor));
  // Every dtype is checked before anything is changed.
  for (int64_t t = 0; t < a->xs->count; t++) {
    const pb_status status = with_dtype(ctx, "scale_multi", a->xs->tensors[t], [](auto) { return (pb_status)PB_OK; });
    if (status != PB_OK) return status;
  }
  for (int64_t t = 0; t < a->xs->count; t++) {
    const DLTensor *x = a->xs->tensors[t];
    with_dtype(ctx, "scale_multi", x, [&](auto dtype) {
      typedef decltype(dtype) D;
      typename D::type *p = data<typename D::type>(x);
      parallel(ctx, numel(x), grain_of(1), [&](int64_t begin, int64_t end) {
        int64_t i = begin;
        for (; i + simd::W <= end; i += simd::W) D::store(p + i, simd::mul(D::load(p + i), factor));
        if (i < end) D::store_n(p + i, simd::mul(D::load_n(p + i, (int)(end - i)), factor), (int)(end - i));
      });
      return (pb_status)PB_OK;
    });
  }
  return PB_OK;
}

}  // namespace
