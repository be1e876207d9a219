// Both sides of a HIP backend in one file: every kernel, and a launch of one of them on the caller's stream.
#include <hip/hip_runtime.h>

#include "../kernels.cu"

extern "C" int launch(quantize_kbit4_fp16_kernel::Args args, unsigned groups, void *stream) {
  hipLaunchKernelGGL(quantize_kbit4_fp16, dim3(groups), dim3(256), 0, static_cast<hipStream_t>(stream), args);
  return hipGetLastError();
}
