// Reductions whose result does not depend on the width, on the order or on the number of threads.
#ifndef POLYBIT_CPU_REDUCE_H
#define POLYBIT_CPU_REDUCE_H

#include "dtype.h"
#include "math/encode.h"

namespace {

// The bits of the largest |x|: an integer maximum, so that NaN wins whatever the order.
inline uint32_t absmax_bits(const float *x, int64_t n) {
  const simd::I clear = simd::set1i(0x7fffffff);
  simd::I m0 = simd::set1i(0), m1 = m0;
  int64_t i = 0;
  for (; i + 2 * simd::W <= n; i += 2 * simd::W) {
    m0 = simd::maxi(m0, simd::and_(simd::as_int(simd::load(x + i)), clear));
    m1 = simd::maxi(m1, simd::and_(simd::as_int(simd::load(x + i + simd::W)), clear));
  }
  for (; i < n; i += simd::W) {
    const int left = (int)min64(n - i, simd::W);
    m0 = simd::maxi(m0, simd::and_(simd::as_int(simd::load_n(x + i, left)), clear));
  }
  return (uint32_t)simd::reduce_maxi(simd::maxi(m0, m1));
}

// The tree sum of leaf(i), i = 0, W, 2W, ... < n: W values each, zeros behind the end. A binary counter: level[k] waits
// for its neighbour.
template <class Leaf>
inline float tree_sum_of(int64_t n, const Leaf &leaf) {
  simd::F level[64];
  const int64_t vectors = ceil_div(n, simd::W);
  int64_t padded = 1;
  while (padded < vectors) padded *= 2;
  simd::F sum = simd::zero();
  for (int64_t v = 0; v < padded; v++) {
    sum = v < vectors ? leaf(v * simd::W) : simd::zero();
    int k = 0;
    for (; v >> k & 1; k++) sum = simd::hadd(level[k], sum);
    level[k] = sum;
  }
  return simd::reduce_add(sum);
}

// The tree sum of leaf(i, lanes), i = 0, W, 2W, ... < n, by all threads; lanes: how many of the W count. Aligned chunks
// of a power of two are subtrees, so threads may take them.
template <class Leaf>
inline float tree_sum_parallel(pb_context *ctx, int64_t n, const Leaf &leaf) {
  enum { most = 1024 };
  float partial[most];
  int64_t chunk = 4096;
  while (ceil_div(n, chunk) > most) chunk *= 2;
  parallel(ctx, ceil_div(n, chunk), grain_of(chunk), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      const int64_t start = c * chunk, count = min64(chunk, n - start);
      partial[c] = tree_sum_of(count, [&](int64_t i) { return leaf(start + i, (int)min64(simd::W, count - i)); });
    }
  });
  const int64_t parts = ceil_div(n, chunk);
  return tree_sum_of(parts, [&](int64_t i) { return simd::load_n(partial + i, (int)min64(simd::W, parts - i)); });
}

// The tree sum of map(x[i]) over a whole tensor.
template <class D, class Map>
inline float tree_sum(pb_context *ctx, D, const typename D::type *x, int64_t n, const Map &map) {
  return tree_sum_parallel(
      ctx, n, [&](int64_t i, int lanes) { return map(lanes == simd::W ? D::load(x + i) : D::load_n(x + i, lanes)); });
}

}  // namespace
#endif
