// What DPC++ is given of a kernel, to compile it when polybit is built (ahead.cpp) or when it is first launched
// (device.cpp).
#ifndef PB_SYCL_COMPILER_H
#define PB_SYCL_COMPILER_H

#include <cstddef>
#include <cstdint>
#include <string>
#include <sycl/sycl.hpp>
#include <vector>

namespace pb {
namespace sycl_device {

struct Kernel {
  const char *name, *type;  // of the entry point, and in C++
  size_t local_bytes;
  bool large;  // wants all registers, see core/kernels/sycl.h
};

struct Target {
  uint32_t width;  // of a sub-group
  bool gpu, engine;

  bool uses_engine(const Kernel &kernel) const;
  bool is_large(const Kernel &kernel) const { return gpu && kernel.large; }
};

// Where a kernel that was compiled ahead of time lies, in the folder sycl.<major version of libsycl> beside the
// library: a file of DPC++'s format SYCLBIN, with SPIR-V inside, which every device with such sub-groups takes.
std::string ahead_file(const Kernel &kernel, uint32_t width);

// Two kinds of kernel are always compiled at their first launch. What uses the engine calls functions that only the
// device's compiler knows, and libsycl links no file that lacks them. One that is large can be compiled only for a
// device that takes it, which the CPU of a build does not.
inline bool is_compiled_ahead(const Kernel &kernel, const Target &target) {
  return !target.uses_engine(kernel) && !target.is_large(kernel);
}

// The text of a kernel's entry point, and the headers that it includes.
sycl::kernel_bundle<sycl::bundle_state::ext_oneapi_source> source(const sycl::context &context, const Kernel &kernel);

std::vector<std::string> options(const Kernel &kernel, const Target &target);

}  // namespace sycl_device
}  // namespace pb
#endif
