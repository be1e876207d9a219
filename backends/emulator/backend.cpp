// The backends emulator:16, emulator:32 and emulator:64: the kernels of core/kernels on CPU tensors, run by engine.cpp
// at three wave widths. For tests only, and so never chosen by itself.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <mutex>
#include <string>

#include "engine.h"
#include "../../core/simt/emulator.h"
#include "../../core/kernels/kbit.h"
#include "../../core/polybit.h"

namespace {

using pb::i64;
using pb::u32;
using pb::u8;

pb_status status(pb_context *ctx, pb_status code, const std::string &reason) {
  if (ctx->error && ctx->error_size) std::snprintf(ctx->error, ctx->error_size, "%s", reason.c_str());
  return code;
}

template <class T>
T *data(const DLTensor *t) {
  return reinterpret_cast<T *>(static_cast<char *>(t->data) + t->byte_offset);
}

i64 element_count(const DLTensor *t) {
  i64 n = 1;
  for (int d = 0; d < t->ndim; d++) n *= t->shape[d];
  return n;
}

struct Work {
  const pb::emulator::Launch &launch;
  const std::function<void()> &kernel;
  std::mutex mutex;
  std::string error;
};

void run_range(void *arg, int64_t begin, int64_t end) {
  Work &work = *static_cast<Work *>(arg);
  std::string error;
  try {
    error = pb::emulator::run_groups(work.launch, begin, end, work.kernel);
  } catch (const std::exception &e) {
    error = e.what();
  }
  if (error.empty()) return;
  const std::lock_guard<std::mutex> lock(work.mutex);
  if (work.error.empty()) work.error = error;
}

// Groups are independent, so they go to the threads of the caller; each part sets up its own fibers.
pb_status launch(pb_context *ctx, const char *op, i64 groups, u32 group_dim, u32 width,
                 const std::function<void()> &kernel) {
  pb::emulator::Launch what = {groups, group_dim, width, {}};
  const char *order = std::getenv("POLYBIT_EMULATOR_ORDER");
  if (!pb::emulator::parse_order(order, &what.order))
    return status(ctx, PB_ERROR,
                  std::string("POLYBIT_EMULATOR_ORDER: got '") + order +
                      "', wanted ascending, descending, shuffled or shuffled:SEED");
  Work work = {what, kernel, {}, {}};
  if (ctx->parallel_for)
    ctx->parallel_for(groups, 16, run_range, &work);
  else
    run_range(&work, 0, groups);
  return work.error.empty() ? PB_OK : status(ctx, PB_ERROR, std::string(op) + ": " + work.error);
}

template <class T>
pb_status quantize_kbit4(pb_context *ctx, const pb_quantize_kbit_args *a, u32 width) {
  const T *x = data<const T>(a->x);
  const float *thresholds = data<const float>(a->thresholds);
  const u8 *order = data<const u8>(a->order);
  u8 *q = data<u8>(a->q);
  float *absmax = data<float>(a->absmax);
  const i64 n = element_count(a->x);
  if (n == 0) return PB_OK;
  const u32 block = static_cast<u32>(a->block), group = pb::kbit4_group(block);
  const u32 block_log2 = static_cast<u32>(__builtin_ctz(block));
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && reinterpret_cast<uintptr_t>(q) % 4 == 0;
  const i64 per_group = i64(group) * pb::kbit4_values;
  return launch(ctx, "quantize_kbit", (n + per_group - 1) / per_group, group, width, [=] {
    PB_SHARED(pb::Kbit4Local, local);
    pb::quantize_kbit4(pb::Wave(), local, x, thresholds, order, q, absmax, n, block_log2, aligned);
  });
}

template <u32 width>
pb_status quantize_kbit(pb_context *ctx, const pb_quantize_kbit_args *a) {
  if (a->bits != 4) return status(ctx, PB_UNSUPPORTED, "quantize_kbit: bits must be 4, got " + std::to_string(a->bits));
  if (a->search) return status(ctx, PB_UNSUPPORTED, "quantize_kbit: scale search is not there yet");
  if (a->block < 16 || a->block > 4096 || (a->block & (a->block - 1)))
    return status(ctx, PB_UNSUPPORTED,
                  "quantize_kbit: block must be a power of two in 16...4096, got " + std::to_string(a->block));
  const DLDataType type = a->x->dtype;
  if (type.code == kDLFloat && type.bits == 32) return quantize_kbit4<float>(ctx, a, width);
  if (type.code == kDLFloat && type.bits == 16) return quantize_kbit4<pb::Fp16>(ctx, a, width);
  if (type.code == kDLBfloat && type.bits == 16) return quantize_kbit4<pb::Bf16>(ctx, a, width);
  return status(ctx, PB_UNSUPPORTED, "quantize_kbit: x must be fp32, fp16 or bf16");
}

int64_t probe(char *, uint64_t) { return 1; }

template <u32 width>
constexpr pb_backend table(const char *name) {
  pb_backend b = {};
  b.abi = PB_ABI;
  b.size = sizeof(pb_backend);
  b.name = name;
  b.device_type = kDLCPU;
  b.probe = probe;
  b.quantize_kbit = quantize_kbit<width>;
  return b;
}

constexpr pb_backend backends[] = {table<32>("emulator:32"), table<64>("emulator:64"), table<16>("emulator:16")};

}  // namespace

extern "C" const pb_backend *polybit_backend(uint64_t index) {
  return index < sizeof backends / sizeof *backends ? &backends[index] : nullptr;
}
