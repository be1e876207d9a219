// The kernels on a second implementation of SYCL, AdaptiveCpp, as a backend for CPU tensors: the adaptor and the
// kernels as they are, launched as lambdas, with a wave of its own (adaptivecpp_wave.h).
#include <exception>

#include "simt/sycl.h"
#include "kernels/kernels.h"
#include "launch/table.h"

namespace {

sycl::queue &queue() {
  static sycl::queue queue(sycl::cpu_selector_v, sycl::property::queue::in_order());
  return queue;
}

struct Cpu {
  typedef pb::LaneTiles Tiles;
  static constexpr bool host_memory = true;
  static uint32_t width(pb_context *) { return PB_SUB_GROUP; }

  template <class K>
  static pb_status launch(pb_context *ctx, int64_t groups, uint32_t group_dim, const typename K::Args &args) {
    if (groups == 0) return PB_OK;
    try {
      queue().submit([&](sycl::handler &handler) {
        const sycl::local_accessor<typename K::Local, 1> local(1, handler);
        const sycl::local_accessor<uint32_t, 1> exchange(group_dim, handler);
        const sycl::nd_range<1> range(size_t(groups) * group_dim, group_dim);
        handler.parallel_for(range,
                             [=](sycl::nd_item<1> item) { K::run(pb::Wave{item, &exchange[0]}, &local[0], args); });
      });
      queue().wait_and_throw();
      return PB_OK;
    } catch (const std::exception &error) {
      return pb::launch::fail(ctx, PB_ERROR, "%s", error.what());
    }
  }

  static int64_t probe(char *, uint64_t) { return 1; }
};

constexpr pb_backend backend = pb::launch::table<Cpu>("adaptivecpp", kDLCPU, Cpu::probe);

}  // namespace

PB_EXPORT const pb_backend *polybit_backend(uint64_t index) { return index ? nullptr : &backend; }
