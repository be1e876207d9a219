#include "device.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <unordered_map>

namespace pb {
namespace sycl_device {
namespace {

namespace ex = sycl::ext::oneapi::experimental;
namespace fs = std::filesystem;

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

// A module of SPIR-V for each kernel, which DPC++ made when polybit was built (compile.cpp), beside this library. The
// matrix engine's sub-groups are as wide as a register.
fs::path folder_of(const sycl::device &device, uint32_t width) {
  const bool engine = device.is_gpu() && device.has(sycl::aspect::ext_intel_matrix) && (width == 8 || width == 16);
  const std::string folder = "sycl." + std::to_string(__LIBSYCL_MAJOR_VERSION);
  return fs::path(library_of(&enqueue)).parent_path() / folder / (std::to_string(width) + (engine ? "-xmx" : ""));
}

std::vector<std::byte> read(const fs::path &path) {
  std::vector<std::byte> bytes(fs::file_size(path));
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char *>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw std::runtime_error("cannot read " + path.string());
  return bytes;
}

sycl::kernel make(const sycl::queue &queue, const Kernel &kernel, uint32_t width) {
  const sycl::device device = queue.get_device();
  const std::string name = std::string("__sycl_kernel_") + kernel.name;  // as DPC++ calls it
  const fs::path path = folder_of(device, width) / (name + ".spv");
  const std::vector<std::byte> spirv = read(path);
  const std::vector<std::string> options = device.is_gpu() ? gpu_options(kernel) : std::vector<std::string>();
  std::string log;
  try {
    auto module = ex::create_kernel_bundle_from_source(queue.get_context(), ex::source_language::spirv, spirv);
    return ex::build(module, {device}, ex::properties{ex::build_options{options}, ex::save_log{&log}})
        .ext_oneapi_get_kernel(name);
  } catch (const std::exception &error) {
    throw std::runtime_error(path.string() + ": " + error.what() + "\n" + log);
  }
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
  if (!device.ext_oneapi_can_build(ex::source_language::spirv)) return "libsycl takes no SPIR-V for it";
  return "";
}

std::vector<std::string> gpu_options(const Kernel &kernel) {
  std::vector<std::string> options = {"-ze-fp32-correctly-rounded-divide-sqrt"};
  if (kernel.large) options.push_back("-ze-opt-large-register-file");
  return options;
}

void enqueue(sycl::queue &queue, uint32_t width, const Kernel &kernel, const Launch &launch) {
  const sycl::kernel compiled = kernels().get(queue, kernel, width);
  const size_t threads = launch.group_dim;
  queue.submit([&](sycl::handler &handler) {
    handler.set_arg(0, ex::raw_kernel_arg(launch.args, launch.args_bytes));
    ex::work_group_memory<char[]> local(kernel.local_bytes, handler);
    handler.set_arg(1, local);
    handler.parallel_for(sycl::nd_range<1>(static_cast<size_t>(launch.groups) * threads, threads), compiled);
  });
}

}  // namespace sycl_device
}  // namespace pb
