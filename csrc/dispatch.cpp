#include "dispatch.h"

namespace topk {

#if defined(__x86_64__)
namespace avx512vnni {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace baseline {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#else
namespace baseline {
extern const Kernels kernels;
}
#endif

namespace {

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
  if (has_avx512) kernels.push_back(&avx512::kernels);
  if (has_avx2) kernels.push_back(&avx2::kernels);
  kernels.push_back(&baseline::kernels);
#elif defined(__aarch64__)
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
