// The entry points a CUDA backend would have, to compile the kernel for real architectures.
#include "../../core/simt/cuda_hip.h"
#include "../../core/kernels/kbit.h"

#define ENTRY(name, T) \
  extern "C" __global__ void __launch_bounds__(pb::kbit4_group_max) \
      name(const T *x, const float *thresholds, const pb::u8 *order, pb::u8 *q, float *absmax, pb::i64 n, \
           pb::u32 block_log2, bool aligned) { \
    PB_SHARED(pb::Kbit4Local, local); \
    pb::quantize_kbit4(pb::Wave(), local, x, thresholds, order, q, absmax, n, block_log2, aligned); \
  }
ENTRY(quantize_kbit4_fp32, float)
ENTRY(quantize_kbit4_fp16, pb::Fp16)
ENTRY(quantize_kbit4_bf16, pb::Bf16)
