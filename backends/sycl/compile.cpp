// Compiles kernels when polybit is built, by the DPC++ in libsycl: polybit_sycl_compile SOURCE FOLDER [OPTION ...].
// Writes a module of SPIR-V for each kernel, FOLDER/<name>.spv, and prints what the compiler says.
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "device.h"

namespace {

namespace ex = sycl::ext::oneapi::experimental;
namespace fs = std::filesystem;
typedef std::vector<uint32_t> Spirv;

const char *const always[] = {
    "-ffp-contract=off",
    "-foffload-fp32-prec-div",
    "-foffload-fp32-prec-sqrt",
    "-fsycl-device-code-split=per_kernel",
    "-fno-sycl-dead-args-optimization",  // SPIR-V alone does not say which arguments are left
#if __LIBSYCL_MAJOR_VERSION == 8  // links the C library for devices, which Intel's wheels lack and no kernel calls
    "-fno-sycl-device-lib=all",
    "-Wno-deprecated",
#endif
};

std::string read(const fs::path &path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path.string());
  return {std::istreambuf_iterator<char>(file), {}};
}

// For the CPU as an OpenCL device, which compiles no further than it must: nothing is linked, as functions that are the
// engine's instructions are known to the compilers of GPUs alone.
std::vector<cl_program> compile(const std::string &text, const std::vector<std::string> &options) {
  auto source =
      ex::create_kernel_bundle_from_source(pb::sycl_device::cpu_queue().get_context(), ex::source_language::sycl, text);
  std::string log;
  try {
    const auto compiled = ex::compile(source, ex::properties{ex::build_options{options}, ex::save_log{&log}});
    std::printf("%s", log.c_str());
    return sycl::get_native<sycl::backend::opencl>(compiled);
  } catch (const std::exception &error) {
    throw std::runtime_error(error.what() + ("\n" + log));
  }
}

// What a program was made from.
Spirv spirv(cl_program program) {
  size_t bytes = 0;
  Spirv words;
  cl_int error = clGetProgramInfo(program, CL_PROGRAM_IL, 0, nullptr, &bytes);
  words.resize(bytes / sizeof words[0]);
  if (!error) error = clGetProgramInfo(program, CL_PROGRAM_IL, bytes, words.data(), nullptr);
  if (error || words.empty()) throw std::runtime_error("OpenCL has no SPIR-V of a program: " + std::to_string(error));
  return words;
}

// The names of a module's kernels. Five words are its header; each instruction's first one has its length and number.
std::vector<std::string> kernels(const Spirv &module) {
  constexpr uint32_t op_entry_point = 15, name = 3;  // after the execution model and the function
  std::vector<std::string> names;
  for (size_t at = 5, length; at < module.size(); at += length) {
    length = module[at] >> 16;
    if (length == 0 || length > module.size() - at) throw std::runtime_error("an instruction of SPIR-V is cut off");
    if ((module[at] & 0xffff) != op_entry_point || length <= name) continue;
    const char *const letters = reinterpret_cast<const char *>(&module[at + name]);
    names.emplace_back(letters, strnlen(letters, (length - name) * sizeof module[0]));
  }
  return names;
}

void write(const fs::path &path, const Spirv &module) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char *>(module.data()),
             static_cast<std::streamsize>(module.size() * sizeof module[0]));
  file.close();
  if (!file) throw std::runtime_error("cannot write " + path.string());
}

void run(const fs::path &source, const fs::path &folder, std::vector<std::string> options) {
  options.insert(options.end(), std::begin(always), std::end(always));
  options.push_back("-I" + source.parent_path().string());  // where an #include of a file's own folder is looked for
  const std::vector<cl_program> programs = compile(read(source), options);
  fs::create_directories(folder);
  for (cl_program program : programs) {
    const Spirv module = spirv(program);
    for (const std::string &name : kernels(module)) write(folder / (name + ".spv"), module);
  }
}

}  // namespace

int main(int count, char **words) {
  if (count < 3) {
    std::fprintf(stderr, "usage: polybit_sycl_compile SOURCE FOLDER [OPTION ...]\n");
    return 2;
  }
  try {
    run(words[1], words[2], {words + 3, words + count});
    return 0;
  } catch (const std::exception &error) {
    std::fprintf(stderr, "polybit_sycl_compile: %s\n", error.what());
    return 1;
  }
}
