// fp32, fp16 and bf16 tensors behind one interface: kernels compute in fp32 and convert at the edges.
#ifndef POLYBIT_CPU_DTYPE_H
#define POLYBIT_CPU_DTYPE_H

#include "math/float16.h"
#include "parallel.h"

namespace {

struct Float32 {
  typedef float type;
  static simd::F load(const float *p) { return simd::load(p); }
  static simd::F load_n(const float *p, int n) { return simd::load_n(p, n); }
  static void store(float *p, simd::F a) { simd::store(p, a); }
  static void stream(float *p, simd::F a) { simd::stream(p, a); }
  static void store_n(float *p, simd::F a, int n) { simd::store_n(p, a, n); }
  static void store1(float *p, float a) { *p = a; }
};
struct Float16 {
  typedef uint16_t type;
  static simd::F load(const uint16_t *p) { return simd::load_f16(p); }
  static simd::F load_n(const uint16_t *p, int n) { return simd::load_f16_n(p, n); }
  static void store(uint16_t *p, simd::F a) { simd::store_f16(p, a); }
  static void stream(uint16_t *p, simd::F a) { simd::stream_f16(p, a); }
  static void store_n(uint16_t *p, simd::F a, int n) { simd::store_f16_n(p, a, n); }
  static void store1(uint16_t *p, float a) { *p = pb::float_to_half(a); }
};
struct BFloat16 {
  typedef uint16_t type;
  static simd::F load(const uint16_t *p) { return simd::load_bf16(p); }
  static simd::F load_n(const uint16_t *p, int n) { return simd::load_bf16_n(p, n); }
  static void store(uint16_t *p, simd::F a) { simd::store_bf16(p, a); }
  static void stream(uint16_t *p, simd::F a) { simd::stream_bf16(p, a); }
  static void store_n(uint16_t *p, simd::F a, int n) { simd::store_bf16_n(p, a, n); }
  static void store1(uint16_t *p, float a) { *p = pb::float_to_bf16(a); }
};

// D with stores past the caches, for an output too large to find there again. Every whole vector must be aligned.
template <class D>
struct Streamed : D {
  static void store(typename D::type *p, simd::F a) { D::stream(p, a); }
};

// Ends a thread's part of a loop that may have streamed.
template <class D>
inline void finish(D) {}
template <class D>
inline void finish(Streamed<D>) {
  simd::fence();
}

// Calls run(D()) with the dtype of t.
template <class Run>
inline pb_status with_dtype(pb_context *ctx, const char *op, const DLTensor *t, const Run &run) {
  if (t->dtype.code == kDLFloat && t->dtype.bits == 32) return run(Float32());
  if (t->dtype.code == kDLFloat && t->dtype.bits == 16) return run(Float16());
  if (t->dtype.code == kDLBfloat && t->dtype.bits == 16) return run(BFloat16());
  return unsupported_dtype(ctx, op, t);
}

// The same for an output; `aligned` says whether its rows or blocks keep the alignment of its first element.
template <class Run>
inline pb_status with_output(pb_context *ctx, const char *op, const DLTensor *t, bool aligned, const Run &run) {
  const bool large = numel(t) * (t->dtype.bits / 8) >= (int64_t)32 << 20;
  if (!large || !aligned || ((uintptr_t)data<char>(t) & 63)) return with_dtype(ctx, op, t, run);
  return with_dtype(ctx, op, t, [&](auto dtype) { return run(Streamed<decltype(dtype)>()); });
}

// n values as fp32: x itself, or a converted copy in buffer.
inline const float *as_float32(Float32, const float *x, int64_t, float *) { return x; }
template <class D>
inline const float *as_float32(D, const typename D::type *x, int64_t n, float *buffer) {
  int64_t i = 0;
  for (; i + simd::W <= n; i += simd::W) simd::store(buffer + i, D::load(x + i));
  if (i < n) simd::store_n(buffer + i, D::load_n(x + i, (int)(n - i)), (int)(n - i));
  return buffer;
}

template <class D>
inline void from_float32(D, typename D::type *y, const float *x, int64_t n) {
  int64_t i = 0;
  for (; i + simd::W <= n; i += simd::W) D::store(y + i, simd::load(x + i));
  if (i < n) D::store_n(y + i, simd::load_n(x + i, (int)(n - i)), (int)(n - i));
}

}  // namespace
#endif
