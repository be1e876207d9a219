// What threads that share a block find out together. A block is a power of two of neighbouring threads, from one to a
// whole group; up to the width of a wave they shuffle, beyond it their waves meet in the memory of the group, at the
// narrowest width in two steps.
#ifndef PB_KERNELS_BLOCK_H
#define PB_KERNELS_BLOCK_H

#include "../simt/wave.h"
#include "../math/encode.h"

namespace pb {

enum : u32 { block_group_max = 512 };

struct BlockLocal {
  u32 of_unit[block_group_max / PB_NARROWEST];
};

// Reductions work on bits. A sum adds neighbours first, then neighbouring sums: the tree sum of docs/numerics.md.
struct Max {
  PB_FN u32 of(u32 a, u32 b) { return max_u32(a, b); }
};
struct Sum {
  PB_FN u32 of(u32 a, u32 b) { return as_u32(as_float(a) + as_float(b)); }
};

// Over each aligned run of `lanes` lanes, a power of two up to the width; every lane of the run gets the result.
template <class Reduction>
PB_FN u32 wave_reduce(Wave w, u32 value, u32 lanes) {
  for (u32 mask = 1; mask < lanes; mask <<= 1) value = Reduction::of(value, w.shuffle_xor(value, mask));
  return value;
}

// The same of values that each run of `unit` threads has in common, through the memory of the group; `unit` is a
// multiple of the width, and there are at most twice as many units as lanes.
template <class Reduction>
PB_FN u32 units_reduce(Wave w, PB_LOCAL BlockLocal *local, u32 value, u32 unit, u32 threads) {
  const u32 units = threads / unit;  // of one block; 0 if a unit holds several
  if (units < 2) return value;
  if (w.tid() % unit == 0) local->of_unit[w.tid() / unit] = value;
  w.barrier();
  // As many lanes as there are units read one of them each, or two if a wave has not that many lanes.
  const bool two = units > w.width();
  const u32 lanes = two ? units >> 1 : units, mine = w.lane() & (lanes - 1u);
  const u32 first = (w.tid() & ~(threads - 1u)) / unit + (two ? 2 * mine : mine);
  value = local->of_unit[first];
  if (two) value = Reduction::of(value, local->of_unit[first + 1]);
  value = wave_reduce<Reduction>(w, value, lanes);
  w.barrier();  // of_unit may be used again
  return value;
}

// Over each aligned run of `threads` threads, the same for the whole group; every thread of the group calls it.
template <class Reduction>
PB_FN u32 block_reduce(Wave w, PB_LOCAL BlockLocal *local, u32 value, u32 threads) {
  value = wave_reduce<Reduction>(w, value, min_u32(threads, w.width()));
  u32 unit = w.width();
  const u32 most = 2u * unit * unit;  // threads whose waves can meet at once
  if (most < block_group_max) {
    value = units_reduce<Reduction>(w, local, value, unit, min_u32(threads, most));
    unit = most;
  }
  return units_reduce<Reduction>(w, local, value, unit, threads);
}

PB_FN float block_sum(Wave w, PB_LOCAL BlockLocal *local, float value, u32 threads) {
  return as_float(block_reduce<Sum>(w, local, as_u32(value), threads));
}

// The tree sum of a thread's own values.
PB_FN float sum8(F8 x) { return ((x.v[0] + x.v[1]) + (x.v[2] + x.v[3])) + ((x.v[4] + x.v[5]) + (x.v[6] + x.v[7])); }

PB_FN u32 magnitude_bits8(F8 x) {
  u32 bits = 0;
  PB_UNROLL
  for (u32 k = 0; k < 8; k++) bits = max_u32(bits, magnitude_bits(x.v[k]));
  return bits;
}

}  // namespace pb
#endif
