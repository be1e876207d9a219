// Prepacked 4-bit weights: tiles of 16 output rows; for each 8 consecutive k one 32-bit word a row, element k + j in
// bits [4j, 4j + 4), so that a lane is an output row. N is padded to 16. Weights of another shape keep their canonical
// bytes.

namespace {

constexpr int64_t tile_rows = 16, word_elements = 8;

inline bool is_tiled(int64_t k, int64_t block, int64_t bits) { return bits == 4 && k > 0 && k % block == 0; }

inline int64_t tiled_words(int64_t n, int64_t k) { return ceil_div(n, tile_rows) * (k / word_elements) * tile_rows; }

inline int64_t word_place(int64_t row, int64_t word, int64_t k) {
  return (row / tile_rows * (k / word_elements) + word) * tile_rows + row % tile_rows;
}

pb_status pack_size_kbit(pb_context *, const pb_pack_size_kbit_args *a) {
  *data<int64_t>(a->size) = is_tiled(a->k, a->block, a->bits) ? tiled_words(a->n, a->k) * 4 : numel(a->q);
  return PB_OK;
}

inline void copy_bytes(pb_context *ctx, uint8_t *to, const uint8_t *from, int64_t count) {
  parallel(ctx, count, 65536, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) to[i] = from[i];
  });
}

// The bytes of a packed weight may begin at any address.
inline uint32_t read_word(const uint8_t *p, int64_t place) {
  uint32_t word;
  __builtin_memcpy(&word, p + 4 * place, 4);
  return word;
}
inline void write_word(uint8_t *p, int64_t place, uint32_t word) { __builtin_memcpy(p + 4 * place, &word, 4); }

// A word holds four bytes of q, each with the first element in its high nibble.
inline uint32_t swap_nibbles(uint32_t word) { return (word >> 4 & 0x0f0f0f0fu) | (word & 0x0f0f0f0fu) << 4; }

pb_status pack_kbit(pb_context *ctx, const pb_pack_kbit_args *a) {
  const uint8_t *q = data<const uint8_t>(a->q);
  if (!is_tiled(a->k, a->block, a->bits)) {
    copy_bytes(ctx, data<uint8_t>(a->packed), q, numel(a->q));
    return PB_OK;
  }
  uint8_t *packed = data<uint8_t>(a->packed);
  const int64_t words = a->k / word_elements;
  parallel(ctx, ceil_div(a->n, tile_rows), grain_of(tile_rows * a->k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * tile_rows; row < end * tile_rows; row++)
      for (int64_t w = 0; w < words; w++) {
        const uint32_t word = row < a->n ? read_word(q, row * words + w) : 0;
        write_word(packed, word_place(row, w, a->k), swap_nibbles(word));
      }
  });
  return PB_OK;
}

pb_status unpack_kbit(pb_context *ctx, const pb_unpack_kbit_args *a) {
  uint8_t *q = data<uint8_t>(a->q);
  if (!is_tiled(a->k, a->block, a->bits)) {
    copy_bytes(ctx, q, data<const uint8_t>(a->packed), numel(a->q));
    return PB_OK;
  }
  const uint8_t *packed = data<const uint8_t>(a->packed);
  const int64_t words = a->k / word_elements;
  parallel(ctx, a->n, grain_of(a->k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      for (int64_t w = 0; w < words; w++)
        write_word(q, row * words + w, swap_nibbles(read_word(packed, word_place(row, w, a->k))));
  });
  return PB_OK;
}

}  // namespace
