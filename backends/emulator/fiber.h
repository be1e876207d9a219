// Cooperative fibers: a stack of its own for every emulated thread, and a switch that stays in user space. x86-64 and
// AArch64 have their own few instructions, other machines use ucontext. AddressSanitizer is told of every switch.
#ifndef PB_EMULATOR_FIBER_H
#define PB_EMULATOR_FIBER_H

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define PB_FIBER_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PB_FIBER_ASAN
#endif
#endif

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(PB_FIBER_UCONTEXT)
#define PB_FIBER_UCONTEXT
#endif
#ifdef PB_FIBER_UCONTEXT
#include <ucontext.h>
#endif

namespace pb {
namespace emulator {

// Where a thread of control that does not run will go on. Default-constructed: for what runs on the stack of its OS
// thread. Must not move once it has been switched from or to.
struct Fiber {
#ifdef PB_FIBER_UCONTEXT
  ucontext_t context;
#else
  void *stack_pointer = nullptr;
#endif
#ifdef PB_FIBER_ASAN
  const void *bottom = nullptr;
  size_t size = 0;
  void *fake_stack = nullptr;
  Fiber *from = nullptr;  // who switched here last
#endif
};

// Lets the fiber begin with entry(arg), which must not return, on a stack of `size` bytes. What it did before is lost.
void begin(Fiber *fiber, char *stack, size_t size, void (*entry)(void *), void *arg);

// Saves the running thread of control in `from` and goes on with `to`.
void switch_fiber(Fiber *from, Fiber *to);

// `count` stacks of `size` bytes, a multiple of every page size, each with a page below it that must not be touched.
class Stacks {
 public:
  Stacks() = default;
  Stacks(size_t count, size_t size);  // throws std::bad_alloc
  ~Stacks();
  Stacks(Stacks &&other) noexcept;
  Stacks &operator=(Stacks &&other) noexcept;
  char *operator[](size_t index) const;
  size_t count() const { return count_; }

 private:
  size_t bytes() const;
  char *memory_ = nullptr;
  size_t count_ = 0, size_ = 0;
};

}  // namespace emulator
}  // namespace pb
#endif
