// A CUDA runtime that is none: it remembers what it was told, fails when it is asked to, and runs kernels on the
// emulator. What core/launch/cuda_hip.h may not call (allocate, wait) is not here, so such a call does not compile.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
typedef struct FakeStream *cudaStream_t;
struct cudaFuncAttributes {};
struct dim3 {
  unsigned x;
  explicit dim3(unsigned size) : x(size) {}
};

namespace fake {
inline int devices = 2, current = 0;
inline cudaError_t launch_error = cudaSuccess, attributes_error = cudaSuccess, last_error = cudaSuccess;
inline std::vector<std::string> calls;
void run(const void *kernel, unsigned groups, unsigned group_dim, void *args);
}  // namespace fake

inline cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) fake::last_error = error;
  return error;
}
inline cudaError_t cudaGetDeviceCount(int *count) { return *count = fake::devices, cudaSuccess; }
inline cudaError_t cudaGetDevice(int *device) { return *device = fake::current, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  fake::calls.push_back("device " + std::to_string(device));
  if (device < 0 || device >= fake::devices) return remember(cudaErrorInvalidDevice);
  fake::current = device;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, const void *) {
  return remember(fake::attributes_error);
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = fake::last_error;
  fake::last_error = cudaSuccess;
  return error;
}
inline const char *cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "cudaErrorInvalidDevice";
}
inline const char *cudaGetErrorString(cudaError_t) { return "as asked for"; }
inline cudaError_t cudaLaunchKernel(const void *kernel, dim3 groups, dim3 group_dim, void **parameters, size_t,
                                    cudaStream_t stream) {
  fake::calls.push_back("launch on device " + std::to_string(fake::current) + " stream " +
                        std::to_string(reinterpret_cast<size_t>(stream)));
  if (fake::launch_error != cudaSuccess) return remember(fake::launch_error);
  fake::run(kernel, groups.x, group_dim.x, parameters[0]);
  return cudaSuccess;
}
