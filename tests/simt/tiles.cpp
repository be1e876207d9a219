// Every matrix tile on the emulator: one multiply of a wave against the sums written out. The layouts of AMD, Intel and
// NVIDIA must be one to one: every place of C belongs to one sum of one lane. Built with -I <core>. Prints what is
// wrong; 0 is success.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../backends/emulator/engine.h"
#include "simt/emulator.h"
#include "simt/tile_amd.h"
#include "simt/tile_mma.h"
#include "simt/tile_xmx.h"

namespace {

using pb::u32;
int wrong = 0;

// The values of a word, as numbers.
std::vector<double> values(pb::Fp16Word, u32 word) {
  return {pb::half_to_float(pb::u16(word)), pb::half_to_float(pb::u16(word >> 16))};
}
std::vector<double> values(pb::Bf16Word, u32 word) {
  return {pb::bf16_to_float(pb::u16(word)), pb::bf16_to_float(pb::u16(word >> 16))};
}
std::vector<double> values(pb::Int8Word, u32 word) {
  std::vector<double> v;
  for (u32 k = 0; k < 32; k += 8) v.push_back(static_cast<int8_t>(word >> k));
  return v;
}
u32 random_word(pb::Fp16Word, std::mt19937 &random) {
  std::normal_distribution<float> normal;
  return pb::Fp16Word::pair(normal(random), normal(random));
}
u32 random_word(pb::Bf16Word, std::mt19937 &random) {
  std::normal_distribution<float> normal;
  return pb::Bf16Word::pair(normal(random), normal(random));
}
u32 random_word(pb::Int8Word, std::mt19937 &random) { return random(); }

template <class Word, class Tile>
void check(const char *name, u32 width) {
  constexpr u32 columns = Tile::columns, pitch = Tile::stride;
  const u32 rows = Tile::sums * width / columns;
  std::mt19937 random(1);
  std::vector<u32> a(rows * pitch), b(columns * pitch);
  for (u32 &word : a) word = random_word(Word(), random);
  for (u32 &word : b) word = random_word(Word(), random);
  std::vector<double> c(rows * columns, 7.0), start(rows * columns);
  std::vector<int> written(rows * columns);
  for (double &x : start) x = double(random() % 100);
  const std::string error = pb::emulator::run_groups({1, width, width, {}}, 0, 1, [&] {
    const pb::Wave w;
    typename Tile::Sums sums;
    for (u32 i = 0; i < Tile::sums; i++)
      sums.v[i] = static_cast<typename Word::Sum>(start[Tile::row(w, i) * columns + Tile::column(w, i)]);
    sums = Tile::multiply(w, Tile::load_a(w, a.data(), pitch), Tile::load_b(w, b.data(), pitch), sums);
    for (u32 i = 0; i < Tile::sums; i++) {
      const u32 at = Tile::row(w, i) * columns + Tile::column(w, i);
      c[at] = static_cast<double>(sums.v[i]);
      written[at]++;
    }
  });
  if (!error.empty()) wrong++, std::printf("%s: %s\n", name, error.c_str());
  for (u32 m = 0; m < rows; m++)
    for (u32 n = 0; n < columns; n++) {
      double want = start[m * columns + n];
      for (u32 k = 0; k < Tile::words; k++) {
        const auto x = values(Word(), a[m * pitch + k]), y = values(Word(), b[n * pitch + k]);
        for (size_t i = 0; i < x.size(); i++) want += x[i] * y[i];
      }
      const double got = c[m * columns + n];
      if (written[m * columns + n] != 1 || std::fabs(got - want) > 1e-4 * (1 + std::fabs(want)))
        if (wrong++ < 10)
          std::printf("%s: C[%u][%u] is %g, wanted %g; written %d times\n", name, m, n, got, want,
                      written[m * columns + n]);
    }
}

template <class Word>
void check_all(const char *word) {
  const std::string name = word;
  check<Word, pb::MmaTile<Word>>((name + " mma").c_str(), 32);
  check<Word, pb::MfmaTile<Word>>((name + " mfma").c_str(), 64);
  check<Word, pb::WmmaTile<Word, 3>>((name + " wmma, RDNA 3").c_str(), 32);
  check<Word, pb::WmmaTile<Word, 4>>((name + " wmma, RDNA 4").c_str(), 32);
  check<Word, pb::Xmx16<Word>>((name + " xmx of 16 lanes").c_str(), 16);
  check<Word, pb::Xmx8<Word>>((name + " xmx of 8 lanes").c_str(), 8);
}

}  // namespace

int main() {
  check_all<pb::Fp16Word>("fp16");
  check_all<pb::Bf16Word>("bf16");
  check_all<pb::Int8Word>("int8");
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
