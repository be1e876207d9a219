// Launchers of sum_squares_multi and scale_multi, and tree sums for other ops.
#ifndef PB_LAUNCH_MULTI_H
#define PB_LAUNCH_MULTI_H

#include "list.h"
#include "../kernels/multi.h"

namespace pb {
namespace launch {

// An array in device memory that is to be summed.
struct Summed {
  const void *p;
  Dtype dtype;
  i64 n;
};

inline i64 sum_chunks(i64 n) { return ceil_div(n, SumChunks::chunk); }
inline i64 sum_room(i64 chunks) { return ceil_div(chunks, 4) * 4; }  // floats, so that each array begins at 16 bytes

// The floats of scratch that tree_sums wants. `summed` is a function of the place: 0 ... count - 1.
template <class F>
i64 tree_sums_scratch(i64 count, const F &summed) {
  i64 room = 0;
  for (i64 t = 0; t < count; t++)
    for (i64 n = sum_chunks(summed(t).n); n > 1; n = sum_chunks(n)) room += sum_room(n);
  return room;
}

// y[t] = the tree sum of array t, or of its squares: first over its chunks, then over the sums of those, until one is
// left.
template <class Device, class F>
pb_status tree_sums(pb_context *ctx, i64 count, const F &summed, bool squares, float *y, float *scratch) {
  SumChunks::Args args = {};
  args.squares = squares;
  float *sums = nullptr, *next = scratch;
  bool more = true;
  for (u32 level = 0; more; level++) {
    more = false;
    float *read = sums;
    sums = next;
    PB_TRY((launch_list<Device, SumChunks>(ctx, count, args, [&](ListEntry<2> entry) -> i64 {
      Summed x = summed(entry.place());
      for (u32 k = 0; k < level; k++) x.n = sum_chunks(x.n);
      if (level) {
        if (x.n <= 1) return 0;
        x.p = read, x.dtype = dtype_fp32;
        read += sum_room(x.n);
      }
      const i64 chunks = x.n ? sum_chunks(x.n) : 1;  // the sum of nothing is 0
      entry.elements(x.n);
      entry.pointer(0, x.p, x.dtype);
      entry.pointer(1, chunks > 1 ? next : y + entry.place(), dtype_fp32);
      if (chunks > 1) next += sum_room(chunks), more = true;
      return chunks;
    })));
    args.squares = 0;
  }
  return PB_OK;
}

template <class Device>
pb_status sum_squares_multi(pb_context *ctx, const pb_sum_squares_multi_args *a) {
  const auto summed = [&](i64 t) {
    const DLTensor *x = a->xs->tensors[t];
    return Summed{data<const u8>(x), dtype_of(x), numel(x)};
  };
  Scratch scratch(ctx);
  float *room = scratch.take<float>(tree_sums_scratch(a->xs->count, summed));
  PB_TRY(scratch.status());
  return tree_sums<Device>(ctx, a->xs->count, summed, true, data<float>(a->y), room);
}

template <class Device>
pb_status scale_multi(pb_context *ctx, const pb_scale_multi_args *a) {
  ScaleMulti::Args args = {};
  args.factor = data<const float>(a->factor);
  return launch_list<Device, ScaleMulti>(ctx, a->xs->count, args, [&](ListEntry<1> entry) {
    const DLTensor *x = a->xs->tensors[entry.place()];
    entry.elements(numel(x));
    entry.tensor(0, x);
    return ceil_div(numel(x), ScaleMulti::chunk);
  });
}

}  // namespace launch
}  // namespace pb
#endif
