#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <utility>

#ifdef PB_FIBER_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef PB_FIBER_UCONTEXT
// polybit_fiber_switch(void **save, void *load): pushes the registers that a call preserves, exchanges the stack
// pointer, pops. A new stack holds zeros for them, but for the two with which polybit_fiber_begin calls entry(arg). The
// floating-point control words stay as they are: no kernel changes them.
#ifdef __APPLE__
#define PB_SYMBOL(name) "_" #name
#define PB_FUNCTION(name) ".text\n.p2align 4\n.private_extern _" #name "\n_" #name ":\n"
#else
#define PB_SYMBOL(name) #name
#define PB_FUNCTION(name) \
  ".text\n.p2align 4\n.globl " #name "\n.hidden " #name "\n.type " #name ", %function\n" #name ":\n"
#endif
#ifdef __x86_64__
asm(PB_FUNCTION(polybit_fiber_switch) R"(
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)" PB_FUNCTION(polybit_fiber_begin) R"(
  movq %r12, %rdi
  callq *%r13
  ud2
)");
// r15 r14 r13 r12 rbx rbp return
enum { saved_words = 7, entry_word = 2, arg_word = 3, return_word = 6 };
#else
asm(PB_FUNCTION(polybit_fiber_switch) R"(
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)" PB_FUNCTION(polybit_fiber_begin) R"(
  mov x0, x19
  blr x20
  brk #0
)");
enum { saved_words = 20, arg_word = 0, entry_word = 1, return_word = 11 };
#endif
extern "C" void polybit_fiber_switch(void **save, void *load);
extern "C" void polybit_fiber_begin();
#endif

namespace pb {
namespace emulator {
namespace {

constexpr size_t guard = 64 * 1024;  // a page or more, whatever the machine's pages are

// After every switch, on the new stack: `me` is the fiber that goes on.
void arrived(Fiber *me) {
#ifdef PB_FIBER_ASAN
  __sanitizer_finish_switch_fiber(me->fake_stack, &me->from->bottom, &me->from->size);
#else
  (void)me;
#endif
}

struct Start {
  Fiber *fiber;
  void (*entry)(void *);
  void *arg;
};

// The Start lies at the top of the fiber's own stack.
void first(Start *start) {
  arrived(start->fiber);
  start->entry(start->arg);
}

#ifdef PB_FIBER_UCONTEXT
// makecontext passes on int alone.
void first_of_halves(unsigned low, unsigned high) {
  first(reinterpret_cast<Start *>(static_cast<uintptr_t>(uint64_t(high) << 32 | low)));
}
#endif

}  // namespace

void begin(Fiber *fiber, char *stack, size_t size, void (*entry)(void *), void *arg) {
#ifdef PB_FIBER_ASAN
  __asan_unpoison_memory_region(stack, size);  // what an abandoned fiber left there
  fiber->bottom = stack;
  fiber->size = size;
  fiber->fake_stack = nullptr;
#endif
  char *top = stack + size - 64;
  Start *start = new (top) Start{fiber, entry, arg};
#ifdef PB_FIBER_UCONTEXT
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = stack;
  fiber->context.uc_stack.ss_size = static_cast<size_t>(top - stack);
  fiber->context.uc_link = nullptr;
  const uint64_t bits = reinterpret_cast<uintptr_t>(start);
  makecontext(&fiber->context, reinterpret_cast<void (*)()>(first_of_halves), 2, static_cast<unsigned>(bits),
              static_cast<unsigned>(bits >> 32));
#else
  uintptr_t *words = reinterpret_cast<uintptr_t *>(top) - saved_words;
  for (int i = 0; i < saved_words; i++) words[i] = 0;
  words[arg_word] = reinterpret_cast<uintptr_t>(start);
  words[entry_word] = reinterpret_cast<uintptr_t>(first);
  words[return_word] = reinterpret_cast<uintptr_t>(polybit_fiber_begin);
  fiber->stack_pointer = words;
#endif
}

void switch_fiber(Fiber *from, Fiber *to) {
#ifdef PB_FIBER_ASAN
  to->from = from;
  __sanitizer_start_switch_fiber(&from->fake_stack, to->bottom, to->size);
#endif
#ifdef PB_FIBER_UCONTEXT
  swapcontext(&from->context, &to->context);
#else
  polybit_fiber_switch(&from->stack_pointer, to->stack_pointer);
#endif
  arrived(from);
}

Stacks::Stacks(size_t count, size_t size) : count_(count), size_(size) {
  // mmap, not the heap: an untouched stack costs nothing.
  void *memory = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char *>(memory);
  for (size_t i = 0; i < count; i++) mprotect((*this)[i] - guard, guard, PROT_NONE);
}

Stacks::~Stacks() {
  if (memory_) munmap(memory_, bytes());
}

Stacks::Stacks(Stacks &&other) noexcept { *this = std::move(other); }

Stacks &Stacks::operator=(Stacks &&other) noexcept {
  std::swap(memory_, other.memory_);
  std::swap(count_, other.count_);
  std::swap(size_, other.size_);
  return *this;
}

char *Stacks::operator[](size_t index) const { return memory_ + index * (guard + size_) + guard; }

size_t Stacks::bytes() const { return count_ * (guard + size_); }

}  // namespace emulator
}  // namespace pb
