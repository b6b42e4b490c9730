#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace topk {

#if defined(__x86_64__)
namespace avx512vnni {
extern const Kernels kernels;
}
namespace avx512screen {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#if !defined(TOPK_WITHOUT_AVXVNNI)  // setup.py: the compiler is older than that
namespace avxvnni {
extern const Kernels kernels;
}
#endif
namespace avx2screen {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace baseline {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neondot {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}
#else
namespace baseline {
extern const Kernels kernels;
}
#endif

namespace {

#if defined(__x86_64__)
// What __builtin_cpu_supports has no name for in every compiler. Both work on the registers of AVX2, for which it does ask the
// operating system.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29)) != 0;
}

// Whether avx2screen is likely the better one: not on processors that multiply 16-bit integers in one unit and float32 in two
// (Intel Haswell and Broadwell, AMD Zen to Zen 2), of which AMD's take 20 to 290 cycles for pdep and pext too; nor on those of
// other makers, of which nothing is known. LOG.md has the figures.
bool multiplies_16_bits_fast() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) return false;
  const bool is_intel = ebx == signature_INTEL_ebx, is_amd = ebx == signature_AMD_ebx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned family = (eax >> 8 & 0xf) == 0xf ? 0xf + (eax >> 20 & 0xff) : eax >> 8 & 0xf;
  const unsigned model = (eax >> 16 & 0xf) << 4 | (eax >> 4 & 0xf);
  if (is_amd) return family >= 0x19;
  if (!is_intel) return false;
  for (const unsigned slow : {0x3cu, 0x3fu, 0x45u, 0x46u, 0x3du, 0x47u, 0x4fu, 0x56u})
    if (family == 6 && model == slow) return false;
  return true;
}

#if !defined(TOPK_WITHOUT_AVXVNNI)
bool has_avxvnni() {
#if defined(TOPK_AVXVNNI_BY_AVX512)  // for tests: screen_vectors-inl.h encodes the instruction otherwise
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
#else
  // Processors without this part of the leaf return zeros.
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 4)) != 0;
#endif
}
#endif
#endif

#if defined(__aarch64__)
bool has_dot_products() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & (1ul << 20)) != 0;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

// A target for AMX, with tiles of bytes or bfloat16 in place of add_products, would come first: LOG.md has what it could gain.
// It needs CPUID and, on Linux, the kernel's leave to use the tiles (ARCH_REQ_XCOMP_PERM).
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi") &&
                        __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi2"))
    kernels.push_back(&avx512vnni::kernels);
  if (has_avx512) kernels.push_back(&avx512screen::kernels);
  if (has_avx512) kernels.push_back(&avx512::kernels);
#if !defined(TOPK_WITHOUT_AVXVNNI)
  if (has_avx2 && has_f16c() && has_avxvnni()) kernels.push_back(&avxvnni::kernels);
#endif
  const bool screens_with_avx2 = has_avx2 && has_f16c();
  if (screens_with_avx2 && multiplies_16_bits_fast()) kernels.push_back(&avx2screen::kernels);
  if (has_avx2) kernels.push_back(&avx2::kernels);
  if (screens_with_avx2 && !multiplies_16_bits_fast()) kernels.push_back(&avx2screen::kernels);
  kernels.push_back(&baseline::kernels);
#elif defined(__aarch64__)
  if (has_dot_products()) kernels.push_back(&neondot::kernels);
  kernels.push_back(&neon::kernels);  // every 64-bit Arm processor has NEON
#else
  kernels.push_back(&baseline::kernels);
#endif
  return kernels;
}

}  // namespace

std::vector<std::string> available_targets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable()) names.push_back(kernels->target);
  return names;
}

const Kernels* kernels_of(const std::string& target) {
  for (const Kernels* kernels : runnable())
    if (target.empty() || target == kernels->target) return kernels;
  return nullptr;
}

}  // namespace topk
