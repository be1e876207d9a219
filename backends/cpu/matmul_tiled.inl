// y = x W^T from the prepacked weight (pack.inl), for few rows of x: a lane is an output row, so nothing is summed
// across lanes, and one table lookup decodes an element of every lane.

namespace {

constexpr int64_t most_tiled_rows = 16;  // beyond, decoding a panel once for all rows of x is cheaper
constexpr int tile_vectors = (int)(tile_rows / simd::W);

// sums[m][r] over k columns for ROWS rows of x and one vector of the tile's rows; scale: the 16 scales of each block.
template <int ROWS>
inline void multiply_tile(const simd::Table16 &table, const uint32_t *words, const float *scale, int64_t block,
                          const float *x, int64_t ldx, int64_t k, int vector, float *sums) {
  simd::F total[ROWS];
  for (int m = 0; m < ROWS; m++) total[m] = simd::zero();
  for (int64_t c = 0; c < k; scale += tile_rows) {
    simd::F sum[ROWS];
    for (int m = 0; m < ROWS; m++) sum[m] = simd::zero();
    for (const int64_t end = c + block; c < end; c += word_elements) {
      const simd::I word = simd::load_i((const int32_t *)words + c / word_elements * tile_rows + vector * simd::W);
      for (int j = 0; j < word_elements; j++) {
        const simd::F value = simd::lookup16(table, simd::shr(word, 4 * j));
        for (int m = 0; m < ROWS; m++) sum[m] = simd::fma(value, simd::set1(x[m * ldx + c + j]), sum[m]);
      }
    }
    for (int m = 0; m < ROWS; m++) total[m] = simd::fma(sum[m], simd::load(scale + vector * simd::W), total[m]);
  }
  for (int m = 0; m < ROWS; m++) simd::store(sums + m * tile_rows, total[m]);
}

inline void multiply_tiled(pb_context *ctx, const KbitWeight &weight, const uint32_t *packed, const float *x,
                           int64_t rows, int64_t n, int64_t k, float *acc) {
  const int64_t block = (int64_t)1 << weight.block_shift, blocks = k / block;
  const simd::Table16 table = simd::table16(weight.code);
  parallel(ctx, ceil_div(n, tile_rows), grain_of(tile_rows * k * rows), [&](int64_t begin, int64_t end) {
    constexpr int64_t span = 64;  // blocks whose scales fit the stack
    alignas(64) float scale[span * tile_rows], sums[most_tiled_rows * tile_rows];
    for (int64_t tile = begin; tile < end; tile++) {
      const int64_t row = tile * tile_rows, height = min64(tile_rows, n - row);
      for (int64_t first = 0; first < blocks; first += span) {
        const int64_t count = min64(span, blocks - first);
        for (int64_t b = 0; b < count; b++)
          for (int64_t r = 0; r < tile_rows; r++)
            scale[b * tile_rows + r] = r < height ? weight.scale((row + r) * blocks + first + b) : 0.0f;
        const uint32_t *words = packed + word_place(row, first * block / word_elements, k);
        for (int vector = 0; vector < tile_vectors; vector++) {
          float *to = sums + vector * simd::W;
          const float *from = x + first * block;
          int64_t m = 0;
          for (; m + 4 <= rows; m += 4)
            multiply_tile<4>(table, words, scale, block, from + m * k, k, count * block, vector, to + m * tile_rows);
          for (; m < rows; m++)
            multiply_tile<1>(table, words, scale, block, from + m * k, k, count * block, vector, to + m * tile_rows);
        }
        for (int64_t m = 0; m < rows; m++)
          for (int64_t r = 0; r < height; r++) acc[m * n + row + r] += sums[m * tile_rows + r];
      }
    }
  });
}

}  // namespace
