// The interface between the tensor side and the feed-forward kernels.
//
// T tokens, D model size, F neurons, X size of a row of any table
#pragma once

#include <cstdint>

#include "attention.h"

namespace topk {

enum class Activation : int32_t { identity, relu, silu, gelu, gelu_tanh, quick_gelu, relu_squared };

// A matrix whose rows are contiguous.
struct Matrix {
  const void* data = nullptr;
  int64_t row_stride = 0;
};

// A is float, or double where the inputs are; T the dtype of the inputs.
struct ChooseNeurons {
  int64_t num_tokens, model_size, num_neurons, k;
  DType dtype;
  Matrix x, w_in, w_gate;     // [T, D], [F, D], [F, D]; w_gate.data may be null
  const void *b_in, *b_gate;  // A [F]; may be null
  Activation activation;      // of the gate; neurons are ranked by |activation(gate) * in|, without a gate by `in`
  // A gated layer cuts the gate at this number from above and `in` at both signs of it, then adds the offset to `in`.
  double limit = __builtin_inf(), offset = 0;  // infinity cuts nothing
  int32_t* neurons;           // written: [T, k], ascending
  void* values;               // written: A [T, k], x w_in' + b_in of the chosen neurons
  void* gates;                // written where there is a gate: A [T, k]
};

// Entries [T, k]: neurons, ascending in each row, and one coefficient each.
struct Entries {
  int64_t num_tokens, k;
  const int32_t* neurons;
  const void* coefficients;  // A
};

// out[t] += sum over j of coefficients[t, j] * table[neurons[t, j]]
struct SumNeurons {
  Entries entries;
  int64_t num_neurons, size;
  DType dtype;                 // of the table
  Matrix table;                // [F, X], or [X, F] where it is transposed
  void* out;                   // A [T, X], contiguous
  bool is_transposed = false;  // changes no bit of the result
};

// out[t, j] = rows[t] . table[neurons[t, j]]
struct DotNeurons {
  int64_t num_tokens, k, num_neurons, size;
  DType dtype;  // of rows and table
  const int32_t* neurons;
  Matrix rows, table;  // [T, X], [F, X]
  void* out;           // A [T, k]
};

// out[f] += sum over entries (t, j) of neuron f of coefficients[t, j] * rows[t], in the order of t
struct SumTokens {
  Entries entries;
  int64_t num_neurons, size;
  DType dtype;       // of rows
  Matrix rows;       // [T, X]
  void* out;         // A [F, X], contiguous
  void* bias_out;    // A [F], gets the coefficients' sums; may be null
};

struct FeedForwardKernels {
  bool (*choose_neurons)(const ChooseNeurons& call, const Parallel& parallel);
  bool (*sum_neurons)(const SumNeurons& call, const Parallel& parallel);
  bool (*dot_neurons)(const DotNeurons& call, const Parallel& parallel);
  bool (*sum_tokens)(const SumTokens& call, const Parallel& parallel);
};

}  // namespace topk
