/* The C ABI between the registry and a backend. C11; no Python, no torch. */
#ifndef POLYBIT_H
#define POLYBIT_H

#include <stdint.h>

#include "dlpack.h"
#include "polybit_abi.h" /* generated: PB_ABI, a hash of ops.def and this file */

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t pb_status;
enum {
  PB_OK = 0,
  PB_UNSUPPORTED = 1, /* nothing was enqueued; pb_context.error says why */
  PB_SCRATCH = 2,     /* nothing was enqueued; pb_context.scratch_needed says how many bytes */
  PB_ERROR = 3,       /* the op failed; error says why */
  PB_BAD_INDEX = 4,   /* a tensor of indices holds one that is out of range; error says which */
};

/* Runs body(arg, begin, end) over parts of [0, count), each at least grain long but the last; returns when all are
 * done. */
typedef void (*pb_range_body)(void *arg, int64_t begin, int64_t end);

typedef struct pb_context {
  uint64_t size;           /* sizeof(pb_context) of the caller */
  void *stream;            /* cudaStream_t, hipStream_t, sycl::queue *, or null */
  int64_t device_index;    /* set and restored by the launcher */
  char *error;             /* message buffer, zero-terminated */
  uint64_t error_size;     /* its size in bytes */
  void *scratch;           /* 64-byte aligned device memory, or null */
  uint64_t scratch_size;   /* its size in bytes */
  uint64_t scratch_needed; /* written by a kernel that returns PB_SCRATCH */
  uint64_t thread_count;   /* how many threads parallel_for uses at most */
  void (*parallel_for)(int64_t count, int64_t grain, pb_range_body body, void *arg); /* CPU backends; else null */
  uint64_t deterministic; /* not 0: a row of a result may depend on that row alone, not on M nor on the kernel chosen */
} pb_context;

typedef struct pb_tensor_list {
  int64_t count;
  DLTensor *const *tensors;
} pb_tensor_list;

/* One argument struct per op. Every field is eight bytes: the struct is also an array of slots. */
#define PB_IN(name) const DLTensor *name;
#define PB_OPT(name) const DLTensor *name;
#define PB_OUT(name) DLTensor *name;
#define PB_MUT(name) DLTensor *name;
#define PB_INS(name) const pb_tensor_list *name;
#define PB_MUTS(name) const pb_tensor_list *name;
#define PB_INT(name) int64_t name;
#define PB_FLOAT(name) double name;
#define PB_DTYPE(name)
#define PB_SHAPE(name)
#define PB_OP(name, arguments) \
  typedef struct pb_##name##_args { \
    arguments \
  } pb_##name##_args;
#include "ops.def"
#undef PB_OP

/* A backend. A null op is "not implemented"; a library built earlier has a smaller size, and its missing ops read as
 * null. */
typedef struct pb_backend {
  uint64_t abi;        /* PB_ABI */
  uint64_t size;       /* sizeof(pb_backend) of the library */
  const char *name;    /* "family" or "family:variant", as in "cpu:avx2" */
  int64_t device_type; /* a DLDeviceType: whose tensors it takes */
  /* 1 if usable on this machine; else 0 with the reason in error. */
  int64_t (*probe)(char *error, uint64_t error_size);
#define PB_OP(name, arguments) pb_status (*name)(pb_context *, const pb_##name##_args *);
#include "ops.def"
#undef PB_OP
} pb_backend;

#undef PB_IN
#undef PB_OPT
#undef PB_OUT
#undef PB_MUT
#undef PB_INS
#undef PB_MUTS
#undef PB_INT
#undef PB_FLOAT
#undef PB_DTYPE
#undef PB_SHAPE

/* The one symbol of a backend library: its backends, best first, then null. */
#if defined(_WIN32)
#define PB_EXPORT __declspec(dllexport)
#else
#define PB_EXPORT __attribute__((visibility("default")))
#endif
PB_EXPORT const pb_backend *polybit_backend(uint64_t index);

#ifdef __cplusplus
}
#endif
#endif
