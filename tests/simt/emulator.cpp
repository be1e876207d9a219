// The emulator backend through the C ABI against a plain restatement of docs/numerics.md, over sizes, blocks, dtypes,
// codebooks and hard values, with guard bytes around the outputs. Prints the number of wrong cases; 0 is success.
// The argument n, if there is one, runs every n-th case only.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "polybit.h"

namespace {

enum Type { fp32, fp16, bf16 };
constexpr uint8_t guard = 0xC7;

uint32_t bits_of(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}
float float_of(uint32_t b) {
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}
// By arithmetic rather than by bits, so that it shares nothing with core/math.
float from_half(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  float m = exponent == 31 ? (mantissa ? NAN : INFINITY)
            : exponent     ? std::ldexp(1024.0f + float(mantissa), exponent - 25)
                           : std::ldexp(float(mantissa), -24);
  return h & 0x8000 ? -m : m;
}

struct Codebook {
  std::vector<float> thresholds;
  std::vector<uint8_t> order;
};

Codebook codebook(int kind, std::mt19937 &random) {
  Codebook c;
  for (int i = 0; i < 16; i++) c.order.push_back(uint8_t(i));
  if (kind == 0) {  // evenly spaced, dyadic: the values below hit many ties
    for (int i = 0; i < 15; i++) c.thresholds.push_back(float(i - 7) / 8.0f);
  } else {  // any, in any order of codes
    std::normal_distribution<float> normal(0.0f, 0.4f);
    for (int i = 0; i < 15; i++) c.thresholds.push_back(normal(random));
    std::sort(c.thresholds.begin(), c.thresholds.end());
    std::shuffle(c.order.begin(), c.order.end(), random);
  }
  return c;
}

int rank(const Codebook &c, float s) {
  int r = 0;
  for (const float t : c.thresholds) r += s > t;
  return r;
}

// x at `shift` elements behind an aligned address, outputs between guards: returns true if every byte is right.
bool check(const pb_backend *backend, const Codebook &c, Type type, int64_t n, int64_t block, int shift, int kind,
           std::mt19937 &random, bool complain) {
  std::normal_distribution<float> normal;
  const size_t size = type == fp32 ? 4 : 2;
  std::vector<uint8_t> memory((size_t(n) + size_t(shift)) * size + 64, guard);
  uint8_t *x = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 + size_t(shift) * size;
  std::vector<float> value(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; i++) {
    float v = normal(random);
    if (kind == 1) v = float(int(random() % 33) - 16) / 16.0f;             // ties
    if (kind == 2 && i / block % 2 == 0) v = random() % 2 ? -0.0f : 0.0f;  // zero blocks
    if (kind == 3 && random() % 97 == 0) v = random() % 2 ? NAN : -INFINITY;
    if (kind == 4 && i / block % 3 == 0) v *= 1e-30f;
    uint32_t b = bits_of(v);
    if (type == bf16) {
      const uint16_t h = uint16_t(b >> 16);
      std::memcpy(x + 2 * i, &h, 2);
      v = float_of(uint32_t(h) << 16);
    } else if (type == fp16) {
      uint16_t h = uint16_t(random());
      if (kind != 3 && (h & 0x7c00) == 0x7c00) h &= 0xbfff;
      if (kind == 2 && i / block % 2 == 0) h &= 0x8000;
      if (kind == 4) h &= 0x83ff;  // fp16 subnormals
      std::memcpy(x + 2 * i, &h, 2);
      v = from_half(h);
    } else {
      std::memcpy(x + 4 * i, &v, 4);
    }
    value[size_t(i)] = v;
  }

  const int64_t blocks = (n + block - 1) / block, bytes = (n + 1) / 2;
  std::vector<uint8_t> q_want(size_t(bytes) + 16, guard), q_got = q_want;
  std::vector<float> a_want(size_t(blocks) + 4, 12345.0f), a_got = a_want;
  for (int64_t b = 0; b < blocks; b++) {
    float m = 0;
    bool nan = false;
    const int64_t end = std::min(n, (b + 1) * block);
    for (int64_t i = b * block; i < end; i++) {
      nan |= std::isnan(value[size_t(i)]);
      m = std::max(m, std::fabs(value[size_t(i)]));
    }
    if (nan) m = float_of(0x7fc00000);
    const bool zero = m < 1.17549435e-38f;
    a_want[size_t(b)] = zero ? 0.0f : m;
    const float inverse = 1.0f / m;
    for (int64_t i = b * block; i < end + end % 2; i++) {
      const float s = zero || i >= n ? 0.0f : value[size_t(i)] * inverse;
      const uint8_t code = c.order[size_t(rank(c, s))];
      uint8_t &byte = q_want[size_t(i / 2)];
      byte = i % 2 ? uint8_t((byte & 0xf0) | code) : uint8_t(code << 4);
    }
  }

  int64_t shape_x = n, shape_t = 15, shape_o = 16, shape_q = bytes, shape_a = blocks;
  const DLDevice cpu = {kDLCPU, 0};
  const DLDataType f32 = {kDLFloat, 32, 1}, u8 = {kDLUInt, 8, 1};
  const DLDataType dtype = type == fp32 ? f32 : DLDataType{uint8_t(type == fp16 ? kDLFloat : kDLBfloat), 16, 1};
  DLTensor tx = {x, cpu, 1, dtype, &shape_x, nullptr, 0};
  DLTensor tt = {const_cast<float *>(c.thresholds.data()), cpu, 1, f32, &shape_t, nullptr, 0};
  DLTensor to = {const_cast<uint8_t *>(c.order.data()), cpu, 1, u8, &shape_o, nullptr, 0};
  DLTensor tq = {q_got.data(), cpu, 1, u8, &shape_q, nullptr, 0};
  DLTensor ta = {a_got.data(), cpu, 1, f32, &shape_a, nullptr, 0};
  char error[512] = "";
  pb_context ctx = {};
  ctx.size = sizeof ctx;
  ctx.error = error;
  ctx.error_size = sizeof error;
  pb_quantize_kbit_args args = {&tx, &tt, &tt, &to, &tq, &ta, block, 4, 0};
  const pb_status status = backend->quantize_kbit(&ctx, &args);
  const bool right = status == PB_OK && q_got == q_want && !std::memcmp(a_got.data(), a_want.data(), 4 * a_got.size());
  if (!right && complain)
    std::printf("WRONG %s type %d n %lld block %lld shift %d kind %d: status %d %s\n", backend->name, int(type),
                (long long)n, (long long)block, shift, kind, int(status), error);
  return right;
}

}  // namespace

int main(int argc, char **argv) {
  const int step = argc > 1 ? std::atoi(argv[1]) : 1;
  int cases = 0, wrong = 0, number = 0;
  const pb_backend *backend;
  for (uint64_t index = 0; (backend = polybit_backend(index)); index++) {
    if (!backend->quantize_kbit) continue;
    std::mt19937 random(20240607);
    for (int64_t block = 16; block <= 4096; block *= 2)
      for (const int64_t n : {int64_t(1), block - 1, block, block + 7, 3 * block + 8, int64_t(2055)})
        for (const Type type : {fp32, fp16, bf16})
          for (int kind = 0; kind < 5; kind++) {
            const Codebook c = codebook(kind == 1 ? 0 : 1, random);
            if (number++ % step) continue;
            wrong += !check(backend, c, type, n, block, kind % 2, kind, random, wrong < 5);
            cases++;
          }
  }
  std::printf("%d cases, %d wrong\n", cases, wrong);
  return wrong || !cases;
}
