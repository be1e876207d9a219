// The entry points of the Metal backend: those of core/kernels, and one that binds arguments for all of them.
#include "../../core/simt/metal.h"
#include "../../core/simt/tile_simdgroup.h"
#include "../../core/kernels/kernels.h"

#define PB_ENTRY PB_METAL_ENTRY
#define PB_TILES pb::SimdgroupTiles
#include "../../core/kernels/entries.def"

#define PB_TENSOR(k) device uchar *t##k [[buffer(k)]]
#define PB_TENSORS(PB) \
  PB(3), PB(4), PB(5), PB(6), PB(7), PB(8), PB(9), PB(10), PB(11), PB(12), PB(13), PB(14), PB(15), PB(16), PB(17), \
      PB(18), PB(19), PB(20), PB(21), PB(22), PB(23), PB(24), PB(25), PB(26), PB(27), PB(28), PB(29), PB(30)
#define PB_POINTER(k) t##k

// Writes the arguments of a kernel, a thread for each word: with slot 0 the word itself, else the address of byte
// `word` of tensor slot - 1. Runs before the kernel, in the same encoder, and names every tensor that the kernel uses.
kernel void bind_arguments(device ulong *args [[buffer(0)]], constant long *words [[buffer(1)]],
                           constant uchar *slots [[buffer(2)]], PB_TENSORS(PB_TENSOR),
                           uint i [[thread_position_in_grid]]) {
  device uchar *tensors[28] = {PB_TENSORS(PB_POINTER)};
  const uint slot = slots[i];
  args[i] = slot ? (ulong)(tensors[slot - 1u] + words[i]) : (ulong)words[i];
}
