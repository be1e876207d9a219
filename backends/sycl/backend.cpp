// The kernels of core/kernels as SYCL, compiled to SPIR-V by DPC++ when polybit is built. The backend sycl is for
// tensors of torch.xpu; sycl:cpu, sycl:cpu:8 and sycl:cpu:32 are for CPU tensors, run by Intel's OpenCL
// device for the CPU: for tests only, and so never chosen by themselves.
#include "device.h"
#include "../../core/kernels/sycl.h"
#include "../../core/launch/table.h"

namespace {

using pb::launch::fail;

template <class K>
struct Entry;
#define PB_TILES pb::SyclTiles
#define PB_WIDE_TILES
#define PB_ENTRY(entry, ...) \
  template <> \
  struct Entry<__VA_ARGS__> { \
    static constexpr pb::sycl_device::Kernel kernel = {#entry, sizeof(__VA_ARGS__::Local), \
                                                       pb::IsLarge<__VA_ARGS__>::value}; \
  };
#include "../../core/kernels/entries.def"

// What `run` throws is the error of the op.
template <class K, class Run>
pb_status launched(pb_context *ctx, int64_t groups, const Run &run) {
  static_assert(sizeof(typename K::Args) <= PB_ARGUMENT_BYTES, "what a launch can carry");
  if (groups == 0) return PB_OK;
  if (groups > 0x7fffffff)  // DPC++ takes it that a group's number is an int
    return fail(ctx, PB_UNSUPPORTED, "too large for one launch: %lld groups", static_cast<long long>(groups));
  try {
    return run();
  } catch (const std::exception &error) {
    return fail(ctx, PB_ERROR, "%s: %s", Entry<K>::kernel.name, error.what());
  }
}

template <class K>
void enqueue(sycl::queue &queue, uint32_t width, int64_t groups, uint32_t group_dim, const typename K::Args &args) {
  pb::sycl_device::enqueue(queue, width, Entry<K>::kernel, {groups, group_dim, &args, sizeof args});
}

// What `reason` returns or throws is why the device cannot be used; "": it can.
template <class Reason>
int64_t probe(char *error, uint64_t size, const char *none, const Reason &reason) {
  pb_context ctx = {};
  ctx.error = error;
  ctx.error_size = size;
  try {
    const std::string why = reason();
    if (why.empty()) return 1;
    fail(&ctx, PB_UNSUPPORTED, "%s", why.c_str());
  } catch (const std::exception &exception) {
    fail(&ctx, PB_UNSUPPORTED, "%s: %s", none, exception.what());
  }
  return 0;
}

// The context's stream is torch's queue. Kernels of a queue that is in order, as torch's are, run one after another.
struct Gpu {
  typedef pb::SyclTiles Tiles;
  static sycl::queue *queue(pb_context *ctx) { return static_cast<sycl::queue *>(ctx->stream); }
  static uint32_t width(pb_context *ctx) {
    return ctx->stream ? pb::sycl_device::sub_group_size(queue(ctx)->get_device()) : 16;
  }

  template <class K>
  static pb_status launch(pb_context *ctx, int64_t groups, uint32_t group_dim, const typename K::Args &args) {
    return launched<K>(ctx, groups, [&]() -> pb_status {
      if (!ctx->stream) return fail(ctx, PB_ERROR, "no SYCL queue was given");
      if (!queue(ctx)->is_in_order()) return fail(ctx, PB_UNSUPPORTED, "the SYCL queue is not in order");
      enqueue<K>(*queue(ctx), width(ctx), groups, group_dim, args);
      return PB_OK;
    });
  }

  static int64_t probe(char *error, uint64_t size) {
    return ::probe(error, size, "no Intel GPU", [] {
      std::string reason = "no Intel GPU: Level Zero has none";
      for (const sycl::device &device : pb::sycl_device::gpus()) {
        reason = pb::sycl_device::unfit(device, pb::sycl_device::sub_group_size(device));
        if (reason.empty()) break;
      }
      return reason;
    });
  }
};

// Tensors are in memory that the OpenCL device reads and writes where it is, and a launch is complete when it returns.
template <uint32_t WIDTH>
struct Cpu {
  typedef pb::SyclTiles Tiles;
  static constexpr bool host_memory = true;
  static uint32_t width(pb_context *) { return WIDTH; }

  template <class K>
  static pb_status launch(pb_context *ctx, int64_t groups, uint32_t group_dim, const typename K::Args &args) {
    return launched<K>(ctx, groups, [&]() -> pb_status {
      sycl::queue &queue = pb::sycl_device::cpu_queue();
      enqueue<K>(queue, WIDTH, groups, group_dim, args);
      queue.wait_and_throw();
      return PB_OK;
    });
  }

  static int64_t probe(char *error, uint64_t size) {
    return ::probe(error, size, "no CPU as a SYCL device", [] {
      const sycl::device device = pb::sycl_device::cpu_queue().get_device();
      std::string reason = pb::sycl_device::unfit(device, WIDTH);
      if (reason.empty() && !device.has(sycl::aspect::usm_system_allocations))
        reason = "its OpenCL device does not read the memory of the process";
      return reason;
    });
  }
};

template <uint32_t WIDTH>
constexpr pb_backend cpu(const char *name) {
  return pb::launch::table<Cpu<WIDTH>>(name, kDLCPU, Cpu<WIDTH>::probe);
}

constexpr pb_backend backends[] = {pb::launch::table<Gpu>("sycl", kDLOneAPI, Gpu::probe), cpu<16>("sycl:cpu"),
                                   cpu<8>("sycl:cpu:8"), cpu<32>("sycl:cpu:32")};

}  // namespace

extern "C" const pb_backend *polybit_backend(uint64_t index) {
  return index < sizeof backends / sizeof *backends ? &backends[index] : nullptr;
}
