// The backend sycl, for the tensors of torch.xpu, given a queue from outside as torch gives it: sycl_queue LIBRARY.
// Here the queue is one of Intel's OpenCL device for the CPU and the tensors are USM shared memory. Prints what is
// wrong.
#include <dlfcn.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <future>
#include <sycl/sycl.hpp>

#include "polybit.h"

namespace {

int wrong = 0;
void expect(bool right, const char *what, const char *error = "") {
  if (right) return;
  wrong++;
  std::printf("%s: %s\n", what, error);
}

struct Call {
  char error[256] = "";
  pb_context context = {};
  explicit Call(sycl::queue *queue) {
    context.size = sizeof context;
    context.stream = queue;
    context.error = error;
    context.error_size = sizeof error;
  }
};

struct Tensor {
  int64_t shape;
  DLTensor t;
  Tensor(void *data, int64_t n, DLDataType type) : shape(n), t{data, {kDLOneAPI, 0}, 1, type, &shape, nullptr, 0} {}
};

constexpr DLDataType fp32 = {kDLFloat, 32, 1}, bytes = {kDLUInt, 8, 1};
constexpr int64_t n = 100003, block = 64, blocks = (n + block - 1) / block;

struct Memory {
  float *x, *y, *code, *absmax;
  uint8_t *q;
  explicit Memory(sycl::queue &queue)
      : x(sycl::malloc_shared<float>(n, queue)),
        y(sycl::malloc_shared<float>(n, queue)),
        code(sycl::malloc_shared<float>(256, queue)),
        absmax(sycl::malloc_shared<float>(blocks, queue)),
        q(sycl::malloc_shared<uint8_t>(n, queue)) {
    for (int64_t i = 0; i < n; i++) x[i] = 0, y[i] = -7;
    for (int i = 0; i < 256; i++) code[i] = (float(i) - 127.5f) / 127.5f;
  }
};

// Descriptions and arguments are gone when it returns, as they are when torch calls.
pb_status quantize(const pb_backend &backend, Call &call, const Memory &m) {
  Tensor x(m.x, n, fp32), code(m.code, 256, fp32), q(m.q, n, bytes), absmax(m.absmax, blocks, fp32);
  const pb_quantize_blockwise_args args = {&x.t, &code.t, &q.t, &absmax.t, block};
  return backend.quantize_blockwise(&call.context, &args);
}
pb_status dequantize(const pb_backend &backend, Call &call, const Memory &m) {
  Tensor q(m.q, n, bytes), absmax(m.absmax, blocks, fp32), code(m.code, 256, fp32), y(m.y, n, fp32);
  const pb_dequantize_blockwise_args args = {&q.t, &absmax.t, &code.t, &y.t, block};
  return backend.dequantize_blockwise(&call.context, &args);
}

}  // namespace

int main(int, char **argv) {
  void *library = dlopen(argv[1], RTLD_NOW);
  if (!library) return std::printf("%s\n", dlerror()), 1;
  const auto table = reinterpret_cast<const pb_backend *(*)(uint64_t)>(dlsym(library, "polybit_backend"));
  const pb_backend &backend = *table(0);
  expect(!std::strcmp(backend.name, "sycl") && backend.device_type == kDLOneAPI, "the first backend", backend.name);

  sycl::queue queue(sycl::cpu_selector_v, sycl::property::queue::in_order());
  const Memory m(queue);
  {
    // Work that torch has enqueued before, and that does not end until the launches have returned.
    std::promise<void> go;
    std::shared_future<void> gone(go.get_future());
    queue.submit([&](sycl::handler &handler) {
      handler.host_task([gone, m] {
        gone.wait();
        for (int64_t i = 0; i < n; i++) m.x[i] = float(i % 1000) - 500.0f;
      });
    });
    Call first(&queue), second(&queue);
    expect(quantize(backend, first, m) == PB_OK, "quantize", first.error);
    expect(dequantize(backend, second, m) == PB_OK, "dequantize", second.error);
    expect(m.y[0] == -7 && m.y[n - 1] == -7, "a launch does not wait, and does not run early");
    go.set_value();
    queue.wait_and_throw();
    int64_t bad = 0;
    for (int64_t i = 0; i < n; i++) {
      float largest = 0;
      for (int64_t k = i / block * block; k < n && k < (i / block + 1) * block; k++)
        largest = std::fmax(largest, std::fabs(m.x[k]));
      bad += !(std::fabs(m.y[i] - m.x[i]) <= largest * 0.00393f);  // half a step of the code, 1 / 255, and rounding
      bad += m.absmax[i / block] != largest;
    }
    expect(bad == 0, "each kernel sees what was enqueued before it");
  }
  {
    Call call(nullptr);
    expect(quantize(backend, call, m) == PB_ERROR && std::strstr(call.error, "no SYCL queue"), "no queue", call.error);
  }
  {
    sycl::queue loose(queue.get_context(), queue.get_device());
    Call call(&loose);
    expect(quantize(backend, call, m) == PB_UNSUPPORTED && std::strstr(call.error, "not in order"), "order",
           call.error);
  }
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
