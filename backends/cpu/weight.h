// A k-bit quantized weight as every op that reads one sees it. Include a simd header first.
#ifndef POLYBIT_CPU_WEIGHT_H
#define POLYBIT_CPU_WEIGHT_H

#include "dtype.h"

namespace {

struct KbitWeight {
  const uint8_t *q;
  const float *absmax;         // one fp32 per block, or null
  const uint8_t *absmax_q;     // one code per block where absmax is null
  const float *nested_absmax;  // one per 256 places
  const float *nested_code;    // 256 entries
  float nested_offset;
  int bits;
  int block_shift;       // block = 1 << block_shift
  int64_t block_offset;  // place of the first block
  int64_t block_stride;  // places between rows, or 0: the places are consecutive
  int64_t row_blocks;    // blocks in a row; used where block_stride is not 0
  float code[16];        // by stored code; entries behind 2^bits are 0

  float scale(int64_t b) const {
    if (absmax) return absmax[b];
    const int64_t place =
        block_stride ? block_offset + b / row_blocks * block_stride + b % row_blocks : block_offset + b;
    return nested_code[absmax_q[b]] * nested_absmax[place >> 8] + nested_offset;
  }

  // The stored code of element i of the flat weight.
  int stored_code(int64_t i) const {
    if (bits == 4) return q[i >> 1] >> (i & 1 ? 0 : 4) & 15;
    if (bits == 2) return q[i >> 2] >> 2 * (i & 3) & 3;
    const int shift = (int)(3 * i & 7);
    return (q[3 * i >> 3] | (shift > 5 ? q[(3 * i >> 3) + 1] << 8 : 0)) >> shift & 7;
  }
  float value(int64_t i) const { return code[stored_code(i)] * scale(i >> block_shift); }

  // emit(offset, F) for each whole vector and emit1(offset, float) for each single value of the range.
  template <int BITS, class Emit, class Emit1>
  inline __attribute__((always_inline)) void walk(int64_t start, int64_t count, const Emit &emit,
                                                  const Emit1 &emit1) const {
    const simd::Table16 table = simd::table16(code);
    int64_t i = start;
    const int64_t end = start + count;
    for (; i < end && (i & (simd::W - 1)); i++) emit1(i - start, value(i));
    while (i + simd::W <= end) {
      const int64_t b = i >> block_shift;
      const int64_t stop = min64((b + 1) << block_shift, end);
      const simd::F s = simd::set1(scale(b));
      for (; i + simd::W <= stop; i += simd::W)
        emit(i - start, simd::mul(simd::lookup16(table, simd::load_codes<BITS>(q, i)), s));
    }
    for (; i < end; i++) emit1(i - start, value(i));
  }

  // Elements start ... start + count - 1 of the flat weight, rounded to D.
  template <class D>
  void decode_as(D, int64_t start, int64_t count, typename D::type *out) const {
    const auto emit = [out](int64_t i, simd::F v) { D::store(out + i, v); };
    const auto emit1 = [out](int64_t i, float v) { D::store1(out + i, v); };
    if (bits == 4)
      walk<4>(start, count, emit, emit1);
    else if (bits == 3)
      walk<3>(start, count, emit, emit1);
    else
      walk<2>(start, count, emit, emit1);
  }
  void decode_range(int64_t start, int64_t count, float *out) const { decode_as(Float32(), start, count, out); }
};

inline int log2_of(int64_t power) { return __builtin_ctzll((unsigned long long)power); }

// `args` is any argument struct with the run of a quantized weight; row is the last dimension of the weight.
template <class Args>
inline KbitWeight kbit_weight(const Args *args, int64_t row) {
  KbitWeight w = {};
  w.q = data<const uint8_t>(args->q);
  if (args->nested_absmax) {
    w.absmax_q = data<const uint8_t>(args->absmax);
    w.nested_absmax = data<const float>(args->nested_absmax);
    w.nested_code = data<const float>(args->nested_code);
    w.nested_offset = *data<const float>(args->nested_offset);
  } else {
    w.absmax = data<const float>(args->absmax);
  }
  w.bits = (int)args->bits;
  w.block_shift = log2_of(args->block);
  w.block_offset = args->block_offset;
  w.block_stride = args->block_stride;
  w.row_blocks = row >> w.block_shift;
  if (w.row_blocks < 1) w.row_blocks = 1;
  const float *code = data<const float>(args->code);
  for (int i = 0; i < 1 << w.bits; i++) w.code[i] = code[i];
  return w;
}

}  // namespace
#endif
