#include "engine.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "../../core/simt/emulator.h"

namespace pb {
namespace emulator {
namespace {

constexpr size_t stack_bytes = 64 * 1024, local_bytes = 32 * 1024;  // 32 KiB: the least of our targets (Metal)

enum class State { ready, at_barrier, in_wave, done };

struct Fiber {
  ucontext_t context;
  State state = State::ready;
  Place place = {"", 0};
  u32 mask = 0;
};

// Values of the lanes that have arrived. Two of them in turn: a fast lane may deposit its next value before a slow
// one has read the last.
struct WaveState {
  u32 slots[2][64];
  u32 arrived = 0, phase = 0;
  u32 first = 0;  // the thread that arrived first, to compare with
};

std::string describe(const Place &place) {
  const char *slash = std::strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

bool same(const Place &a, const Place &b) { return a.line == b.line && !std::strcmp(a.file, b.file); }

class Machine {
 public:
  Machine(const Launch &launch, const std::function<void()> &kernel) : launch_(launch), kernel_(kernel) {
    fibers_.resize(launch.group_dim);
    waves_.resize(launch.group_dim / launch.width);
    order_.resize(launch.group_dim);
    local_.reset(static_cast<unsigned char *>(std::aligned_alloc(64, local_bytes)));
    // mmap, not the heap: an untouched stack costs nothing.
    void *stacks = mmap(nullptr, stack_bytes * fibers_.size(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED || !local_) throw std::bad_alloc();
    stacks_ = static_cast<char *>(stacks);
    for (size_t i = 0; i < fibers_.size(); i++) {
      getcontext(&fibers_[i].context);
      fibers_[i].context.uc_stack.ss_sp = stacks_ + i * stack_bytes;
      fibers_[i].context.uc_stack.ss_size = stack_bytes;
      fibers_[i].context.uc_link = nullptr;
      makecontext(&fibers_[i].context, entry, 0);
    }
  }
  ~Machine() { munmap(stacks_, stack_bytes * fibers_.size()); }
  Machine(const Machine &) = delete;
  Machine &operator=(const Machine &) = delete;

  std::string run(int64_t group) {
    group_ = group;
    waiting_ = done_ = 0;
    for (auto &fiber : fibers_) fiber.state = State::ready;
    for (auto &wave : waves_) wave.arrived = wave.phase = 0;
    std::memset(local_.get(), 0xA5, local_bytes);
    set_order();
    while (done_ < fibers_.size()) {
      bool progress = false;
      for (const u32 index : order_) {
        if (fibers_[index].state != State::ready) continue;
        progress = true;
        current_ = index;
        swapcontext(&scheduler_, &fibers_[index].context);
        if (!error_.empty()) return error_ + " (group " + std::to_string(group) + ")";
      }
      if (!progress) return deadlock() + " (group " + std::to_string(group) + ")";
    }
    return "";
  }

  Ids ids() const { return {current_, static_cast<u32>(group_), launch_.group_dim, launch_.width}; }

  void barrier(Place place) {
    Fiber &me = fibers_[current_];
    me.place = place;
    if (done_) fail("divergent barrier: " + thread(current_) + ", others have left the kernel");
    for (const auto &other : fibers_)
      if (other.state == State::at_barrier) {
        if (!same(other.place, place))
          fail("divergent barrier: " + thread(current_) + ", " + thread(static_cast<u32>(&other - fibers_.data())));
        break;
      }
    if (++waiting_ == fibers_.size()) {
      waiting_ = 0;
      for (auto &fiber : fibers_)
        if (fiber.state == State::at_barrier) fiber.state = State::ready;
    } else {
      me.state = State::at_barrier;
      leave();
    }
  }

  u32 shuffle_xor(u32 value, u32 mask, Place place) {
    Fiber &me = fibers_[current_];
    const u32 lane = current_ % launch_.width, base = current_ - lane;
    WaveState &wave = waves_[current_ / launch_.width];
    me.place = place;
    me.mask = mask;
    if (mask >= launch_.width) fail("shuffle_xor: a mask beyond the wave: " + thread(current_));
    for (u32 i = 0; i < launch_.width; i++)
      if (fibers_[base + i].state == State::done)
        fail("divergent collective: " + thread(current_) + ", thread " + std::to_string(base + i) +
             " has left the kernel");
    if (!wave.arrived) {
      wave.first = current_;
    } else if (!same(fibers_[wave.first].place, place) || fibers_[wave.first].mask != mask) {
      fail("mixed collectives: " + thread(wave.first) + ", " + thread(current_));
    }
    u32 *slots = wave.slots[wave.phase & 1];
    slots[lane] = value;
    if (++wave.arrived == launch_.width) {
      wave.arrived = 0;
      wave.phase++;
      for (u32 i = 0; i < launch_.width; i++)
        if (fibers_[base + i].state == State::in_wave) fibers_[base + i].state = State::ready;
    } else {
      me.state = State::in_wave;
      leave();
    }
    return slots[lane ^ mask];
  }

  void *local_memory(size_t bytes) {
    if (bytes > local_bytes) fail("group memory: " + std::to_string(bytes) + " bytes, at most 32768");
    return local_.get();
  }

  void check_aligned(const void *p, size_t bytes, Place place) {
    fibers_[current_].place = place;
    if (reinterpret_cast<uintptr_t>(p) % bytes)
      fail("an access of " + std::to_string(bytes) + " bytes is not aligned: " + thread(current_));
  }

  static thread_local Machine *running;

 private:
  // A fiber serves one thread of every group in turn. It never returns and is never unwound: kernels own nothing.
  static void entry() {
    for (;;) {
      Machine &m = *running;
      m.kernel_();
      m.finish();
    }
  }

  void finish() {
    fibers_[current_].state = State::done;
    done_++;
    if (waiting_) {
      for (u32 i = 0; i < fibers_.size(); i++)
        if (fibers_[i].state == State::at_barrier)
          fail("divergent barrier: " + thread(i) + ", thread " + std::to_string(current_) + " has left the kernel");
    }
    const u32 base = current_ - current_ % launch_.width;
    for (u32 i = base; i < base + launch_.width; i++)
      if (fibers_[i].state == State::in_wave)
        fail("divergent collective: " + thread(i) + ", thread " + std::to_string(current_) + " has left the kernel");
    leave();
  }

  void leave() { swapcontext(&fibers_[current_].context, &scheduler_); }

  void fail(const std::string &what) {
    error_ = what;
    leave();  // for good: run() gives up
  }

  std::string thread(u32 index) const {
    return "thread " + std::to_string(index) + " at " + describe(fibers_[index].place);
  }

  std::string deadlock() const {
    std::string barrier, wave;
    for (u32 i = 0; i < fibers_.size(); i++) {
      if (fibers_[i].state == State::at_barrier && barrier.empty()) barrier = thread(i);
      if (fibers_[i].state == State::in_wave && wave.empty()) wave = thread(i);
    }
    return "deadlock: " + barrier + " waits in a barrier, " + wave + " in a wave operation";
  }

  void set_order() {
    std::iota(order_.begin(), order_.end(), 0u);
    if (launch_.order.kind == Order::descending) {
      std::iota(order_.rbegin(), order_.rend(), 0u);
    } else if (launch_.order.kind == Order::shuffled) {
      uint64_t s = (uint64_t(launch_.order.seed) << 32) + uint64_t(group_) + 1;
      for (size_t i = order_.size() - 1; i > 0; i--) {
        s = s * 6364136223846793005u + 1442695040888963407u;
        std::swap(order_[i], order_[(s >> 33) % (i + 1)]);
      }
    }
  }

  struct Free {
    void operator()(void *p) const { std::free(p); }
  };
  const Launch launch_;
  const std::function<void()> &kernel_;
  std::vector<Fiber> fibers_;  // never resized: a context must not move
  std::vector<WaveState> waves_;
  std::vector<u32> order_;
  std::unique_ptr<unsigned char, Free> local_;
  char *stacks_ = nullptr;
  ucontext_t scheduler_;
  std::string error_;
  int64_t group_ = 0;
  size_t waiting_ = 0, done_ = 0;
  u32 current_ = 0;
};

thread_local Machine *Machine::running = nullptr;

}  // namespace

Ids ids() { return Machine::running->ids(); }
void barrier(Place place) { Machine::running->barrier(place); }
u32 shuffle_xor(u32 value, u32 mask, Place place) { return Machine::running->shuffle_xor(value, mask, place); }
void *local_memory(size_t bytes) { return Machine::running->local_memory(bytes); }
void check_aligned(const void *p, size_t bytes, Place place) { Machine::running->check_aligned(p, bytes, place); }

bool parse_order(const char *text, Order *order) {
  const std::string s = text ? text : "";
  *order = Order();
  if (s.empty() || s == "ascending") return true;
  if (s == "descending") return order->kind = Order::descending, true;
  if (s.compare(0, 8, "shuffled")) return false;
  order->kind = Order::shuffled;
  if (s.size() == 8) return true;
  if (s[8] != ':' || s.size() == 9 || s.find_first_not_of("0123456789", 9) != std::string::npos) return false;
  order->seed = static_cast<uint32_t>(std::strtoul(s.c_str() + 9, nullptr, 10));
  return true;
}

std::string run_groups(const Launch &launch, int64_t begin, int64_t end, const std::function<void()> &kernel) {
  if (!launch.width || launch.width > 64 || !launch.group_dim || launch.group_dim % launch.width)
    return "a group of " + std::to_string(launch.group_dim) + " threads is not made of waves of " +
           std::to_string(launch.width);
  Machine machine(launch, kernel);
  Machine::running = &machine;
  std::string error;
  for (int64_t group = begin; group < end && error.empty(); group++) error = machine.run(group);
  Machine::running = nullptr;
  return error;
}

}  // namespace emulator
}  // namespace pb
