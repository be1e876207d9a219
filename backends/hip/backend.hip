// The HIP backend: core/kernels for AMD GPUs.
#include "launch/cuda_hip.h"
#include "launch/table.h"

namespace {

using Device = pb::launch::CudaHip;
constexpr pb_backend backend = pb::launch::table<Device>("hip", kDLROCM, Device::probe);

}  // namespace

extern "C" const pb_backend *polybit_backend(uint64_t index) { return index == 0 ? &backend : nullptr; }
