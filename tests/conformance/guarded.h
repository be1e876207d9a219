// Memory between guard bytes: a write outside is noticed, and under AddressSanitizer a read, too.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__has_include)
#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>
#endif
#endif
#ifndef ASAN_POISON_MEMORY_REGION
#define ASAN_POISON_MEMORY_REGION(begin, size) ((void)(begin), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(begin, size) ((void)(begin), (void)(size))
#endif

class Guarded {
 public:
  static constexpr size_t guard = 64;
  static constexpr uint8_t fill = 0xa5;

  // `size` bytes that begin `off` bytes behind a 64-byte boundary, all of them `fill`.
  Guarded(size_t size, size_t off) : size_(size), total_((guard + off + size + guard + 63) / 64 * 64) {
    base_ = static_cast<uint8_t *>(std::aligned_alloc(64, total_));
    if (!base_) throw std::bad_alloc();
    std::memset(base_, fill, total_);
    data_ = base_ + guard + off;
    ASAN_POISON_MEMORY_REGION(base_, data_ - base_);
    ASAN_POISON_MEMORY_REGION(data_ + size_, base_ + total_ - (data_ + size_));
  }
  ~Guarded() {
    ASAN_UNPOISON_MEMORY_REGION(base_, total_);
    std::free(base_);
  }
  Guarded(const Guarded &) = delete;

  uint8_t *data() const { return data_; }
  bool untouched() const { return all_fill(data_, data_ + size_); }
  bool guards_hold() const {
    ASAN_UNPOISON_MEMORY_REGION(base_, total_);
    return all_fill(base_, data_) && all_fill(data_ + size_, base_ + total_);
  }

 private:
  static bool all_fill(const uint8_t *begin, const uint8_t *end) {
    for (; begin < end; begin++)
      if (*begin != fill) return false;
    return true;
  }
  size_t size_, total_;
  uint8_t *base_, *data_;
};
