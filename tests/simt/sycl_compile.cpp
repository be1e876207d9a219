// Compiles SYCL source text to SPIR-V with the DPC++ compiler in libsycl: sycl_compile SOURCE [OPTION ...]. Prints the
// compiler's log; exit status 1 for an error.
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <sycl/sycl.hpp>
#include <vector>

namespace ex = sycl::ext::oneapi::experimental;

int main(int, char **argv) {
  std::string log;
  int status = 0;
  try {
    std::ifstream file(argv[1], std::ios::binary);
    const std::string source(std::istreambuf_iterator<char>(file), {});
    std::vector<std::string> options;
    for (char **option = argv + 2; *option; option++) options.push_back(*option);
    const sycl::context context{sycl::device(sycl::cpu_selector_v)};
    auto text = ex::create_kernel_bundle_from_source(context, ex::source_language::sycl, source);
    // To SPIR-V: what it takes to make machine code of it is for the device to say.
    ex::compile(text, ex::properties{ex::build_options{options}, ex::save_log{&log}});
  } catch (const std::exception &error) {
    std::printf("%s\n", error.what());
    status = 1;
  }
  std::printf("%s", log.c_str());
  return status;
}
