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

// N tree sums of what leaf(i, values) puts there, i = 0, W, 2W, ... < n: W values each, zeros behind the end. A binary
// counter: level[k] waits for its neighbour.
template <int N, class Leaf>
inline void tree_sums_of(int64_t n, const Leaf &leaf, float (&sums)[N]) {
  simd::F level[64][N], sum[N];
  const int64_t vectors = ceil_div(n, simd::W);
  int64_t padded = 1;
  while (padded < vectors) padded *= 2;
  for (int64_t v = 0; v < padded; v++) {
    for (int j = 0; j < N; j++) sum[j] = simd::zero();
    if (v < vectors) leaf(v * simd::W, sum);
    int k = 0;
    for (; v >> k & 1; k++)
      for (int j = 0; j < N; j++) sum[j] = simd::hadd(level[k][j], sum[j]);
    for (int j = 0; j < N; j++) level[k][j] = sum[j];
  }
  for (int j = 0; j < N; j++) sums[j] = simd::reduce_add(sum[j]);
}

// The same of leaf(i, lanes, values) by all threads; lanes: how many of the W count. Aligned chunks of a power of two
// are subtrees, so threads may take them.
template <int N, class Leaf>
inline void tree_sums(pb_context *ctx, int64_t n, const Leaf &leaf, float (&sums)[N]) {
  enum { most = 1024 };
  float partial[most][N];
  int64_t chunk = 4096;
  while (ceil_div(n, chunk) > most) chunk *= 2;
  parallel(ctx, ceil_div(n, chunk), grain_of(chunk), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      const int64_t start = c * chunk, count = min64(chunk, n - start);
      tree_sums_of<N>(
          count, [&](int64_t i, simd::F(&values)[N]) { leaf(start + i, (int)min64(simd::W, count - i), values); },
          partial[c]);
    }
  });
  const int64_t parts = ceil_div(n, chunk);
  const auto of_parts = [&](int64_t i, simd::F(&values)[N]) {
    for (int j = 0; j < N; j++) {
      float column[simd::W] = {};
      for (int k = 0; k < min64(simd::W, parts - i); k++) column[k] = partial[i + k][j];
      values[j] = simd::load(column);
    }
  };
  tree_sums_of<N>(parts, of_parts, sums);
}

// The tree sum of map(x[i]) over a whole tensor.
template <class D, class Map>
inline float tree_sum(pb_context *ctx, D, const typename D::type *x, int64_t n, const Map &map) {
  float sum[1];
  const auto leaf = [&](int64_t i, int lanes, simd::F(&values)[1]) {
    values[0] = map(lanes == simd::W ? D::load(x + i) : D::load_n(x + i, lanes));
  };
  tree_sums<1>(ctx, n, leaf, sum);
  return sum[0];
}

}  // namespace
#endif
