// All kernels of one CPU target. Compiled once per target with TOPK_TARGET as the name of its namespace and that target's
// compiler flags. Nothing here may come from the standard library's templates: such code, compiled for one target, could
// be shared with the rest of the process by the linker.
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../attention.h"

namespace topk {
namespace TOPK_TARGET {
namespace {

#include "vectors.h"
#include "numbers.h"
#include "arena.h"
#include "rows.h"
#include "selection.h"
#include "scores.h"
#include "forward.h"
#include "backward.h"

bool forward(const AttentionForward& call, const Parallel& parallel) {
  switch (call.dtype) {
    case DType::float32: return run_forward<float, float>(call, parallel);
    case DType::float64: return run_forward<double, double>(call, parallel);
    case DType::bfloat16: return run_forward<BFloat16, float>(call, parallel);
    case DType::float16: return run_forward<Float16, float>(call, parallel);
    default: return false;
  }
}

template <class T, class A>
bool backward_of(const AttentionBackward& call, const Parallel& parallel) {
  if (call.sizes.head_dim == 64 && call.sizes.value_dim == 64) return run_backward<T, A, 64>(call, parallel);
  if (call.sizes.head_dim == 128 && call.sizes.value_dim == 128) return run_backward<T, A, 128>(call, parallel);
  return run_backward<T, A, 0>(call, parallel);
}

bool backward(const AttentionBackward& call, const Parallel& parallel) {
  switch (call.dtype) {
    case DType::float32: return backward_of<float, float>(call, parallel);
    case DType::float64: return backward_of<double, double>(call, parallel);
    case DType::bfloat16: return backward_of<BFloat16, float>(call, parallel);
    case DType::float16: return backward_of<Float16, float>(call, parallel);
    default: return false;
  }
}

}  // namespace

extern const AttentionKernels kernels;
const AttentionKernels kernels = {TOPK_TARGET_NAME, forward, backward};

}  // namespace TOPK_TARGET
}  // namespace topk
