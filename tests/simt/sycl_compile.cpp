// Compiles SYCL source text with the DPC++ compiler in libsycl, and runs a kernel of it on the OpenCL CPU device:
//
//   sycl_compile SOURCE [OPTION ...]              the compiler's log; exit status 1 for an error
//   sycl_compile SOURCE LAUNCH.launch ... [OPTION ...]
//
// A launch file has a line for the kernel, "NAME GROUPS THREADS", and one for each eight bytes of its arguments:
// "integer N", or "buffer FILE", whose bytes are given to the kernel and written back.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <sycl/sycl.hpp>
#include <vector>

namespace ex = sycl::ext::oneapi::experimental;

namespace {

constexpr size_t group_memory = 32768;  // what the contract of core/simt/wave.h promises

std::string read(const std::string &path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + " cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

struct Buffer {
  std::string path;
  char *data;
  size_t size;
};

void launch(sycl::queue queue, sycl::kernel_bundle<sycl::bundle_state::executable> bundle, std::istream &file) {
  std::string name, kind, value;
  size_t groups = 0, threads = 0;
  file >> name >> groups >> threads;
  std::vector<uint64_t> arguments;
  std::vector<Buffer> buffers;
  while (file >> kind >> value) {
    if (kind == "buffer") {
      const std::string bytes = read(value);
      char *data = sycl::aligned_alloc_shared<char>(64, bytes.size(), queue);
      std::memcpy(data, bytes.data(), bytes.size());
      buffers.push_back({value, data, bytes.size()});
      arguments.push_back(reinterpret_cast<uint64_t>(data));
    } else {
      arguments.push_back(static_cast<uint64_t>(std::stoll(value)));
    }
  }
  const sycl::kernel kernel = bundle.ext_oneapi_get_kernel(name);
  queue.submit([&](sycl::handler &handler) {
    handler.set_arg(0, ex::raw_kernel_arg(arguments.data(), arguments.size() * sizeof(uint64_t)));
    handler.set_arg(1, sycl::local_accessor<char, 1>(group_memory, handler));
    handler.parallel_for(sycl::nd_range<1>(groups * threads, threads), kernel);
  });
  queue.wait_and_throw();
  for (const Buffer &buffer : buffers) {
    std::ofstream(buffer.path, std::ios::binary).write(buffer.data, static_cast<std::streamsize>(buffer.size));
    sycl::free(buffer.data, queue);
  }
}

}  // namespace

int main(int argc, char **argv) {
  std::string log;
  try {
    const std::string source = read(argv[1]);
    std::vector<std::string> options(argv + 2, argv + argc);
    std::vector<std::string> launches;
    const std::string end = ".launch";
    while (!options.empty() && options[0].size() > end.size() &&
           options[0].compare(options[0].size() - end.size(), end.size(), end) == 0) {
      launches.push_back(options[0]);
      options.erase(options.begin());
    }

    sycl::queue queue(sycl::cpu_selector_v);
    auto text = ex::create_kernel_bundle_from_source(queue.get_context(), ex::source_language::sycl, source);
    const ex::properties properties{ex::build_options{options}, ex::save_log{&log}};
    if (!launches.empty()) {
      const auto bundle = ex::build(text, properties);
      for (const std::string &path : launches) {
        std::ifstream file(path);
        launch(queue, bundle, file);
      }
    } else {
      ex::compile(text, properties);  // to SPIR-V: what it takes to make machine code of it is for the device to say
    }
  } catch (const std::exception &error) {
    std::printf("%s\n%s\n", log.c_str(), error.what());
    return 1;
  }
  std::printf("%s", log.c_str());
  return 0;
}
