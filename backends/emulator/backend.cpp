// The backends emulator:16, emulator:32 and emulator:64: the kernels of core/kernels on CPU tensors, run by engine.cpp
// at three wave widths, and products by the matrix instructions of NVIDIA, AMD and Intel. For tests only, and so never
// chosen by itself.
#include <cstdlib>
#include <exception>
#include <functional>
#include <mutex>
#include <string>

#include "engine.h"
#include "../../core/simt/emulator.h"
#include "../../core/launch/table.h"
#include "../../core/simt/tile_amd.h"
#include "../../core/simt/tile_mma.h"
#include "../../core/simt/tile_xmx.h"

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

template <uint32_t WIDTH, class MULTIPLIES_WITH = pb::LaneTiles>
struct Emulator {
  typedef MULTIPLIES_WITH Tiles;
  static constexpr bool host_memory = true;
  static uint32_t width(pb_context *) { return WIDTH; }
  template <class K>
  static pb_status launch(pb_context *ctx, int64_t groups, uint32_t group_dim, const typename K::Args &args) {
    return groups ? run(ctx, groups, group_dim, WIDTH, [&] { pb::entry<K>(args); }) : PB_OK;
  }
};

int64_t probe(char *, uint64_t) { return 1; }

// The products with matrix instructions, each emulated as what the hardware's lanes exchange; the other ops are
// inherited from a plain width.
template <class Device>
constexpr pb_backend products(const char *name) {
  const pb_backend all = pb::launch::table<Device>(name, kDLCPU, probe);
  pb_backend b = {};
  b.abi = all.abi;
  b.size = all.size;
  b.name = all.name;
  b.device_type = all.device_type;
  b.probe = all.probe;
  b.matmul_kbit = all.matmul_kbit;
  b.matmul_kbit_transposed = all.matmul_kbit_transposed;
  b.matmul_kbit_grouped = all.matmul_kbit_grouped;
  b.matmul_kbit_grouped_transposed = all.matmul_kbit_grouped_transposed;
  b.matmul_kbit_int8 = all.matmul_kbit_int8;
  b.matmul_int8 = all.matmul_int8;
  b.linear_int8 = all.linear_int8;
  b.linear_int8_transposed = all.linear_int8_transposed;
  return b;
}

template <class Word>
using Wmma3 = pb::WmmaTile<Word, 3>;
template <class Word>
using Wmma4 = pb::WmmaTile<Word, 4>;

constexpr pb_backend backends[] = {
    pb::launch::table<Emulator<32>>("emulator:32", kDLCPU, probe),
    products<Emulator<32, pb::MatrixTiles<pb::MmaTile>>>("emulator:mma"),
    products<Emulator<64, pb::MatrixTiles<pb::MfmaTile>>>("emulator:mfma"),
    products<Emulator<32, pb::MatrixTiles<Wmma3>>>("emulator:wmma3"),
    products<Emulator<32, pb::MatrixTiles<Wmma4>>>("emulator:wmma4"),
    products<Emulator<16, pb::MatrixTiles<pb::Xmx16>>>("emulator:xmx"),
    pb::launch::table<Emulator<64>>("emulator:64", kDLCPU, probe),
    pb::launch::table<Emulator<16>>("emulator:16", kDLCPU, probe),
};

}  // namespace

extern "C" const pb_backend *polybit_backend(uint64_t index) {
  return index < sizeof backends / sizeof *backends ? &backends[index] : nullptr;
}
