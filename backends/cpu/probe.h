/* What each variant needs; defined in backend.cpp, which is compiled without any instruction-set flag. */
#ifndef POLYBIT_CPU_PROBE_H
#define POLYBIT_CPU_PROBE_H

#include "polybit.h"

#ifdef __cplusplus
extern "C" {
#endif

int64_t pb_cpu_probe_scalar(char *error, uint64_t error_size);
int64_t pb_cpu_probe_avx2(char *error, uint64_t error_size);
int64_t pb_cpu_probe_avx512(char *error, uint64_t error_size);
int64_t pb_cpu_probe_avx512_vbmi(char *error, uint64_t error_size);
int64_t pb_cpu_probe_avx512_vnni(char *error, uint64_t error_size);
int64_t pb_cpu_probe_avx512_bf16(char *error, uint64_t error_size);
int64_t pb_cpu_probe_neon(char *error, uint64_t error_size);
int64_t pb_cpu_probe_neon_dotprod(char *error, uint64_t error_size);

extern const pb_backend pb_cpu_scalar, pb_cpu_avx2, pb_cpu_avx512, pb_cpu_avx512_vbmi, pb_cpu_avx512_vnni;
extern const pb_backend pb_cpu_avx512_bf16, pb_cpu_neon, pb_cpu_neon_dotprod;

#ifdef __cplusplus
}
#endif
#endif
