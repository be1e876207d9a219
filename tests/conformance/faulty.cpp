// A backend with one deliberate fault per variant, in matmul_int8: what the conformance program and the sanitizers are
// tried on. faulty:none is correct.
#include "polybit.h"

namespace {

enum Fault {
  none,
  value,     // one element is wrong
  after,     // writes behind the output
  before,    // writes in front of it
  input,     // changes an input
  threads,   // the result depends on the number of threads
  greedy,    // asks for scratch that it already has
  eager,     // writes before it asks for scratch
  read,      // reads behind an input: only AddressSanitizer sees it
  overflow,  // an int overflows: only UndefinedBehaviorSanitizer sees it
  race,      // threads write one byte of scratch: only ThreadSanitizer sees it
};

struct Product {
  const int8_t *a, *b;
  int32_t *y;
  int64_t n, k;
  volatile char *shared;
};

void rows(void *arg, int64_t begin, int64_t end) {
  const Product &p = *static_cast<const Product *>(arg);
  for (int64_t m = begin; m < end; m++) {
    if (p.shared) *p.shared = static_cast<char>(m);
    for (int64_t r = 0; r < p.n; r++) {
      int32_t sum = 0;
      for (int64_t c = 0; c < p.k; c++) sum += p.a[m * p.k + c] * p.b[r * p.k + c];
      p.y[m * p.n + r] = sum;
    }
  }
}

pb_status run(Fault fault, pb_context *ctx, const pb_matmul_int8_args *args) {
  const int64_t k = args->a->shape[args->a->ndim - 1], n = args->b->shape[0];
  int64_t m = 1;
  for (int32_t i = 0; i + 1 < args->a->ndim; i++) m *= args->a->shape[i];
  auto *a = static_cast<int8_t *>(args->a->data);
  auto *b = static_cast<const int8_t *>(args->b->data);
  auto *y = static_cast<int32_t *>(args->y->data);
  Product product = {a, b, y, n, k, nullptr};
  const bool empty = m == 0 || n == 0;
  if (fault == greedy || fault == eager || fault == race) {
    if (fault == eager && !empty) y[0] = 1;
    ctx->scratch_needed = 64;
    if (fault == greedy || ctx->scratch_size < 64) return PB_SCRATCH;
    if (fault == race) product.shared = static_cast<char *>(ctx->scratch);
  }
  if (ctx->parallel_for && m)
    ctx->parallel_for(m, 1, rows, &product);
  else
    rows(&product, 0, m);
  if (fault == value && !empty) y[m * n - 1]++;
  if (fault == after) *reinterpret_cast<volatile char *>(y + m * n) = 0;
  if (fault == before) reinterpret_cast<volatile char *>(y)[-1] = 0;
  if (fault == input && !empty && k > 0) a[0]++;
  if (fault == threads && !empty) y[0] += ctx->parallel_for != nullptr;
  if (fault == read) (void)*reinterpret_cast<const volatile int8_t *>(a + m * k);
  if (fault == overflow) {
    volatile int32_t large = INT32_MAX;
    large = large + 1;
  }
  return PB_OK;
}

template <Fault FAULT>
pb_status matmul_int8(pb_context *ctx, const pb_matmul_int8_args *args) {
  return run(FAULT, ctx, args);
}

template <Fault FAULT>
pb_backend table(const char *name) {
  pb_backend backend = {};
  backend.abi = PB_ABI;
  backend.size = sizeof backend;
  backend.name = name;
  backend.device_type = kDLCPU;
  backend.matmul_int8 = matmul_int8<FAULT>;
  return backend;
}

}  // namespace

extern "C" PB_EXPORT const pb_backend *polybit_backend(uint64_t index) {
#define FAULTY(fault) table<fault>("faulty:" #fault)
  static const pb_backend backends[] = {FAULTY(none),  FAULTY(value),    FAULTY(after),  FAULTY(before),
                                        FAULTY(input), FAULTY(threads),  FAULTY(greedy), FAULTY(eager),
                                        FAULTY(read),  FAULTY(overflow), FAULTY(race)};
  return index < sizeof backends / sizeof *backends ? &backends[index] : nullptr;
}
