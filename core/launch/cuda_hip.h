// The device of the launchers on CUDA and HIP, whose runtimes differ in the prefix of their names only. Include it
// before core/simt/cuda_hip.h. No call here waits, allocates, or touches the default stream, so a launch may be
// captured into a graph.
#ifndef PB_LAUNCH_CUDA_HIP_H
#define PB_LAUNCH_CUDA_HIP_H

#ifdef __HIP__
#include <hip/hip_runtime_api.h>
#define PB_RUNTIME(name) hip##name
#else
#include <cuda_runtime_api.h>
#define PB_RUNTIME(name) cuda##name
#endif

#include "../simt/cuda_hip.h"
#include "launch.h"
#include "../simt/tile_amd.h"
#include "../simt/tile_mma.h"

namespace pb {
namespace launch {

// What the probe asks after: any kernel would do.
struct Nothing {
  enum : u32 { group_max = 1 };
  struct Args {
    i64 unused;
  };
  typedef NoLocal Local;
  PB_FN void run(Wave, PB_LOCAL Local *, Args) {}
};

struct CudaHip {
#ifdef __HIP__
  typedef MatrixTiles<AmdTile> Tiles;
#else
  typedef MatrixTiles<MmaTile> Tiles;
#endif

  // The context's device for as long as this lives; then the one before again.
  class OnDevice {
   public:
    explicit OnDevice(pb_context *ctx) : wanted_(static_cast<int>(ctx->device_index)) {
      status = PB_RUNTIME(GetDevice)(&before_);
      if (status == PB_RUNTIME(Success) && before_ != wanted_) status = PB_RUNTIME(SetDevice)(wanted_);
    }
    ~OnDevice() {
      if (before_ >= 0 && before_ != wanted_) (void)PB_RUNTIME(SetDevice)(before_);
    }
    OnDevice(const OnDevice &) = delete;
    PB_RUNTIME(Error_t) status;

   private:
    int before_ = -1, wanted_;
  };

  // Of an error that is ours: it is taken out of the runtime's memory, so that nobody else reports it.
  static pb_status failed(pb_context *ctx, const char *what, PB_RUNTIME(Error_t) error) {
    (void)PB_RUNTIME(GetLastError)();
    return fail(ctx, PB_ERROR, "%s: %s (%s)", what, PB_RUNTIME(GetErrorName)(error), PB_RUNTIME(GetErrorString)(error));
  }

  // 64 on CDNA, 32 on RDNA and on every NVIDIA GPU.
  static u32 width(pb_context *ctx) {
    (void)ctx;
#ifdef __HIP__
    int lanes = 0;
    if (hipDeviceGetAttribute(&lanes, hipDeviceAttributeWarpSize, static_cast<int>(ctx->device_index)) == hipSuccess)
      return static_cast<u32>(lanes);
#endif
    return 32;
  }

  template <class K>
  static const void *address() {
    return reinterpret_cast<const void *>(&entry<K>);
  }

  template <class K>
  static pb_status launch(pb_context *ctx, i64 groups, u32 group_dim, const typename K::Args &args) {
    static_assert(sizeof args <= 4096, "what a launch can carry");
    if (groups == 0) return PB_OK;
    // A grid has 2^31 - 1 groups at most, and HIP counts its threads in 32 bits.
    if (groups > 0x7fffffff || groups * group_dim > 0xffffffff)
      return fail(ctx, PB_UNSUPPORTED, "too large for one launch: %lld groups of %u threads",
                  static_cast<long long>(groups), group_dim);
    OnDevice device(ctx);
    if (device.status != PB_RUNTIME(Success)) return failed(ctx, "device", device.status);
    void *parameters[] = {const_cast<typename K::Args *>(&args)};
    const auto error = PB_RUNTIME(LaunchKernel)(address<K>(), dim3(static_cast<u32>(groups)), dim3(group_dim),
                                                parameters, 0, static_cast<PB_RUNTIME(Stream_t)>(ctx->stream));
    return error == PB_RUNTIME(Success) ? PB_OK : failed(ctx, "launch", error);
  }

  // Whether there is a device that this library has machine code for; else 0 with the reason.
  static int64_t probe(char *error, uint64_t size) {
    pb_context ctx = {};
    ctx.error = error;
    ctx.error_size = size;
    int count = 0;
    auto status = PB_RUNTIME(GetDeviceCount)(&count);
    PB_RUNTIME(FuncAttributes) attributes;
    if (status == PB_RUNTIME(Success)) status = PB_RUNTIME(FuncGetAttributes)(&attributes, address<Nothing>());
    if (status == PB_RUNTIME(Success) && count > 0) return 1;
    failed(&ctx, "no usable device", status);
    return 0;
  }
};

}  // namespace launch
}  // namespace pb
#endif
