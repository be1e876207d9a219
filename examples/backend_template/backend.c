/* A backend for polybit in C11, with one op: quantize_int8. Copy the folder, replace "template" and the kernel.
 *
 * The headers come with the installed polybit: ops.def is the list of ops, polybit.h makes a struct of arguments and an
 * entry of pb_backend out of each line. docs/writing_a_backend.md says what a kernel gets, what it must not do and what
 * it returns; docs/numerics.md what each op computes, to the bit.
 */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "polybit.h"

/* Grains of parallel_for: below this many elements a second thread costs more than it saves. */
enum { GRAIN = 1 << 14 };

typedef float (*read_element)(const void *data, int64_t i);

typedef struct {
  const void *x; /* [rows, k], read as fp32 by `read` */
  read_element read;
  int64_t rows, k;
  float threshold;  /* 0: nothing is an outlier */
  int8_t *q;        /* [rows, k] */
  float *absmax;    /* [rows] */
  uint8_t *outlier; /* [k]: 1 for the columns with an outlier in any row */
} job;

static float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static float read_fp32(const void *data, int64_t i) { return ((const float *)data)[i]; }

static float read_bf16(const void *data, int64_t i) { return from_bits((uint32_t)((const uint16_t *)data)[i] << 16); }

static float read_fp16(const void *data, int64_t i) {
  const uint32_t half = ((const uint16_t *)data)[i], sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13); /* infinity, NaN */
  /* Exponent and mantissa in fp32's places, then the other bias: exact, for subnormals as well. */
  return from_bits(sign | (rest << 13)) * 0x1p112f;
}

static bool is_outlier(const job *j, float value) { return j->threshold > 0.0f && fabsf(value) >= j->threshold; }

/* Threads share the columns, not the rows: no two of them write one flag. */
static void mark_columns(void *arg, int64_t begin, int64_t end) {
  const job *j = arg;
  memset(j->outlier + begin, 0, (size_t)(end - begin));
  for (int64_t row = 0; row < j->rows; row++)
    for (int64_t c = begin; c < end; c++)
      if (is_outlier(j, j->read(j->x, row * j->k + c))) j->outlier[c] = 1;
}

static void quantize_rows(void *arg, int64_t begin, int64_t end) {
  const job *j = arg;
  for (int64_t row = begin; row < end; row++) {
    float absmax = 0.0f;
    for (int64_t c = 0; c < j->k; c++) {
      const float value = j->read(j->x, row * j->k + c);
      if (is_outlier(j, value)) continue;
      if (isnan(value)) absmax = from_bits(0x7fc00000u); /* the one NaN that the specification stores */
      if (fabsf(value) > absmax) absmax = fabsf(value);  /* false where either is NaN */
    }
    if (absmax < 0x1p-126f) absmax = 0.0f;
    j->absmax[row] = absmax;
    /* Infinite for an absmax below 2^-121, NaN for NaN: hence the clamp, and the test that NaN fails. */
    const float factor = absmax == 0.0f ? 0.0f : 127.0f / absmax;
    for (int64_t c = 0; c < j->k; c++) {
      const float scaled = rintf(j->read(j->x, row * j->k + c) * factor); /* ties to even */
      const bool zero = j->outlier[c] || isnan(scaled);
      j->q[row * j->k + c] = zero ? 0 : (int8_t)fmaxf(-127.0f, fminf(127.0f, scaled));
    }
  }
}

/* Over [0, count), whose items cost `cost` elements each, in parallel if the caller has threads. */
static void spread(const pb_context *context, int64_t count, int64_t cost, pb_range_body body, job *j) {
  if (count == 0) return;
  if (context->parallel_for)
    context->parallel_for(count, cost < GRAIN ? GRAIN / (cost + 1) + 1 : 1, body, j);
  else
    body(j, 0, count);
}

static pb_status quantize_int8(pb_context *context, const pb_quantize_int8_args *a) {
  const DLDataType dtype = a->x->dtype;
  job j = {
      .x = a->x->data,
      .rows = 1,
      .k = a->x->shape[a->x->ndim - 1],
      .threshold = (float)a->threshold,
      .q = a->q->data,
      .absmax = a->absmax->data,
      .outlier = a->outlier->data,
  };
  for (int32_t i = 0; i + 1 < a->x->ndim; i++) j.rows *= a->x->shape[i];
  if (dtype.code == kDLFloat && dtype.bits == 32) j.read = read_fp32;
  if (dtype.code == kDLFloat && dtype.bits == 16) j.read = read_fp16;
  if (dtype.code == kDLBfloat && dtype.bits == 16) j.read = read_bf16;
  if (!j.read) { /* before any work; the reason is what the user reads */
    snprintf(context->error, context->error_size, "template: no kernel for this dtype");
    return PB_UNSUPPORTED;
  }
  spread(context, j.k, j.rows, mark_columns, &j);
  spread(context, j.rows, j.k, quantize_rows, &j);
  return PB_OK;
}

/* Asked once, when the library is loaded, and before any op. A device that is missing is no error: say what is missing,
 * and `polybit info` shows it. */
static int64_t probe(char *error, uint64_t error_size) {
  (void)error, (void)error_size;
  return 1;
}

/* Every op that is not named is null, "not implemented", and runs as its torch reference. */
static const pb_backend backend = {
    .abi = PB_ABI,
    .size = sizeof(pb_backend),
    .name = "template",    /* what POLYBIT_BACKEND and polybit.backend() call it; "family:variant" for one of several */
    .device_type = kDLCPU, /* whose tensors it takes; kDLExtDev is torch's PrivateUse1 */
    .probe = probe,
    .quantize_int8 = quantize_int8,
};

const pb_backend *polybit_backend(uint64_t index) { return index == 0 ? &backend : NULL; }
