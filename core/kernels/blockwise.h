// quantize_blockwise, dequantize_blockwise (docs/numerics.md, "8-bit blockwise"), quantize_absmax and dequantize_absmax
// ("Double quantization of absmax"). A thread owns 8 neighbouring values.
#ifndef PB_KERNELS_BLOCKWISE_H
#define PB_KERNELS_BLOCKWISE_H

#include "block.h"
#include "code256.h"
#include "weight.h"

namespace pb {

struct BlockwiseLocal {
  BlockLocal block;
  Code256 code;
};
struct BlockwiseOut {
  PB_GLOBAL u8 *q;
  PB_GLOBAL float *absmax;
  i64 n, block_log2;
  i64 aligned;  // q to 8 bytes, and what is read to 16
};

// The codes of elements first ... first + 7, zeros behind the end; every thread of the group calls it.
PB_FN void quantize_block8(Wave w, PB_LOCAL BlockwiseLocal *local, F8 x, i64 first, BlockwiseOut out) {
  const u32 lanes = u32(1) << (out.block_log2 - 3);
  const u32 bits = block_reduce<Max>(w, &local->block, magnitude_bits8(x), lanes);
  store_codes8(out.q, first, out.n, out.aligned != 0, code256_of8(&local->code, x, inverse_absmax(bits)));
  if (first < out.n && (w.tid() & (lanes - 1u)) == 0) out.absmax[first >> out.block_log2] = stored_absmax(bits);
}

template <class T>
struct QuantizeBlockwise {
  enum : u32 { group_max = block_group_max };
  struct Args {
    PB_GLOBAL const T *x;
    PB_GLOBAL const float *code;
    BlockwiseOut out;
  };
  typedef BlockwiseLocal Local;

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    const i64 first = (i64(w.group()) * w.group_dim() + w.tid()) * 8;
    const F8 x = load_part(a.x, first, a.out.n, a.out.aligned != 0);
    load_code256(w, &local->code, a.code, false);
    w.barrier();
    quantize_block8(w, local, x, first, a.out);
  }
};

template <class T>
struct DequantizeBlockwise {
  enum : u32 { group_max = 256 };
  struct Args {
    PB_GLOBAL const u8 *q;
    PB_GLOBAL const float *absmax, *code;
    PB_GLOBAL T *y;
    i64 n, block_log2;
    i64 aligned;  // q to 8 bytes, y to 16
  };
  struct Local {
    float value[256];
  };

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    for (u32 i = w.tid(); i < 256u; i += w.group_dim()) local->value[i] = a.code[i];
    w.barrier();
    const i64 first = (i64(w.group()) * w.group_dim() + w.tid()) * 8;
    if (first < a.n) {
      const U2 q = load_codes8(a.q, first, a.n, a.aligned != 0);
      const float scale = a.absmax[first >> a.block_log2];
      store_part(a.y, first, a.n, a.aligned != 0, values8(local->value, q, scale));
    }
  }
};

// After the sum over all of absmax: the differences from the mean, in blocks of 256.
struct QuantizeAbsmax {
  enum : u32 { group_max = 256 };
  struct Args {
    PB_GLOBAL const float *absmax, *sum, *code;
    PB_GLOBAL float *nested_offset;
    BlockwiseOut out;
  };
  typedef BlockwiseLocal Local;

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    const i64 first = (i64(w.group()) * w.group_dim() + w.tid()) * 8;
    F8 x = load_part(a.absmax, first, a.out.n, a.out.aligned != 0);
    const float mean = a.out.n ? div_rn(*a.sum, float(a.out.n)) : 0.0f;
    if (first == 0) *a.nested_offset = mean;
    PB_UNROLL
    for (u32 k = 0; k < 8; k++) x.v[k] = first + k < a.out.n ? x.v[k] - mean : 0.0f;
    load_code256(w, &local->code, a.code, false);
    w.barrier();
    quantize_block8(w, local, x, first, a.out);
  }
};

struct DequantizeAbsmax {
  enum : u32 { group_max = 256 };
  struct Args {
    KbitWeight weight;  // its scales alone
    PB_GLOBAL float *absmax;
    i64 n;
    i64 aligned;  // the codes to 8 bytes, absmax to 16
  };
  typedef NoLocal Local;

  PB_FN void run(Wave w, PB_LOCAL Local *, Args a) {
    const i64 first = (i64(w.group()) * w.group_dim() + w.tid()) * 8;
    if (first < a.n) {
      const U2 q = load_codes8(a.weight.absmax_q, first, a.n, a.aligned != 0);
      F8 y;
      PB_UNROLL
      for (u32 k = 0; k < 8; k++) y.v[k] = first + k < a.n ? nested_scale(a.weight, byte_of(q, k), first + k) : 0.0f;
      store_part(a.absmax, first, a.n, a.aligned != 0, y);
    }
  }
};

}  // namespace pb
#endif
