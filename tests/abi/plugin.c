/* A backend in C11 for the tests. -D options make it old, unusable, for another device, or built for another table. */
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "polybit.h"

#ifndef PLUGIN_NAME
#define PLUGIN_NAME "dummy"
#endif
#ifndef PLUGIN_SIZE
#define PLUGIN_SIZE sizeof(pb_backend)
#endif
#ifndef PLUGIN_DEVICE
#define PLUGIN_DEVICE kDLCPU
#endif
#ifndef PLUGIN_ABI
#define PLUGIN_ABI PB_ABI
#endif

static pb_status refuse(pb_context *context, pb_status status, const char *reason) {
  snprintf(context->error, context->error_size, "%s", reason);
  return status;
}

/* Takes fp32 only, and insists on scratch, so that both ways out before any work are walked. */
static pb_status dequantize_blockwise(pb_context *context, const pb_dequantize_blockwise_args *a) {
  if (a->y->dtype.code != kDLFloat || a->y->dtype.bits != 32)
    return refuse(context, PB_UNSUPPORTED, "dummy writes fp32 only");
  if (context->scratch_size < 256 * sizeof(float)) {
    context->scratch_needed = 256 * sizeof(float);
    return PB_SCRATCH;
  }
  if ((uintptr_t)context->scratch % 64) return refuse(context, PB_ERROR, "scratch is not aligned to 64 bytes");
  float *code = context->scratch;
  memcpy(code, a->code->data, 256 * sizeof(float));
  int64_t count = 1;
  for (int i = 0; i < a->q->ndim; i++) count *= a->q->shape[i];
  const uint8_t *q = a->q->data;
  const float *absmax = a->absmax->data;
  float *y = a->y->data;
  for (int64_t i = 0; i < count; i++) y[i] = code[q[i]] * absmax[i / a->block];
  return PB_OK;
}

/* Lies behind the size of an "old" plug-in: must never run there. */
static pb_status gather_int8(pb_context *context, const pb_gather_int8_args *a) {
  (void)a;
  return refuse(context, PB_ERROR, "this entry was not to be read");
}

static int64_t probe(char *error, uint64_t error_size) {
#ifdef PLUGIN_BROKEN
  snprintf(error, error_size, "the dummy device is out of order");
  return 0;
#else
  (void)error, (void)error_size;
  return 1;
#endif
}

static const pb_backend backend = {
    .abi = PLUGIN_ABI,
    .size = PLUGIN_SIZE,
    .name = PLUGIN_NAME,
    .device_type = PLUGIN_DEVICE,
    .probe = probe,
    .dequantize_blockwise = dequantize_blockwise,
    .gather_int8 = gather_int8,
};

const pb_backend *polybit_backend(uint64_t index) { return index == 0 ? &backend : NULL; }
