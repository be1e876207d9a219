// The backends emulator:16, emulator:32 and emulator:64: the kernels of core/kernels on CPU tensors, run by engine.cpp
// at three wave widths. For tests only, and so never chosen by itself.
#include <cstdlib>
#include <exception>
#include <functional>
#include <mutex>
#include <string>

#include "engine.h"
#include "../../core/simt/emulator.h"
#include "../../core/launch/table.h"

namespace {

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
pb_status run(pb_context *ctx, int64_t groups, uint32_t group_dim, uint32_t width,
              const std::function<void()> &kernel) {
  pb::emulator::Launch what = {groups, group_dim, width, {}};
  const char *order = std::getenv("POLYBIT_EMULATOR_ORDER");
  if (!pb::emulator::parse_order(order, &what.order))
    return pb::launch::fail(ctx, PB_ERROR,
                            "POLYBIT_EMULATOR_ORDER: got '%s', wanted ascending, descending, shuffled or shuffled:SEED",
                            order);
  Work work = {what, kernel, {}, {}};
  if (ctx->parallel_for)
    ctx->parallel_for(groups, 16, run_range, &work);
  else
    run_range(&work, 0, groups);
  return work.error.empty() ? PB_OK : pb::launch::fail(ctx, PB_ERROR, "%s", work.error.c_str());
}

template <uint32_t WIDTH>
struct Emulator {
  static constexpr bool host_memory = true;
  static uint32_t width(pb_context *) { return WIDTH; }
  template <class K>
  static pb_status launch(pb_context *ctx, int64_t groups, uint32_t group_dim, const typename K::Args &args) {
    return groups ? run(ctx, groups, group_dim, WIDTH, [&] { pb::entry<K>(args); }) : PB_OK;
  }
};

int64_t probe(char *, uint64_t) { return 1; }

constexpr pb_backend backends[] = {
    pb::launch::table<Emulator<32>>("emulator:32", kDLCPU, probe),
    pb::launch::table<Emulator<64>>("emulator:64", kDLCPU, probe),
    pb::launch::table<Emulator<16>>("emulator:16", kDLCPU, probe),
};

}  // namespace

extern "C" const pb_backend *polybit_backend(uint64_t index) {
  return index < sizeof backends / sizeof *backends ? &backends[index] : nullptr;
}
