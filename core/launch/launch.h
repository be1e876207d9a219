// What the launchers are written against: one function per op of the table, the same for every backend of core/kernels.
// A launcher reads the arguments, chooses the size of the launch, and hands a kernel to the device:
//
//   struct Device {
//     typedef LaneTiles Tiles;             // or those of its matrix instructions: core/simt/tile.h
//     static u32 width(pb_context *ctx);   // of a wave; the same for all launches of the context's device
//     static constexpr bool host_memory;   // may be left out: whether the host can read the tensors at once
//     static constexpr i64 tensors;        // may be left out: how many of them one launch can name
//     template <class K>
//     static pb_status launch(pb_context *ctx, i64 groups, u32 group_dim, const typename K::Args &args);
//   };
//
// launch() enqueues on the context's stream and never waits. Kernels of one stream run one after another, and see what
// those before wrote. Host code, C++17; an adaptor of core/simt is included first.
#ifndef PB_LAUNCH_LAUNCH_H
#define PB_LAUNCH_LAUNCH_H

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <type_traits>

#include "../polybit.h"

namespace pb {
namespace launch {

template <class T>
T *data(const DLTensor *t) {
  return t ? reinterpret_cast<T *>(static_cast<char *>(t->data) + t->byte_offset) : nullptr;
}

inline i64 numel(const DLTensor *t) {
  i64 n = 1;
  for (int d = 0; d < t->ndim; d++) n *= t->shape[d];
  return n;
}
inline i64 last_dimension(const DLTensor *t) { return t->ndim ? t->shape[t->ndim - 1] : 1; }

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
inline i64 log2_of(i64 power) { return __builtin_ctzll(static_cast<unsigned long long>(power)); }

template <class... Pointers>
bool aligned(size_t bytes, Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

inline pb_status fail(pb_context *ctx, pb_status status, const char *format, ...) {
  if (ctx->error && ctx->error_size) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(ctx->error, ctx->error_size, format, arguments);
    va_end(arguments);
  }
  return status;
}

inline bool is_fp32(const DLTensor *t) { return t->dtype.code == kDLFloat && t->dtype.bits == 32; }
inline bool is_fp16(const DLTensor *t) { return t->dtype.code == kDLFloat && t->dtype.bits == 16; }
inline bool is_bf16(const DLTensor *t) { return t->dtype.code == kDLBfloat && t->dtype.bits == 16; }

// f(float()), f(Fp16()) or f(Bf16()), as the tensor is.
template <class F>
pb_status with_float(pb_context *ctx, const DLTensor *t, const F &f) {
  if (is_fp32(t)) return f(float());
  if (is_fp16(t)) return f(Fp16());
  if (is_bf16(t)) return f(Bf16());
  return fail(ctx, PB_UNSUPPORTED, "fp32, fp16 or bf16 is wanted");
}

template <class Device, class = void>
constexpr bool host_memory = false;
template <class Device>
constexpr bool host_memory<Device, std::void_t<decltype(Device::host_memory)>> = Device::host_memory;

// Parts of the context's scratch, 64-byte aligned. First take all of them, then ask whether they are there.
class Scratch {
 public:
  explicit Scratch(pb_context *ctx) : ctx_(ctx) {}
  template <class T>
  T *take(i64 count) {
    const uint64_t at = size_;
    size_ += (static_cast<uint64_t>(count) * sizeof(T) + 63) / 64 * 64;
    return size_ <= ctx_->scratch_size ? reinterpret_cast<T *>(static_cast<char *>(ctx_->scratch) + at) : nullptr;
  }
  // PB_OK, or PB_SCRATCH to return before anything is enqueued.
  pb_status status() const {
    if (size_ <= ctx_->scratch_size) return PB_OK;
    ctx_->scratch_needed = size_;
    return PB_SCRATCH;
  }

 private:
  pb_context *ctx_;
  uint64_t size_ = 0;
};

// One after another until one fails: `PB_TRY(launch(...))`.
#define PB_TRY(expression) \
  do { \
    if (const pb_status status_ = (expression)) return status_; \
  } while (0)

}  // namespace launch
}  // namespace pb
#endif
