// The entry points a Metal backend would have, for the type check.
#include "../../core/simt/metal.h"
#include "../../core/kernels/kbit.h"

#define ENTRY(name, T) \
  kernel void name(device const T *x [[buffer(0)]], device const float *thresholds [[buffer(1)]], \
                   device const pb::u8 *order [[buffer(2)]], device pb::u8 *q [[buffer(3)]], \
                   device float *absmax [[buffer(4)]], constant pb::i64 &n [[buffer(5)]], \
                   constant pb::u32 &block_log2 [[buffer(6)]], constant pb::u32 &aligned [[buffer(7)]], \
                   uint tid [[thread_position_in_threadgroup]], uint group [[threadgroup_position_in_grid]], \
                   uint group_dim [[threads_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) { \
    PB_SHARED(pb::Kbit4Local, local); \
    pb::quantize_kbit4(pb::Wave{tid, group, group_dim, lane}, local, x, thresholds, order, q, absmax, n, block_log2, \
                       aligned != 0); \
  }
ENTRY(quantize_kbit4_fp32, float)
ENTRY(quantize_kbit4_fp16, pb::Fp16)
ENTRY(quantize_kbit4_bf16, pb::Bf16)

#ifdef MUTATE_ADDRESS_SPACE  // a test's mutation: the type check must refuse it
kernel void mutation(device float *x [[buffer(0)]]) {
  threadgroup float *p = x;
  *p = 0.0f;
}
#endif
