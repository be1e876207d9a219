// The text of backends/mps (PB_METAL_TEXT), run on the emulated machine: what tests/metal.py calls in torch.mps's
// place. PB_METAL_ENTRIES are its kernels.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <string>
#include <utility>

#include "backends/emulator/engine.h"

#include PB_METAL_TEXT

namespace {

// An argument of an entry point, by its place.
struct Buffer {
  void *p;
  template <class Pointer>
  operator Pointer() const {
    return (Pointer)(uintptr_t)p;  // into an address space
  }
};

template <class Args>
void call(void (*f)(Args, uint, uint, uint, uint), void *const *buffers) {
  const pb::emulator::Ids ids = pb::emulator::ids();
  f(*static_cast<const Args *>(buffers[0]), ids.tid, ids.group, ids.group_dim, ids.tid % ids.width);
}

template <size_t... I>
void call_bind(void *const *buffers, std::index_sequence<I...>) {
  const pb::emulator::Ids ids = pb::emulator::ids();
  bind_arguments(Buffer{buffers[I]}..., ids.group * ids.group_dim + ids.tid);
}

void run(const char *name, void *const *buffers) {
  if (!std::strcmp(name, "bind_arguments")) return call_bind(buffers, std::make_index_sequence<31>());
#define PB_ENTRY(entry, ...) \
  if (!std::strcmp(name, #entry)) return call(entry, buffers);
#include PB_METAL_ENTRIES
}

}  // namespace

// Null if the kernel ran, else what went wrong, valid until the next call.
extern "C" const char *metal_run(const char *name, void *const *buffers, int64_t groups, uint32_t group_dim,
                                 const char *order) {
  static std::string error;
  pb::emulator::Launch launch = {groups, group_dim, 32, {}};
  if (!pb::emulator::parse_order(order, &launch.order)) return "an unknown order";
  try {
    error = pb::emulator::run_groups(launch, 0, groups, [&] { run(name, buffers); });
  } catch (const std::exception &e) {
    error = e.what();
  }
  return error.empty() ? nullptr : error.c_str();
}
