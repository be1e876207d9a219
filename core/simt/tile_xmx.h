// Intel's matrix engines (XMX): 8 x WIDTH of C from eight words of k, that is k16 of halves and k32 of bytes, by a
// sub-group of 8 (Xe-HPG: Arc A, dg2) or of 16 (Xe-HPC and Xe2: pvc, Arc B). A lane holds
//
//   A  of each of eight rows: at 8 lanes word lane, at 16 the 16 bits of number lane
//   B  eight words of column lane
//   C  eight sums: row i, column lane
//
// (cl_intel_subgroup_matrix_multiply_accumulate. joint_matrix becomes the same instruction, but does not say where in a
// lane an element is, which what is done to the sums needs to know.)
#ifndef PB_SIMT_TILE_XMX_H
#define PB_SIMT_TILE_XMX_H

#include "tile_matrix.h"

#ifdef PB_XMX
namespace pb {
typedef float Floats8 __attribute__((ext_vector_type(8)));
typedef i32 Ints8 __attribute__((ext_vector_type(8)));
typedef int16_t Shorts8 __attribute__((ext_vector_type(8)));
}  // namespace pb
#define PB_XMX_MULTIPLY(Part) \
  SYCL_EXTERNAL pb::Floats8 intel_sub_group_f16_f16_matrix_mad_k16(Part, pb::Ints8, pb::Floats8); \
  SYCL_EXTERNAL pb::Floats8 intel_sub_group_bf16_bf16_matrix_mad_k16(Part, pb::Ints8, pb::Floats8); \
  SYCL_EXTERNAL pb::Ints8 intel_sub_group_i8_i8_matrix_mad_k32(Part, pb::Ints8, pb::Ints8);
PB_XMX_MULTIPLY(pb::Ints8)
PB_XMX_MULTIPLY(pb::Shorts8)
#endif

namespace pb {

// A lane's part of a row of A.
template <u32 WIDTH>
struct XmxPart;
template <>
struct XmxPart<8> {
  typedef u32 Type;
};
template <>
struct XmxPart<16> {
  typedef u16 Type;
};

// Slabs and the shape of a group are those of LaneTile.
template <class Word, u32 WIDTH>
struct XmxTile : MatrixTile<Word> {
  typedef typename XmxPart<WIDTH>::Type Part;
  enum : u32 {
    per_word = Word::per_word,
    words = 8,
    threads = 256,
    group_rows = 64,
    group_columns = 64,
    slab_words = per_word == 2 ? 32 : 16,
    chain_words = 16,
    stride = slab_words + 4,
    columns = WIDTH,
    repeat_m = 1,
    repeat_n = 2,
    sums = 8,
    parts_of_word = WIDTH / 8
  };
  PB_FN u32 rows(Wave) { return 8; }
  PB_FN u32 row(Wave, u32 i) { return i; }
  PB_FN u32 column(Wave w, u32) { return w.lane(); }
  struct Sums {
    typename Word::Sum v[sums];
  };
  struct A {
    Part of[8];
  };
  struct B {
    u32 of[words];
  };

  PB_FN A load_a(Wave w, PB_LOCAL const u32 *a, u32 pitch) {
    A r;
    PB_UNROLL
    for (u32 i = 0; i < 8; i++)
      r.of[i] = Part(a[i * pitch + w.lane() / parts_of_word] >> (w.lane() % parts_of_word * 16u));
    return r;
  }
  PB_FN B load_b(Wave w, PB_LOCAL const u32 *b, u32 pitch) {
    B r;
    PB_UNROLL
    for (u32 h = 0; h < 2; h++) {
      const U4 x = load16(b + w.lane() * pitch + 4u * h);
      PB_UNROLL
      for (u32 k = 0; k < 4; k++) r.of[4u * h + k] = x.v[k];
    }
    return r;
  }

#ifdef PB_XMX
  static_assert(WIDTH == PB_SUB_GROUP, "the engine's sub-group");
  PB_FN Floats8 instruction(Fp16Word, A a, B b, Floats8 c) {
    return intel_sub_group_f16_f16_matrix_mad_k16(vector(a), vector(b), c);
  }
  PB_FN Floats8 instruction(Bf16Word, A a, B b, Floats8 c) {
    return intel_sub_group_bf16_bf16_matrix_mad_k16(vector(a), vector(b), c);
  }
  PB_FN Ints8 instruction(Int8Word, A a, B b, Ints8 c) {
    return intel_sub_group_i8_i8_matrix_mad_k32(vector(a), vector(b), c);
  }
  template <class To, class From>
  PB_FN To bits_as(From x) {
    return sycl::bit_cast<To>(x);
  }
  PB_FN auto vector(A a) { return vector(a, Part()); }
  PB_FN Ints8 vector(A a, u32) { return bits_as<Ints8>(a); }
  PB_FN Shorts8 vector(A a, u16) { return bits_as<Shorts8>(a); }
  PB_FN Ints8 vector(B b) { return bits_as<Ints8>(b); }
  PB_FN Floats8 sums_of(Sums c, float) { return bits_as<Floats8>(c); }
  PB_FN Ints8 sums_of(Sums c, i32) { return bits_as<Ints8>(c); }
  PB_FN Sums multiply(Wave, A a, B b, Sums c) {
    return bits_as<Sums>(instruction(Word(), a, b, sums_of(c, typename Word::Sum())));
  }
#else
  PB_FN Sums multiply(Wave w, A a, B b, Sums c) {
    PB_UNROLL
    for (u32 k = 0; k < words; k++) {
      PB_UNROLL
      for (u32 i = 0; i < sums; i++) {
        u32 left = w.shuffle(a.of[i], k * parts_of_word);
        if (parts_of_word == 2) left |= w.shuffle(a.of[i], k * parts_of_word + 1u) << 16;
        c.v[i] = Word::add(left, b.of[k], c.v[i]);
      }
    }
    return c;
  }
#endif
};

template <class Word>
using Xmx8 = XmxTile<Word, 8>;
template <class Word>
using Xmx16 = XmxTile<Word, 16>;

}  // namespace pb
#endif
