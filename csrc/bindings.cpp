// The tensor side: the operators of torch.ops.topk_attention, on the LibTorch stable ABI. No file below sees a tensor.
// Python has checked every argument (functional/) and made shapes, dtypes and devices canonical (backends/cpu/).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels in use: the best that this processor can run, unless others are forced.
const topk::Kernels* used_kernels = topk::kernels_of("");

const topk::Kernels& kernels() { return *used_kernels; }

topk::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return topk::DType::float32;
    case ScalarType::Double: return topk::DType::float64;
    case ScalarType::BFloat16: return topk::DType::bfloat16;
    case ScalarType::Half: return topk::DType::float16;
    case ScalarType::Bool: return topk::DType::boolean;
    default: STD_TORCH_CHECK(false, "unsupported dtype");
  }
}

ScalarType accumulation_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

topk::View view_of(const Tensor& tensor) {
  topk::View view;
  view.data = tensor.const_data_ptr();
  view.dtype = dtype_of(tensor);
  for (int64_t axis = 0; axis < 4; ++axis) view.stride[axis] = tensor.size(axis) == 1 ? 0 : tensor.stride(axis);
  return view;
}

topk::View view_of(const std::optional<Tensor>& tensor) { return tensor.has_value() ? view_of(*tensor) : topk::View(); }

// The tensor with a contiguous last axis; copies only where it has none.
Tensor with_whole_rows(const Tensor& tensor) {
  const bool whole = tensor.size(3) <= 1 || tensor.stride(3) == 1;
  return whole ? tensor : torch::stable::contiguous(tensor);
}

topk::Dropout dropout_of(const std::optional<Tensor>& seed, double p) {
  topk::Dropout dropout;
  dropout.p = p;
  if (seed.has_value()) {
    dropout.active = true;
    dropout.seed = uint64_t(*static_cast<const int64_t*>(seed->const_data_ptr()));
  }
  return dropout;
}

// The arrays that a topk::HeadK points into.
struct HeadKArrays {
  explicit HeadKArrays(const std::vector<int64_t>& head_k) : k(head_k) {
    for (int64_t k_of_head : k) {
      first.push_back(total);
      total += k_of_head;
    }
  }
  topk::HeadK view() const { return {k.data(), first.data(), total}; }

  std::vector<int64_t> k, first;
  int64_t total = 0;
};

// Torch's own threads run the tasks; each free thread takes the next one.
void run_in_parallel(int64_t num_tasks, void* state, void (*task)(void*, int64_t)) {
  std::atomic<int64_t> next = 0;
  const int64_t num_threads = std::min<int64_t>(num_tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = next++; i < num_tasks; i = next++) task(state, i);
  });
}

topk::Parallel parallel() { return {run_in_parallel, int64_t(torch::stable::get_num_threads())}; }

Tensor empty(const std::vector<int64_t>& size, ScalarType dtype) { return torch::stable::empty(size, dtype); }

Tensor zeros(const std::vector<int64_t>& size, ScalarType dtype) {
  Tensor tensor = empty(size, dtype);
  return torch::stable::zero_(tensor);
}

// Keys of a panel of a kept index.
constexpr int64_t kIndexPanel = 32;

void check_memory(bool ok) { STD_TORCH_CHECK(ok, "the top-k kernels found no memory for their scratch space"); }

// The tensors and options of RestInputs in backends/calls.py.
struct RestTensors {
  Tensor mass_scale;
  double lift;
  Tensor key_sums, value_sums;
  std::optional<Tensor> products, score_values, grad_keys;
  Tensor key, value;
  std::optional<Tensor> counts, score_sums;
  int64_t interval;
};

const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// Strides of [B|1, H|1, N], 0 along an axis that broadcasts.
void broadcast_strides(const std::optional<Tensor>& tensor, int64_t* stride) {
  for (int64_t axis = 0; tensor.has_value() && axis < 3; ++axis)
    stride[axis] = tensor->size(axis) == 1 ? 0 : tensor->stride(axis);
}

// Makes what the rest points to contiguous; it must outlive the result.
topk::Rest rest_of(RestTensors& tensors) {
  for (Tensor* tensor : {&tensors.mass_scale, &tensors.key_sums, &tensors.value_sums})
    *tensor = torch::stable::contiguous(*tensor);
  for (std::optional<Tensor>* tensor : {&tensors.products, &tensors.score_values, &tensors.grad_keys})
    *tensor = contiguous(*tensor);
  tensors.key = with_whole_rows(tensors.key);
  tensors.value = with_whole_rows(tensors.value);
  topk::Rest rest = {};
  rest.active = true;
  rest.lift = tensors.lift;
  rest.mass_scale = tensors.mass_scale.const_data_ptr();
  rest.num_sum_heads = tensors.key_sums.size(1);
  rest.num_sums = tensors.key_sums.size(2);
  rest.interval = tensors.interval;
  rest.key_sums = tensors.key_sums.const_data_ptr();
  rest.value_sums = tensors.value_sums.const_data_ptr();
  rest.products = data_of(tensors.products);
  rest.score_values = data_of(tensors.score_values);
  rest.grad_keys = data_of(tensors.grad_keys);
  rest.key = view_of(tensors.key);
  rest.value = view_of(tensors.value);
  rest.counts = static_cast<const int32_t*>(data_of(tensors.counts));
  rest.score_sums = data_of(tensors.score_sums);
  broadcast_strides(tensors.counts, rest.count_stride);
  broadcast_strides(tensors.score_sums, rest.score_sum_stride);
  return rest;
}

struct ForwardTensors {
  Tensor output, indices, weights, log_sums, mass, cuts;
};

// Bytes of one panel of a kept index.
int64_t index_panel_bytes(int64_t head_dim) { return (head_dim + 3) / 4 * 4 * kIndexPanel; }

// The tensors of a kept index: topk::KeptIndex. They may be parts of larger ones along their first two axes.
struct IndexTensors {
  Tensor panels, numbers, unscreened, centre;
};

topk::KeptIndex index_of(const IndexTensors& tensors, const Tensor& key, int64_t num_indexed) {
  const int64_t batch = key.size(0), heads = key.size(1), head_dim = key.size(3), num_panels = tensors.panels.size(2);
  const auto check = [&](const Tensor& tensor, const char* name, ScalarType dtype, const std::vector<int64_t>& size) {
    bool fits = tensor.scalar_type() == dtype && tensor.dim() == int64_t(size.size());
    for (int64_t axis = 0; fits && axis < tensor.dim(); ++axis) fits = tensor.size(axis) == size[axis];
    int64_t inner = 1;
    for (int64_t axis = tensor.dim() - 1; fits && axis > 1; inner *= size[axis--])
      fits = size[axis] <= 1 || tensor.stride(axis) == inner;
    STD_TORCH_CHECK(fits, name, " does not have the shape, dtype or layout of an index of these keys");
  };
  STD_TORCH_CHECK(tensors.panels.dim() == 4, "panels does not have the shape of an index of these keys");
  check(tensors.panels, "panels", ScalarType::Byte, {batch, heads, num_panels, index_panel_bytes(head_dim)});
  check(tensors.numbers, "numbers", ScalarType::Float, {batch, heads, num_panels, 4});
  check(tensors.unscreened, "unscreened", ScalarType::Int, {batch, heads, num_panels});
  check(tensors.centre, "centre", ScalarType::Float, {batch, heads, (head_dim + 3) / 4 * 4});
  STD_TORCH_CHECK(num_indexed >= 0 && num_indexed <= num_panels * kIndexPanel, "an index of ", num_panels, " panels holds ",
                  num_panels * kIndexPanel, " keys, not ", num_indexed);
  topk::KeptIndex index;
  index.panels = static_cast<uint8_t*>(tensors.panels.mutable_data_ptr());
  index.numbers = static_cast<float*>(tensors.numbers.mutable_data_ptr());
  index.unscreened = static_cast<int32_t*>(tensors.unscreened.mutable_data_ptr());
  index.centre = static_cast<float*>(tensors.centre.mutable_data_ptr());
  for (int64_t axis = 0; axis < 2; ++axis) {
    index.panel_stride[axis] = tensors.panels.stride(axis);
    index.number_stride[axis] = tensors.numbers.stride(axis);
    index.unscreened_stride[axis] = tensors.unscreened.stride(axis);
    index.centre_stride[axis] = tensors.centre.stride(axis);
  }
  return index;
}

// Writes the panels of an index from the one that holds key `start` on; with start = 0 also its centre.
void index_keys(Tensor key, int64_t start, Tensor panels, Tensor numbers, Tensor unscreened, Tensor centre) {
  key = with_whole_rows(key);
  topk::IndexKeys call = {};
  call.batch = key.size(0);
  call.num_heads = key.size(1);
  call.num_keys = key.size(2);
  call.head_dim = key.size(3);
  call.start = start;
  STD_TORCH_CHECK(start >= 0 && start <= call.num_keys, "start must be one of ", call.num_keys, " keys, got ", start);
  STD_TORCH_CHECK(key.scalar_type() != ScalarType::Double, "float64 keys have no index");
  call.dtype = dtype_of(key);
  call.key = view_of(key);
  call.index = index_of({panels, numbers, unscreened, centre}, key, call.num_keys);
  if (call.batch * call.num_heads * call.num_keys > 0) check_memory(kernels().attention.index_keys(call, parallel()));
}

// Output [B, H, N, E] (laid out as [B, N, H, E]) and all entries, indices int32 and weights, which are empty unless asked
// for: see topk::HeadK for their order. With sinks and entries also log_sums. With a rest also its weight at a scale of 1 and
// the slot of the smallest score.
ForwardTensors run_attention_forward(
    Tensor query, Tensor key, Tensor value, std::optional<Tensor> attn_mask, std::optional<Tensor> bias,
    std::optional<Tensor> relative_bias, std::optional<Tensor> sinks, std::optional<Tensor> seed,
    std::vector<int64_t> head_k, bool is_causal, double scale, double softcap, double dropout_p, bool save_selection,
    RestTensors* rest, const IndexTensors* index = nullptr, int64_t num_indexed = 0,
    bool reads_ahead = false) {
  query = with_whole_rows(query);
  key = with_whole_rows(key);
  value = with_whole_rows(value);
  const HeadKArrays per_head(head_k);
  topk::AttentionForward call = {};
  topk::Sizes& s = call.sizes;
  s = {query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), value.size(3)};
  Tensor output = empty({s.batch, s.num_queries, s.num_heads, s.value_dim}, query.scalar_type());
  output = torch::stable::transpose(output, 1, 2);
  const int64_t num_entries = save_selection ? s.batch * s.num_queries * per_head.total : 0;
  Tensor indices = empty({num_entries}, ScalarType::Int);
  Tensor weights = empty({num_entries}, accumulation_dtype(query));
  const std::vector<int64_t> rows = {rest == nullptr ? 0 : s.batch, s.num_heads, s.num_queries};
  const bool saves_sums = save_selection && sinks.has_value();
  Tensor log_sums = empty(saves_sums ? std::vector<int64_t>{s.batch, s.num_heads, s.num_queries} : std::vector<int64_t>{0},
                          accumulation_dtype(query));
  Tensor mass = empty(rows, accumulation_dtype(query)), cuts = empty(rows, ScalarType::Int);
  if (s.batch * s.num_heads * s.num_queries == 0) return {output, indices, weights, log_sums, mass, cuts};

  call.dtype = dtype_of(query);
  call.query = view_of(query);
  call.key = view_of(key);
  call.value = view_of(value);
  call.attn_mask = view_of(attn_mask);
  call.bias = view_of(bias);
  if (relative_bias.has_value()) {
    relative_bias = torch::stable::contiguous(*relative_bias);
    call.relative_bias = relative_bias->const_data_ptr();
    call.relative_bias_stride = relative_bias->size(0) == 1 ? 0 : relative_bias->size(1);
  }
  call.head_k = per_head.view();
  call.is_causal = is_causal;
  call.scale = scale;
  sinks = contiguous(sinks);
  call.sinks = data_of(sinks);
  call.softcap = softcap;
  if (saves_sums) call.log_sums = log_sums.mutable_data_ptr();
  call.dropout = dropout_of(seed, dropout_p);
  call.output = output.mutable_data_ptr();
  for (int64_t axis = 0; axis < 3; ++axis) call.output_stride[axis] = output.stride(axis);
  if (save_selection) {
    call.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
    call.weights = weights.mutable_data_ptr();
  }
  if (rest != nullptr) {
    call.rest = rest_of(*rest);
    call.mass = mass.mutable_data_ptr();
    call.cuts = static_cast<int32_t*>(cuts.mutable_data_ptr());
  }
  if (index == nullptr) {
    check_memory(kernels().attention.forward(call, parallel()));
    return {output, indices, weights, log_sums, mass, cuts};
  }
  bool is_stale = false;
  check_memory(kernels().attention.forward_indexed(
      {call, index_of(*index, key, num_indexed), num_indexed, &is_stale, reads_ahead}, parallel()));
  STD_TORCH_CHECK(!is_stale, "key_index is not of these keys: a score lies outside the bounds that the index gives it; build it "
                  "anew where keys are written over");
  return {output, indices, weights, log_sums, mass, cuts};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_forward(
    Tensor query, Tensor key, Tensor value, std::optional<Tensor> attn_mask, std::optional<Tensor> bias,
    std::optional<Tensor> relative_bias, std::optional<Tensor> sinks, std::optional<Tensor> seed,
    std::vector<int64_t> head_k, bool is_causal, double scale, double softcap, double dropout_p, bool save_selection) {
  const ForwardTensors result = run_attention_forward(query, key, value, attn_mask, bias, relative_bias, sinks, seed, head_k,
                                                      is_causal, scale, softcap, dropout_p, save_selection, nullptr);
  return {result.output, result.indices, result.weights, result.log_sums};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_forward_indexed(
    Tensor query, Tensor key, Tensor value, std::optional<Tensor> attn_mask, std::optional<Tensor> bias,
    std::optional<Tensor> relative_bias, std::optional<Tensor> sinks, std::optional<Tensor> seed,
    std::vector<int64_t> head_k, bool is_causal, double scale, double softcap, double dropout_p, bool save_selection,
    Tensor panels, Tensor numbers, Tensor unscreened, Tensor centre, int64_t num_indexed, bool reads_ahead) {
  const IndexTensors index = {panels, numbers, unscreened, centre};
  const ForwardTensors result = run_attention_forward(query, key, value, attn_mask, bias, relative_bias, sinks, seed, head_k,
                                                      is_causal, scale, softcap, dropout_p, save_selection, nullptr, &index,
                                                      num_indexed, reads_ahead);
  return {result.output, result.indices, result.weights, result.log_sums};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> completed_attention_forward(
    Tensor query, Tensor key, Tensor value, std::optional<Tensor> attn_mask, std::optional<Tensor> bias,
    std::optional<Tensor> relative_bias, std::optional<Tensor> sinks, std::optional<Tensor> seed,
    std::vector<int64_t> head_k, bool is_causal, double scale, double softcap, double dropout_p, bool save_selection,
    Tensor mass_scale, double lift, Tensor key_sums, Tensor value_sums, std::optional<Tensor> products,
    std::optional<Tensor> score_values, std::optional<Tensor> grad_keys, Tensor rest_key, Tensor rest_value,
    std::optional<Tensor> counts, std::optional<Tensor> score_sums, int64_t interval, std::optional<Tensor> panels,
    std::optional<Tensor> numbers, std::optional<Tensor> unscreened, std::optional<Tensor> centre, int64_t num_indexed,
    bool reads_ahead) {
  RestTensors rest = {mass_scale, lift,       key_sums, value_sums, products,  score_values,
                      grad_keys,  rest_key, rest_value, counts,     score_sums, interval};
  std::optional<IndexTensors> index;
  if (panels.has_value()) {
    STD_TORCH_CHECK(numbers.has_value() && unscreened.has_value() && centre.has_value(), "an index is four tensors");
    index = IndexTensors{*panels, *numbers, *unscreened, *centre};
  }
  const ForwardTensors result = run_attention_forward(query, key, value, attn_mask, bias, relative_bias, sinks, seed, head_k,
                                                      is_causal, scale, softcap, dropout_p, save_selection, &rest,
                                                      index.has_value() ? &*index : nullptr, num_indexed, reads_ahead);
  return {result.output, result.indices, result.weights, result.log_sums, result.mass, result.cuts};
}

struct BackwardTensors {
  Tensor query, key, value, bias, relative_bias, mean_grads, sent[5];
};

// Gradients of query (in its dtype), of key, value and bias (in the accumulation dtype) and of relative_bias (float64).
// Those not wanted are left out, for a bias where its shape is empty; their places hold empty tensors. With a rest also
// what it sends to all keys that a row sees, [B, H, N] each: RestGradients in backends/calls.py.
BackwardTensors run_attention_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, std::optional<Tensor> seed, Tensor indices,
    Tensor weights, std::vector<int64_t> head_k, double scale, double softcap, double dropout_p, bool query_wanted,
    bool key_wanted, bool value_wanted, bool means_wanted, std::vector<int64_t> bias_shape,
    std::vector<int64_t> relative_bias_shape, bool is_causal,
    const Tensor* mass, const Tensor* cuts, RestTensors* rest) {
  grad_output = with_whole_rows(grad_output);
  query = with_whole_rows(query);
  key = with_whole_rows(key);
  value = with_whole_rows(value);
  const ScalarType accumulated = accumulation_dtype(query);
  const HeadKArrays per_head(head_k);
  topk::AttentionBackward call = {};
  topk::Sizes& s = call.sizes;
  s = {query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), value.size(3)};
  const std::vector<int64_t> none = {0}, key_shape = {s.batch, s.num_key_heads, s.num_keys, s.head_dim},
                             value_shape = {s.batch, s.num_key_heads, s.num_keys, s.value_dim},
                             query_shape = {s.batch, s.num_heads, s.num_queries, s.head_dim},
                             rows = {s.batch, s.num_heads, s.num_queries};
  if (bias_shape.empty()) bias_shape = {0};
  if (relative_bias_shape.empty()) relative_bias_shape = {0};
  BackwardTensors result;
  result.query = empty(query_wanted ? query_shape : none, query.scalar_type());
  result.key = zeros(key_wanted ? key_shape : none, accumulated);
  result.value = zeros(value_wanted ? value_shape : none, accumulated);
  result.bias = zeros(bias_shape, accumulated);
  result.relative_bias = zeros(relative_bias_shape, ScalarType::Double);
  result.mean_grads = empty(means_wanted ? rows : none, accumulated);
  for (Tensor& sent : result.sent) sent = empty(rest == nullptr ? none : rows, accumulated);
  if (s.batch * s.num_heads * s.num_queries == 0) return result;

  call.dtype = dtype_of(query);
  call.grad_output = view_of(grad_output);
  call.query = view_of(query);
  call.key = view_of(key);
  call.value = view_of(value);
  call.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  call.weights = weights.const_data_ptr();
  call.head_k = per_head.view();
  call.scale = scale;
  call.dropout = dropout_of(seed, dropout_p);
  if (query_wanted) call.grad_query = result.query.mutable_data_ptr();
  if (key_wanted) call.grad_key = result.key.mutable_data_ptr();
  if (value_wanted) call.grad_value = result.value.mutable_data_ptr();
  if (bias_shape.size() == 4) {
    call.grad_bias = result.bias.mutable_data_ptr();
    const topk::View view = view_of(result.bias);
    for (int64_t axis = 0; axis < 4; ++axis) call.grad_bias_stride[axis] = view.stride[axis];
  }
  if (relative_bias_shape.size() == 2) {
    call.grad_relative_bias = static_cast<double*>(result.relative_bias.mutable_data_ptr());
    call.grad_relative_bias_stride = relative_bias_shape[0] == 1 ? 0 : relative_bias_shape[1];
  }
  call.softcap = softcap;
  if (means_wanted) call.mean_grads = result.mean_grads.mutable_data_ptr();
  if (rest != nullptr) {
    call.is_causal = is_causal;
    call.rest = rest_of(*rest);
    call.mass = mass->const_data_ptr();
    call.cuts = static_cast<const int32_t*>(cuts->const_data_ptr());
    for (int64_t i = 0; i < 5; ++i) call.sent[i] = result.sent[i].mutable_data_ptr();
  }
  check_memory(kernels().attention.backward(call, parallel()));
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, std::optional<Tensor> seed, Tensor indices,
    Tensor weights, std::vector<int64_t> head_k, double scale, double softcap, double dropout_p, bool query_wanted,
    bool key_wanted, bool value_wanted, bool means_wanted, std::vector<int64_t> bias_shape,
    std::vector<int64_t> relative_bias_shape) {
  const BackwardTensors result = run_attention_backward(
      grad_output, query, key, value, seed, indices, weights, head_k, scale, softcap, dropout_p, query_wanted, key_wanted,
      value_wanted, means_wanted, bias_shape, relative_bias_shape, false, nullptr, nullptr, nullptr);
  return {result.query, result.key, result.value, result.bias, result.relative_bias, result.mean_grads};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> completed_attention_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, std::optional<Tensor> seed, Tensor indices,
    Tensor weights, std::vector<int64_t> head_k, double scale, double softcap, double dropout_p, bool query_wanted,
    bool key_wanted, bool value_wanted, bool means_wanted, std::vector<int64_t> bias_shape,
    std::vector<int64_t> relative_bias_shape, bool is_causal,
    Tensor mass, Tensor cuts, Tensor mass_scale, double lift, Tensor key_sums, Tensor value_sums,
    std::optional<Tensor> products, std::optional<Tensor> score_values, std::optional<Tensor> grad_keys, Tensor rest_key,
    Tensor rest_value, std::optional<Tensor> counts, std::optional<Tensor> score_sums, int64_t interval) {
  RestTensors rest = {mass_scale, lift,       key_sums, value_sums, products,  score_values,
                      grad_keys,  rest_key, rest_value, counts,     score_sums, interval};
  const BackwardTensors result = run_attention_backward(
      grad_output, query, key, value, seed, indices, weights, head_k, scale, softcap, dropout_p, query_wanted, key_wanted,
      value_wanted, means_wanted, bias_shape, relative_bias_shape, is_causal, &mass, &cuts, &rest);
  return {result.query,   result.key,     result.value,   result.bias,    result.relative_bias, result.mean_grads,
          result.sent[0], result.sent[1], result.sent[2], result.sent[3], result.sent[4]};
}

// Sums over the first num_sums intervals of keys, in the accumulation dtype: of keys [B, G, C, D], values [B, G, C, E] and
// key times value [B, G, C, D, E].
std::tuple<Tensor, Tensor, Tensor> sum_keys(Tensor key, Tensor value, int64_t interval) {
  key = with_whole_rows(key);
  value = with_whole_rows(value);
  topk::SumKeys call = {};
  call.batch = key.size(0);
  call.num_heads = key.size(1);
  call.head_dim = key.size(3);
  call.value_dim = value.size(3);
  call.interval = interval;
  call.num_sums = key.size(2) / interval;
  const ScalarType dtype = accumulation_dtype(key);
  Tensor key_sums = empty({call.batch, call.num_heads, call.num_sums, call.head_dim}, dtype);
  Tensor value_sums = empty({call.batch, call.num_heads, call.num_sums, call.value_dim}, dtype);
  Tensor products = empty({call.batch, call.num_heads, call.num_sums, call.head_dim, call.value_dim}, dtype);
  if (call.batch * call.num_heads * call.num_sums == 0) return {key_sums, value_sums, products};
  call.dtype = dtype_of(key);
  call.key = view_of(key);
  call.value = view_of(value);
  call.key_sums = key_sums.mutable_data_ptr();
  call.value_sums = value_sums.mutable_data_ptr();
  call.products = products.mutable_data_ptr();
  check_memory(kernels().attention.sum_keys(call, parallel()));
  return {key_sums, value_sums, products};
}

// Adds to the gradients of keys and values what the rest sends to all keys that a row sees, under causality.
void send_rest(Tensor query, Tensor grad_output, Tensor key, Tensor value, Tensor key_weights, Tensor value_weights,
               Tensor cross_weights, double scale, std::optional<Tensor> mask, int64_t interval,
               std::optional<Tensor> grad_key, std::optional<Tensor> grad_value) {
  query = with_whole_rows(query);
  grad_output = with_whole_rows(grad_output);
  key = with_whole_rows(key);
  value = with_whole_rows(value);
  topk::SendRest call = {};
  topk::Sizes& s = call.sizes;
  s = {query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), value.size(3)};
  if (s.batch * s.num_heads * s.num_queries == 0) return;
  call.dtype = dtype_of(query);
  call.query = view_of(query);
  call.grad_output = view_of(grad_output);
  call.key = view_of(key);
  call.value = view_of(value);
  Tensor* const weights[3] = {&key_weights, &value_weights, &cross_weights};
  for (int64_t i = 0; i < 3; ++i) {
    *weights[i] = torch::stable::contiguous(*weights[i]);
    call.weights[i] = weights[i]->const_data_ptr();
  }
  call.scale = scale;
  if (mask.has_value()) {
    call.mask = static_cast<const bool*>(mask->const_data_ptr());
    for (int64_t axis = 0; axis < 2; ++axis) call.mask_stride[axis] = mask->size(axis) == 1 ? 0 : mask->stride(axis);
  }
  call.interval = interval;
  if (grad_key.has_value()) call.grad_key = grad_key->mutable_data_ptr();
  if (grad_value.has_value()) call.grad_value = grad_value->mutable_data_ptr();
  check_memory(kernels().attention.send_rest(call, parallel()));
}

// x, weights and tables are matrices whose last axis is contiguous.
topk::Matrix matrix_of(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0)}; }

topk::Matrix matrix_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? matrix_of(*tensor) : topk::Matrix();
}

topk::Entries entries_of(const Tensor& neurons, const Tensor& coefficients) {
  return {neurons.size(0), neurons.size(1), static_cast<const int32_t*>(neurons.const_data_ptr()),
          coefficients.const_data_ptr()};
}

// The k best neurons of each token, int32 [T, k], their pre-activations [T, k] and those of their gates ([0, k] without
// a gate) in the accumulation dtype. Biases come in the accumulation dtype.
std::tuple<Tensor, Tensor, Tensor> choose_neurons(Tensor x, Tensor w_in, std::optional<Tensor> w_gate,
                                                  std::optional<Tensor> b_in, std::optional<Tensor> b_gate,
                                                  int64_t activation, std::optional<double> limit, double offset,
                                                  int64_t k) {
  const ScalarType accumulated = accumulation_dtype(x);
  Tensor neurons = empty({x.size(0), k}, ScalarType::Int);
  Tensor values = empty({x.size(0), k}, accumulated);
  Tensor gates = empty({w_gate.has_value() ? x.size(0) : 0, k}, accumulated);
  topk::ChooseNeurons call = {};
  call.num_tokens = x.size(0);
  call.model_size = x.size(1);
  call.num_neurons = w_in.size(0);
  call.k = k;
  call.dtype = dtype_of(x);
  call.x = matrix_of(x);
  call.w_in = matrix_of(w_in);
  call.w_gate = matrix_of(w_gate);
  call.b_in = data_of(b_in);
  call.b_gate = data_of(b_gate);
  call.activation = topk::Activation(activation);
  if (limit.has_value()) call.limit = *limit;
  call.offset = offset;
  call.neurons = static_cast<int32_t*>(neurons.mutable_data_ptr());
  call.values = values.mutable_data_ptr();
  call.gates = gates.mutable_data_ptr();
  if (call.num_tokens > 0) check_memory(kernels().feed_forward.choose_neurons(call, parallel()));
  return {neurons, values, gates};
}

// [T, X] in the accumulation dtype: for each token the sum of its neurons' rows of `table` [F, X], of
// which either axis may be the contiguous one.
Tensor sum_neurons(Tensor table, Tensor neurons, Tensor coefficients) {
  Tensor out = zeros({neurons.size(0), table.size(1)}, accumulation_dtype(table));
  topk::SumNeurons call = {};
  call.entries = entries_of(neurons, coefficients);
  call.num_neurons = table.size(0);
  call.size = table.size(1);
  call.dtype = dtype_of(table);
  call.is_transposed = table.stride(1) != 1 && call.size != 1;
  call.table = {table.const_data_ptr(), table.stride(call.is_transposed ? 1 : 0)};
  call.out = out.mutable_data_ptr();
  if (neurons.size(0) * call.size > 0) check_memory(kernels().feed_forward.sum_neurons(call, parallel()));
  return out;
}

// [T, k] in the accumulation dtype: products of each token's row with its neurons' rows of `table` [F, X].
Tensor dot_neurons(Tensor rows, Tensor table, Tensor neurons) {
  Tensor out = empty({neurons.size(0), neurons.size(1)}, accumulation_dtype(table));
  topk::DotNeurons call = {};
  call.num_tokens = neurons.size(0);
  call.k = neurons.size(1);
  call.num_neurons = table.size(0);
  call.size = table.size(1);
  call.dtype = dtype_of(table);
  call.neurons = static_cast<const int32_t*>(neurons.const_data_ptr());
  call.rows = matrix_of(rows);
  call.table = matrix_of(table);
  call.out = out.mutable_data_ptr();
  if (call.num_tokens > 0) check_memory(kernels().feed_forward.dot_neurons(call, parallel()));
  return out;
}

// Adds to sums [F, X], for each neuron, the rows [T, X] of the tokens that chose it; and its coefficients to bias [F].
void add_tokens(Tensor rows, Tensor neurons, Tensor coefficients, Tensor sums, std::optional<Tensor> bias) {
  topk::SumTokens call = {};
  call.entries = entries_of(neurons, coefficients);
  call.num_neurons = sums.size(0);
  call.size = sums.size(1);
  call.dtype = dtype_of(rows);
  call.rows = matrix_of(rows);
  call.out = sums.mutable_data_ptr();
  call.bias_out = bias.has_value() ? bias->mutable_data_ptr() : nullptr;
  if (neurons.size(0) > 0) check_memory(kernels().feed_forward.sum_tokens(call, parallel()));
}

// Raised, here and in backends/cpu/library.py, where what an operator is promised or promises changes: Python that is newer
// than the kernels then says so, where it would read memory wrongly. 2: the table of sum_neurons may be transposed. 4: kept
// indexes of keys. 5: cpu_attention_forward_indexed reads ahead. 8: more activations, sinks and soft caps, completed attention
// takes an index, cpu_choose_neurons cuts the gate.
int64_t kernel_interface() { return 8; }

// Targets that this processor can run, best first, separated by spaces.
std::string cpu_targets() {
  std::string names;
  for (const std::string& name : topk::available_targets()) names += name + " ";
  return names;
}

// Use the target of this name from now on; the best one if the name is empty.
void force_cpu_target(std::string target) {
  const topk::Kernels* found = topk::kernels_of(target);
  STD_TORCH_CHECK(found != nullptr, "this processor cannot run CPU target ", target);
  used_kernels = found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(topk_attention, m) {
  m.def(
      "cpu_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? bias, "
      "Tensor? relative_bias, Tensor? sinks, Tensor? seed, SymInt[] head_k, bool is_causal, float scale, float softcap, "
      "float dropout_p, bool save_selection) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpu_index_keys(Tensor key, SymInt start, Tensor(a!) panels, Tensor(b!) numbers, Tensor(c!) unscreened, "
      "Tensor(d!) centre) -> ()");
  m.def(
      "cpu_attention_forward_indexed(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? bias, "
      "Tensor? relative_bias, Tensor? sinks, Tensor? seed, SymInt[] head_k, bool is_causal, float scale, float softcap, "
      "float dropout_p, bool save_selection, Tensor panels, Tensor numbers, Tensor unscreened, Tensor centre, "
      "SymInt num_indexed, bool reads_ahead=False) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpu_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? seed, "
      "Tensor indices, Tensor weights, SymInt[] head_k, float scale, float softcap, float dropout_p, "
      "bool query_wanted, bool key_wanted, bool value_wanted, bool means_wanted, "
      "SymInt[] bias_shape, SymInt[] relative_bias_shape) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpu_completed_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? bias, "
      "Tensor? relative_bias, Tensor? sinks, Tensor? seed, SymInt[] head_k, bool is_causal, float scale, float softcap, "
      "float dropout_p, bool save_selection, Tensor mass_scale, float lift, Tensor key_sums, Tensor value_sums, "
      "Tensor? products, Tensor? score_values, Tensor? grad_keys, Tensor rest_key, Tensor rest_value, Tensor? counts, "
      "Tensor? score_sums, int interval, Tensor? panels=None, Tensor? numbers=None, Tensor? unscreened=None, "
      "Tensor? centre=None, SymInt num_indexed=0, bool reads_ahead=False) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpu_completed_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? seed, "
      "Tensor indices, Tensor weights, SymInt[] head_k, float scale, float softcap, float dropout_p, "
      "bool query_wanted, bool key_wanted, bool value_wanted, bool means_wanted, "
      "SymInt[] bias_shape, SymInt[] relative_bias_shape, "
      "bool is_causal, Tensor mass, Tensor cuts, Tensor mass_scale, float lift, Tensor key_sums, Tensor value_sums, "
      "Tensor? products, Tensor? score_values, Tensor? grad_keys, Tensor rest_key, Tensor rest_value, Tensor? counts, "
      "Tensor? score_sums, int interval) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_sum_keys(Tensor key, Tensor value, int interval) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_send_rest(Tensor query, Tensor grad_output, Tensor key, Tensor value, Tensor key_weights, "
      "Tensor value_weights, Tensor cross_weights, float scale, Tensor? mask, int interval, Tensor(a!)? grad_key, "
      "Tensor(b!)? grad_value) -> ()");
  m.def(
      "cpu_choose_neurons(Tensor x, Tensor w_in, Tensor? w_gate, Tensor? b_in, Tensor? b_gate, int activation, "
      "float? limit, float offset, int k) -> (Tensor, Tensor, Tensor)");
  m.def("cpu_sum_neurons(Tensor table, Tensor neurons, Tensor coefficients) -> Tensor");
  m.def("cpu_dot_neurons(Tensor rows, Tensor table, Tensor neurons) -> Tensor");
  m.def("cpu_add_tokens(Tensor rows, Tensor neurons, Tensor coefficients, Tensor(a!) sums, Tensor(b!)? bias) -> ()");
  m.def("cpu_index_panel_bytes(int head_dim) -> int");
  m.def("kernel_interface() -> int");
  m.def("cpu_targets() -> str");
  m.def("force_cpu_target(str target) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(topk_attention, CPU, m) {
  m.impl("cpu_attention_forward", TORCH_BOX(&attention_forward));
  m.impl("cpu_index_keys", TORCH_BOX(&index_keys));
  m.impl("cpu_attention_forward_indexed", TORCH_BOX(&attention_forward_indexed));
  m.impl("cpu_attention_backward", TORCH_BOX(&attention_backward));
  m.impl("cpu_completed_attention_forward", TORCH_BOX(&completed_attention_forward));
  m.impl("cpu_completed_attention_backward", TORCH_BOX(&completed_attention_backward));
  m.impl("cpu_sum_keys", TORCH_BOX(&sum_keys));
  m.impl("cpu_send_rest", TORCH_BOX(&send_rest));
  m.impl("cpu_choose_neurons", TORCH_BOX(&choose_neurons));
  m.impl("cpu_sum_neurons", TORCH_BOX(&sum_neurons));
  m.impl("cpu_dot_neurons", TORCH_BOX(&dot_neurons));
  m.impl("cpu_add_tokens", TORCH_BOX(&add_tokens));
}

STABLE_TORCH_LIBRARY_IMPL(topk_attention, CompositeExplicitAutograd, m) {
  m.impl("cpu_index_panel_bytes", TORCH_BOX(&index_panel_bytes));
  m.impl("kernel_interface", TORCH_BOX(&kernel_interface));
  m.impl("cpu_targets", TORCH_BOX(&cpu_targets));
  m.impl("force_cpu_target", TORCH_BOX(&force_cpu_target));
}
