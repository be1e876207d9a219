// Loops over threads and tensors as the kernels see them. No std:: here: this is compiled for one instruction set.
#ifndef POLYBIT_CPU_PARALLEL_H
#define POLYBIT_CPU_PARALLEL_H

#include <stddef.h>
#include <stdint.h>

#include "polybit.h"

namespace {

// body(begin, end) over parts of [0, count); the parts are disjoint and run in any order.
template <class Body>
inline void parallel(pb_context *ctx, int64_t count, int64_t grain, const Body &body) {
  if (count <= 0) return;
  if (!ctx->parallel_for || count <= grain) {
    body((int64_t)0, count);
    return;
  }
  ctx->parallel_for(
      count, grain, [](void *arg, int64_t begin, int64_t end) { (*(const Body *)arg)(begin, end); }, (void *)&body);
}

// Parts worth a thread: about 32 Ki elements where one item has `size` of them.
inline int64_t grain_of(int64_t size) { return size >= 32768 ? 1 : 32768 / (size < 1 ? 1 : size); }

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t numel(const DLTensor *t) {
  int64_t n = 1;
  for (int32_t i = 0; i < t->ndim; i++) n *= t->shape[i];
  return n;
}
inline int64_t last_dim(const DLTensor *t) { return t->ndim ? t->shape[t->ndim - 1] : 1; }

template <class T>
inline T *data(const DLTensor *t) {
  return (T *)((char *)t->data + t->byte_offset);
}

struct Message {
  pb_context *ctx;
  uint64_t used;

  explicit Message(pb_context *c) : ctx(c), used(0) {
    if (ctx->error && ctx->error_size) ctx->error[0] = 0;
  }
  Message &text(const char *s) {
    for (; *s && ctx->error && used + 1 < ctx->error_size; s++) ctx->error[used++] = *s;
    if (ctx->error && used < ctx->error_size) ctx->error[used] = 0;
    return *this;
  }
  Message &number(int64_t value) {
    char digits[24];
    char *p = digits + sizeof digits;
    *--p = 0;
    uint64_t rest = value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
    do *--p = (char)('0' + rest % 10);
    while (rest /= 10);
    if (value < 0) *--p = '-';
    return text(p);
  }
};

inline pb_status unsupported_dtype(pb_context *ctx, const char *op, const DLTensor *t) {
  Message(ctx)
      .text(op)
      .text(": dtype code ")
      .number(t->dtype.code)
      .text(" with ")
      .number(t->dtype.bits)
      .text(" bits; wanted fp32, fp16 or bf16");
  return PB_UNSUPPORTED;
}

}  // namespace
#endif
