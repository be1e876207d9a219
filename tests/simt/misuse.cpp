// What the engine must catch, by name: prints what it said, or "nothing" for kernels that are right. tests/test_simt.py
// looks up the lines of the calls here, in the order in which they stand in each function.
#include <cstdio>
#include <string>
#include <thread>

#include "../../backends/emulator/engine.h"
#include "../../core/simt/emulator.h"
#include "../../core/kernels/block.h"

using pb::u32;
using pb::u8;
using pb::Wave;

namespace {

constexpr u32 groups = 4, group_dim = 128;
alignas(16) u32 memory[8];
u32 total, flags;
u8 *volatile escaped;  // keeps a big array alive

// The kernels that are right find a wrong value by themselves and say so through the engine's report of an unaligned
// access.
void expect(bool right, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!right) pb::emulator::misaligned("a wrong value", 1, {file, line});
}

void correct() {
  const Wave w;
  w.barrier();
  expect(pb::wave_reduce<pb::Max>(w, w.tid(), w.width()) == (w.tid() | (w.width() - 1)));
  w.barrier();
}
void correct_shuffle() {
  const Wave w;
  for (u32 step = 1; step < 5; step++) {
    const u32 source = (w.lane() * step + 3) % w.width();
    expect(w.shuffle(w.tid(), source) == w.tid() - w.lane() + source);
  }
}
// Both halves of a wave at once, at different places, one of them more often.
void correct_members() {
  const Wave w;
  const u32 half = w.width() / 2;
  const uint64_t low = (uint64_t(1) << half) - 1;
  if (w.lane() < half) {
    for (u32 i = 0; i < 3; i++) expect(w.shuffle_xor(w.tid(), 1, low) == (w.tid() ^ 1));
  } else {
    expect(w.shuffle(w.tid(), half, low << half) == w.tid() - w.lane() + half);
  }
  expect(w.shuffle_xor(w.tid(), half) == (w.tid() ^ half));
}
void correct_atomics() {
  const Wave w;
  pb::atomic_add(&total, w.lane());
  pb::atomic_or(&flags, 1u << (w.tid() % 32));
}
struct Local {
  u32 of[group_dim];
};
void correct_group_memory() {
  const Wave w;
  PB_SHARED(Local, local);
  expect(local->of[w.tid()] == 0xFFFFFFFFu);
  local->of[w.tid()] = w.tid();
  w.barrier();
  expect(local->of[w.tid() ^ 77] == (w.tid() ^ 77));
}

void exit_before_barrier() {
  const Wave w;
  w.shuffle_xor(1, 1);
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
void members_that_wait_in_a_circle() {
  const Wave w;
  if (w.lane() == 0) w.shuffle_xor(1, 1, 3);
  if (w.lane() == 1) w.shuffle_xor(1, 2, 10);
  if (w.lane() == 2) w.shuffle(1, 2, 4);
  w.barrier();
}
void deadlock_at_many_places() {
  const Wave w;
  if (w.tid() == 0) w.shuffle(1, 0, 1 << 9 | 1);
  if (w.tid() == 1) w.shuffle(1, 1, 1 << 9 | 2);
  if (w.tid() == 2) w.shuffle(1, 2, 1 << 9 | 4);
  if (w.tid() == 3) w.shuffle(1, 3, 1 << 9 | 8);
  if (w.tid() == 4) w.shuffle(1, 4, 1 << 9 | 16);
  w.barrier();
}
void mixed_places() {
  const Wave w;
  if (w.lane() < 8)
    w.shuffle_xor(1, 1);
  else
    w.shuffle_xor(1, 1);
}
void mixed_kinds() {
  const Wave w;
  if (w.lane() < 8)
    w.shuffle_xor(1, 1);
  else
    w.shuffle(1, w.lane());
}
void mixed_masks() {
  const Wave w;
  w.shuffle_xor(1, w.lane() < 8 ? 1 : 2);
}
void mixed_members() {
  const Wave w;
  if (w.lane() < 16) w.shuffle_xor(1, 1, w.lane() < 8 ? 0xffff : 0xfff0);
}
void exit_before_shuffle() {
  const Wave w;
  if (w.lane() == 2) return;
  w.shuffle_xor(1, 1);
}
void exit_of_a_member() {
  const Wave w;
  w.barrier();
  if (w.lane() < 2) w.shuffle_xor(1, 1, 7);
}
void no_member() {
  const Wave w;
  w.shuffle_xor(1, 1, 0x3fff);
}
void source_no_member() {
  const Wave w;
  if (w.lane() < 4) w.shuffle(1, w.lane() + 1, 15);
}
void members_too_many() {
  const Wave w;
  w.shuffle_xor(1, 1, w.width() < 64 ? (uint64_t(2) << w.width()) - 1 : ~uint64_t(0));
}
void mask_too_wide() {
  Wave().shuffle_xor(1, 64);  //
}
void source_too_far() {
  const Wave w;
  w.shuffle(1, w.lane() + 1);
}
void unaligned() {
  pb::load16(memory + 1);  //
}
void unaligned_atomic() {
  pb::atomic_add(reinterpret_cast<u32 *>(reinterpret_cast<u8 *>(memory) + 2), 1);  //
}
struct TooMuch {
  u8 bytes[32769];
};
void too_much_group_memory() {
  PB_SHARED(TooMuch, local);
  local->bytes[0] = 1;
}
void too_much_private_memory() {
  const Wave w;
  u8 array[70000];
  escaped = array;
  w.barrier();
}

// For a sanitizer: one word behind what the kernel has of the group's memory.
void overrun() {
  PB_SHARED(Local, local);
  local->of[Wave().tid() + 1] = 1;
}

struct Case {
  const char *name;
  void (*kernel)();
};
#define CASE(name) {#name, name}
constexpr Case table[] = {
    CASE(correct),
    CASE(correct_shuffle),
    CASE(correct_members),
    CASE(correct_atomics),
    CASE(correct_group_memory),
    CASE(exit_before_barrier),
    CASE(two_barriers),
    CASE(barrier_against_shuffle),
    CASE(members_that_wait_in_a_circle),
    CASE(deadlock_at_many_places),
    CASE(mixed_places),
    CASE(mixed_kinds),
    CASE(mixed_masks),
    CASE(mixed_members),
    CASE(exit_before_shuffle),
    CASE(exit_of_a_member),
    CASE(no_member),
    CASE(source_no_member),
    CASE(members_too_many),
    CASE(mask_too_wide),
    CASE(source_too_far),
    CASE(unaligned),
    CASE(unaligned_atomic),
    CASE(too_much_group_memory),
    CASE(too_much_private_memory),
};

}  // namespace

// misuse [ORDER [overrun]]
int main(int argc, char **argv) {
  pb::emulator::Order order;
  if (!pb::emulator::parse_order(argc > 1 ? argv[1] : nullptr, &order)) return 2;
  if (argc > 2) return !pb::emulator::run_groups({1, group_dim, 32, order}, 0, 1, overrun).empty();
  for (const Case &c : table)
    for (const u32 width : {16u, 32u, 64u}) {
      const pb::emulator::Launch launch = {groups, group_dim, width, order};
      total = flags = 0;
      std::string said, said_there;
      std::thread other([&] { said_there = pb::emulator::run_groups(launch, groups / 2, groups, c.kernel); });
      said = pb::emulator::run_groups(launch, 0, groups / 2, c.kernel);
      other.join();
      if (said.empty()) said = said_there;
      if (c.kernel == correct_atomics && (total != groups * group_dim * (width - 1) / 2 || flags != 0xffffffffu))
        said = "atomics: total " + std::to_string(total) + ", flags " + std::to_string(flags);
      std::printf("%s %u %s\n", c.name, width, said.empty() ? "nothing" : said.c_str());
    }
}
