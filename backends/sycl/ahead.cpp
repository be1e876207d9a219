// Compiles kernels when polybit is built: polybit_sycl_ahead FOLDER LANES [ENTRY ...]; all of them where none is named.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <set>

#include "../../core/kernels/sycl.h"
#include "device.h"

namespace {

namespace ex = sycl::ext::oneapi::experimental;
using pb::sycl_device::Kernel;
using pb::sycl_device::Target;

const Kernel kernels[] = {
#define PB_TILES pb::SyclTiles
#define PB_WIDE_TILES
#define PB_ENTRY(entry, ...) {#entry, #__VA_ARGS__, sizeof(__VA_ARGS__::Local), pb::IsLarge<__VA_ARGS__>::value},
#include "../../core/kernels/entries.def"
};

void compile(const sycl::context &context, const Kernel &kernel, const Target &target,
             const std::filesystem::path &folder) {
  std::string log;
  try {
    auto text = source(context, kernel);
    const auto bundle =
        ex::compile(text, ex::properties{ex::build_options{options(kernel, target)}, ex::save_log{&log}});
    const std::vector<char> bytes = bundle.ext_oneapi_get_content();
    const std::filesystem::path path = folder / ahead_file(kernel, target.width);
    std::filesystem::create_directories(path.parent_path());
    std::ofstream file(path, std::ios::binary);
    file.exceptions(std::ios::failbit | std::ios::badbit);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    file.close();
  } catch (const std::exception &error) {
    throw std::runtime_error(std::string(kernel.name) + ": " + error.what() + "\n" + log);
  }
}

int run(const std::filesystem::path &folder, const std::string &lanes, std::set<std::string> wanted) {
  const Target target = {static_cast<uint32_t>(std::stoul(lanes)), true, false};
  const bool all = wanted.empty();
  const sycl::context context = pb::sycl_device::cpu_queue().get_context();
  for (const Kernel &kernel : kernels) {
    if (!all && !wanted.erase(kernel.name)) continue;
    if (is_compiled_ahead(kernel, target)) compile(context, kernel, target, folder);
  }
  for (const std::string &name : wanted)
    std::fprintf(stderr, "polybit_sycl_ahead: no kernel is called %s\n", name.c_str());
  return wanted.empty() ? 0 : 1;
}

}  // namespace

int main(int count, char **words) {
  if (count < 3) {
    std::fprintf(stderr, "usage: polybit_sycl_ahead FOLDER LANES [ENTRY ...]\n");
    return 2;
  }
  try {
    return run(words[1], words[2], {words + 3, words + count});
  } catch (const std::exception &error) {
    std::fprintf(stderr, "polybit_sycl_ahead: %s\n", error.what());
    return 1;
  }
}
