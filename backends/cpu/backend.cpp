// Which variants of the CPU backend there are, and whether this machine can run them.
#include <cstdio>

#include "probe.h"

#if defined(__x86_64__) || defined(_M_X64)
#define PB_CPU_X86 1
#include <cpuid.h>
#else
#define PB_CPU_X86 0
#endif
#if defined(__aarch64__)
#define PB_CPU_ARM 1
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#else
#define PB_CPU_ARM 0
#endif

namespace {

#if PB_CPU_X86

enum Feature {
  FMA,
  F16C,
  AVX2,
  AVX512F,
  AVX512BW,
  AVX512VL,
  AVX512VBMI,
  AVX512VNNI,
  AVX512BF16,
  YMM_STATE,
  ZMM_STATE,
  FEATURES
};

const char *const feature_names[FEATURES] = {"FMA",
                                             "F16C",
                                             "AVX2",
                                             "AVX512F",
                                             "AVX512BW",
                                             "AVX512VL",
                                             "AVX512VBMI",
                                             "AVX512VNNI",
                                             "AVX512BF16",
                                             "256-bit registers saved by the operating system",
                                             "512-bit registers saved by the operating system"};

struct Cpu {
  bool has[FEATURES] = {};

  Cpu() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    has[FMA] = c >> 12 & 1;
    has[F16C] = c >> 29 & 1;
    const bool osxsave = c >> 27 & 1;
    // A feature bit is not enough: without the operating system's part the first wide instruction faults.
    if (osxsave) {
      unsigned low, high;
      __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
      has[YMM_STATE] = (low & 0x06) == 0x06;
      has[ZMM_STATE] = (low & 0xe6) == 0xe6;
    }
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    has[AVX2] = b >> 5 & 1;
    has[AVX512F] = b >> 16 & 1;
    has[AVX512BW] = b >> 30 & 1;
    has[AVX512VL] = b >> 31 & 1;
    has[AVX512VBMI] = c >> 1 & 1;
    has[AVX512VNNI] = c >> 11 & 1;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) has[AVX512BF16] = a >> 5 & 1;
  }
};

// Names everything that is missing, not only the first thing.
template <unsigned N>
int64_t need(const Feature (&features)[N], char *error, uint64_t error_size) {
  static const Cpu cpu;
  uint64_t used = 0;
  bool complete = true;
  for (Feature feature : features) {
    if (cpu.has[feature]) continue;
    const char *join = complete ? "this processor lacks " : ", ";
    complete = false;
    if (!error || used >= error_size) continue;
    const int written = std::snprintf(error + used, error_size - used, "%s%s", join, feature_names[feature]);
    if (written > 0) used += static_cast<uint64_t>(written);
  }
  return complete;
}

#elif PB_CPU_ARM

// NEON is part of every 64-bit ARM that runs an operating system: what calls this was compiled with it.
bool has_dotprod() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value;
#else
  return false;
#endif
}

#endif

}  // namespace

extern "C" {

int64_t pb_cpu_probe_scalar(char *, uint64_t) { return 1; }

#if PB_CPU_X86

int64_t pb_cpu_probe_avx2(char *error, uint64_t error_size) {
  return need({AVX2, FMA, F16C, YMM_STATE}, error, error_size);
}

int64_t pb_cpu_probe_avx512(char *error, uint64_t error_size) {
  return need({AVX512F, AVX512BW, AVX512VL, AVX2, FMA, F16C, YMM_STATE, ZMM_STATE}, error, error_size);
}

int64_t pb_cpu_probe_avx512_vbmi(char *error, uint64_t error_size) {
  return need({AVX512VBMI, AVX512F, AVX512BW, AVX512VL, AVX2, FMA, F16C, YMM_STATE, ZMM_STATE}, error, error_size);
}

int64_t pb_cpu_probe_avx512_vnni(char *error, uint64_t error_size) {
  return need({AVX512VNNI, AVX512F, AVX512BW, AVX512VL, AVX2, FMA, F16C, YMM_STATE, ZMM_STATE}, error, error_size);
}

int64_t pb_cpu_probe_avx512_bf16(char *error, uint64_t error_size) {
  return need({AVX512BF16, AVX512VNNI, AVX512F, AVX512BW, AVX512VL, AVX2, FMA, F16C, YMM_STATE, ZMM_STATE}, error,
              error_size);
}

#elif PB_CPU_ARM

int64_t pb_cpu_probe_neon(char *, uint64_t) { return 1; }

int64_t pb_cpu_probe_neon_dotprod(char *error, uint64_t error_size) {
  if (has_dotprod()) return 1;
  if (error) std::snprintf(error, error_size, "this processor lacks DotProd");
  return 0;
}

#endif

PB_EXPORT const pb_backend *polybit_backend(uint64_t index) {
  static const pb_backend *const backends[] = {
#if PB_CPU_X86
      &pb_cpu_avx512_bf16, &pb_cpu_avx512_vnni, &pb_cpu_avx512_vbmi, &pb_cpu_avx512, &pb_cpu_avx2,
#elif PB_CPU_ARM
      &pb_cpu_neon_dotprod,
      &pb_cpu_neon,
#endif
      &pb_cpu_scalar,
  };
  return index < sizeof backends / sizeof *backends ? backends[index] : nullptr;
}

}  // extern "C"
