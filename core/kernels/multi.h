// sum_squares_multi and scale_multi (docs/numerics.md, "Lists"), and the tree sums of whole tensors.
#ifndef PB_KERNELS_MULTI_H
#define PB_KERNELS_MULTI_H

#include "block.h"
#include "list.h"

namespace pb {

// The tree sum of each chunk, an element of pointer 1 per chunk of pointer 0. A chunk is an aligned power of two of
// elements, so the sums of chunks are summed by the same tree, and zeros behind the end change nothing.
struct SumChunks {
  enum : u32 { group_max = block_group_max, chunk = 8 * group_max };
  struct Args {
    List<2> list;  // the values, of any dtype; the sums, fp32
    i64 squares;   // not 0: of the squares
  };
  typedef BlockLocal Local;

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    const Chunk<2> c = chunk_of(&a.list, w.group());
    F8 x = load_part_as(c.p[0], chunk_dtype(c, 0), c.index * chunk + 8 * w.tid(), c.n, pointer_aligned(c, 0));
    if (a.squares) {
      PB_UNROLL
      for (u32 k = 0; k < 8; k++) x.v[k] = x.v[k] * x.v[k];
    }
    const float sum = block_sum(w, local, sum8(x), group_max);
    if (w.tid() == 0) ((PB_GLOBAL float *)c.p[1])[c.index] = sum;
  }
};

struct ScaleMulti {
  enum : u32 { group_max = 256, chunk = 16 * group_max };
  struct Args {
    List<1> list;
    PB_GLOBAL const float *factor;
  };
  typedef NoLocal Local;

  PB_FN void run(Wave w, PB_LOCAL Local *, Args a) {
    const Chunk<1> c = chunk_of(&a.list, w.group());
    const float factor = *a.factor;
    PB_UNROLL
    for (u32 part = 0; part < 2; part++) {
      const i64 first = c.index * chunk + 8 * (part * group_max + w.tid());
      F8 x = load_part_as(c.p[0], chunk_dtype(c, 0), first, c.n, pointer_aligned(c, 0));
      PB_UNROLL
      for (u32 k = 0; k < 8; k++) x.v[k] = x.v[k] * factor;
      store_part_as(c.p[0], chunk_dtype(c, 0), first, c.n, pointer_aligned(c, 0), x);
    }
  }
};

}  // namespace pb
#endif
