#include "compiler.h"

#include <cstring>
#include <utility>

namespace pb {
namespace sycl_device {
namespace {

namespace ex = sycl::ext::oneapi::experimental;

constexpr std::pair<const char *, const char *> headers[] = {
#include "kernels.inc"
};

// Neither contracted nor divided in a hurry, as core/simt/sycl.h asks for.
const char *const always[] = {
    "-ffp-contract=off",        "-foffload-fp32-prec-div", "-foffload-fp32-prec-sqrt",
#if __LIBSYCL_MAJOR_VERSION == 8  // links the C library for devices, which Intel's wheels lack and no kernel calls
    "-fno-sycl-device-lib=all", "-Wno-deprecated",
#endif
};

}  // namespace

bool Target::uses_engine(const Kernel &kernel) const { return engine && std::strstr(kernel.type, "pb::SyclTiles"); }

std::string ahead_file(const Kernel &kernel, uint32_t width) {
  return std::to_string(width) + "/" + kernel.name + ".syclbin";
}

sycl::kernel_bundle<sycl::bundle_state::ext_oneapi_source> source(const sycl::context &context, const Kernel &kernel) {
  const std::string entry = std::string("PB_SYCL_ENTRY(") + kernel.name + ", " + kernel.type + ")\n";
  ex::include_files files;
  for (const auto &header : headers) files.add(header.first, header.second);
  return ex::create_kernel_bundle_from_source(context, ex::source_language::sycl,
                                              "#include \"kernels/sycl.h\"\n" + entry, ex::properties{files});
}

std::vector<std::string> options(const Kernel &kernel, const Target &target) {
  std::vector<std::string> words(std::begin(always), std::end(always));
  words.push_back("-DPB_SUB_GROUP=" + std::to_string(target.width));
  if (target.uses_engine(kernel)) words.push_back("-DPB_XMX");
  if (target.is_large(kernel)) {
    words.push_back("-DPB_LARGE_REGISTER_FILE");
#if __LIBSYCL_MAJOR_VERSION == 8  // does not see the entry point's property
    words.insert(words.end(), {"-Xs", "-ze-opt-large-register-file"});
#endif
  }
  return words;
}

}  // namespace sycl_device
}  // namespace pb
