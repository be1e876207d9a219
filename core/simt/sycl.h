// The adaptor for SYCL (DPC++). A wave is a sub-group, whose size the entry point requires: compile with
// -DPB_SUB_GROUP=8, 16, 32 or 64. Also plain C++ for the host, which gets the types of the kernels from it.
#ifndef PB_SIMT_SYCL_H
#define PB_SIMT_SYCL_H

#include <stdint.h>

#ifdef __SYCL_DEVICE_ONLY__  // all that kernels need; the whole of SYCL takes twice as long to compile
#include <sycl/bit_cast.hpp>
#include <sycl/builtins.hpp>
#include <sycl/ext/oneapi/experimental/work_group_memory.hpp>
#include <sycl/ext/oneapi/free_function_queries.hpp>
#include <sycl/ext/oneapi/kernel_properties/properties.hpp>
#include <sycl/group_algorithm.hpp>
#include <sycl/group_barrier.hpp>
#include <sycl/nd_item.hpp>
#else
#include <sycl/sycl.hpp>
#endif
#ifdef __clang__
#pragma clang fp contract(off)
#define PB_UNROLL _Pragma("unroll")
#else
#define PB_UNROLL
#endif

#ifndef PB_SUB_GROUP
#define PB_SUB_GROUP 16
#endif

static_assert(PB_SUB_GROUP == 8 || PB_SUB_GROUP == 16 || PB_SUB_GROUP == 32 || PB_SUB_GROUP == 64,
              "the kernels are for waves of 8, 16, 32, 64");

#define PB_ADAPTOR
#define PB_FN static inline
#define PB_GLOBAL
#define PB_LOCAL
#define PB_PRIVATE
#define PB_NO_UNROLL
#define PB_NARROWEST 8
#define PB_INDEX_BY_CONSTANTS   // IGC copies an argument that a variable indexes to memory, for every lane
#define PB_ARGUMENT_BYTES 2048  // what Intel's GPUs take

namespace pb {
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef int32_t i32;
typedef int64_t i64;

PB_FN float as_float(u32 bits) { return sycl::bit_cast<float>(bits); }
PB_FN u32 as_u32(float x) { return sycl::bit_cast<u32>(x); }
PB_FN float div_rn(float a, float b) { return a / b; }  // with -foffload-fp32-prec-div, and asked of a GPU's driver
PB_FN float sqrt_rn(float a) { return sycl::sqrt(a); }  // with -foffload-fp32-prec-sqrt
PB_FN float fma_rn(float a, float b, float c) { return sycl::fma(a, b, c); }
PB_FN i32 round_rn(float x) { return i32(sycl::rint(x)); }

// GCC's vectors, so that the host's compiler reads this, too.
typedef u32 Words4 __attribute__((vector_size(16), may_alias));
typedef u32 Words2 __attribute__((vector_size(8), may_alias));
typedef u32 Word __attribute__((may_alias));
struct U4 {
  u32 v[4];
};
struct U2 {
  u32 v[2];
};
PB_FN U4 load16(const u32 *p) {
  const Words4 a = *(const Words4 *)p;
  return U4{{a[0], a[1], a[2], a[3]}};
}
PB_FN void store16(u32 *p, U4 a) { *(Words4 *)p = Words4{a.v[0], a.v[1], a.v[2], a.v[3]}; }
PB_FN U2 load8(const u8 *p) {
  const Words2 a = *(const Words2 *)p;
  return U2{{a[0], a[1]}};
}
PB_FN void store8(u8 *p, U2 a) { *(Words2 *)p = Words2{a.v[0], a.v[1]}; }
PB_FN u32 load4(const u8 *p) { return *(const Word *)p; }
PB_FN void store4(u8 *p, u32 word) { *(Word *)p = word; }
PB_FN void set_flag(u8 *p) { *(volatile u8 *)p = 1; }
PB_FN i32 dot4(u32 a, u32 b, i32 c) {
  PB_UNROLL
  for (u32 k = 0; k < 32; k += 8) c += i32(int8_t(a >> k)) * i32(int8_t(b >> k));
  return c;
}

#ifdef PB_SYCL_WAVE  // of an implementation whose sub-groups are no waves
#include PB_SYCL_WAVE
#else
struct Wave {
  sycl::nd_item<1> item;
  u32 tid() const { return u32(item.get_local_linear_id()); }
  u32 group() const { return u32(item.get_group(0)); }
  u32 group_dim() const { return u32(item.get_local_range(0)); }
  u32 lane() const { return tid() % width(); }
  u32 width() const { return PB_SUB_GROUP; }
  void barrier() const { sycl::group_barrier(item.get_group()); }
  u32 shuffle_xor(u32 value, u32 mask) const { return sycl::permute_group_by_xor(item.get_sub_group(), value, mask); }
  u32 shuffle(u32 value, u32 source) const { return sycl::select_from_group(item.get_sub_group(), value, source); }
};
#endif
}  // namespace pb

#include "wave.h"
#endif
