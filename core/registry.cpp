#include "registry.h"

#include <dlfcn.h>

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>

#include "op_kinds.h"

namespace pb {

const std::vector<Op> &op_table() {
#define PB_OP(name, arguments) {#name, arguments},
  static const std::vector<Op> table = {
#include "ops.def"
  };
#undef PB_OP
  return table;
}

namespace {

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

Backend read(const pb_backend *source) {
  if (source->abi != PB_ABI)
    throw std::runtime_error("built for op table " + hex(source->abi) + ", but this polybit has " + hex(PB_ABI) +
                             ": rebuild it against polybit/include of this version");
  const size_t first_op = offsetof(pb_backend, probe) + sizeof(source->probe);
  if (source->size < first_op || !source->name)
    throw std::runtime_error("its backend struct is damaged (size or name)");
  Backend backend{source->name, source->device_type, false, "", {}};
  // Entries behind the library's own size do not exist in its memory: they read as null.
  const size_t known = (source->size - first_op) / sizeof(Kernel);
  const Kernel *kernels = reinterpret_cast<const Kernel *>(reinterpret_cast<const char *>(source) + first_op);
  for (size_t i = 0; i < op_table().size(); i++) backend.kernels.push_back(i < known ? kernels[i] : nullptr);
  char error[256] = "";
  backend.usable = !source->probe || source->probe(error, sizeof error);
  if (!backend.usable) backend.reason = error[0] ? error : "its probe failed without a reason";
  return backend;
}

}  // namespace

std::vector<Backend> load(const std::string &path) {
  void *handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error(dlerror());
  std::string problem;  // the exception itself may be code of the library: it is gone before the library is closed
  try {
    auto entry = reinterpret_cast<const pb_backend *(*)(uint64_t)>(dlsym(handle, "polybit_backend"));
    if (!entry) throw std::runtime_error("no symbol polybit_backend");
    std::vector<Backend> backends;
    for (uint64_t i = 0; const pb_backend *source = entry(i); i++) backends.push_back(read(source));
    if (backends.empty()) throw std::runtime_error("polybit_backend(0) is null: no backend inside");
    return backends;
  } catch (const std::exception &exception) {
    problem = exception.what();
  } catch (...) {
    problem = "its entry point threw something that is no std::exception";
  }
  dlclose(handle);
  throw std::runtime_error(path + ": " + problem);
}

}  // namespace pb
