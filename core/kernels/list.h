// Lists of tensors in one launch, as the optimizers and the clipping of gradients take them. Each tensor is cut into
// chunks, a group works on one chunk, and the list itself travels in the arguments of the launch: no table in device
// memory, no copy to it.
#ifndef PB_KERNELS_LIST_H
#define PB_KERNELS_LIST_H

#include "../simt/wave.h"

namespace pb {

enum Dtype : u32 { dtype_none, dtype_fp32, dtype_fp16, dtype_bf16, dtype_u8 };

// POINTERS per tensor: up to 8, each of its own dtype. Other arguments beside the list have 512 bytes, and its two
// numbers 64.
template <u32 POINTERS>
struct List {
  enum : u32 { pointers = POINTERS, capacity = (PB_ARGUMENT_BYTES - 576) / (8 * (POINTERS + 3)) };
  i64 count;  // tensors here
  i64 base;   // the place of the first of them in the list of the caller
  i64 first_group[capacity];
  i64 n[capacity];     // elements
  i64 kind[capacity];  // of each pointer: its Dtype in bits 4k ... 4k + 3, and bit 32 + k if aligned to 16 bytes
  PB_GLOBAL u8 *p[capacity][POINTERS];
};

// What a group works on: one chunk of a tensor.
template <u32 POINTERS>
struct Chunk {
  PB_GLOBAL u8 *p[POINTERS];
  u32 dtypes, aligned;
  i64 place;  // of the tensor in the list of the caller
  i64 index;  // of the chunk in its tensor
  i64 n;      // elements of the tensor
};
template <u32 POINTERS>
PB_FN u32 chunk_dtype(Chunk<POINTERS> c, u32 k) {
  return (c.dtypes >> (4u * k)) & 15u;
}
// To 16 bytes.
template <u32 POINTERS>
PB_FN bool pointer_aligned(Chunk<POINTERS> c, u32 k) {
  return ((c.aligned >> k) & 1u) != 0;
}

// The chunk that is `group`, of the tensor t.
template <u32 POINTERS>
PB_FN Chunk<POINTERS> chunk_in(PB_PRIVATE const List<POINTERS> *list, u32 t, i64 group) {
  Chunk<POINTERS> c;
  PB_UNROLL
  for (u32 k = 0; k < POINTERS; k++) c.p[k] = list->p[t][k];
  c.dtypes = u32(list->kind[t]);
  c.aligned = u32(list->kind[t] >> 32);
  c.place = list->base + t;
  c.index = group - list->first_group[t];
  c.n = list->n[t];
  return c;
}

// In the last tensor whose first group is not behind this one: a tensor without groups is never found.
// By pointer, because nvcc copies a list by value into local memory. capacity < 128.
template <u32 POINTERS>
PB_FN Chunk<POINTERS> chunk_of(PB_PRIVATE const List<POINTERS> *list, i64 group) {
#ifdef PB_INDEX_BY_CONSTANTS
  Chunk<POINTERS> c = chunk_in(list, 0, group);
  PB_UNROLL
  for (u32 t = 1; t < List<POINTERS>::capacity; t++)
    if (t < u32(list->count) && list->first_group[t] <= group) c = chunk_in(list, t, group);
  return c;
#else
  u32 t = 0;
  for (u32 step = 64; step; step >>= 1)
    if (t + step < u32(list->count) && list->first_group[t + step] <= group) t += step;
  return chunk_in(list, t, group);
#endif
}

// load_part and store_part of a dtype that is known when it runs: the same branch for the whole group.
PB_FN F8 load_part_as(PB_GLOBAL const u8 *p, u32 dtype, i64 first, i64 n, bool aligned) {
  if (dtype == dtype_fp32) return load_part((PB_GLOBAL const float *)p, first, n, aligned);
  if (dtype == dtype_fp16) return load_part((PB_GLOBAL const Fp16 *)p, first, n, aligned);
  return load_part((PB_GLOBAL const Bf16 *)p, first, n, aligned);
}
PB_FN void store_part_as(PB_GLOBAL u8 *p, u32 dtype, i64 first, i64 n, bool aligned, F8 x) {
  if (dtype == dtype_fp32)
    store_part((PB_GLOBAL float *)p, first, n, aligned, x);
  else if (dtype == dtype_fp16)
    store_part((PB_GLOBAL Fp16 *)p, first, n, aligned, x);
  else
    store_part((PB_GLOBAL Bf16 *)p, first, n, aligned, x);
}

}  // namespace pb
#endif
