// Top-k attention as DESIGN.md defines it, key by key and in more precision than double: what the kernels are compared with.
#pragma once

#include <algorithm>
#include <vector>

#include "claims.h"

namespace topk_test {

struct Case {
  topk::Sizes sizes = {1, 1, 1, 1, 1, 1, 1};
  DType dtype = DType::float32;
  std::vector<int64_t> k;  // one per head
  bool is_causal = false;
  double scale = 1;
  topk::Dropout dropout;
  std::vector<double> mass_scale;  // one per head; empty: no rest. With a rest there are no masks and no biases
  double lift = 0;
  int64_t interval = 0;  // keys between two running sums; 0: one sum of all
  Array query, key, value, grad_output;
  Array mask, bias, relative_bias;  // may be missing; relative_bias is [1, 1, H|1, N + M - 1]
  Layout output_layout = Layout::heads_inside;

  int64_t total_k(int64_t num_heads) const {
    int64_t total = 0;
    for (int64_t h = 0; h < num_heads; ++h) total += k[h];
    return total;
  }
  int64_t first_entry(int64_t b, int64_t h, int64_t i) const {
    return (b * total_k(sizes.num_heads) + total_k(h)) * sizes.num_queries + i * k[h];
  }
  int64_t num_entries() const { return sizes.batch * sizes.num_queries * total_k(sizes.num_heads); }
};

struct Expected {
  std::vector<int32_t> indices;
  std::vector<Number> weights;
  // In the order of contiguous arrays.
  std::vector<Number> output, grad_query, grad_key, grad_value, grad_bias, grad_relative_bias;
};

// backends/dropout.py
inline uint32_t mix(uint64_t word) {
  const uint64_t low = 0xffffffff;
  word ^= word >> 16;
  word = word * 0x85ebca6b & low;
  word ^= word >> 13;
  word = word * 0xc2b2ae35 & low;
  return uint32_t(word ^ (word >> 16));
}

inline bool survives(const topk::Dropout& dropout, int64_t row, int64_t column) {
  const uint64_t word = uint64_t(row) ^ dropout.seed;
  const uint32_t row_hash = mix(mix(word & 0xffffffff) ^ (word >> 32));
  return double(mix(row_hash ^ (uint64_t(column) * 0x9e3779b1 & 0xffffffff))) >= std::nearbyint(dropout.p * 0x1p32);
}

inline bool row_is_finite(const Array& rows, int64_t b, int64_t h, int64_t i) {
  for (int64_t d = 0; d < rows.shape[3]; ++d)
    if (!std::isfinite(rows.get(b, h, i, d))) return false;
  return true;
}

// The score of one key as the accumulation dtype has it; -inf where the key is hidden.
inline Number score_of(const Case& c, int64_t b, int64_t h, int64_t i, int64_t j) {
  const topk::Sizes& s = c.sizes;
  const int64_t g = h / (s.num_heads / s.num_key_heads);
  const DType dtype = accumulation(c.dtype);
  if (c.is_causal && j > i + s.num_keys - s.num_queries) return -kInf;
  Number added = 0;
  const auto add = [&](double x) {
    x = round_to(dtype, x);
    added = x == -kInf || added.value == -kInf ? Number(-kInf) : Number(round_to(dtype, double(added.value) + x));
  };
  if (c.relative_bias.exists()) add(c.relative_bias.get(0, 0, h, j - i + s.num_queries - 1));
  if (c.bias.exists()) add(c.bias.get(b, h, i, j));
  if (c.mask.exists() && c.mask.dtype == DType::boolean && c.mask.get(b, h, i, j) == 0) return -kInf;
  if (c.mask.exists() && c.mask.dtype != DType::boolean) add(c.mask.get(b, h, i, j));
  if (added.value == -kInf) return -kInf;
  if (!row_is_finite(c.query, b, h, i) || !row_is_finite(c.key, b, g, j)) return kNan;
  Number product = 0;
  for (int64_t d = 0; d < s.head_dim; ++d) product += Number(c.query.get(b, h, i, d)) * c.key.get(b, g, j, d);
  // Where the product is zero, what is added is the score, whatever its size.
  return {round_to(dtype, double(product.value * c.scale + added.value)), product.mass * c.scale};
}

// The keys that row (b, h, i) keeps, ascending. A NaN counts as the best score of all.
inline std::vector<int32_t> kept_keys(const std::vector<Number>& scores, int64_t k) {
  const auto rank = [&](int32_t j) { return std::isnan(scores[j].value) ? kInf : double(scores[j].value); };
  std::vector<int32_t> keys;
  for (int32_t j = 0; j < int32_t(scores.size()); ++j)
    if (rank(j) != -kInf) keys.push_back(j);
  std::stable_sort(keys.begin(), keys.end(), [&](int32_t a, int32_t b) { return rank(a) > rank(b); });
  if (int64_t(keys.size()) > k) keys.resize(k);
  std::sort(keys.begin(), keys.end());
  return keys;
}

inline std::vector<Number> softmax(const std::vector<Number>& scores, const std::vector<int32_t>& keys) {
  long double highest = -kInf, total = 0;
  for (int32_t j : keys) highest = std::isnan(scores[j].value) ? kInf : std::max(highest, scores[j].value);
  std::vector<Number> weights;
  for (int32_t j : keys) total += std::exp(scores[j].value - highest);
  for (int32_t j : keys) {
    const long double distance = scores[j].value - highest, weight = highest == kInf ? kNan : std::exp(distance) / total;
    // A score that is wrong by e makes the weight wrong by that share, and a sum of n numbers by about sqrt(n) roundings.
    weights.push_back({weight, double(weight * (std::sqrt(double(keys.size())) + scores[j].mass - distance))});
  }
  return weights;
}

// The rest of row (b, h, i) as one more entry of its softmax: the weights of kept keys shrink, its part of the output [E] is
// added. A sum over the rest is one over all visible keys less one over the kept keys, so errors grow with both.
inline void complete(const Case& c, int64_t b, int64_t h, const std::vector<Number>& scores, const std::vector<int32_t>& keys,
                     std::vector<Number>& weights, Number* output) {
  const int64_t g = h / (c.sizes.num_heads / c.sizes.num_key_heads), num_keys = c.sizes.num_keys;
  std::vector<bool> is_kept(num_keys);
  long double highest = -kInf, lowest = kInf, total = 0, mean = 0;
  double score_mass = 0, count = 0;
  for (int32_t j : keys) {
    is_kept[j] = true;
    highest = std::max(highest, scores[j].value);
    lowest = std::min(lowest, scores[j].value);
  }
  for (int32_t j : keys) total += std::exp(scores[j].value - highest);
  for (int64_t j = 0; j < num_keys; ++j) {
    if (scores[j].value == -kInf) continue;
    score_mass += scores[j].mass;
    if (is_kept[j]) continue;
    ++count;
    mean += scores[j].value;
  }
  if (count == 0) return;
  mean /= count;
  const long double score = (1 - c.lift) * mean + c.lift * lowest;
  const long double ratio = c.mass_scale[h] * count * std::exp(score - highest) / total;
  const double num_roundings = std::sqrt(double(num_keys)), error_of_mean = num_roundings * score_mass / count;
  const double error = num_roundings + error_of_mean + std::fabs(double(score - highest));
  for (Number& weight : weights)
    weight = {weight.value / (1 + ratio), (weight.mass + double(weight.value) * error) / double(1 + ratio)};
  const long double share = ratio / (1 + ratio) / count;
  for (int64_t x = 0; x < c.sizes.value_dim; ++x) {
    Number sum = 0;
    for (int64_t j = 0; j < num_keys; ++j) {
      if (scores[j].value == -kInf) continue;
      const double value = c.value.get(b, g, j, x);
      const long double term = is_kept[j] ? 0 : (1 + scores[j].value - mean) * value;
      sum += {term, std::fabs(value) * (1 + scores[j].mass + error_of_mean)};
    }
    output[x] += {share * sum.value, double(share) * error * sum.mass};
  }
}

// With `selection` the entries are taken as given, otherwise chosen. Where there is a rest, the gradients lack its part.
inline Expected define(const Case& c, const std::vector<int32_t>* selection = nullptr) {
  const topk::Sizes& s = c.sizes;
  const int64_t D = s.head_dim, E = s.value_dim, N = s.num_queries, M = s.num_keys;
  Expected e;
  e.indices.assign(c.num_entries(), -1);
  e.weights.assign(c.num_entries(), 0.0);
  e.output.resize(s.batch * s.num_heads * N * E);
  e.grad_query.resize(s.batch * s.num_heads * N * D);
  e.grad_key.resize(s.batch * s.num_key_heads * M * D);
  e.grad_value.resize(s.batch * s.num_key_heads * M * E);
  e.grad_bias.resize(c.bias.count());
  e.grad_relative_bias.resize(c.relative_bias.count());
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.num_heads; ++h)
      for (int64_t i = 0; i < N; ++i) {
        const int64_t g = h / (s.num_heads / s.num_key_heads), row = (b * s.num_heads + h) * N + i;
        std::vector<Number> scores(M);
        for (int64_t j = 0; j < M; ++j) scores[j] = score_of(c, b, h, i, j);
        std::vector<int32_t> keys = kept_keys(scores, c.k[h]);
        const int64_t first = c.first_entry(b, h, i);
        if (selection != nullptr) std::copy_n(selection->begin() + first, keys.size(), keys.begin());
        std::vector<Number> weights = softmax(scores, keys);
        if (!c.mass_scale.empty()) complete(c, b, h, scores, keys, weights, &e.output[row * E]);
        std::copy(keys.begin(), keys.end(), e.indices.begin() + first);
        std::copy(weights.begin(), weights.end(), e.weights.begin() + first);

        std::vector<Number> grad_weight(keys.size()), grad_score(keys.size());
        Number mean = 0;
        for (size_t n = 0; n < keys.size(); ++n) {
          const int64_t j = keys[n];
          double factor = 1;
          if (c.dropout.active) factor = survives(c.dropout, row, j) ? 1 / (1 - c.dropout.p) : 0;
          const Number dropped = weights[n] * factor;
          for (int64_t x = 0; x < E; ++x) {
            const double value = c.value.get(b, g, j, x), grad = c.grad_output.get(b, h, i, x);
            e.output[row * E + x] += dropped * value;
            e.grad_value[((b * s.num_key_heads + g) * M + j) * E + x] += dropped * grad;
            grad_weight[n] += Number(grad) * value * factor;
          }
          mean += weights[n] * grad_weight[n];
        }
        for (size_t n = 0; n < keys.size(); ++n) {
          const int64_t j = keys[n];
          grad_score[n] = weights[n] * (grad_weight[n] - mean);
          for (int64_t d = 0; d < D; ++d) {
            e.grad_query[row * D + d] += grad_score[n] * c.key.get(b, g, j, d) * c.scale;
            e.grad_key[((b * s.num_key_heads + g) * M + j) * D + d] += grad_score[n] * c.query.get(b, h, i, d) * c.scale;
          }
          if (c.bias.exists()) {
            const Shape& shape = c.bias.shape;
            const int64_t at[] = {b % shape[0], h % shape[1], i % shape[2], j % shape[3]};
            e.grad_bias[((at[0] * shape[1] + at[1]) * shape[2] + at[2]) * shape[3] + at[3]] += grad_score[n];
          }
          if (c.relative_bias.exists())
            e.grad_relative_bias[h % c.relative_bias.shape[2] * (N + M - 1) + j - i + N - 1] += grad_score[n];
        }
      }
  return e;
}

}  // namespace topk_test
