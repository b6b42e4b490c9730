// The parts of a top-k feed-forward layer as feed_forward.h defines them, neuron by neuron and in more precision than
// double: what the kernels are compared with.
#pragma once

#include <algorithm>
#include <vector>

#include "../feed_forward.h"
#include "claims.h"

namespace topk_test {

using topk::Activation;

// Matrices are arrays [1, 1, rows, columns].
struct Layer {
  int64_t k = 1;
  DType dtype = DType::float32;
  Activation activation = Activation::identity;
  Array x, w_in, w_gate;  // [T, D], [F, D], [F, D]; w_gate may be missing
  Array b_in, b_gate;     // [1, F] of the accumulation dtype; may be missing

  int64_t num_tokens() const { return x.shape[2]; }
  int64_t model_size() const { return x.shape[3]; }
  int64_t num_neurons() const { return w_in.shape[2]; }
};

struct Chosen {
  std::vector<int32_t> neurons;
  std::vector<Number> values, gates;  // in the order of contiguous arrays [T, k]
};

inline Number pre_activation(const Layer& layer, const Array& weights, const Array& bias, int64_t token, int64_t neuron) {
  Number sum = 0;
  for (int64_t d = 0; d < layer.model_size(); ++d)
    sum += Number(layer.x.get(0, 0, token, d)) * weights.get(0, 0, neuron, d);
  if (bias.exists()) sum += bias.get(0, 0, 0, neuron);
  return sum;
}

// At least the largest slope of an activation up to the size of z.
inline double steepness(Activation activation, long double z) {
  return activation == Activation::relu_squared ? 2 * double(std::fabs(z)) : 1.13;
}

inline long double activated(Activation activation, long double z) {
  switch (activation) {
    case Activation::identity: return z;
    case Activation::relu: return z <= 0 ? 0 : z;
    case Activation::relu_squared: return z <= 0 ? 0 : z * z;
    case Activation::silu: return z / (1 + std::exp(-z));
    case Activation::quick_gelu: return z / (1 + std::exp(-1.702L * z));
    case Activation::gelu: return z * (1 + std::erf(z / std::sqrt(2.0L))) / 2;
    case Activation::gelu_tanh:
      return z * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0L)) * (z + 0.044715L * z * z * z))) / 2;
  }
  return kNan;
}

// What neurons are ranked by; NaN counts as the best.
inline Number rank_of(const Layer& layer, int64_t token, int64_t neuron) {
  Number rank = pre_activation(layer, layer.w_in, layer.b_in, token, neuron);
  if (layer.w_gate.exists()) {
    const Number gate = pre_activation(layer, layer.w_gate, layer.b_gate, token, neuron);
    rank = {std::fabs(activated(layer.activation, gate.value) * rank.value),
            steepness(layer.activation, gate.value) * gate.mass * double(std::fabs(rank.value)) +
                rank.mass * double(std::fabs(activated(layer.activation, gate.value)))};
  }
  return std::isnan(rank.value) ? Number(kInf) : rank;
}

// With `selection` the neurons are taken as given, otherwise chosen: the best k, of tied ones those with the lower index.
inline Chosen define(const Layer& layer, const std::vector<int32_t>* selection = nullptr) {
  Chosen chosen;
  for (int64_t t = 0; t < layer.num_tokens(); ++t) {
    std::vector<int32_t> neurons(layer.num_neurons());
    for (int32_t f = 0; f < int32_t(neurons.size()); ++f) neurons[f] = f;
    if (selection == nullptr) {
      std::vector<long double> rank;
      for (int32_t f : neurons) rank.push_back(rank_of(layer, t, f).value);
      std::stable_sort(neurons.begin(), neurons.end(), [&](int32_t a, int32_t b) { return rank[a] > rank[b]; });
      neurons.resize(layer.k);
      std::sort(neurons.begin(), neurons.end());
    } else {
      neurons.assign(selection->begin() + t * layer.k, selection->begin() + (t + 1) * layer.k);
    }
    for (int32_t f : neurons) {
      chosen.neurons.push_back(f);
      chosen.values.push_back(pre_activation(layer, layer.w_in, layer.b_in, t, f));
      if (layer.w_gate.exists()) chosen.gates.push_back(pre_activation(layer, layer.w_gate, layer.b_gate, t, f));
    }
  }
  return chosen;
}

// For the sums: entries [T, k] of neurons, ascending in each row, and their coefficients; rows of tokens and of neurons.
struct Entries {
  int64_t k = 1;
  DType dtype = DType::float32;
  std::vector<int32_t> neurons;
  Array coefficients;  // [T, k] of the accumulation dtype
  Array rows, table;   // [T, X], [F, X]
  Array before;        // what is in the output beforehand
  Array bias_before;   // [1, F]; may be missing

  int64_t num_tokens() const { return rows.shape[2]; }
  int64_t num_neurons() const { return table.shape[2]; }
  int64_t size() const { return rows.shape[3]; }
};

inline std::vector<Number> numbers_of(const Array& array) {
  std::vector<Number> numbers;
  for (int64_t c = 0; c < array.shape[2]; ++c)
    for (int64_t d = 0; d < array.shape[3]; ++d) numbers.push_back(array.get(0, 0, c, d));
  return numbers;
}

// [T, X]
inline std::vector<Number> define_sum_neurons(const Entries& e) {
  std::vector<Number> out = numbers_of(e.before);
  for (int64_t t = 0; t < e.num_tokens(); ++t)
    for (int64_t j = 0; j < e.k; ++j)
      for (int64_t x = 0; x < e.size(); ++x)
        out[t * e.size() + x] += Number(e.coefficients.get(0, 0, t, j)) * e.table.get(0, 0, e.neurons[t * e.k + j], x);
  return out;
}

// [T, k]
inline std::vector<Number> define_dot_neurons(const Entries& e) {
  std::vector<Number> out(e.num_tokens() * e.k);
  for (int64_t t = 0; t < e.num_tokens(); ++t)
    for (int64_t j = 0; j < e.k; ++j)
      for (int64_t x = 0; x < e.size(); ++x)
        out[t * e.k + j] += Number(e.rows.get(0, 0, t, x)) * e.table.get(0, 0, e.neurons[t * e.k + j], x);
  return out;
}

// [F, X]
inline std::vector<Number> define_sum_tokens(const Entries& e) {
  std::vector<Number> out = numbers_of(e.before);
  for (int64_t t = 0; t < e.num_tokens(); ++t)
    for (int64_t j = 0; j < e.k; ++j)
      for (int64_t x = 0; x < e.size(); ++x)
        out[e.neurons[t * e.k + j] * e.size() + x] += Number(e.coefficients.get(0, 0, t, j)) * e.rows.get(0, 0, t, x);
  return out;
}

// [F]
inline std::vector<Number> define_bias_sums(const Entries& e) {
  std::vector<Number> out = numbers_of(e.bias_before);
  for (int64_t t = 0; t < e.num_tokens(); ++t)
    for (int64_t j = 0; j < e.k; ++j) out[e.neurons[t * e.k + j]] += e.coefficients.get(0, 0, t, j);
  return out;
}

}  // namespace topk_test
