// Launchers on a device whose memory the host cannot read, played by the emulator's engine: what the samples of the
// specification, which run on a backend for CPU tensors, do not reach. Prints what is wrong; 0 is success.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../backends/emulator/engine.h"
#include "../../core/simt/emulator.h"
#include "../../core/launch/gather.h"
#include "../../core/launch/multi.h"
#include "../../core/launch/pack.h"

namespace {

using pb::i64;
using pb::u8;

int wrong = 0, cases = 0;
void expect(bool right, const char *what, i64 a = 0, i64 b = 0) {
  cases++;
  if (right) return;
  wrong++;
  std::printf("%s %lld %lld\n", what, static_cast<long long>(a), static_cast<long long>(b));
}

struct Device {
  template <class K>
  static pb_status launch(pb_context *, i64 groups, pb::u32 group_dim, const typename K::Args &args) {
    const std::string error =
        pb::emulator::run_groups({groups, group_dim, 32, {}}, 0, groups, [&] { pb::entry<K>(args); });
    expect(error.empty(), error.c_str());
    return error.empty() ? PB_OK : PB_ERROR;
  }
};

// A tensor of one or two dimensions over memory of the caller.
struct Tensor {
  i64 shape[2];
  DLTensor t = {};
  Tensor(void *p, DLDataTypeCode code, int bits, i64 rows, i64 columns = -1) : shape{rows, columns} {
    t.data = p;
    t.dtype = {static_cast<u8>(code), static_cast<u8>(bits), 1};
    t.ndim = columns < 0 ? 1 : 2;
    t.shape = shape;
  }
};

// Rows of int8 1, 2, 3 ...; absmax 127 makes them the values.
template <class Index>
void gather_out_of_range(i64 k) {
  const i64 n = 5;
  std::vector<u8> q(static_cast<size_t>(n * k));
  for (size_t i = 0; i < q.size(); i++) q[i] = static_cast<u8>(i % 100);
  std::vector<float> absmax(static_cast<size_t>(n), 127.0f);
  std::vector<Index> index = {4, -1, 0, 5, 2, static_cast<Index>(i64(1) << (8 * sizeof(Index) - 2)), 3};
  const i64 count = static_cast<i64>(index.size());
  std::vector<float> y(static_cast<size_t>(count * k), -1.0f);
  Tensor of_index(index.data(), kDLInt, 8 * sizeof(Index), count), of_q(q.data(), kDLInt, 8, n, k);
  Tensor of_absmax(absmax.data(), kDLFloat, 32, n), of_y(y.data(), kDLFloat, 32, count, k);
  pb_context context = {};
  pb_gather_int8_args args = {&of_index.t, &of_q.t, &of_absmax.t, &of_y.t};
  expect(pb::launch::gather_int8<Device>(&context, &args) == PB_OK, "status of a gather", k);
  for (i64 i = 0; i < count; i++)
    for (i64 c = 0; c < k; c++) {
      const i64 row = static_cast<i64>(index[static_cast<size_t>(i)]);
      const float got = y[static_cast<size_t>(i * k + c)];
      const bool right = row < 0 || row >= n ? std::isnan(got) : std::fabs(got - float((row * k + c) % 100)) < 1e-3f;
      expect(right, "a gathered value", row, c);
    }
}

void packs(i64 n, i64 shift) {
  std::vector<u8> q(static_cast<size_t>(n + 1)), packed(static_cast<size_t>(n + 33), 0xC7), back(q.size());
  for (size_t i = 0; i < q.size(); i++) q[i] = static_cast<u8>(i * 7 + 1);
  i64 size = -1;
  Tensor of_q(q.data(), kDLUInt, 8, n), of_packed(packed.data() + 16 + shift, kDLUInt, 8, n);
  Tensor of_back(back.data(), kDLUInt, 8, n), of_size(&size, kDLInt, 64, 1), shorter(q.data(), kDLUInt, 8, n + 1);
  pb_context context = {};
  pb_pack_size_kbit_args size_args = {&of_q.t, &of_size.t, 1, 2 * n, 64, 4};
  expect(pb::launch::pack_size_kbit<Device>(&context, &size_args) == PB_OK && size == 0, "the size of a layout", n);
  pb_pack_kbit_args pack = {&of_q.t, &of_packed.t, 1, 2 * n, 64, 4, n};
  pb_unpack_kbit_args unpack = {&of_packed.t, &of_back.t, 1, 2 * n, 64, 4};
  expect(pb::launch::pack_kbit<Device>(&context, &pack) == PB_OK, "status of a pack", n, shift);
  expect(pb::launch::unpack_kbit<Device>(&context, &unpack) == PB_OK, "status of an unpack", n, shift);
  expect(!std::memcmp(q.data(), back.data(), static_cast<size_t>(n)), "packed and unpacked bytes", n, shift);
  for (size_t i = 0; i < packed.size(); i++)
    if (static_cast<i64>(i) < 16 + shift || static_cast<i64>(i) >= 16 + shift + n)
      expect(packed[i] == 0xC7, "a byte beside packed", n, static_cast<i64>(i));
  pack.q = &shorter.t;
  expect(pb::launch::pack_kbit<Device>(&context, &pack) == PB_ERROR, "packed of another size", n);
}

// More than chunks of chunks: three launches, the last of the sums of 4097 chunks. Ones that are few enough for fp32.
void sums() {
  const i64 chunk = pb::SumChunks::chunk, n = chunk * chunk + 1;
  std::vector<pb::u16> x(static_cast<size_t>(n), 0);  // bf16
  for (i64 i = 0; i < n; i += 1000) x[static_cast<size_t>(i)] = 0x3f80;
  x.back() = 0x4180;  // 16, the only element of the last chunk
  i64 lengths[] = {0, n, 1, chunk, chunk + 1};
  const auto summed = [&](i64 t) { return pb::launch::Summed{x.data(), pb::dtype_bf16, lengths[t]}; };
  const i64 room = pb::launch::tree_sums_scratch(5, summed);
  std::vector<float> scratch(static_cast<size_t>(room + 4), -1.0f);
  for (const bool squares : {true, false}) {
    float y[6] = {-1, -1, -1, -1, -1, -1};
    pb_context context = {};
    const pb_status status = pb::launch::tree_sums<Device>(&context, 5, summed, squares, y, scratch.data());
    expect(status == PB_OK, "status of the sums");
    const float of_all = squares ? float((n - 2) / 1000 + 1 + 256) : 1.0f;
    const float want[] = {0.0f, of_all, 1.0f, 5.0f, 5.0f, -1.0f};
    for (int t = 0; t < 6; t++) expect(y[t] == want[t], "a sum", t, static_cast<i64>(y[t]));
    lengths[1] = 3;  // once is enough
  }
  for (size_t i = 0; i < 4; i++) expect(scratch[static_cast<size_t>(room) + i] == -1.0f, "behind the scratch");
}

}  // namespace

int main() {
  for (const i64 k : {1, 8, 33, 64}) {
    gather_out_of_range<int64_t>(k);
    gather_out_of_range<int32_t>(k);
  }
  for (const i64 n : {0, 1, 15, 16, 17, 4099})
    for (const i64 shift : {0, 1}) packs(n, shift);
  sums();
  std::printf("%d cases, %d wrong\n", cases, wrong);
  return wrong != 0;
}
