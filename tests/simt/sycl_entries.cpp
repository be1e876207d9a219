// Prints each kernel's entry point and what the driver of an Intel GPU is told of it.
#include <cstdio>

#include "../../backends/sycl/device.h"
#include "../../core/kernels/sycl.h"

int main() {
  const pb::sycl_device::Kernel kernels[] = {
#define PB_TILES pb::SyclTiles
#define PB_WIDE_TILES
#define PB_ENTRY(entry, ...) {#entry, sizeof(__VA_ARGS__::Local), pb::IsLarge<__VA_ARGS__>::value},
#include "../../core/kernels/entries.def"
  };
  for (const auto &kernel : kernels) {
    std::printf("%s", kernel.name);
    for (const std::string &option : gpu_options(kernel)) std::printf(" %s", option.c_str());
    std::printf("\n");
  }
}
