#include "call.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <thread>

#include "guarded.h"

namespace {

int thread_count = 1;

void threaded_for(int64_t count, int64_t grain, pb_range_body body, void *arg) {
  const int64_t grains = (count + grain - 1) / grain, threads = std::min<int64_t>(thread_count, grains);
  std::vector<std::thread> pool;
  for (int64_t id = 0; id < threads; id++) {
    const int64_t begin = grains * id / threads * grain, end = std::min(count, grains * (id + 1) / threads * grain);
    pool.emplace_back(body, arg, begin, end);
  }
  for (std::thread &thread : pool) thread.join();
}

union Slot {
  const void *pointer;
  int64_t integer;
  double real;
};
static_assert(sizeof(Slot) == 8, "every field of an argument struct is eight bytes");

// A tensor of the call in guarded memory; `before` is null for an output.
struct Placed {
  const Tensor *before, *expected;
  Guarded memory;
  DLTensor dl;

  Placed(const Tensor *given, const Tensor *wanted, bool off)
      : before(given), expected(wanted), memory(like().bytes.size(), off ? (like().dtype.bits + 7) / 8 : 0), dl() {
    if (before && !before->bytes.empty()) std::memcpy(memory.data(), before->bytes.data(), before->bytes.size());
    dl.data = memory.data();
    dl.device = {kDLCPU, 0};
    dl.dtype = like().dtype;
    dl.ndim = static_cast<int32_t>(like().shape.size());
    dl.shape = const_cast<int64_t *>(like().shape.data());
  }
  const Tensor &like() const { return before ? *before : *expected; }
  std::vector<uint8_t> bytes() const { return {memory.data(), memory.data() + like().bytes.size()}; }
  bool as_before() const { return before ? bytes() == before->bytes : memory.untouched(); }
};

// The slots of a call, and all that they point to.
class Slots {
 public:
  Slots(const std::vector<Argument> &arguments, bool off) {
    for (const Argument &argument : arguments) {
      Slot slot{nullptr};
      if (argument.kind == 'n') {
        slot.integer = argument.integer;
      } else if (argument.kind == 'f') {
        slot.real = argument.real;
      } else {
        const size_t count = argument.kind == 'o' ? argument.expected.size() : argument.given.size();
        pointers_.emplace_back();
        for (size_t i = 0; i < count; i++) {
          const Tensor *given = argument.kind == 'o' ? nullptr : &argument.given[i];
          tensors.emplace_back(given, argument.expected.empty() ? nullptr : &argument.expected[i], off);
          pointers_.back().push_back(&tensors.back().dl);
        }
        if (argument.kind == 'I' || argument.kind == 'M') {
          lists_.push_back({static_cast<int64_t>(count), pointers_.back().data()});
          slot.pointer = &lists_.back();
        } else if (count) {
          slot.pointer = pointers_.back()[0];
        }
      }
      slots.push_back(slot);
    }
  }
  bool as_before() const {
    return std::all_of(tensors.begin(), tensors.end(), [](const Placed &t) { return t.as_before(); });
  }
  std::vector<Slot> slots;
  std::deque<Placed> tensors;

 private:
  std::deque<std::vector<DLTensor *>> pointers_;
  std::deque<pb_tensor_list> lists_;
};

// Runs the kernel, giving it what scratch it asks for.
pb_status run(pb::Kernel kernel, const Slots &slots, pb_context &ctx, std::string &problem) {
  pb_status status = kernel(&ctx, slots.slots.data());
  if (status != PB_SCRATCH) return status;
  const uint64_t needed = ctx.scratch_needed;
  if (!slots.as_before())
    problem = "wrote before it asked for scratch";
  else if (!needed)
    problem = "asked for no scratch";
  if (!problem.empty()) return status;
  Guarded scratch(needed, 0);
  ctx.scratch = scratch.data();
  ctx.scratch_size = needed - 1;
  status = kernel(&ctx, slots.slots.data());
  if (status != PB_SCRATCH || ctx.scratch_needed != needed || !slots.as_before())
    problem = "worked with less scratch than it asked for";
  ctx.scratch_size = needed;
  status = kernel(&ctx, slots.slots.data());
  if (status == PB_SCRATCH) problem = "asked for scratch that it already had";
  if (!scratch.guards_hold()) problem = "bytes outside the scratch were written";
  return status;
}

}  // namespace

Outcome call(pb::Kernel kernel, const std::vector<Argument> &arguments, int threads) {
  Slots slots(arguments, threads != 0);
  char error[512] = "";
  pb_context ctx{};
  ctx.size = sizeof ctx;
  ctx.error = error;
  ctx.error_size = sizeof error;
  ctx.thread_count = 1;
  if (threads) {
    thread_count = threads;
    ctx.thread_count = static_cast<uint64_t>(threads);
    ctx.parallel_for = threaded_for;
  }
  Outcome outcome{PB_OK, "", {}};
  outcome.status = run(kernel, slots, ctx, outcome.problem);
  if (outcome.status == PB_UNSUPPORTED && !slots.as_before()) outcome.problem = "declined, but wrote";
  if (outcome.status != PB_OK && outcome.status != PB_UNSUPPORTED && outcome.problem.empty())
    outcome.problem = "status " + std::to_string(outcome.status) + ": " + error;
  for (const Placed &tensor : slots.tensors) {
    if (!tensor.memory.guards_hold())
      outcome.problem =
          tensor.expected ? "bytes outside an output were written" : "bytes outside an input were written";
    if (tensor.expected)
      outcome.produced.push_back(tensor.bytes());
    else if (!tensor.as_before())
      outcome.problem = "an input was changed";
  }
  return outcome;
}
