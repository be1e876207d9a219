#include "engine.h"

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fiber.h"
#include "../../core/simt/emulator.h"

#ifdef PB_FIBER_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace pb {
namespace emulator {
namespace {

using u64 = uint64_t;

constexpr size_t local_bytes = 32 * 1024;  // the least of our targets (Metal)
constexpr size_t private_bytes = 64 * 1024, stack_bytes = 2 * private_bytes;
constexpr u32 nobody = ~0u;
constexpr size_t places_told = 4;  // of a deadlock

// What a thread waits in. The lanes of a wave that belong together must make equal calls.
struct Call {
  const char *name;
  Place place;
  u64 members;
  u32 operand;
};

struct Thread {
  Fiber fiber;
  Call call;
  u32 value, source, result;  // of a collective: what this lane gives, whom it reads, what it read
};

// A collective that some lanes of a wave have reached.
struct Exchange {
  u64 members, arrived;
  u32 first;  // the thread that came first, to compare with
};

struct WaveState {
  u64 done = 0;  // lanes that have left the kernel
  std::vector<Exchange> open;
};

std::string describe(const Place &place) {
  const char *slash = std::strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

bool same(const Place &a, const Place &b) { return a.line == b.line && !std::strcmp(a.file, b.file); }

std::string hexadecimal(u64 bits) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(bits));
  return text;
}

class Machine {
 public:
  Machine() : local_(static_cast<unsigned char *>(std::aligned_alloc(64, local_bytes))) {
    if (!local_) throw std::bad_alloc();
  }
  Machine(const Machine &) = delete;
  Machine &operator=(const Machine &) = delete;

  // The groups [begin, end) of the launch. What went wrong, or "".
  std::string run(const Launch &launch, int64_t begin, int64_t end, const std::function<void()> &kernel) {
    prepare(launch, kernel);
    running = this;
    for (group_ = begin; group_ < end && error_.empty(); group_++) run_group();
    running = nullptr;
    return error_;
  }

  Ids ids() const { return {current_, static_cast<u32>(group_), launch_.group_dim, launch_.width}; }

  void barrier(Place place) {
    enter({"barrier", place, 0, 0});
    if (done_) fail("divergent barrier: " + thread(current_) + ", " + left(first_done_));
    if (!at_barrier_)
      first_at_barrier_ = current_;
    else if (!same(threads_[first_at_barrier_].call.place, place))
      fail("divergent barrier: " + thread(first_at_barrier_) + ", " + thread(current_));
    if (++at_barrier_ < launch_.group_dim) return leave();
    at_barrier_ = 0;
    ready_ = everybody_;
    ready_[current_ / 64] &= ~(u64(1) << current_ % 64);
  }

  u32 shuffle_xor(u32 value, u32 mask, u64 members, Place place) {
    enter({"shuffle_xor", place, members, mask});
    if (mask >= launch_.width) fail("shuffle_xor: a mask beyond the wave: " + thread(current_));
    return exchange(value, lane() ^ mask);
  }

  u32 shuffle(u32 value, u32 source, u64 members, Place place) {
    enter({"shuffle", place, members, 0});
    if (source >= launch_.width)
      fail("shuffle: lane " + std::to_string(source) + " is beyond the wave: " + thread(current_));
    return exchange(value, source);
  }

  void *local_memory(size_t bytes, Place place) {
    enter({"group memory", place, 0, 0});
    if (bytes > local_bytes)
      fail("group memory: " + thread(current_) + " wants " + std::to_string(bytes) + " bytes, at most " +
           std::to_string(local_bytes));
    if (bytes != local_used_) {
      local_used_ = bytes;
#ifdef PB_FIBER_ASAN
      __asan_unpoison_memory_region(local_.get(), bytes);
      __asan_poison_memory_region(local_.get() + bytes, local_bytes - bytes);
#endif
    }
    return local_.get();
  }

  void misaligned(const char *what, size_t bytes, Place place) {
    enter({what, place, 0, 0});
    fail(std::string(what) + " of " + std::to_string(bytes) + " bytes is not aligned: " + thread(current_));
  }

  static thread_local Machine *running;

 private:
  void prepare(const Launch &launch, const std::function<void()> &kernel) {
    const bool reusable = error_.empty() && launch.group_dim <= threads_.size();
    launch_ = launch;
    kernel_ = &kernel;
    error_.clear();
    if (!reusable) {
      if (launch.group_dim > threads_.size()) {
        stacks_ = Stacks(launch.group_dim, stack_bytes);
        threads_ = std::vector<Thread>(launch.group_dim);
      }
      for (u32 i = 0; i < threads_.size(); i++) begin(&threads_[i].fiber, stacks_[i], stack_size(i), entry, this);
    }
    waves_.resize(launch.group_dim / launch.width);
    everybody_.assign((launch.group_dim + 63) / 64, ~u64(0));
    if (launch.group_dim % 64) everybody_.back() = (u64(1) << launch.group_dim % 64) - 1;
    all_lanes_ = launch.width == 64 ? ~u64(0) : (u64(1) << launch.width) - 1;
  }

  void run_group() {
    for (u32 i = 0; i < launch_.group_dim; i++) threads_[i].call = {nullptr, {"", 0}, 0, 0};
    for (auto &wave : waves_) {
      wave.done = 0;
      wave.open.clear();
    }
    at_barrier_ = done_ = 0;
    ready_ = everybody_;
    round_.clear();
    next_in_round_ = 0;
    random_ = (u64(launch_.order.seed) << 32) + u64(group_) + 1;
    std::memset(local_.get(), 0xFF, local_used_);  // NaN as floats, -1 as integers
    local_used_ = 0;

    current_ = next();
    switch_fiber(&scheduler_, &threads_[current_].fiber);
    if (error_.empty() && done_ < launch_.group_dim) error_ = deadlock();
    if (!error_.empty()) error_ += " (group " + std::to_string(group_) + ")";
  }

  // A fiber serves one thread of every group in turn. One that failed is unwound to here, the others are left where
  // they are: kernels own nothing. The machine is an argument because its launches may be on different OS threads.
  static void entry(void *machine) {
    Machine &m = *static_cast<Machine *>(machine);
    for (;;) {
      try {
        (*m.kernel_)();
        m.finish();
      } catch (const std::exception &error) {
        m.error_ = error.what();
      }
      m.leave();
    }
  }

  // Not all stacks begin at the same place of a page, because such places share the lines of a cache.
  static size_t stack_size(u32 index) { return stack_bytes - index % 32 * 256; }

  u32 lane() const { return current_ % launch_.width; }
  WaveState &wave() { return waves_[current_ / launch_.width]; }

  void finish() {
    if (!done_++) first_done_ = current_;
    WaveState &mine = wave();
    mine.done |= u64(1) << lane();
    if (at_barrier_) fail("divergent barrier: " + thread(first_at_barrier_) + ", " + left(current_));
    for (const Exchange &other : mine.open)
      if (other.members >> lane() & 1) fail("divergent collective: " + thread(other.first) + ", " + left(current_));
  }

  // Every wait and check begins here.
  void enter(const Call &call) {
    threads_[current_].call = call;
    const char *top = stacks_[current_] + stack_size(current_);
    const size_t used = static_cast<size_t>(top - static_cast<char *>(__builtin_frame_address(0)));
    if (used > private_bytes)
      fail("private memory: " + thread(current_) + " uses " + std::to_string(used) + " bytes of stack, at most " +
           std::to_string(private_bytes));
  }

  // The heart of every collective: gives `value` to the lanes of the call, waits for all of them, and returns what lane
  // `source` gave.
  u32 exchange(u32 value, u32 source) {
    Thread &me = threads_[current_];
    WaveState &mine = wave();
    const u32 base = current_ - lane();
    if (me.call.members == every_lane) me.call.members = all_lanes_;
    const u64 members = me.call.members, bit = u64(1) << lane();
    if (members & ~all_lanes_) fail(std::string(me.call.name) + ": members beyond the wave: " + thread(current_));
    if (!(members & bit))
      fail(std::string(me.call.name) + ": lane " + std::to_string(lane()) + " is no member: " + thread(current_));
    if (!(members >> source & 1))
      fail(std::string(me.call.name) + ": lane " + std::to_string(source) +
           " is read but no member: " + thread(current_));
    if (mine.done & members)
      fail("divergent collective: " + thread(current_) + ", " +
           left(base + static_cast<u32>(__builtin_ctzll(mine.done & members))));

    me.value = value;
    me.source = source;
    // A call that waits for this lane, and for which this lane would have to wait, must be the same one.
    size_t index = 0;
    while (index < mine.open.size() && !(mine.open[index].members & bit && mine.open[index].arrived & members)) index++;
    if (index == mine.open.size()) mine.open.push_back({members, 0, current_});
    Exchange &other = mine.open[index];
    const Call &call = threads_[other.first].call;
    if (call.name != me.call.name || call.operand != me.call.operand || call.members != members ||
        !same(call.place, me.call.place))
      fail("mixed collectives: " + collective(other.first) + ", " + collective(current_));
    other.arrived |= bit;
    if (other.arrived != members) {
      leave();
      return me.result;
    }
    mine.open.erase(mine.open.begin() + static_cast<std::ptrdiff_t>(index));
    for (u64 left = members; left; left &= left - 1) {
      Thread &lane = threads_[base + static_cast<u32>(__builtin_ctzll(left))];
      lane.result = threads_[base + lane.source].value;
    }
    ready_[base / 64] |= (members & ~bit) << base % 64;
    return me.result;
  }

  // Who runs next; it is no longer in ready_. Ascending and descending: always the first one, so that a wave runs ahead
  // of the others as far as it can. Shuffled: rounds of all that are ready, every round in another order.
  u32 next() {
    if (launch_.order.kind == Order::shuffled) {
      if (next_in_round_ == round_.size()) begin_round();
      return next_in_round_ < round_.size() ? round_[next_in_round_++] : nobody;
    }
    const size_t count = ready_.size();
    for (size_t i = 0; i < count; i++) {
      const bool up = launch_.order.kind == Order::ascending;
      u64 &word = ready_[up ? i : count - 1 - i];
      if (!word) continue;
      const u32 bit = static_cast<u32>(up ? __builtin_ctzll(word) : 63 - __builtin_clzll(word));
      word &= ~(u64(1) << bit);
      return static_cast<u32>(&word - ready_.data()) * 64 + bit;
    }
    return nobody;
  }

  void begin_round() {
    round_.clear();
    next_in_round_ = 0;
    for (u32 i = 0; i < ready_.size(); i++)
      for (u64 &word = ready_[i]; word; word &= word - 1)
        round_.push_back(i * 64 + static_cast<u32>(__builtin_ctzll(word)));
    for (size_t i = round_.size(); i > 1; i--) {
      random_ = random_ * 6364136223846793005u + 1442695040888963407u;
      std::swap(round_[i - 1], round_[(random_ >> 33) % i]);
    }
  }

  // Lets another thread run, or run_group() if none can; returns when this one is ready again and its turn has come.
  void leave() {
    Thread &me = threads_[current_];
    const u32 index = error_.empty() ? next() : nobody;
    if (index != nobody) current_ = index;
    switch_fiber(&me.fiber, index == nobody ? &scheduler_ : &threads_[index].fiber);
  }

  [[noreturn]] static void fail(const std::string &what) { throw std::runtime_error(what); }

  std::string thread(u32 index) const {
    return "thread " + std::to_string(index) + " at " + describe(threads_[index].call.place);
  }

  std::string collective(u32 index) const {
    const Call &call = threads_[index].call;
    return thread(index) + " (" + call.name + (call.operand ? " by " + std::to_string(call.operand) : "") +
           ", members " + hexadecimal(call.members) + ")";
  }

  // A thread that has returned from the kernel, with the last call it made there.
  std::string left(u32 index) const {
    const Call &call = threads_[index].call;
    return "thread " + std::to_string(index) + " has left the kernel" +
           (call.name ? " after the " + std::string(call.name) + " at " + describe(call.place) : "");
  }

  // The places where threads wait, each with one thread and their number.
  std::string deadlock() const {
    std::vector<std::pair<u32, u32>> places;
    for (u32 i = 0; i < launch_.group_dim; i++) {
      if (waves_[i / launch_.width].done >> i % launch_.width & 1) continue;
      auto place = places.begin();
      while (place != places.end() && !same(threads_[place->first].call.place, threads_[i].call.place)) ++place;
      if (place == places.end()) place = places.insert(places.end(), {i, 0});
      place->second++;
    }
    std::string text = "deadlock: ";
    for (size_t i = 0; i < places.size() && i < places_told; i++)
      text += (i ? ", " : "") + thread(places[i].first) + " waits in " + threads_[places[i].first].call.name + " (" +
              std::to_string(places[i].second) + " in all)";
    return text + (places.size() > places_told ? ", ..." : "");
  }

  struct Free {
    void operator()(void *p) const { std::free(p); }
  };
  Launch launch_ = {};
  const std::function<void()> *kernel_ = nullptr;
  Stacks stacks_;
  std::vector<Thread> threads_;
  std::vector<WaveState> waves_;
  std::vector<u64> ready_, everybody_;  // a bit for each thread
  std::vector<u32> round_;
  std::unique_ptr<unsigned char, Free> local_;
  Fiber scheduler_;
  std::string error_;
  int64_t group_ = 0;
  u64 all_lanes_ = 0, random_ = 0;
  size_t at_barrier_ = 0, done_ = 0, next_in_round_ = 0, local_used_ = local_bytes;
  u32 current_ = 0, first_at_barrier_ = 0, first_done_ = 0;
};

thread_local Machine *Machine::running = nullptr;

// Machines are kept, because a new one costs a page fault and more for every thread. As many as ever ran at once.
class Pool {
 public:
  std::unique_ptr<Machine> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) return std::make_unique<Machine>();
    std::unique_ptr<Machine> machine = std::move(idle_.back());
    idle_.pop_back();
    return machine;
  }
  void give(std::unique_ptr<Machine> machine) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(machine));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Machine>> idle_;
};

Pool &pool() {
  static Pool *pool = new Pool;  // never destroyed: threads may run until the process ends
  return *pool;
}

}  // namespace

Ids ids() { return Machine::running->ids(); }
void barrier(Place place) { Machine::running->barrier(place); }
u32 shuffle_xor(u32 value, u32 mask, u64 members, Place place) {
  return Machine::running->shuffle_xor(value, mask, members, place);
}
u32 shuffle(u32 value, u32 source, u64 members, Place place) {
  return Machine::running->shuffle(value, source, members, place);
}
void *local_memory(size_t bytes, Place place) { return Machine::running->local_memory(bytes, place); }
void misaligned(const char *what, size_t bytes, Place place) { Machine::running->misaligned(what, bytes, place); }

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
  const uint32_t width = launch.width;
  if (!width || width > 64 || width & (width - 1) || !launch.group_dim || launch.group_dim % width)
    return "a group of " + std::to_string(launch.group_dim) + " threads is not made of waves of " +
           std::to_string(width);
  std::unique_ptr<Machine> machine = pool().take();
  std::string error = machine->run(launch, begin, end, kernel);
  pool().give(std::move(machine));
  return error;
}

}  // namespace emulator
}  // namespace pb
