#include "device.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <unordered_map>

namespace pb {
namespace sycl_device {
namespace {

namespace ex = sycl::ext::oneapi::experimental;

template <class Function>
std::string library_of(Function *function) {
  Dl_info info = {};
  return dladdr(reinterpret_cast<void *>(function), &info) && info.dli_fname ? info.dli_fname : "";
}

// Intel's wheels have the OpenCL CPU device beside libsycl, but their list of devices names a folder that is not there.
void tell_opencl_of_the_cpu() {
  const std::string library = library_of(&sycl::platform::get_platforms);
  const std::string driver = library.substr(0, library.rfind('/') + 1) + "libintelocl.so";
  if (access(driver.c_str(), R_OK) == 0) setenv("OCL_ICD_FILENAMES", driver.c_str(), 0);
}

// What was compiled ahead of time, beside this library.
std::filesystem::path ahead_folder() {
  return std::filesystem::path(library_of(&enqueue)).parent_path() /
         ("sycl." + std::to_string(__LIBSYCL_MAJOR_VERSION));
}

// The matrix engine's sub-groups are as wide as a register.
Target target_of(const sycl::device &device, uint32_t width) {
  const bool engine = device.is_gpu() && device.has(sycl::aspect::ext_intel_matrix) && (width == 8 || width == 16);
  return {width, device.is_gpu(), engine};
}

sycl::kernel load(const sycl::queue &queue, const Kernel &kernel, const std::filesystem::path &path) {
  try {
    const auto compiled =
        ex::get_kernel_bundle<sycl::bundle_state::object>(queue.get_context(), {queue.get_device()}, path);
    return sycl::link(compiled).ext_oneapi_get_kernel(kernel.name);
  } catch (const std::exception &error) {
    throw std::runtime_error(path.string() + ": " + error.what());
  }
}

sycl::kernel compile(const sycl::queue &queue, const Kernel &kernel, const Target &target) {
  auto text = source(queue.get_context(), kernel);
  std::string log;
  try {
    return ex::build(text, {queue.get_device()},
                     ex::properties{ex::build_options{options(kernel, target)}, ex::save_log{&log}})
        .ext_oneapi_get_kernel(kernel.name);
  } catch (const std::exception &error) {
    throw std::runtime_error(std::string(error.what()) + "\n" + log);
  }
}

sycl::kernel make(const sycl::queue &queue, const Kernel &kernel, uint32_t width) {
  const Target target = target_of(queue.get_device(), width);
  const std::filesystem::path path = ahead_folder() / ahead_file(kernel, width);
  return is_compiled_ahead(kernel, target) && std::filesystem::exists(path) ? load(queue, kernel, path)
                                                                            : compile(queue, kernel, target);
}

// Those of a process; an entry is made once, whichever thread asks first. A kernel keeps its context and device, so no
// other one gets their hashes.
class Kernels {
 public:
  sycl::kernel get(const sycl::queue &queue, const Kernel &kernel, uint32_t width) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Key key = {std::hash<sycl::context>()(queue.get_context()), std::hash<sycl::device>()(queue.get_device()),
                     width, kernel.name};
    const auto found = made_.find(key);
    if (found != made_.end()) return found->second;
    return made_.emplace(key, make(queue, kernel, width)).first->second;
  }

 private:
  typedef std::tuple<size_t, size_t, uint32_t, std::string> Key;
  std::mutex mutex_;
  std::map<Key, sycl::kernel> made_;
};

Kernels &kernels() {
  static Kernels *kernels = new Kernels;  // never destroyed: libsycl may be gone before
  return *kernels;
}

}  // namespace

sycl::queue &cpu_queue() {
  static sycl::queue *queue = [] {
    tell_opencl_of_the_cpu();
    return new sycl::queue(sycl::cpu_selector_v, sycl::property::queue::in_order());  // never destroyed, either
  }();
  return *queue;
}

std::vector<sycl::device> gpus() {
  tell_opencl_of_the_cpu();  // OpenCL, too, looks for its devices now, and never again
  std::vector<sycl::device> found;
  for (const sycl::device &device : sycl::device::get_devices(sycl::info::device_type::gpu))
    if (device.get_backend() == sycl::backend::ext_oneapi_level_zero) found.push_back(device);
  return found;
}

uint32_t sub_group_size(const sycl::device &device) {
  static std::mutex *mutex = new std::mutex;
  static auto *known = new std::unordered_map<sycl::device, uint32_t>;
  const std::lock_guard<std::mutex> lock(*mutex);
  const auto found = known->find(device);
  if (found != known->end()) return found->second;
  const auto widths = device.get_info<sycl::info::device::sub_group_sizes>();
  uint32_t width = 8;
  while (width < 32 && std::find(widths.begin(), widths.end(), width) == widths.end()) width *= 2;
  return known->emplace(device, width).first->second;
}

std::string unfit(sycl::device device, uint32_t width) {
  const auto widths = device.get_info<sycl::info::device::sub_group_sizes>();
  if (std::find(widths.begin(), widths.end(), width) == widths.end())
    return "no sub-groups of " + std::to_string(width);
  if (!device.ext_oneapi_can_compile(ex::source_language::sycl)) return "no DPC++ in libsycl to compile kernels";
  return "";
}

void enqueue(sycl::queue &queue, uint32_t width, const Kernel &kernel, const Launch &launch) {
  const sycl::kernel compiled = kernels().get(queue, kernel, width);
  const size_t threads = launch.group_dim;
  queue.submit([&](sycl::handler &handler) {
    handler.set_arg(0, ex::raw_kernel_arg(launch.args, launch.args_bytes));
    handler.set_arg(1, sycl::local_accessor<char, 1>(kernel.local_bytes, handler));
    handler.parallel_for(sycl::nd_range<1>(static_cast<size_t>(launch.groups) * threads, threads), compiled);
  });
}

}  // namespace sycl_device
}  // namespace pb
