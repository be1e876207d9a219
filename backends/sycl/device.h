// Devices, queues and kernels of SYCL, apart from which kernels there are.
#ifndef PB_SYCL_DEVICE_H
#define PB_SYCL_DEVICE_H

#include <cstddef>
#include <cstdint>
#include <string>
#include <sycl/sycl.hpp>
#include <vector>

namespace pb {
namespace sycl_device {

struct Kernel {
  const char *name;  // of the entry point
  size_t local_bytes;
  bool large;  // wants all registers, see core/kernels/sycl.h
};

struct Launch {
  int64_t groups;
  uint32_t group_dim;
  const void *args;
  size_t args_bytes;
};

// The in-order queue of the CPU as an OpenCL device. Throws if there is none.
sycl::queue &cpu_queue();

// Intel's GPUs, as torch sees them: by Level Zero.
std::vector<sycl::device> gpus();

// The size of sub-groups that kernels get on a device: the smallest of 8, 16 and 32 that it has. That is as many lanes
// as a register holds (8 before Xe-HPC and on Arc A, else 16), so that a lane has 128 words of registers on all of
// them.
uint32_t sub_group_size(const sycl::device &device);

// Why a device cannot run kernels with sub-groups of `width`, or "".
std::string unfit(sycl::device device, uint32_t width);

// What the driver of a GPU is told of a kernel: its divides and roots are not correctly rounded unless it is asked for
// that. A CPU's are.
std::vector<std::string> gpu_options(const Kernel &kernel);

// Enqueues with sub-groups of `width`; does not wait. The arguments are copied. The device's driver compiles a kernel
// when it is first launched in a process. Throws what SYCL throws, and the driver's log in it.
void enqueue(sycl::queue &queue, uint32_t width, const Kernel &kernel, const Launch &launch);

}  // namespace sycl_device
}  // namespace pb
#endif
