// Rows of a quantized table, by index (docs/numerics.md, "Gather").

namespace {

struct Indices {
  const int64_t *wide;
  const int32_t *narrow;
  int64_t operator[](int64_t i) const { return wide ? wide[i] : narrow[i]; }
};

inline Indices indices(const DLTensor *t) {
  return t->dtype.bits == 64 ? Indices{data<const int64_t>(t), nullptr} : Indices{nullptr, data<const int32_t>(t)};
}

// Before any row is written: the output of a call that fails is not half of a result.
inline pb_status check_indices(pb_context *ctx, const char *op, const Indices &index, int64_t count, int64_t n) {
  for (int64_t i = 0; i < count; i++)
    if (index[i] < 0 || index[i] >= n) {
      Message(ctx)
          .text(op)
          .text(": index ")
          .number(index[i])
          .text(" at position ")
          .number(i)
          .text(" is out of range for ")
          .number(n)
          .text(" rows");
      return PB_BAD_INDEX;
    }
  return PB_OK;
}

pb_status gather_kbit(pb_context *ctx, const pb_gather_kbit_args *a) {
  const int64_t count = numel(a->index), k = a->k;
  const Indices index = indices(a->index);
  const pb_status status = check_indices(ctx, "gather_kbit", index, count, a->n);
  if (status != PB_OK || count == 0) return status;
  return with_dtype(ctx, "gather_kbit", a->y, [&](auto dtype) {
    typedef decltype(dtype) D;
    const KbitWeight weight = kbit_weight(a, k);
    typename D::type *y = data<typename D::type>(a->y);
    parallel(ctx, count, grain_of(k), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) weight.decode_as(dtype, index[i] * k, k, y + i * k);
    });
    return (pb_status)PB_OK;
  });
}

pb_status gather_int8(pb_context *ctx, const pb_gather_int8_args *a) {
  const int64_t count = numel(a->index), k = last_dim(a->q), n = a->q->shape[0];
  const Indices index = indices(a->index);
  const pb_status status = check_indices(ctx, "gather_int8", index, count, n);
  if (status != PB_OK || count == 0) return status;
  return with_dtype(ctx, "gather_int8", a->y, [&](auto dtype) {
    typedef decltype(dtype) D;
    const int8_t *q = data<const int8_t>(a->q);
    const float *absmax = data<const float>(a->absmax);
    typename D::type *y = data<typename D::type>(a->y);
    parallel(ctx, count, grain_of(k), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) dequantize_row(dtype, q + index[i] * k, k, absmax[index[i]], y + i * k);
    });
    return (pb_status)PB_OK;
  });
}

}  // namespace
