#include "device.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <unordered_map>
#include <utility>

namespace pb {
namespace sycl_device {
namespace {

namespace ex = sycl::ext::oneapi::experimental;

constexpr std::pair<const char *, const char *> headers[] = {
#include "kernels.inc"
};

// Neither contracted nor divided in a hurry, as core/simt/sycl.h asks for.
const char *const options[] = {
    "-ffp-contract=off",        "-foffload-fp32-prec-div", "-foffload-fp32-prec-sqrt",
#if __LIBSYCL_MAJOR_VERSION == 8  // links the C library for devices, which Intel's wheels lack and no kernel calls
    "-fno-sycl-device-lib=all", "-Wno-deprecated",
#endif
};

// Intel's wheels have the OpenCL CPU device beside libsycl, but their list of devices names a folder that is not there.
void tell_opencl_of_the_cpu() {
  Dl_info info = {};
  if (!dladdr(reinterpret_cast<void *>(&sycl::platform::get_platforms), &info) || !info.dli_fname) return;
  const std::string library = info.dli_fname;
  const std::string driver = library.substr(0, library.rfind('/') + 1) + "libintelocl.so";
  if (access(driver.c_str(), R_OK) == 0) setenv("OCL_ICD_FILENAMES", driver.c_str(), 0);
}

// The matrix engine's sub-groups are as wide as a register.
bool has_engine(const sycl::device &device, uint32_t width) {
  return device.has(sycl::aspect::ext_intel_matrix) && (width == 8 || width == 16);
}

sycl::kernel compile(const sycl::queue &queue, const Kernel &kernel) {
  const std::string entry = std::string("PB_SYCL_ENTRY(") + kernel.name + ", " + kernel.type + ")\n";
  ex::include_files files;
  for (const auto &header : headers) files.add(header.first, header.second);
  auto text = ex::create_kernel_bundle_from_source(queue.get_context(), ex::source_language::sycl,
                                                   "#include \"kernels/sycl.h\"\n" + entry, ex::properties{files});
  std::vector<std::string> words(std::begin(options), std::end(options));
  words.push_back("-DPB_SUB_GROUP=" + std::to_string(kernel.width));
  const sycl::device device = queue.get_device();
  if (device.is_gpu()) {
    words.push_back("-DPB_INTEL_GPU");
    if (has_engine(device, kernel.width)) words.push_back("-DPB_XMX");
#if __LIBSYCL_MAJOR_VERSION == 8  // does not see the entry point's property
    if (kernel.large) words.insert(words.end(), {"-Xs", "-ze-opt-large-register-file"});
#endif
  }
  std::string log;
  try {
    return ex::build(text, {device}, ex::properties{ex::build_options{words}, ex::save_log{&log}})
        .ext_oneapi_get_kernel(kernel.name);
  } catch (const std::exception &error) {
    throw std::runtime_error(std::string(error.what()) + "\n" + log);
  }
}

// Those of a process; an entry is made once, whichever thread asks first. A kernel keeps its context and device, so no
// other one gets their hashes.
class Kernels {
 public:
  sycl::kernel get(const sycl::queue &queue, const Kernel &kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Key key = {std::hash<sycl::context>()(queue.get_context()), std::hash<sycl::device>()(queue.get_device()),
                     kernel.width, kernel.name};
    const auto found = made_.find(key);
    if (found != made_.end()) return found->second;
    return made_.emplace(key, compile(queue, kernel)).first->second;
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

void enqueue(sycl::queue &queue, const Kernel &kernel, const Launch &launch) {
  const sycl::kernel compiled = kernels().get(queue, kernel);
  const size_t threads = launch.group_dim;
  queue.submit([&](sycl::handler &handler) {
    handler.set_arg(0, ex::raw_kernel_arg(launch.args, launch.args_bytes));
    handler.set_arg(1, sycl::local_accessor<char, 1>(kernel.local_bytes, handler));
    handler.parallel_for(sycl::nd_range<1>(static_cast<size_t>(launch.groups) * threads, threads), compiled);
  });
}

}  // namespace sycl_device
}  // namespace pb
