// The backends sycl:cpu, sycl:cpu:8 and sycl:cpu:32: the kernels of core/kernels as SYCL on CPU tensors, compiled by
// DPC++ and run by Intel's OpenCL device for the CPU. For tests only, and so never chosen by themselves.
#include "device.h"
#include "../../core/simt/sycl.h"
#include "../../core/launch/table.h"

namespace {

using pb::launch::fail;

// The name of the entry point of a kernel, and its type as text.
template <class K>
struct Entry;
#define PB_ENTRY(entry, ...) \
  template <> \
  struct Entry<__VA_ARGS__> { \
    static constexpr const char *name = #entry, *type = #__VA_ARGS__; \
  };
#include "../../core/kernels/entries.def"

// Tensors are in memory that the OpenCL device reads and writes where it is, and a launch is complete when it returns.
template <uint32_t WIDTH>
struct Cpu {
  typedef pb::LaneTiles Tiles;
  static constexpr bool host_memory = true;
  static uint32_t width(pb_context *) { return WIDTH; }

  template <class K>
  static pb_status launch(pb_context *ctx, int64_t groups, uint32_t group_dim, const typename K::Args &args) {
    static_assert(sizeof args <= PB_ARGUMENT_BYTES, "what a launch can carry");
    if (groups == 0) return PB_OK;
    if (groups > 0x7fffffff)  // DPC++ takes it that a group's number is an int
      return fail(ctx, PB_UNSUPPORTED, "too large for one launch: %lld groups", static_cast<long long>(groups));
    try {
      sycl::queue &queue = pb::sycl_device::cpu_queue();
      pb::sycl_device::enqueue(queue, {Entry<K>::name, Entry<K>::type, WIDTH, sizeof(typename K::Local)},
                               {groups, group_dim, &args, sizeof args});
      queue.wait_and_throw();
      return PB_OK;
    } catch (const std::exception &error) {
      return fail(ctx, PB_ERROR, "%s: %s", Entry<K>::name, error.what());
    }
  }

  static int64_t probe(char *error, uint64_t size) {
    pb_context ctx = {};
    ctx.error = error;
    ctx.error_size = size;
    try {
      const sycl::device device = pb::sycl_device::cpu_queue().get_device();
      std::string reason = pb::sycl_device::unfit(device, WIDTH);
      if (reason.empty() && !device.has(sycl::aspect::usm_system_allocations))
        reason = "its OpenCL device does not read the memory of the process";
      if (reason.empty()) return 1;
      fail(&ctx, PB_UNSUPPORTED, "%s", reason.c_str());
    } catch (const std::exception &exception) {
      fail(&ctx, PB_UNSUPPORTED, "no CPU as a SYCL device: %s", exception.what());
    }
    return 0;
  }
};

template <uint32_t WIDTH>
constexpr pb_backend cpu(const char *name) {
  return pb::launch::table<Cpu<WIDTH>>(name, kDLCPU, Cpu<WIDTH>::probe);
}

constexpr pb_backend backends[] = {cpu<16>("sycl:cpu"), cpu<8>("sycl:cpu:8"), cpu<32>("sycl:cpu:32")};

}  // namespace

extern "C" const pb_backend *polybit_backend(uint64_t index) {
  return index < sizeof backends / sizeof *backends ? &backends[index] : nullptr;
}
