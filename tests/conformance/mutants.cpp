// mutants SAMPLES LIBRARY BACKEND [INDEX...]: the program with which tools/mutate.py tries its mutants.
//
// With indices: checks these samples in their order and ends with status 1 at the first that fails. Without: checks all
// of them, the library tracing its mutants, and prints for each sample its index, op, seconds and the mutants that
// would have computed anything else in it.
#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>

#include "check.h"

namespace {

// Checks a sample of the backend; says what is wrong.
bool passes(const std::vector<pb::Backend> &backends, size_t backend, const Sample &sample) {
  bool unsupported = false;
  const std::string problem = check(backends, backend, sample, unsupported);
  if (!problem.empty())
    std::fprintf(stderr, "%s, sample %s: %s\n", pb::op_table()[sample.op].name, sample.id.c_str(), problem.c_str());
  return problem.empty();
}

// What the header that tools/mutate.py writes adds to the library.
struct Trace {
  unsigned char *seen;
  size_t count;
  explicit Trace(const char *path) {
    void *library = dlopen(path, RTLD_NOW);
    const auto trace =
        library ? reinterpret_cast<unsigned char *(*)(size_t *)>(dlsym(library, "polybit_mutants_trace")) : nullptr;
    if (!trace) throw std::runtime_error(std::string(path) + " has no mutants to trace");
    seen = trace(&count);
  }
};

bool trace_all(const std::vector<pb::Backend> &backends, size_t backend, const std::vector<Sample> &samples,
               const Trace &trace) {
  for (size_t i = 0; i < samples.size(); i++) {
    if (!backends[backend].kernels[samples[i].op]) continue;
    std::memset(trace.seen, 0, trace.count);
    const auto start = std::chrono::steady_clock::now();
    if (!passes(backends, backend, samples[i])) return false;
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%zu %s %.6f", i, pb::op_table()[samples[i].op].name, seconds.count());
    for (size_t mutant = 1; mutant < trace.count; mutant++)
      if (trace.seen[mutant]) std::printf(" %zu", mutant);
    std::printf("\n");
  }
  return true;
}

}  // namespace

int main(int argc, char **argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: mutants SAMPLES LIBRARY BACKEND [INDEX...]\n");
    return 2;
  }
  try {
    const std::vector<Sample> samples = read_samples(argv[1]);
    const std::vector<pb::Backend> backends = pb::load(argv[2]);
    size_t backend = 0;
    while (backend < backends.size() && backends[backend].name != argv[3]) backend++;
    if (backend == backends.size()) throw std::runtime_error(std::string("no backend is called ") + argv[3]);
    if (argc == 4) return !trace_all(backends, backend, samples, Trace(argv[2]));
    for (int i = 4; i < argc; i++)
      if (!passes(backends, backend, samples.at(std::strtoul(argv[i], nullptr, 10)))) return 1;
    return 0;
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
