// All kernels of one CPU target. Compiled once per target with TOPK_TARGET as the name of its namespace and that target's
// compiler flags. TOPK_SCREENS is defined where attention screens keys by products of bytes. TOPK_OTHERWISE may name another target,
// of the same vectors, whose kernels do all the rest; then they are not compiled twice. Nothing in these files may use the
// standard library's templates: the linker could share such code, compiled for one target, with the rest of the process.
#include <stddef.h>
#include <stdint.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
// GCC 12 takes the undefined vectors that its own header passes to masked instructions for mistakes of ours.
#pragma GCC diagnostic push
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../kernels.h"

namespace topk {
#if defined(TOPK_OTHERWISE)
namespace TOPK_OTHERWISE {
extern const Kernels kernels;
}
#endif
namespace TOPK_TARGET {
namespace {

// Each -inl.h file may be included only at this point, inside the namespace of a target; it relies on those before it.
#include "vectors-inl.h"
#include "numbers-inl.h"
#include "arena-inl.h"
#include "rows-inl.h"
#include "selection-inl.h"
#include "scores-inl.h"
#include "rest-inl.h"
#include "activations-inl.h"
#include "softcap-inl.h"
#include "forward-inl.h"
#if !defined(TOPK_OTHERWISE)
#include "few_rows-inl.h"
#include "kept_index-inl.h"
#include "indexed_rows-inl.h"
#endif
#if defined(TOPK_SCREENS)
#include "screen_vectors-inl.h"
#include "key_index-inl.h"
#include "screen-inl.h"
#include "screened_forward-inl.h"
#endif
#if defined(TOPK_OTHERWISE)

bool forward(const AttentionForward& call, const Parallel& parallel) {
  if (screening_pays(call)) switch (call.dtype) {
      case DType::float32: return run_screened_forward<float>(call, parallel);
      case DType::bfloat16: return run_screened_forward<BFloat16>(call, parallel);
      case DType::float16: return run_screened_forward<Float16>(call, parallel);
      default: break;
    }
  return TOPK_OTHERWISE::kernels.attention.forward(call, parallel);
}

// An index is for few rows of a key head, which are never screened.
bool forward_indexed(const IndexedForward& call, const Parallel& parallel) {
  if (screening_pays(call.forward)) return forward(call.forward, parallel);
  return TOPK_OTHERWISE::kernels.attention.forward_indexed(call, parallel);
}

#define OTHERWISE(part, name, Call) \
  bool name(const Call& call, const Parallel& parallel) { return TOPK_OTHERWISE::kernels.part.name(call, parallel); }

OTHERWISE(attention, index_keys, IndexKeys)
OTHERWISE(attention, backward, AttentionBackward)
OTHERWISE(attention, sum_keys, SumKeys)
OTHERWISE(attention, send_rest, SendRest)
OTHERWISE(feed_forward, choose_neurons, ChooseNeurons)
OTHERWISE(feed_forward, sum_neurons, SumNeurons)
OTHERWISE(feed_forward, dot_neurons, DotNeurons)
OTHERWISE(feed_forward, sum_tokens, SumTokens)

#else
#include "backward-inl.h"
#include "choose_neurons-inl.h"
#include "neuron_sums-inl.h"

#define FOR_DTYPE(run)                                                       \
  switch (call.dtype) {                                                      \
    case DType::float32: return run<float, float>(call, parallel);           \
    case DType::float64: return run<double, double>(call, parallel);         \
    case DType::bfloat16: return run<BFloat16, float>(call, parallel);       \
    case DType::float16: return run<Float16, float>(call, parallel);         \
    default: return false;                                                   \
  }

template <class T, class A>
bool forward_of(const AttentionForward& call, const Parallel& parallel) {
  if (!call.as_many_rows && has_few_rows(call.sizes)) return run_few_rows<T, A>(call, parallel);
#if defined(TOPK_SCREENS)
  if constexpr (sizeof(A) == 4)
    if (screening_pays(call)) return run_screened_forward<T>(call, parallel);
#endif
  return run_forward<T, A>(call, parallel);
}

bool forward(const AttentionForward& call, const Parallel& parallel) { FOR_DTYPE(forward_of) }

template <class T, class A>
bool index_keys_of(const IndexKeys& call, const Parallel& parallel) {
  if constexpr (sizeof(A) == 4) return run_index_keys<T>(call, parallel);
  return false;
}

bool index_keys(const IndexKeys& call, const Parallel& parallel) { FOR_DTYPE(index_keys_of) }

// An index is for few rows of a key head. Others take less time without it.
template <class T, class A>
bool indexed_forward_of(const IndexedForward& call, const Parallel& parallel) {
  if constexpr (sizeof(A) == 4)
    if (has_few_rows(call.forward.sizes) && call.forward.sizes.head_dim <= kLargestKeptDim) return run_indexed_rows<T>(call, parallel);
  return forward_of<T, A>(call.forward, parallel);
}

bool forward_indexed(const IndexedForward& indexed, const Parallel& parallel) {
  const AttentionForward& call = indexed.forward;
  switch (call.dtype) {
    case DType::float32: return indexed_forward_of<float, float>(indexed, parallel);
    case DType::bfloat16: return indexed_forward_of<BFloat16, float>(indexed, parallel);
    case DType::float16: return indexed_forward_of<Float16, float>(indexed, parallel);
    default: return forward(call, parallel);
  }
}

template <class T, class A>
bool backward_of(const AttentionBackward& call, const Parallel& parallel) {
  if (call.sizes.head_dim == 64 && call.sizes.value_dim == 64) return run_backward<T, A, 64>(call, parallel);
  if (call.sizes.head_dim == 128 && call.sizes.value_dim == 128) return run_backward<T, A, 128>(call, parallel);
  return run_backward<T, A, 0>(call, parallel);
}

bool backward(const AttentionBackward& call, const Parallel& parallel) { FOR_DTYPE(backward_of) }

bool sum_keys(const SumKeys& call, const Parallel& parallel) { FOR_DTYPE(run_sum_keys) }
bool send_rest(const SendRest& call, const Parallel& parallel) { FOR_DTYPE(run_send_rest) }

bool choose_neurons(const ChooseNeurons& call, const Parallel& parallel) { FOR_DTYPE(run_choose_neurons) }
bool sum_neurons(const SumNeurons& call, const Parallel& parallel) { FOR_DTYPE(run_sum_neurons) }
bool dot_neurons(const DotNeurons& call, const Parallel& parallel) { FOR_DTYPE(run_dot_neurons) }
bool sum_tokens(const SumTokens& call, const Parallel& parallel) { FOR_DTYPE(run_sum_tokens) }

#endif

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {TOPK_TARGET_NAME, {forward, index_keys, forward_indexed, backward, sum_keys, send_rest}, {choose_neurons, sum_neurons, dot_neurons, sum_tokens}};

}  // namespace TOPK_TARGET
}  // namespace topk
