// The interface between the tensor side and the attention kernels: pointers, sizes and options, no tensors.
//
// B batch, H query heads, G key heads (H a multiple of G), N queries, M keys, D head size, E value size
#pragma once

#include <cstdint>

namespace topk {

enum class DType : int32_t { float32, float64, bfloat16, float16, boolean };

// A 4-d array that is only read. Strides count elements; an axis of size 1 that broadcasts has stride 0.
struct View {
  const void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  DType dtype = DType::float32;
};

// Runs task(state, i) for every i in [0, num_tasks), on several threads and in any order; returns when all are done.
struct Parallel {
  void (*run)(int64_t num_tasks, void* state, void (*task)(void* state, int64_t index)) = nullptr;
  int64_t num_threads = 1;
};

struct Dropout {
  bool active = false;
  uint64_t seed = 0;
  double p = 0;
};

struct Sizes {
  int64_t batch, num_heads, num_key_heads, num_queries, num_keys, head_dim, value_dim;
};

// Which keys the rows of each head keep, and where its entries lie.
//
// The entries of batch b, head h, query i begin at (b * total_k + first_k[h]) * N + i * k[h]. They are k[h] slots: kept
// keys in ascending order, then -1 (weight 0) in the empty slots. With one k for all heads this is a [B, H, N, k] array.
struct HeadK {
  const int64_t* k;        // [H], each in 1..M
  const int64_t* first_k;  // [H], sums of the k before
  int64_t total_k;
};

// The rest, the keys that a row sees and does not keep, as one more entry of its softmax; backends/chunked/rest.py has the
// formulas, backends/calls.py (RestInputs) the meaning of each array. S is G or H, C the number of sums of a head.
struct Rest {
  bool active;
  double lift;
  const void* mass_scale;                   // A [H]
  int64_t num_sum_heads, num_sums;          // S, C
  int64_t interval;                         // keys between two sums; 0: C is 1, or N with a sum for each row
  const void *key_sums, *value_sums;        // A [B, S, C, D], [B, S, C, E], contiguous
  const void* products;                     // A [B, S, C, D, E], contiguous; null where C is N
  const void *score_values, *grad_keys;     // A [B, H, N, E], [B, H, N, D], contiguous; null unless C is N
  View key, value;                          // T [B, S, M, D], [B, S, M, E]; the last axis is contiguous
  const int32_t* counts;                    // visible keys of each row; null: all that are not in its future
  const void* score_sums;                   // A, sums of masks and biases over a row's visible keys; may be null
  int64_t count_stride[3], score_sum_stride[3];  // of [B|1, H|1, N]
};

// A is float, or double where the inputs are; T the dtype of the inputs.
struct AttentionForward {
  Sizes sizes;
  DType dtype;                     // T
  View query, key, value;          // [B, H, N, D], [B, G, M, D], [B, G, M, E] of T; the last axis is contiguous
  View attn_mask, bias;            // [B|1, H|1, N|1, M|1]; data may be null
  const void* relative_bias;       // A [H|1, N + M - 1]; may be null
  int64_t relative_bias_stride;    // 0 for one head
  HeadK head_k;
  bool is_causal;
  double scale;
  Dropout dropout;
  void* output;                    // written: T [B, H, N, E], the last axis contiguous
  int64_t output_stride[3];
  int32_t* indices;                // written unless null: all entries
  void* weights;                   // written unless null: A, softmax weights before dropout
  Rest rest;
  void* mass;                      // written where there is a rest: A [B, H, N], its weight at a scale of 1
  int32_t* cuts;                   // and the slot of the smallest kept score; of equal ones the last
  const void* sinks;               // A [H]: one more score for each row of a head, with weight and without a value; may be null
  double softcap;                  // c: score s counts as c * tanh(s / c). Masks then only hide, and there is no bias. 0: none
  void* log_sums;                  // written unless null: A [B, H, N], of exp(score) and the sink; inf where a row sees no key
  bool as_many_rows;               // few rows of a key head are worked on as many are, with the same bits: for tests
};

struct AttentionBackward {
  Sizes sizes;
  DType dtype;
  View grad_output, query, key, value;  // of T; the last axis is contiguous
  const int32_t* indices;
  const void* weights;
  HeadK head_k;
  double scale;
  Dropout dropout;
  void* grad_query;               // written unless null: T [B, H, N, D], contiguous
  void* grad_key;                 // added to unless null: A [B, G, M, D], contiguous, zeros at the start
  void* grad_value;               // added to unless null: A [B, G, M, E], contiguous, zeros at the start
  void* grad_bias;                // added to unless null: A, with these strides
  int64_t grad_bias_stride[4];
  bool is_causal;                 // read only where there is a rest
  Rest rest;
  const void* mass;               // what the forward pass wrote
  const int32_t* cuts;
  void* sent[5];                  // written where there is a rest: A [B, H, N], see RestGradients in backends/calls.py
  double softcap;                 // that of the forward pass
  void* mean_grads;               // written unless null: A [B, H, N], the sum of a row's weights times their gradients
  double* grad_relative_bias;     // added to unless null: [H|1, N + M - 1]; a sum over all rows, hence double
  int64_t grad_relative_bias_stride;  // 0 for one head
};

// Sums over intervals of consecutive keys.
struct SumKeys {
  int64_t batch, num_heads, head_dim, value_dim, num_sums, interval;
  DType dtype;
  View key, value;  // T [B, G, M, D] and [B, G, M, E]; M is at least num_sums * interval; the last axis is contiguous
  void *key_sums, *value_sums, *products;  // written: A [B, G, C, D], [B, G, C, E], [B, G, C, D, E]
};

// What the rest sends, under causality, to all keys that a row sees: RestGradients in backends/calls.py.
struct SendRest {
  Sizes sizes;
  DType dtype;
  View query, grad_output, key, value;  // T; the last axis is contiguous
  const void* weights[3];               // A [B, H, N]: of keys, values, and cross
  double scale;
  const bool* mask;                     // true = visible, [B|1, M] with these strides; null: no key is hidden
  int64_t mask_stride[2];
  int64_t interval;                     // keys of one task
  void *grad_key, *grad_value;          // added to unless null: A [B, G, M, D] and [B, G, M, E], contiguous
};

// An index of keys that is kept from call to call: 8-bit integers in panels of 32 keys, kernels/kept_index-inl.h says what each
// number means. P panels are there; strides count elements, the other axes are contiguous.
struct KeptIndex {
  uint8_t* panels;        // [B, G, P, D / 4 rounded up, 32, 4]
  float* numbers;         // [B, G, P, 4]
  int32_t* unscreened;    // [B, G, P]
  float* centre;          // [B, G, D rounded up to a multiple of 4]
  int64_t panel_stride[2], number_stride[2], unscreened_stride[2], centre_stride[2];
};

// Write the panels from the one that holds key `start` on; with start = 0 also the centre, which is only read otherwise.
struct IndexKeys {
  int64_t batch, num_heads, num_keys, head_dim, start;
  DType dtype;
  View key;               // [B, G, M, D] of T; the last axis is contiguous
  KeptIndex index;
};

// The forward pass with an index of the keys, which it only reads. Keys from num_indexed on are not in it.
struct IndexedForward {
  AttentionForward forward;
  KeptIndex index;
  int64_t num_indexed;
  bool* is_stale;         // set where a key's score is not what the index says: it is of other keys
  bool reads_ahead = false;  // ask the system for all rows that a query scores before the first is read: they lie in a file
};

// All kernels allocate scratch memory per thread and return false if there is not enough memory.
struct AttentionKernels {
  bool (*forward)(const AttentionForward& call, const Parallel& parallel);
  bool (*index_keys)(const IndexKeys& call, const Parallel& parallel);
  bool (*forward_indexed)(const IndexedForward& call, const Parallel& parallel);
  bool (*backward)(const AttentionBackward& call, const Parallel& parallel);
  bool (*sum_keys)(const SumKeys& call, const Parallel& parallel);
  bool (*send_rest)(const SendRest& call, const Parallel& parallel);
};

}  // namespace topk
