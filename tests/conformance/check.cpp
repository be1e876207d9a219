#include "check.h"

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "call.h"
#include "math/float16.h"

namespace {

constexpr int threads = 3;

size_t op_index(const char *name) {
  size_t i = 0;
  while (std::strcmp(pb::op_table()[i].name, name) != 0) i++;
  return i;
}

// The kernel of an op in backend `first` or, as the front end inherits it, in the next one that has it.
pb::Kernel inherited(const std::vector<pb::Backend> &backends, size_t first, const char *op) {
  for (size_t i = first; i < backends.size(); i++)
    if (backends[i].usable && backends[i].kernels[op_index(op)]) return backends[i].kernels[op_index(op)];
  return nullptr;
}

double float_at(const uint8_t *p, DLDataType dtype) {
  if (dtype.bits == 32) {
    float value;
    std::memcpy(&value, p, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, p, 2);
  return dtype.code == kDLBfloat ? pb::bf16_to_float(half) : pb::half_to_float(half);
}

bool is_float(DLDataType dtype) { return dtype.code == kDLFloat || dtype.code == kDLBfloat; }

bool equal(const uint8_t *got, const uint8_t *want, DLDataType dtype, const Sample &sample) {
  if (std::memcmp(got, want, dtype.bits / 8) == 0) return true;
  if (!is_float(dtype) || sample.compare == Compare::bits_and_nan) return false;
  const double g = float_at(got, dtype), w = float_at(want, dtype);
  if (std::isnan(g) || std::isnan(w)) return std::isnan(g) && std::isnan(w);
  if (sample.compare == Compare::bits) return false;
  return g == w || (std::isfinite(g) && std::fabs(g - w) <= sample.atol + sample.rtol * std::fabs(w));
}

std::string value_at(const uint8_t *p, DLDataType dtype) {
  char text[64];
  if (is_float(dtype)) {
    std::snprintf(text, sizeof text, "%.9g", float_at(p, dtype));
  } else {
    uint64_t bits = 0;
    std::memcpy(&bits, p, dtype.bits / 8);
    std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(bits));
  }
  return text;
}

// The first difference in words; empty if there is none.
std::string differences(const std::vector<uint8_t> &got, const Tensor &want, const Sample &sample) {
  const size_t step = want.dtype.bits / 8, count = want.bytes.size() / step;
  size_t wrong = 0, first = 0;
  for (size_t i = count; i-- > 0;)
    if (!equal(&got[i * step], &want.bytes[i * step], want.dtype, sample)) wrong++, first = i;
  if (!wrong) return "";
  return std::to_string(wrong) + " of " + std::to_string(count) + " differ, first at " + std::to_string(first) + ": " +
         value_at(&got[first * step], want.dtype) + ", wanted " + value_at(&want.bytes[first * step], want.dtype);
}

std::string differences(const Outcome &outcome, const std::vector<Argument> &arguments, const Sample &sample) {
  size_t next = 0;
  for (const Argument &argument : arguments)
    for (const Tensor &want : argument.expected) {
      const std::string difference = differences(outcome.produced[next], want, sample);
      if (!difference.empty()) return "output " + std::to_string(next) + ": " + difference;
      next++;
    }
  return "";
}

// Serially and with threads.
std::string check_arguments(pb::Kernel kernel, const std::vector<Argument> &arguments, const Sample &sample,
                            bool &unsupported) {
  const Outcome serial = call(kernel, arguments, 0);
  if (!serial.problem.empty()) return serial.problem;
  const Outcome threaded = call(kernel, arguments, threads);
  if (!threaded.problem.empty()) return "with threads: " + threaded.problem;
  if (serial.status != threaded.status) return "its status depends on threads or alignment";
  unsupported = serial.status == PB_UNSUPPORTED;
  if (unsupported) return "";
  if (serial.produced != threaded.produced) return "its result depends on threads or alignment";
  return differences(serial, arguments, sample);
}

Argument integer(int64_t value) {
  Argument argument = {'n'};
  argument.integer = value;
  return argument;
}
Argument input(const Tensor &tensor) {
  Argument argument = {'i'};
  argument.given = {tensor};
  return argument;
}
Argument output(const Tensor &expected) {
  Argument argument = {'o'};
  argument.expected = {expected};
  return argument;
}

// How a backend lays out a packed weight is its own affair: what counts is that unpack_kbit gives q back.
struct Packing {
  pb::Kernel size, pack, unpack;
  Packing(const std::vector<pb::Backend> &backends, size_t first)
      : size(inherited(backends, first, "pack_size_kbit")),
        pack(inherited(backends, first, "pack_kbit")),
        unpack(inherited(backends, first, "unpack_kbit")) {}
  bool complete() const { return size && pack && unpack; }

  // Leaves the packed bytes in `packed`; none if the backend has no layout for this weight. `always`: such a backend
  // still has to copy, if it packs at all.
  std::string round_trip(const Tensor &q, int64_t n, int64_t k, int64_t block, int64_t bits, bool always,
                         Tensor &packed) const {
    const std::vector<Argument> shape = {integer(n), integer(k), integer(block), integer(bits)};
    const auto with = [&](const Argument &in, const Argument &out) {
      std::vector<Argument> arguments = {in, out};
      arguments.insert(arguments.end(), shape.begin(), shape.end());
      return arguments;
    };
    Outcome outcome = call(size, with(input(q), output(Tensor{{kDLInt, 64, 1}, {}, std::vector<uint8_t>(8)})), 0);
    if (!outcome.problem.empty()) return "pack_size_kbit: " + outcome.problem;
    int64_t bytes;
    std::memcpy(&bytes, outcome.produced[0].data(), 8);
    if (bytes < 0) return "pack_size_kbit: " + std::to_string(bytes);
    const bool copied = !bytes && always;
    if (copied) bytes = static_cast<int64_t>(q.bytes.size());
    packed = Tensor{{kDLUInt, 8, 1}, {bytes}, std::vector<uint8_t>(static_cast<size_t>(bytes))};
    if (!bytes) return "";
    std::vector<Argument> arguments = with(input(q), output(packed));
    arguments.push_back(integer(bytes));
    for (int t : {0, threads}) {
      outcome = call(pack, arguments, t);
      if (!outcome.problem.empty()) return "pack_kbit: " + outcome.problem;
      if (copied && outcome.status == PB_UNSUPPORTED) return "";
      packed.bytes = outcome.produced[0];
      outcome = call(unpack, with(input(packed), output(q)), t);
      if (!outcome.problem.empty()) return "unpack_kbit: " + outcome.problem;
      if (outcome.produced[0] != q.bytes) return "unpack_kbit does not give q back";
      if (copied && packed.bytes != q.bytes) return "pack_kbit changes what it has no layout for";
    }
    return "";
  }
};

// The slot of a field of an argument struct.
#define SLOT(op, field) (offsetof(pb_##op##_args, field) / 8)

}  // namespace

std::string check(const std::vector<pb::Backend> &backends, size_t backend, const Sample &sample, bool &unsupported) {
  const std::string op = pb::op_table()[sample.op].name;
  const std::vector<Argument> &arguments = sample.arguments;
  const Packing packing(backends, backend);
  Tensor packed;
  if (op == "pack_size_kbit" || op == "pack_kbit" || op == "unpack_kbit") {
    if (!packing.complete()) return "a part of pack_size_kbit, pack_kbit and unpack_kbit is missing";
    return packing.round_trip(arguments[0].given[0], arguments[2].integer, arguments[3].integer, arguments[4].integer,
                              arguments[5].integer, true, packed);
  }
  const pb::Kernel kernel = backends[backend].kernels[sample.op];
  std::string problem = check_arguments(kernel, arguments, sample, unsupported);
  if (!problem.empty() || unsupported || op != "matmul_kbit" || !packing.complete()) return problem;

  std::vector<Argument> more = arguments;
  const int64_t k = more[SLOT(matmul_kbit, x)].given[0].shape.back();
  problem =
      packing.round_trip(more[SLOT(matmul_kbit, q)].given[0], more[SLOT(matmul_kbit, n)].integer, k,
                         more[SLOT(matmul_kbit, block)].integer, more[SLOT(matmul_kbit, bits)].integer, false, packed);
  if (!problem.empty() || packed.bytes.empty()) return problem;
  more[SLOT(matmul_kbit, packed)].given = {packed};
  problem = check_arguments(kernel, more, sample, unsupported);
  return problem.empty() ? "" : "with packed: " + problem;
}
