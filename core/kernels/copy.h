// Bytes as they are: pack_kbit and unpack_kbit.
#ifndef PB_KERNELS_COPY_H
#define PB_KERNELS_COPY_H

#include "../simt/wave.h"

namespace pb {

// 16 bytes a thread.
struct CopyBytes {
  enum : u32 { group_max = 256 };
  struct Args {
    PB_GLOBAL const u8 *from;
    PB_GLOBAL u8 *to;
    i64 n;
    i64 aligned;  // both to 16 bytes
  };
  typedef NoLocal Local;

  PB_FN void run(Wave w, PB_LOCAL Local *, Args a) {
    const i64 first = (i64(w.group()) * w.group_dim() + w.tid()) * 16;
    if (a.aligned && first + 16 <= a.n) {
      store16((PB_GLOBAL u32 *)(a.to + first), load16((PB_GLOBAL const u32 *)(a.from + first)));
    } else {
      for (u32 k = 0; k < 16; k++)
        if (first + k < a.n) a.to[first + k] = a.from[first + k];
    }
  }
};

}  // namespace pb
#endif
