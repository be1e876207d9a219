#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#if defined(__APPLE__)
#include <mach-o/dyld.h>
#else
#include <link.h>
#endif

namespace pb {
namespace {

// Linking an OpenMP runtime would bring a second pool beside torch's, and both would fight for the cores. So the one
// that is loaded is looked up; libgomp, libomp and libiomp5 all export the GNU entry point.
struct OpenMP {
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
  int (*max_threads)() = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  std::string path;
};

std::vector<std::string> loaded_libraries() {
  std::vector<std::string> names;
#if defined(__APPLE__)
  for (uint32_t i = 0; i < _dyld_image_count(); i++) names.emplace_back(_dyld_get_image_name(i));
#else
  dl_iterate_phdr(
      [](dl_phdr_info *info, size_t, void *out) {
        static_cast<std::vector<std::string> *>(out)->emplace_back(info->dlpi_name);
        return 0;
      },
      &names);
#endif
  return names;
}

bool resolve(const std::string &path, OpenMP &omp) {
  void *handle = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
  if (!handle) return false;
  auto symbol = [&](const char *name, auto &function) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
    return function != nullptr;
  };
  omp.path = path;
  return symbol("GOMP_parallel", omp.parallel) && symbol("omp_get_max_threads", omp.max_threads) &&
         symbol("omp_get_thread_num", omp.thread_num) && symbol("omp_get_num_threads", omp.num_threads) &&
         symbol("omp_in_parallel", omp.in_parallel);
}

OpenMP find_openmp() {
  std::vector<std::string> found;
  for (const std::string &path : loaded_libraries()) {
    const std::string file = path.substr(path.rfind('/') + 1);
    if (file.rfind("libgomp", 0) == 0 || file.rfind("libomp", 0) == 0 || file.rfind("libiomp", 0) == 0)
      found.push_back(path);
  }
  // Where several are loaded, torch's own is the pool to share.
  std::stable_partition(found.begin(), found.end(),
                        [](const std::string &p) { return p.find("torch") != std::string::npos; });
  for (const std::string &path : found) {
    OpenMP omp;
    if (resolve(path, omp)) return omp;
  }
  return {};
}

// An OpenMP pool does not survive fork: in the child its threads are gone, and waking them would hang.
bool forked = false;

const OpenMP &openmp() {
  static const OpenMP omp = [] {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    return find_openmp();
  }();
  return omp;
}

struct Loop {
  int64_t count, grain;
  pb_range_body body;
  void *arg;
};

void run_share(void *data) {
  const Loop &loop = *static_cast<const Loop *>(data);
  const int64_t threads = openmp().num_threads(), id = openmp().thread_num();
  const int64_t grains = (loop.count + loop.grain - 1) / loop.grain;
  const int64_t begin = grains * id / threads * loop.grain;
  const int64_t end = std::min(loop.count, grains * (id + 1) / threads * loop.grain);
  if (begin < end) loop.body(loop.arg, begin, end);
}

}  // namespace

int64_t thread_count() {
  const OpenMP &omp = openmp();
  if (!omp.parallel || forked || omp.in_parallel()) return 1;
  return omp.max_threads();
}

void parallel_for(int64_t count, int64_t grain, pb_range_body body, void *arg) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t threads = std::min(thread_count(), (count + grain - 1) / grain);
  if (threads <= 1) return body(arg, 0, count);
  Loop loop{count, grain, body, arg};
  openmp().parallel(run_share, &loop, static_cast<unsigned>(threads), 0);
}

const char *openmp_library() { return openmp().path.c_str(); }

}  // namespace pb
