// conformance SAMPLES LIBRARY [BACKEND...]: hold the backends of a library to the specification, without Python and
// torch, so that it also runs cross-compiled and under sanitizers.
//
// Every sample is called serially and with threads, the inputs and outputs between guard bytes, aligned and not; the
// two results must have equal bits and agree with the expected one. Prints the counts of each backend and op. Exit
// status: 1 for a failure, 2 where the arguments or the files are no good.
#include <cstdio>
#include <exception>
#include <map>

#include "check.h"

namespace {

constexpr size_t most_failures_shown = 20;

struct Counts {
  size_t samples = 0, unsupported = 0, failures = 0;
};

// How many samples the backend failed.
size_t check_backend(const std::vector<pb::Backend> &backends, size_t backend, const std::vector<Sample> &samples) {
  const char *name = backends[backend].name.c_str();
  std::map<uint64_t, Counts> counts;
  size_t failures = 0;
  for (const Sample &sample : samples) {
    if (!backends[backend].kernels[sample.op]) continue;
    Counts &count = counts[sample.op];
    bool unsupported = false;
    const std::string problem = check(backends, backend, sample, unsupported);
    count.samples++;
    count.unsupported += unsupported;
    if (problem.empty()) continue;
    count.failures++;
    if (failures++ < most_failures_shown)
      std::fprintf(stderr, "%s %s, sample %s: %s\n", name, pb::op_table()[sample.op].name, sample.id.c_str(),
                   problem.c_str());
  }
  for (const auto &[op, count] : counts)
    std::printf("%s %s: %zu samples, %zu unsupported, %zu failures\n", name, pb::op_table()[op].name, count.samples,
                count.unsupported, count.failures);
  return failures;
}

bool wanted(const std::string &name, const std::vector<std::string> &names) {
  if (names.empty()) return true;
  for (const std::string &one : names)
    if (one == name) return true;
  return false;
}

}  // namespace

int main(int argc, char **argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: conformance SAMPLES LIBRARY [BACKEND...]\n");
    return 2;
  }
  try {
    const std::vector<Sample> samples = read_samples(argv[1]);
    const std::vector<pb::Backend> backends = pb::load(argv[2]);
    const std::vector<std::string> names(argv + 3, argv + argc);
    size_t ran = 0, failures = 0;
    for (size_t i = 0; i < backends.size(); i++) {
      if (!wanted(backends[i].name, names)) continue;
      if (!backends[i].usable) {
        std::printf("%s is not usable: %s\n", backends[i].name.c_str(), backends[i].reason.c_str());
        continue;
      }
      failures += check_backend(backends, i, samples);
      ran++;
    }
    if (ran < (names.empty() ? 1 : names.size())) {
      std::fprintf(stderr, "%s: a backend that was to run is missing or not usable\n", argv[2]);
      return 2;
    }
    return failures != 0;
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
