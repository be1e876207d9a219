// What SYCL's entry points are made of: the kernels, what they multiply with, and which of them want more registers.
// -DPB_XMX is for GPUs with matrix engines.
#ifndef PB_KERNELS_SYCL_H
#define PB_KERNELS_SYCL_H

#include "../simt/sycl.h"
#include "kernels.h"
#include "../simt/tile_xmx.h"

namespace pb {

// What a device multiplies with. One name, as the host launches the kernel by its name; it needs the shape alone.
#if defined(PB_XMX) || !defined(__SYCL_DEVICE_ONLY__)
template <class Word>
struct SyclTile : XmxTile<Word, PB_SUB_GROUP> {};
#else
template <class Word>
struct SyclTile : FmaTile {};
template <>
struct SyclTile<Int8Word> : Dot4Tile {};
#endif
typedef MatrixTiles<SyclTile> SyclTiles;
static_assert(u32(SyclTile<Fp16Word>::group_rows) == FmaTile::group_rows &&
                  u32(SyclTile<Fp16Word>::group_columns) == FmaTile::group_columns &&
                  u32(SyclTile<Fp16Word>::threads) == FmaTile::threads &&
                  sizeof(Slabs<SyclTile<Fp16Word>>) == sizeof(Slabs<FmaTile>) &&
                  u32(SyclTile<Int8Word>::group_rows) == Dot4Tile::group_rows &&
                  u32(SyclTile<Int8Word>::group_columns) == Dot4Tile::group_columns &&
                  u32(SyclTile<Int8Word>::threads) == Dot4Tile::threads &&
                  sizeof(Slabs<SyclTile<Int8Word>>) == sizeof(Slabs<Dot4Tile>),
              "the shape of a launch");

// Kernels that spill with the 128 registers of a hardware thread (tests/simt/intel.json): they ask for all 256, with
// which half as many threads run at a time. The first has the sums of two products at once.
template <class K>
struct IsLarge {
  enum : bool { value = false };
};
template <class Ints, class Floats, class T>
struct IsLarge<GemmLinearInt8<Ints, Floats, T>> {
  enum : bool { value = true };
};
template <class Word, class A, class Finish>
struct IsLarge<Gemm<SyclTile<Word>, A, ScaledBytes, true, Finish>> {
  enum : bool { value = true };
};

}  // namespace pb

// An entry point of a kernel: a free function, because compilation by libsycl finds no other. Its parameters are the
// kernel's arguments, by value, and a Local in the memory of a group; each in a type that can be declared by its name
// alone, which DPC++ wants of them. Always inlined: the kernel that DPC++ makes would call it, and Intel's GPUs call
// through a stack in memory, with a copy of the arguments there.
#define PB_SYCL_PROPERTY(property) SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((property))
#define PB_SYCL_ENTRY(name, ...) \
  typedef __VA_ARGS__ name##_kernel; \
  struct name##_args { \
    name##_kernel::Args args; \
  }; \
  struct name##_local { \
    name##_kernel::Local local; \
  }; \
  extern "C" __attribute__((always_inline)) SYCL_EXTERNAL PB_SYCL_PROPERTY( \
      sycl::ext::oneapi::experimental::nd_range_kernel<1>) \
      PB_SYCL_PROPERTY(sycl::ext::oneapi::experimental::sub_group_size<PB_SUB_GROUP>) void name( \
          name##_args a, sycl::ext::oneapi::experimental::work_group_memory<name##_local> l) { \
    name##_kernel::run(pb::Wave{sycl::ext::oneapi::this_work_item::get_nd_item<1>()}, &(&l)->local, a.args); \
  }

#endif
