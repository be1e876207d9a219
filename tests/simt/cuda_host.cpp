// The host side of the CUDA backend, core/launch/cuda_hip.h, against the runtime of fake/cuda_runtime_api.h: devices,
// streams, errors, the probe. Prints what is wrong; 0 is success.
#include <cstdio>
#include <cstring>

#include "../../backends/emulator/engine.h"
#include "../../core/simt/emulator.h"
#define PB_SIMT_CUDA_HIP_H  // its place is taken by the emulator's adaptor
#include "../../core/launch/cuda_hip.h"
#include "../../core/launch/table.h"

void fake::run(const void *kernel, unsigned groups, unsigned group_dim, void *args) {
  // entry<K> takes its arguments by reference, which is a pointer.
  const auto entry = reinterpret_cast<void (*)(const void *)>(const_cast<void *>(kernel));
  const std::string error = pb::emulator::run_groups({groups, group_dim, 32, {}}, 0, groups, [&] { entry(args); });
  if (!error.empty()) std::printf("kernel: %s\n", error.c_str());
}

namespace {

int wrong = 0;
void expect(bool right, const char *what) {
  if (right) return;
  wrong++;
  std::printf("%s\n", what);
  for (const std::string &call : fake::calls) std::printf("  called: %s\n", call.c_str());
}

using Device = pb::launch::CudaHip;
constexpr pb_backend backend = pb::launch::table<Device>("cuda", kDLCUDA, Device::probe);

// Doubles a vector.
struct Double {
  enum : pb::u32 { group_max = 64 };
  struct Args {
    float *x;
    pb::i64 n;
  };
  typedef pb::NoLocal Local;
  static void run(pb::Wave w, Local *, Args a) {
    const pb::i64 i = pb::i64(w.group()) * w.group_dim() + w.tid();
    if (i < a.n) a.x[i] *= 2.0f;
  }
};

struct Call {
  char error[256] = "";
  pb_context context = {};
  explicit Call(int64_t device) {
    context.size = sizeof context;
    context.stream = reinterpret_cast<void *>(77);
    context.device_index = device;
    context.error = error;
    context.error_size = sizeof error;
    fake::calls.clear();
  }
  pb_status launch(float *x, pb::i64 n) { return Device::launch<Double>(&context, (n + 63) / 64, 64, {x, n}); }
};

}  // namespace

int main() {
  float x[100];
  for (float &value : x) value = 1.0f;
  const std::vector<std::string> there_and_back = {"device 1", "launch on device 1 stream 77", "device 0"};
  {
    Call call(1);
    expect(call.launch(x, 100) == PB_OK && x[0] == 2.0f && x[99] == 2.0f, "a launch runs the kernel");
    expect(fake::calls == there_and_back && fake::current == 0, "the device of the context, then the one before");
  }
  {
    Call call(0);
    expect(call.launch(x, 100) == PB_OK && fake::calls.size() == 1, "no switch where none is needed");
  }
  {
    Call call(1);
    expect(call.launch(x, 0) == PB_OK && fake::calls.empty(), "nothing to do is no launch");
  }
  {
    Call call(1);
    fake::launch_error = cudaErrorInvalidValue;
    expect(call.launch(x, 100) == PB_ERROR, "a refused launch is an error");
    fake::launch_error = cudaSuccess;
    expect(!std::strcmp(call.error, "launch: cudaErrorInvalidValue (as asked for)"), call.error);
    expect(fake::calls == there_and_back && fake::last_error == cudaSuccess, "an error leaves no trace");
  }
  {
    Call call(5);
    expect(call.launch(x, 100) == PB_ERROR && fake::current == 0, "a device that is not there");
    expect(!std::strcmp(call.error, "device: cudaErrorInvalidDevice (as asked for)"), call.error);
  }
  {
    Call call(0);
    expect(Device::launch<Double>(&call.context, 1ll << 31, 64, {x, 1}) == PB_UNSUPPORTED, "more than a grid holds");
  }
  {
    char error[256] = "";
    expect(backend.probe(error, sizeof error) == 1, "two devices are usable");
    fake::devices = 0;
    expect(backend.probe(error, sizeof error) == 0 && *error, "no device");
    fake::devices = 2;
    fake::attributes_error = cudaErrorInvalidValue;
    expect(backend.probe(error, sizeof error) == 0 && std::strstr(error, "cudaErrorInvalidValue"), error);
    fake::attributes_error = cudaSuccess;
  }
  {
    // A whole op: NF4-like codes of a ramp, on the second device.
    float code[16], thresholds[15], absmax[2];
    uint8_t order[16], q[64];
    for (int i = 0; i < 16; i++) code[i] = float(i) / 7.5f - 1.0f, order[i] = uint8_t(i);
    for (int i = 0; i < 15; i++) thresholds[i] = (code[i] + code[i + 1]) / 2;
    float ramp[128];
    for (int i = 0; i < 128; i++) ramp[i] = float(i % 64) - 31.5f;
    const auto tensor = [](void *data, int64_t *shape, DLDataType type) {
      return DLTensor{data, {kDLCUDA, 1}, 1, type, shape, nullptr, 0};
    };
    int64_t n128 = 128, n16 = 16, n15 = 15, n64 = 64, n2 = 2;
    const DLDataType fp32 = {kDLFloat, 32, 1}, bytes = {kDLUInt, 8, 1};
    DLTensor t[] = {tensor(ramp, &n128, fp32),  tensor(code, &n16, fp32), tensor(thresholds, &n15, fp32),
                    tensor(order, &n16, bytes), tensor(q, &n64, bytes),   tensor(absmax, &n2, fp32)};
    const pb_quantize_kbit_args args = {&t[0], &t[1], &t[2], &t[3], &t[4], &t[5], 64, 4, 0};
    Call call(1);
    expect(backend.quantize_kbit(&call.context, &args) == PB_OK && fake::calls == there_and_back, "an op");
    expect(absmax[0] == 31.5f && absmax[1] == 31.5f && q[0] == 0x00 && q[31] == 0xff, "its result");
  }
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
