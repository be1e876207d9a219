// What the engine must catch, by name: prints what it said, or "nothing" for kernels that are right.
#include <cstdio>
#include <cstring>

#include "../../backends/emulator/engine.h"
#include "../../core/simt/emulator.h"
#include "../../core/kernels/block.h"

using pb::u32;
using pb::Wave;

namespace {

alignas(16) u32 memory[8];

void correct() {
  const Wave w;
  w.barrier();
  pb::wave_reduce<pb::Max>(w, w.tid(), w.width());
  w.barrier();
}
void exit_before_barrier() {
  const Wave w;
  if (w.tid() == 3) return;
  w.barrier();
}
void two_barriers() {
  const Wave w;
  if (w.tid() < 32)
    w.barrier();
  else
    w.barrier();
}
void barrier_against_shuffle() {
  const Wave w;
  if (w.lane() == 5)
    w.barrier();
  else
    w.shuffle_xor(1, 1);
}
void mixed_collectives() {
  const Wave w;
  if (w.lane() < 8)
    w.shuffle_xor(1, 1);
  else
    w.shuffle_xor(1, 1);
}
void mixed_masks() {
  const Wave w;
  w.shuffle_xor(1, w.lane() < 8 ? 1 : 2);
}
void exit_before_shuffle() {
  const Wave w;
  if (w.lane() == 2) return;
  w.shuffle_xor(1, 1);
}
void mask_too_wide() { Wave().shuffle_xor(1, 64); }
void unaligned() { pb::load16(memory + 1); }
void too_much_memory() { pb::emulator::local_memory(32769); }

struct Case {
  const char *name;
  void (*kernel)();
};
constexpr Case table[] = {
    {"correct", correct},
    {"exit_before_barrier", exit_before_barrier},
    {"two_barriers", two_barriers},
    {"barrier_against_shuffle", barrier_against_shuffle},
    {"mixed_collectives", mixed_collectives},
    {"mixed_masks", mixed_masks},
    {"exit_before_shuffle", exit_before_shuffle},
    {"mask_too_wide", mask_too_wide},
    {"unaligned", unaligned},
    {"too_much_memory", too_much_memory},
};

}  // namespace

int main(int argc, char **argv) {
  pb::emulator::Order order;
  if (!pb::emulator::parse_order(argc > 1 ? argv[1] : nullptr, &order)) return 2;
  for (const Case &c : table)
    for (const u32 width : {16u, 32u, 64u}) {
      const std::string said = pb::emulator::run_groups({2, 128, width, order}, 0, 2, c.kernel);
      std::printf("%s %u %s\n", c.name, width, said.empty() ? "nothing" : said.c_str());
    }
}
