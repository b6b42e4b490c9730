// Claims about the kernels of every CPU target that this processor can run. Each call goes through the interface in
// attention.h and is compared with definition.h.
//
// Queries, keys and biases are small multiples of powers of two, so that scores are exact in every dtype and the kept
// keys must agree exactly, ties included (there are many).
#include <sys/mman.h>

#include <string>

#include "claims.h"
#include "definition.h"

namespace topk_test {
namespace {

// ------------------------------------------------------------------------------------------------------- kernel calls

struct Result {
  bool ok = true;
  Array output, weights, grad_query, grad_key, grad_value, grad_bias, grad_relative_bias;
  std::vector<int32_t> indices;
};

struct HeadKArrays {
  std::vector<int64_t> first;
  topk::HeadK view;

  explicit HeadKArrays(const Case& c) {
    for (int64_t h = 0; h < c.sizes.num_heads; ++h) first.push_back(c.total_k(h));
    view = {c.k.data(), first.data(), c.total_k(c.sizes.num_heads)};
  }
};

// Sums over keys as the kernels take them: running ones over intervals, or one of all.
struct RestArrays {
  Array mass_scale, key_sums, value_sums, products, mass;
  Array sent[5];
  std::vector<int32_t> cuts;
  topk::Rest view = {};
  bool ok = true;

  explicit RestArrays(const Case& c) {
    const topk::Sizes& s = c.sizes;
    const DType dtype = accumulation(c.dtype);
    const int64_t tables = s.batch * s.num_key_heads, rows = s.batch * s.num_heads * s.num_queries;
    const int64_t interval = c.interval == 0 ? s.num_keys : c.interval, whole = s.num_keys / interval;
    Array keys(dtype, {tables, whole, 1, s.head_dim}), values(dtype, {tables, whole, 1, s.value_dim});
    Array both(dtype, {tables, whole, s.head_dim, s.value_dim});
    topk::SumKeys call = {};
    call.batch = s.batch;
    call.num_heads = s.num_key_heads;
    call.head_dim = s.head_dim;
    call.value_dim = s.value_dim;
    call.num_sums = whole;
    call.interval = interval;
    call.dtype = c.dtype;
    call.key = c.key.view();
    call.value = c.value.view();
    call.key_sums = keys.data();
    call.value_sums = values.data();
    call.products = both.data();
    ok = kernels->attention.sum_keys(call, parallel());
    key_sums = c.interval == 0 ? keys : running(keys);
    value_sums = c.interval == 0 ? values : running(values);
    products = c.interval == 0 ? both : running(both);
    mass_scale = Array(dtype, {1, 1, 1, s.num_heads});
    for (int64_t h = 0; h < s.num_heads; ++h) mass_scale.set(0, 0, 0, h, c.mass_scale[h]);
    mass = Array(dtype, {1, 1, 1, rows});
    for (Array& array : sent) array = Array(dtype, {1, 1, 1, rows});
    cuts.assign(rows, -77);
    view.active = true;
    view.lift = c.lift;
    view.mass_scale = mass_scale.data();
    view.num_sum_heads = s.num_key_heads;
    view.num_sums = key_sums.shape[1];
    view.interval = c.interval;
    view.key_sums = key_sums.data();
    view.value_sums = value_sums.data();
    view.products = products.data();
    view.key = call.key;
    view.value = call.value;
  }

  // [tables, C + 1, X, Y] of [tables, C, X, Y]: the sums over all intervals before each one.
  static Array running(const Array& sums) {
    const Shape& shape = sums.shape;
    Array result = zeros(sums.dtype, {shape[0], shape[1] + 1, shape[2], shape[3]});
    for (int64_t t = 0; t < shape[0]; ++t)
      for (int64_t n = 0; n < shape[1]; ++n)
        for (int64_t x = 0; x < shape[2]; ++x)
          for (int64_t y = 0; y < shape[3]; ++y)
            result.set(t, n + 1, x, y, result.get(t, n, x, y) + sums.get(t, n, x, y));
    return result;
  }
};

topk::AttentionForward forward_call(const Case& c, const HeadKArrays& head_k, Array& output) {
  topk::AttentionForward call = {};
  call.sizes = c.sizes;
  call.dtype = c.dtype;
  call.query = c.query.view();
  call.key = c.key.view();
  call.value = c.value.view();
  call.attn_mask = c.mask.view();
  call.bias = c.bias.view();
  if (c.relative_bias.exists()) {
    call.relative_bias = c.relative_bias.data();
    call.relative_bias_stride = c.relative_bias.broadcast_stride()[2];
  }
  call.head_k = head_k.view;
  call.is_causal = c.is_causal;
  call.scale = c.scale;
  call.dropout = c.dropout;
  call.output = output.data();
  for (int axis = 0; axis < 3; ++axis) call.output_stride[axis] = output.stride[axis];
  return call;
}

void expect_same_entries(const char* how, const Result& one, const Result& other) {
  if (one.indices != other.indices) complain("%s: other keys are kept", how);
  const auto same = [](const Array& a, const Array& b) {
    for (int64_t n = 0; n < int64_t(a.bytes.size()); n += int64_t(bytes_of(a.dtype))) {
      const double x = read(a.dtype, &a.bytes[n]), y = read(b.dtype, &b.bytes[n]);
      if (!(x == y || (std::isnan(x) && std::isnan(y)))) return false;
    }
    return true;
  };
  if (!same(one.weights, other.weights)) complain("%s: weights differ", how);
  const Shape& shape = one.output.shape;
  for (int64_t n = 0; n < shape[0] * shape[1] * shape[2] * shape[3]; ++n) {
    const int64_t e = n % shape[3], i = n / shape[3] % shape[2], h = n / shape[3] / shape[2] % shape[1], b = n / shape[3] / shape[2] / shape[1];
    const double x = one.output.get(b, h, i, e), y = other.output.get(b, h, i, e);
    if (x == y || (std::isnan(x) && std::isnan(y))) continue;
    complain("%s: output[%d, %d, %d, %d] differs", how, int(b), int(h), int(i), int(e));
    return;
  }
}

// Builds an index in two pieces, the second of which begins within a panel, and runs the call with it. Returns whether the index
// is taken for one of other keys.
bool forward_with_index(const Case& c, const Array& indexed_key, const topk::AttentionForward& call) {
  const topk::Sizes& s = c.sizes;
  const int64_t heads = s.batch * s.num_key_heads, quads = (s.head_dim + 3) / 4, panels = (s.num_keys + 31) / 32;
  std::vector<uint8_t> bytes(heads * panels * quads * 128);
  std::vector<float> numbers(heads * panels * 4), centre(heads * quads * 4);
  std::vector<int32_t> unscreened(heads * panels);
  topk::IndexKeys build = {};
  build.batch = s.batch;
  build.num_heads = s.num_key_heads;
  build.head_dim = s.head_dim;
  build.dtype = c.dtype;
  build.key = indexed_key.view();
  build.index = {bytes.data(), numbers.data(), unscreened.data(), centre.data(), {}, {}, {}, {}};
  const int64_t sizes[] = {panels * quads * 128, panels * 4, panels, quads * 4};
  int64_t* const strides[] = {build.index.panel_stride, build.index.number_stride, build.index.unscreened_stride,
                              build.index.centre_stride};
  for (int i = 0; i < 4; ++i) {
    strides[i][0] = s.num_key_heads * sizes[i];
    strides[i][1] = sizes[i];
  }
  const int64_t first = s.num_keys * 2 / 3;
  for (int64_t start : {int64_t(0), first}) {
    if (start > 0 && first == 0) continue;
    build.start = start;
    build.num_keys = start == 0 && first > 0 ? first : s.num_keys;
    if (!kernels->attention.index_keys(build, parallel())) complain("no memory for an index");
  }
  bool is_stale = false;
  if (!kernels->attention.forward_indexed({call, build.index, s.num_keys, &is_stale}, parallel())) complain("no memory with an index");
  return is_stale;
}

void expect_no_change_by_an_index(const Case& c, const topk::AttentionForward& call, Result& other, const Result& r) {
  other.output.fill([](int64_t, int64_t, int64_t, int64_t) { return 77.0; });
  if (forward_with_index(c, c.key, call)) complain("an index of these keys is taken for one of others");
  expect_same_entries("with an index", other, r);
}

void forward(const Case& c, Result& r, RestArrays* rest = nullptr) {
  const topk::Sizes& s = c.sizes;
  const HeadKArrays head_k(c);
  r.output = Array(c.dtype, {s.batch, s.num_heads, s.num_queries, s.value_dim}, c.output_layout);
  r.indices.assign(c.num_entries(), -77);
  r.indices.shrink_to_fit();
  r.weights = Array(accumulation(c.dtype), {1, 1, 1, c.num_entries()});
  topk::AttentionForward call = forward_call(c, head_k, r.output);
  call.indices = r.indices.data();
  call.weights = r.weights.data();
  if (rest != nullptr) {
    call.rest = rest->view;
    call.mass = rest->mass.data();
    call.cuts = rest->cuts.data();
  }
  r.ok = kernels->attention.forward(call, parallel()) && r.ok;
  if (s.num_heads / s.num_key_heads * s.num_queries > 16 || !r.ok) return;
  // Few rows have two more ways, which change no bit.
  Result other = r;
  call.output = other.output.data();
  call.indices = other.indices.data();
  call.weights = other.weights.data();
  call.as_many_rows = true;
  if (!kernels->attention.forward(call, parallel())) complain("no memory for many rows");
  expect_same_entries("as many rows", other, r);
  call.as_many_rows = false;
  if (c.dtype != DType::float64) expect_no_change_by_an_index(c, call, other, r);
}

// The bits of `wanted` stand for the gradients of query, key, value, bias and relative_bias.
void backward(const Case& c, Result& r, unsigned wanted = 31, RestArrays* rest = nullptr) {
  const topk::Sizes& s = c.sizes;
  const HeadKArrays head_k(c);
  const DType accumulated = accumulation(c.dtype);
  r.grad_query = Array(c.dtype, {s.batch, s.num_heads, s.num_queries, s.head_dim});
  r.grad_key = zeros(accumulated, {s.batch, s.num_key_heads, s.num_keys, s.head_dim});
  r.grad_value = zeros(accumulated, {s.batch, s.num_key_heads, s.num_keys, s.value_dim});
  topk::AttentionBackward call = {};
  call.sizes = s;
  call.dtype = c.dtype;
  call.grad_output = c.grad_output.view();
  call.query = c.query.view();
  call.key = c.key.view();
  call.value = c.value.view();
  call.indices = r.indices.data();
  call.weights = r.weights.data();
  call.head_k = head_k.view;
  call.scale = c.scale;
  call.dropout = c.dropout;
  if ((wanted & 1) != 0) call.grad_query = r.grad_query.data();
  if ((wanted & 2) != 0) call.grad_key = r.grad_key.data();
  if ((wanted & 4) != 0) call.grad_value = r.grad_value.data();
  if (c.bias.exists() && (wanted & 8) != 0) {
    r.grad_bias = zeros(accumulated, c.bias.shape);
    call.grad_bias = r.grad_bias.data();
    for (int axis = 0; axis < 4; ++axis) call.grad_bias_stride[axis] = r.grad_bias.broadcast_stride()[axis];
  }
  if (c.relative_bias.exists() && (wanted & 16) != 0) {
    r.grad_relative_bias = zeros(DType::float64, c.relative_bias.shape);
    call.grad_relative_bias = static_cast<double*>(r.grad_relative_bias.data());
    call.grad_relative_bias_stride = r.grad_relative_bias.broadcast_stride()[2];
  }
  if (rest != nullptr) {
    call.is_causal = c.is_causal;
    call.rest = rest->view;
    call.mass = rest->mass.data();
    call.cuts = rest->cuts.data();
    for (int n = 0; n < 5; ++n) call.sent[n] = rest->sent[n].data();
  }
  r.ok = kernels->attention.backward(call, parallel()) && r.ok;
}

Result run(const Case& c) {
  Result r;
  forward(c, r);
  backward(c, r);
  return r;
}

void expect_unused_memory_untouched(const Array& output, Layout layout) {
  const auto zero = [](int64_t, int64_t, int64_t, int64_t) { return 0.0; };
  Array used = output, blank(output.dtype, output.shape, layout);
  if (used.fill(zero).bytes != blank.fill(zero).bytes) complain("something was written between the rows of output");
}

void compare(const Case& c, const Result& r, const Expected& e) {
  const DType accumulated = accumulation(c.dtype);
  if (!r.ok) complain("no memory");
  for (size_t n = 0; n < e.indices.size(); ++n)
    if (r.indices[n] != e.indices[n]) {
      complain("entry %d is key %d, should be %d", int(n), int(r.indices[n]), int(e.indices[n]));
      break;
    }
  expect_close("weights", r.weights, e.weights, accumulated);
  expect_close("output", r.output, e.output, accumulated);
  expect_unused_memory_untouched(r.output, c.output_layout);
  if (!r.grad_query.exists()) return;
  expect_close("grad_query", r.grad_query, e.grad_query, accumulated);
  expect_close("grad_key", r.grad_key, e.grad_key, accumulated);
  expect_close("grad_value", r.grad_value, e.grad_value, accumulated);
  expect_close("grad_bias", r.grad_bias, e.grad_bias, accumulated);
  expect_close("grad_relative_bias", r.grad_relative_bias, e.grad_relative_bias, accumulated);
}

// Calls more(result) after the comparison with the definition.
template <class More>
void check(const Case& c, More more) {
  const Expected expected = define(c);
  on_every_target([&] {
    const Result r = run(c);
    compare(c, r, expected);
    more(r);
  });
}

void check(const Case& c) {
  check(c, [](const Result&) {});
}

// --------------------------------------------------------------------------------------------------------- test data

Case make_case(topk::Sizes s, int64_t k, DType dtype = DType::float32, Layout layout = Layout::contiguous) {
  generator.seed(unsigned(s.num_queries * 1009 + s.num_keys * 31 + s.head_dim));
  Case c;
  c.sizes = s;
  c.dtype = dtype;
  c.k.assign(s.num_heads, k);
  c.scale = std::ldexp(1.0, -1 - int(std::log2(double(s.head_dim)) / 2));  // scores vary by about 1 to 2
  c.query = Array(dtype, {s.batch, s.num_heads, s.num_queries, s.head_dim}, layout).fill(small_integer);
  c.key = Array(dtype, {s.batch, s.num_key_heads, s.num_keys, s.head_dim}, layout).fill(small_integer);
  c.value = Array(dtype, {s.batch, s.num_key_heads, s.num_keys, s.value_dim}, layout).fill(any_element);
  c.grad_output = Array(dtype, {s.batch, s.num_heads, s.num_queries, s.value_dim}, layout).fill(any_element);
  return c;
}

// A case with the scores `score(i, j)`: queries are zero, and a bias of dtype float32 or float64 holds the scores.
template <class Score>
Case make_case_of_scores(int64_t num_queries, int64_t num_keys, int64_t k, DType dtype, Score score) {
  Case c = make_case({1, 1, 1, num_queries, num_keys, 4, 4}, k, dtype);
  c.query.fill([](int64_t, int64_t, int64_t, int64_t) { return 0.0; });
  c.bias = Array(accumulation(dtype), {1, 1, num_queries, num_keys});
  c.bias.fill([&](int64_t, int64_t, int64_t i, int64_t j) { return double(score(i, j)); });
  return c;
}

// All the shapes that broadcast to [B, H, N, M].
std::vector<Shape> broadcast_shapes(const topk::Sizes& s) {
  std::vector<Shape> shapes;
  for (int bits = 0; bits < 16; ++bits)
    shapes.push_back({bits & 8 ? s.batch : 1, bits & 4 ? s.num_heads : 1, bits & 2 ? s.num_queries : 1,
                      bits & 1 ? s.num_keys : 1});
  return shapes;
}

// ------------------------------------------------------------------------------------------------------------- claims

void every_head_size_is_right() {
  for (int64_t dim : {1, 2, 3, 8, 15, 16, 17, 40, 64, 80, 128, 256})
    for (DType dtype : kDtypes) {
      context = text("D=%d %s", int(dim), name_of(dtype));
      check(make_case({1, 2, 1, 13, 70, dim, dim}, 7, dtype));
    }
}

void value_size_may_differ_from_head_size() {
  for (int64_t dim : {1, 7, 64})
    for (int64_t value_dim : {1, 3, 16, 33, 64, 128})
      for (DType dtype : kDtypes) {
        context = text("D=%d E=%d %s", int(dim), int(value_dim), name_of(dtype));
        check(make_case({2, 1, 1, 7, 50, dim, value_dim}, 9, dtype));
      }
}

void every_number_of_keys_and_every_k_is_right() {
  for (int64_t num_keys : {1, 2, 31, 32, 33, 511, 512, 513, 1500, 5000})
    for (int64_t k : {int64_t(1), int64_t(2), int64_t(63), int64_t(64), int64_t(65), num_keys - 1, num_keys})
      for (DType dtype : kDtypes) {
        if (k < 1 || k > num_keys) continue;
        if (num_keys > 513 && dtype != DType::float32 && dtype != DType::float64) continue;
        context = text("M=%d k=%d %s", int(num_keys), int(k), name_of(dtype));
        check(make_case({1, 1, 1, num_keys > 1000 ? 7 : 14, num_keys, 6, 2}, k, dtype));
      }
}

void every_number_of_queries_is_right() {
  for (int64_t num_queries : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 24, 25, 100, 131})
    for (DType dtype : {DType::float32, DType::float64}) {
      context = text("N=%d %s", int(num_queries), name_of(dtype));
      check(make_case({1, 1, 1, num_queries, 600, 3, 2}, 5, dtype));
    }
}

void real_scores_keep_the_best_to_rounding() {
  for (DType dtype : {DType::float32, DType::float64}) {
    context = name_of(dtype);
    Case c = make_case({1, 1, 1, 9, 2000, 64, 8}, 64, dtype);
    c.query.fill(any_element);
    c.key.fill(any_element);
    c.scale = 0.3;
    on_every_target([&] {
      const Result r = run(c);
      for (int64_t i = 0; i < c.sizes.num_queries; ++i) {
        std::vector<bool> is_kept(c.sizes.num_keys);
        double worst_kept = kInf, best_left = -kInf, rounding = 0;
        for (int64_t n = 0; n < c.k[0]; ++n) is_kept[r.indices[c.first_entry(0, 0, i) + n]] = true;
        for (int64_t j = 0; j < c.sizes.num_keys; ++j) {
          const Number score = score_of(c, 0, 0, i, j);
          rounding = std::max(rounding, score.mass * rounding_of(dtype) * allowed_roundings);
          if (is_kept[j]) worst_kept = std::min(worst_kept, double(score.value));
          if (!is_kept[j]) best_left = std::max(best_left, double(score.value));
        }
        if (worst_kept < best_left - rounding) complain("row %d keeps %g and leaves %g", int(i), worst_kept, best_left);
      }
      compare(c, r, define(c, &r.indices));
    });
  }
}

void causal_rows_align_at_the_end() {
  for (int64_t num_keys : {1, 40, 700})
    for (int64_t num_queries : {1, 2, 39, 40, 41, 90})
      for (DType dtype : {DType::float32, DType::float64}) {
        context = text("N=%d M=%d %s", int(num_queries), int(num_keys), name_of(dtype));
        Case c = make_case({1, 2, 1, num_queries, num_keys, 5, 3}, std::min<int64_t>(num_keys, 12), dtype);
        c.is_causal = true;
        check(c);
      }
  context = "long";
  Case c = make_case({1, 1, 1, 900, 900, 2, 2}, 20);
  c.is_causal = true;
  check(c);
}

void masks_of_every_dtype_and_shape_are_right() {
  for (int64_t num_keys : {45, 600})
    for (const Shape& shape : broadcast_shapes({2, 2, 2, 7, num_keys, 0, 0}))
      for (DType mask : {DType::boolean, DType::float32, DType::float64, DType::bfloat16, DType::float16})
        for (DType dtype : {DType::float32, DType::float64, DType::bfloat16}) {
          if (num_keys > 100 && (dtype == DType::bfloat16 || shape[0] == 1)) continue;
          context = text("%s mask [%d, %d, %d, %d] %s", name_of(mask), int(shape[0]), int(shape[1]), int(shape[2]),
                         int(shape[3]), name_of(dtype));
          Case c = make_case({2, 2, 2, 7, num_keys, 4, 3}, 9, dtype);
          c.mask = Array(mask, shape, Layout::gaps);
          c.mask.fill([&](int64_t, int64_t, int64_t, int64_t) {
            const bool visible = any_integer(0, 3) != 0;
            return mask == DType::boolean ? double(visible) : visible ? double(any_integer(-3, 3)) : -kInf;
          });
          check(c);
        }
}

void biases_of_every_shape_are_added_and_get_gradients() {
  for (const Shape& shape : broadcast_shapes({2, 4, 2, 7, 45, 0, 0}))
    for (DType dtype : kDtypes)
      for (bool with_mask : {false, true}) {
        context = text("bias [%d, %d, %d, %d] %s%s", int(shape[0]), int(shape[1]), int(shape[2]), int(shape[3]),
                       name_of(dtype), with_mask ? " and mask" : "");
        Case c = make_case({2, 4, 2, 7, 45, 4, 3}, 9, dtype);
        c.bias = Array(dtype, shape, Layout::heads_inside).fill(any_quarter);
        if (with_mask) {
          c.mask = Array(DType::boolean, {2, 1, 1, 45});
          c.mask.fill([](int64_t, int64_t, int64_t, int64_t) { return double(any_integer(0, 1)); });
        }
        check(c);
      }
  for (DType dtype : kDtypes)
    for (int64_t dim : {64, 128}) {  // sizes with a backward pass of their own
      context = text("D=%d %s", int(dim), name_of(dtype));
      Case c = make_case({1, 2, 1, 7, 45, dim, dim}, 9, dtype);
      c.bias = Array(dtype, {1, 1, 7, 45}).fill(any_quarter);
      c.relative_bias = Array(accumulation(dtype), {1, 1, 2, 7 + 45 - 1}).fill(any_quarter);
      c.is_causal = true;
      check(c);
    }
}

void relative_biases_are_added_and_get_gradients() {
  for (int64_t num_keys : {1, 33, 600})
    for (int64_t num_queries : {1, 9, 30})
      for (int64_t num_biases : {1, 4})
        for (DType dtype : kDtypes)
          for (int more = 0; more < 3; ++more) {
            context = text("N=%d M=%d [%d, N + M - 1] %s %d", int(num_queries), int(num_keys), int(num_biases),
                           name_of(dtype), more);
            if (num_keys > 100 && accumulation(dtype) != dtype) continue;
            Case c = make_case({2, 4, 2, num_queries, num_keys, 3, 2}, std::min<int64_t>(8, num_keys), dtype);
            c.relative_bias = Array(accumulation(dtype), {1, 1, num_biases, num_queries + num_keys - 1});
            c.relative_bias.fill(any_quarter);
            c.is_causal = more == 1;
            if (more == 2) {
              c.bias = Array(dtype, {1, 4, 1, num_keys}).fill(any_quarter);
              c.mask = Array(DType::float16, {2, 1, num_queries, num_keys}).fill(any_quarter);
            }
            check(c);
          }
}

void query_heads_may_share_key_heads() {
  for (int64_t num_key_heads : {1, 2, 3, 6})
    for (DType dtype : kDtypes)
      for (bool is_causal : {false, true}) {
        context = text("G=%d %s", int(num_key_heads), name_of(dtype));
        Case c = make_case({2, 6, num_key_heads, 11, 60, 8, 5}, 6, dtype);
        c.is_causal = is_causal;
        check(c);
      }
}

void every_head_may_have_its_own_k() {
  for (int64_t num_keys : {50, 900})
    for (int64_t num_key_heads : {1, 4})
      for (DType dtype : {DType::float32, DType::float64, DType::bfloat16}) {
        context = text("M=%d G=%d %s", int(num_keys), int(num_key_heads), name_of(dtype));
        Case c = make_case({2, 4, num_key_heads, 9, num_keys, 5, 3}, 1, dtype);
        c.k = {1, num_keys, 7, 33};
        check(c);
      }
}

void arrays_may_have_any_strides() {
  for (Layout layout : {Layout::contiguous, Layout::heads_inside, Layout::gaps})
    for (Layout output_layout : {Layout::contiguous, Layout::heads_inside, Layout::gaps})
      for (DType dtype : kDtypes)
        for (int64_t dim : {5, 64}) {
          context = text("layout %d %d %s", int(layout), int(output_layout), name_of(dtype));
          Case c = make_case({2, 3, 3, 8, 45, dim, dim}, 6, dtype, layout);
          c.output_layout = output_layout;
          check(c);
        }
}

void broken_hidden_keys_never_show() {
  for (DType dtype : kDtypes)
    for (double broken : {kNan, kInf, -kInf})
      for (int64_t num_keys : {70, 700})
        for (int how = 0; how < 4; ++how) {
          context = text("%g %s M=%d hidden by %d", broken, name_of(dtype), int(num_keys), how);
          Case c = make_case({1, 1, 1, 9, num_keys, 8, 3}, 12, dtype);
          const auto is_broken = [&](int64_t j) { return how == 2 ? j > num_keys - 9 : j % 3 == 1; };
          for (int64_t j = 0; j < num_keys; ++j)
            if (is_broken(j)) {
              for (int64_t d = 0; d < 8; d += 1 + j % 8) c.key.set(0, 0, j, d, broken);
              c.value.set(0, 0, j, j % 3, broken);
            }
          if (how == 0) c.mask = Array(DType::boolean, {1, 1, 1, num_keys});
          if (how == 1) c.mask = Array(DType::float32, {1, 1, 9, num_keys});
          if (how == 3) c.bias = Array(dtype, {1, 1, 1, num_keys});
          if (how == 2) {  // hidden from the first row at least
            c.is_causal = true;
            c.mask = Array(DType::boolean, {1, 1, 9, 1});
            c.mask.fill([](int64_t, int64_t, int64_t i, int64_t) { return double(i == 0); });
          }
          const auto hide = [&](int64_t, int64_t, int64_t, int64_t j) {
            return how == 0 ? double(!is_broken(j)) : is_broken(j) ? -kInf : 0;
          };
          if (how < 2) c.mask.fill(hide);
          if (how == 3) c.bias.fill(hide);
          check(c, [](const Result& r) {
            for (int64_t i = 0; i < 9; ++i)
              for (int64_t e = 0; e < 3; ++e)
                if (std::isnan(r.output.get(0, 0, i, e))) complain("row %d is NaN", int(i));
          });
        }
}

void broken_visible_keys_make_the_row_nan() {
  for (DType dtype : kDtypes)
    for (double broken : {kNan, kInf, -kInf})
      for (int64_t num_keys : {70, 700})
        for (int64_t every : {1, 2, 50}) {
          context = text("%g %s M=%d every %d", broken, name_of(dtype), int(num_keys), int(every));
          Case c = make_case({1, 1, 1, 9, num_keys, 8, 3}, 12, dtype);
          c.is_causal = true;
          for (int64_t j = num_keys - 5; j >= 0; j -= every) c.key.set(0, 0, j, j % 8, broken);
          check(c, [](const Result& r) {
            for (int64_t i = 4; i < 9; ++i)
              if (!std::isnan(r.output.get(0, 0, i, 0))) complain("row %d is not NaN", int(i));
          });
        }
  context = "query";
  Case c = make_case({1, 1, 1, 9, 700, 8, 3}, 12);
  c.query.set(0, 0, 3, 7, kInf);
  check(c);
}

void rows_without_keys_are_zero() {
  for (DType dtype : kDtypes)
    for (int how = 0; how < 4; ++how) {
      const int64_t dim = how == 0 ? 64 : how == 3 ? 128 : 8;
      context = text("%s %d", name_of(dtype), how);
      Case c = make_case({1, 2, 1, 30, 20, dim, dim}, 5, dtype);
      if (how % 3 == 0) c.is_causal = true;  // rows 0 to 9 lie before the first key
      if (how == 1) {
        c.mask = Array(DType::boolean, {1, 2, 30, 20});
        c.mask.fill([](int64_t, int64_t h, int64_t i, int64_t) { return double(h == 0 && i >= 10); });
      }
      if (how == 2) {
        c.bias = Array(dtype, {1, 1, 30, 1});
        c.bias.fill([](int64_t, int64_t, int64_t i, int64_t) { return i >= 10 ? 1 : -kInf; });
      }
      for (int64_t i = 0; i < 10; ++i) c.query.set(0, 0, i, 0, i % 2 == 0 ? kNan : 1);
      check(c, [&](const Result& r) {
        for (int64_t i = 0; i < 10; ++i)
          for (int64_t e = 0; e < c.sizes.head_dim; ++e)
            if (r.output.get(0, 0, i, e) != 0 || r.grad_query.get(0, 0, i, e) != 0) complain("row %d is not zero", int(i));
      });
    }
}

void of_tied_keys_the_lower_index_is_kept() {
  for (DType dtype : {DType::float32, DType::float64})
    for (int64_t num_keys : {100, 513, 3000})
      for (int64_t k : {1, 10, 64, 99})
        for (int64_t num_scores : {1, 2, 3}) {
          context = text("M=%d k=%d %d scores %s", int(num_keys), int(k), int(num_scores), name_of(dtype));
          const Case c = make_case_of_scores(13, num_keys, k, dtype,
                                             [&](int64_t, int64_t) { return any_integer(1, num_scores); });
          check(c, [&](const Result& r) {
            for (size_t n = 0; n < r.indices.size(); ++n)
              if (num_scores == 1 && r.indices[n] != int32_t(n % size_t(k)))
                complain("entry %d is key %d", int(n), int(r.indices[n]));
          });
        }
}

void scores_in_any_order_are_right() {
  for (DType dtype : {DType::float32, DType::float64})
    for (int64_t num_keys : {600, 4000})
      for (int64_t k : {1, 40, 300})
        for (int order = 0; order < 5; ++order) {
          context = text("M=%d k=%d order %d %s", int(num_keys), int(k), order, name_of(dtype));
          check(make_case_of_scores(7, num_keys, k, dtype, [&](int64_t i, int64_t j) -> double {
            switch (order) {
              case 0: return double(j) / 64;
              case 1: return double(num_keys - j) / 64;
              case 2: return j < i * num_keys / 7 ? double(j) / 64 : -double(j) / 64;
              case 3: return -std::ldexp(1.0, int(j % 100));  // over a huge range
              default: return (j * 7919 % num_keys) / 64.0;
            }
          }));
        }
}

// Whether the kernels score key j first when their panels have this many keys: forward-inl.h, choose_sample.
bool is_sampled(int64_t j, int64_t num_keys, int64_t panel) {
  const int64_t num_panels = (num_keys + panel - 1) / panel;
  const int64_t num_sampled = (std::max<int64_t>(256, num_keys / 8) + panel - 1) / panel;
  for (int64_t n = 0; n < num_sampled; ++n)
    if (j / panel == (2 * n + 1) * num_panels / (2 * num_sampled)) return true;
  return false;
}

void misleading_samples_change_nothing() {
  for (DType dtype : kDtypes)
    for (int64_t panel : {4, 6, 8, 12, 16, 32})  // that of some target and dtype
      for (int64_t k : {10, 64, 200})
        for (int how = 0; how < 4; ++how) {
          if (accumulation(dtype) != dtype && how != 0) continue;
          context = text("panel %d k=%d how %d %s", int(panel), int(k), how, name_of(dtype));
          constexpr int64_t num_keys = 2500;
          std::vector<bool> is_in_sample(num_keys);
          for (int64_t j = 0; j < num_keys; ++j) is_in_sample[j] = is_sampled(j, num_keys, panel);
          Case c = make_case_of_scores(5, num_keys, k, dtype, [&](int64_t i, int64_t j) -> double {
            const bool sampled = is_in_sample[j];
            const double score = double(j * 7919 % num_keys) / 512;
            switch (how) {
              case 0: return sampled ? 10 + score : score;             // too few keys reach the guess
              case 1: return sampled ? score : 10 + score;             // nearly all do
              case 2: return sampled ? 10 + score : -kInf;             // fewer than k keys may be seen elsewhere
              default: return (i % 2 == 0) == sampled ? 10 : score;    // some rows are done again, some overflow, with ties
            }
          });
          check(c);
          if (how != 0) continue;
          // Row 3 is all NaN, the others are done again around it.
          c.query.set(0, 0, 3, 0, kNan);
          check(c);
        }
}

void extreme_scores_are_right() {
  for (DType dtype : {DType::float32, DType::float64}) {
    const bool is_double = dtype == DType::float64;
    const double largest = is_double ? 1.7976931348623157e308 : 3.4028234663852886e38;
    const double smallest = is_double ? 5e-324 : 0x1p-149, normal = is_double ? 0x1p-1022 : 0x1p-126;
    const double extremes[] = {-kInf,     -largest,  -largest / 2, -1,      -normal,     -smallest, -0.0, 0.0, smallest,
                               2 * smallest, normal, normal / 2,   1,       largest / 2, largest,   kInf};
    for (int first = 0; first < 16; ++first)
      for (int last = first; last < 16; last += 1 + first % 3)
        for (int64_t k : {1, 37}) {
          context = text("extremes %d to %d, k=%d, %s", first, last, int(k), name_of(dtype));
          check(make_case_of_scores(3, 700, k, dtype,
                                    [&](int64_t, int64_t) { return extremes[any_integer(first, last)]; }));
        }
  }
}

void weights_follow_the_exponential() {
  for (DType dtype : {DType::float32, DType::float64}) {
    context = name_of(dtype);
    const double step = dtype == DType::float64 ? 0.0913 : 0.0137;
    const Case c =
        make_case_of_scores(8100, 2, 2, dtype, [&](int64_t i, int64_t j) { return j == 0 ? 0 : -step * double(i); });
    on_every_target([&] {
      Result r;
      forward(c, r);
      for (int64_t i = 0; i < c.sizes.num_queries; ++i) {
        const double power = std::exp(c.bias.get(0, 0, i, 1)), got = r.weights.get(0, 0, 0, 2 * i + 1);
        const double error = std::fabs(got - power / (1 + power));
        // Below exp(-87), or exp(-708), the weight is zero.
        const double allowed = 4 * rounding_of(dtype) * power + (dtype == DType::float64 ? 4e-308 : 2e-38);
        if (error > allowed) complain("exp(%g) is %g, off by %g", c.bias.get(0, 0, i, 1), got, error);
      }
    });
  }
}

// With two keys of equal score, both kept by dropout with p = 1/2, the output is the sum of two values.
void halves_round_to_nearest_ties_to_even() {
  for (DType dtype : {DType::bfloat16, DType::float16})
    for (int how = 0; how < 6; ++how) {
      context = text("%s %d", name_of(dtype), how);
      Case c = make_case({1, 1, 1, 1, 2, 1, 0x10000}, 2, dtype);
      c.query.set(0, 0, 0, 0, 0);
      c.dropout = {true, 0, 0.5};
      while (!survives(c.dropout, 0, 0) || !survives(c.dropout, 0, 1)) ++c.dropout.seed;
      for (int64_t e = 0; e < 0x10000; ++e) {
        // Every number there is, and another one that is no more than a few places, or many, from it.
        const uint16_t one = uint16_t(e), other = uint16_t(how == 0 ? 0 : how == 1 ? e + 1 : how == 2 ? e - 0x3000
                                                           : how == 3 ? e - 0x0400 * 11 : how == 4 ? e - 0x80 * 8 : e * 40503);
        std::memcpy(&c.value.bytes[2 * e], &one, 2);
        std::memcpy(&c.value.bytes[2 * (0x10000 + e)], &other, 2);
      }
      on_every_target([&] {
        Result r;
        forward(c, r);
        for (int64_t e = 0; e < 0x10000; ++e) {
          const float a = float(c.value.get(0, 0, 0, e)), b = float(c.value.get(0, 0, 1, e)), sum = 0.0f + a + b;
          const double want = round_to(dtype, sum), got = r.output.get(0, 0, 0, e);
          const bool is_right = std::isnan(want) ? std::isnan(got) : got == want && std::signbit(got) == std::signbit(want);
          if (!is_right) complain("%a + %a is %a, should be %a", a, b, got, want);
        }
      });
    }
}

void dropout_draws_as_the_other_backends_do() {
  for (DType dtype : kDtypes)
    for (double p : {0.0, 0.1, 0.5, 0.999, 1 - 0x1p-32, 1 - 0x1p-40})
      for (uint64_t seed : {uint64_t(0), uint64_t(12345), (uint64_t(1) << 62) - 1}) {
        context = text("p=%g %s", p, name_of(dtype));
        if (dtype == DType::float16 && 1 / (1 - p) > 1e4) continue;  // its numbers end at 65504
        Case c = make_case({2, 2, 1, 9, 80, 8, 4}, 30, dtype);
        c.dropout = {true, seed, p};
        check(c);
      }
}

void the_number_of_threads_changes_no_bit() {
  struct Size {
    topk::Sizes sizes;
    int64_t k;
  };
  const Size all[] = {{{1, 1, 1, 150, 700, 16, 16}, 20},    // all threads share one head
                      {{4, 4, 4, 9, 60, 16, 16}, 20},       // each has heads of its own
                      {{1, 6, 2, 40, 600, 64, 64}, 200},
                      {{1, 2, 1, 150, 900, 16, 8}, 800},      // several chunks
                      {{1, 4, 2, 80, 1100, 20, 8}, 15},     // keys are screened where that is possible
                      {{1, 4, 2, 2, 3300, 20, 8}, 15}};     // few rows: threads share the keys of each head
  for (const Size& size : all)
    for (DType dtype : {DType::float32, DType::float64, DType::bfloat16})
      for (bool more : {false, true}) {
        Case c = make_case(size.sizes, size.k, dtype);
        const topk::Sizes& s = size.sizes;
        c.query.fill(any_element);
        c.key.fill(any_element);
        if (more) {
          c.is_causal = true;
          c.dropout = {true, 7, 0.2};
          c.bias = Array(dtype, {1, s.num_heads, 1, s.num_keys}).fill(any_element);
          c.relative_bias = Array(accumulation(dtype), {1, 1, 1, s.num_queries + s.num_keys - 1}).fill(any_element);
        }
        on_every_target([&] {
          const Result one = run(c);
          for (int threads : {2, 3}) {
            context = text("B=%d %s%s, %d threads", int(s.batch), name_of(dtype), more ? " and more" : "", threads);
            num_threads = threads;
            const Result r = run(c);
            num_threads = 1;
            if (r.indices != one.indices) complain("indices differ");
            const auto same = [](const char* what, const Array& a, const Array& b) {
              if (a.bytes != b.bytes) complain("%s differs", what);
            };
            same("output", r.output, one.output);
            same("weights", r.weights, one.weights);
            same("grad_query", r.grad_query, one.grad_query);
            same("grad_key", r.grad_key, one.grad_key);
            same("grad_value", r.grad_value, one.grad_value);
            same("grad_bias", r.grad_bias, one.grad_bias);
            same("grad_relative_bias", r.grad_relative_bias, one.grad_relative_bias);
          }
        });
      }
}

void keys_that_many_rows_keep_get_all_their_gradients() {
  for (Layout layout : {Layout::contiguous, Layout::heads_inside})
    for (int64_t num_seen : {1, 3})
      for (int64_t dim : {20, 64})
        for (DType dtype : kDtypes) {
          context = text("%d keys D=%d %s layout %d", int(num_seen), int(dim), name_of(dtype), int(layout));
          Case c = make_case({1, 4, 2, 70, 300, dim, dim}, 5, dtype, layout);
          // Every fifth row sees no key.
          c.mask = Array(DType::boolean, {1, 1, 70, 300}).fill([&](int64_t, int64_t, int64_t i, int64_t j) {
            const bool is_one = j == 299 || (num_seen > 1 && (j == 7 || j == 150));
            return double(i % 5 != 0 && is_one);
          });
          check(c);
        }
}

void gradients_of_more_rows_than_a_chunk_are_right() {
  for (int64_t group : {1, 2})
    for (DType dtype : {DType::float32, DType::float64, DType::bfloat16}) {
      context = text("group=%d %s", int(group), name_of(dtype));
      Case c = make_case({1, group, 1, group == 1 ? 400 : 150, 900, 16, 8}, 800, dtype, Layout::heads_inside);
      c.dropout = {true, 7, 0.2};
      c.bias = Array(dtype, {1, 1, 1, 900}).fill(any_quarter);
      c.relative_bias = Array(accumulation(dtype), {1, 1, 1, c.sizes.num_queries + 899}).fill(any_quarter);
      check(c);
    }
}

// Elements that are hard to screen; j counts queries or keys.
double misleading_element(int how, int64_t j, int64_t d) {
  const double x = any_number() + any_number() + any_number();
  switch (how) {
    case 0: return x;
    case 1: return d == 3 ? 300 * x : x;                    // a channel far larger
    case 2: return 100 + x;                                 // a large mean
    case 3: return j % 90 == 0 ? 1e6 * x : x;               // few keys far larger
    case 4: return j % 50 == 0 ? 1e17 * x : x;              // few keys beyond what is screened
    case 5: return 1;                                       // all equal
    case 6: return j % 3 == 0 ? 0 : double(any_integer(-1, 1));
    case 7: return j % 70 == 0 && d == 1 ? kNan : x;
    case 8: return j % 70 == 0 && d == 1 ? kInf : x;
    case 9: return 1e-40 * x;                               // subnormal
    case 10: return 1e20 * x;                               // scores overflow
    case 11: return j % 2 == 0 ? 1 + 0.1 * x : -1 + 0.1 * x;  // all of one sign, alike in size: products add up to the most
    default: return std::fabs(x) * double(j % 1000) / 100;  // better from key to key
  }
}

// Sizes from which keys are screened: forward-inl.h scores all of them on the other targets.
void screened_keys_are_those_of_all_scores(const topk::Kernels* screened, const topk::Kernels* plain) {
  for (int how = 0; how < 13; ++how)
    for (DType dtype : {DType::float32, DType::bfloat16, DType::float16})
      for (int more = 0; more < 4; ++more) {
        context = text("elements %d, %s, %d", how, name_of(dtype), more);
        const int64_t num_keys = 1024 + 61 * more, dim = 18 + 23 * more;
        Case c = make_case({1, 2, 1, 40 + 20 * more, num_keys, dim, 5}, 1, dtype);
        c.k = {3 + how, 60};
        c.query.fill([&](int64_t, int64_t, int64_t i, int64_t d) { return misleading_element(more == 3 ? how : 0, i, d); });
        c.key.fill([&](int64_t, int64_t, int64_t j, int64_t d) { return misleading_element(how, j, d); });
        c.is_causal = more % 2 == 1;
        if (more == 1) c.relative_bias = Array(DType::float32, {1, 1, 2, c.sizes.num_queries + num_keys - 1}).fill(any_element);
        if (more == 2) {
          c.mask = Array(DType::boolean, {1, 1, c.sizes.num_queries, num_keys});
          c.mask.fill([](int64_t, int64_t, int64_t, int64_t) { return double(any_integer(0, 2) != 0); });
        }
        if (more == 3) c.bias = Array(dtype, {1, 1, 1, num_keys}, Layout::gaps).fill(any_quarter);
        Result results[2];
        for (int n = 0; n < 2; ++n) {
          kernels = n == 0 ? plain : screened;
          target = kernels->target;
          forward(c, results[n]);
        }
        if (results[0].indices != results[1].indices) complain("other keys");
        const auto same = [](const char* what, const Array& a, const Array& b) {
          for (int64_t n = 0; n < a.shape[1] * a.shape[2] * a.shape[3]; ++n) {
            const int64_t d = n % a.shape[3], i = n / a.shape[3] % a.shape[2], h = n / a.shape[3] / a.shape[2];
            const double x = a.get(0, h, i, d), y = b.get(0, h, i, d);
            if (!(x == y || (std::isnan(x) && std::isnan(y)))) return complain("other %s", what);
          }
        };
        same("weights", results[0].weights, results[1].weights);
        same("output", results[0].output, results[1].output);
      }
}

void screened_keys_are_those_of_all_scores() {
  // Each target that screens, and the one of the same vectors that does not.
  const char* const pairs[][2] = {
      {"avx512vnni", "avx512"}, {"avx512screen", "avx512"}, {"avxvnni", "avx2"}, {"avx2screen", "avx2"}, {"neondot", "neon"}};
  bool any = false;
  for (const auto& pair : pairs) {
    const topk::Kernels *screened = topk::kernels_of(pair[0]), *plain = topk::kernels_of(pair[1]);
    if (screened == nullptr || plain == nullptr) continue;
    any = true;
    screened_keys_are_those_of_all_scores(screened, plain);
  }
  if (!any) std::printf("  skipped: no target that this processor runs screens keys\n");
}

void an_index_of_other_keys_is_found() {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    context = name_of(dtype);
    Case c = make_case({1, 2, 1, 3, 700, 20, 4}, 9, dtype);
    const Array other = Array(dtype, c.key.shape).fill(any_element);
    c.key.fill(any_element);
    const HeadKArrays head_k(c);
    Array output(dtype, c.grad_output.shape);
    const topk::AttentionForward call = forward_call(c, head_k, output);
    on_every_target([&] {
      if (!forward_with_index(c, other, call)) complain("an index of other keys is taken for one of these");
      if (forward_with_index(c, c.key, call)) complain("an index of these keys is taken for one of others");
    });
  }
}

void gradients_not_wanted_change_no_bit_of_others() {
  for (bool has_dropout : {false, true})
    for (int64_t dim : {5, 64})
      for (DType dtype : {DType::float32, DType::bfloat16}) {
        Case c = make_case({2, 4, 2, 9, 80, dim, dim}, 20, dtype);
        c.dropout = {has_dropout, 7, 0.2};
        c.bias = Array(dtype, {1, 4, 1, 80}).fill(any_quarter);
        c.relative_bias = Array(accumulation(dtype), {1, 1, 4, 88}).fill(any_quarter);
        on_every_target([&] {
          const Result all = run(c);
          for (unsigned wanted = 0; wanted < 32; ++wanted) {
            context = text("D=%d %s%s, wanted %d", int(dim), name_of(dtype), has_dropout ? " dropout" : "", int(wanted));
            Result r = all;
            backward(c, r, wanted);
            const auto same = [&](const char* what, int bit, const Array& a, const Array& b) {
              if ((wanted >> bit & 1) != 0 && a.bytes != b.bytes) complain("%s differs", what);
            };
            same("grad_query", 0, r.grad_query, all.grad_query);
            same("grad_key", 1, r.grad_key, all.grad_key);
            same("grad_value", 2, r.grad_value, all.grad_value);
            same("grad_bias", 3, r.grad_bias, all.grad_bias);
            same("grad_relative_bias", 4, r.grad_relative_bias, all.grad_relative_bias);
          }
        });
      }
}

void entries_need_not_be_saved() {
  const Case c = make_case({1, 2, 1, 9, 600, 8, 4}, 30);
  const HeadKArrays head_k(c);
  on_every_target([&] {
    Result saved;
    forward(c, saved);
    Array output(c.dtype, saved.output.shape, c.output_layout);
    const topk::AttentionForward call = forward_call(c, head_k, output);
    if (!kernels->attention.forward(call, parallel()) || output.bytes != saved.output.bytes) complain("the output differs");
  });
}

void want_of_memory_is_reported() {
  const Case c = make_case({1, 1, 1, 3, 5, 4, 4}, 2);
  const HeadKArrays head_k(c);
  Array output = c.grad_output;
  topk::AttentionForward call = forward_call(c, head_k, output);
  call.sizes.value_dim = int64_t(1) << 50;
  topk::AttentionBackward back = {};
  back.sizes = call.sizes;
  back.dtype = c.dtype;
  back.head_k = head_k.view;
  back.grad_query = back.grad_key = back.grad_value = output.data();  // never written
  on_every_target([&] {
    if (kernels->attention.forward(call, parallel())) complain("forward found 2^52 bytes");
    if (kernels->attention.backward(back, parallel())) complain("backward found 2^52 bytes");
  });
}

// Pages that exist once they are touched, and that read as zeros.
class SparseMemory {
 public:
  explicit SparseMemory(size_t size) : size_(size) {
    data_ = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  SparseMemory(const SparseMemory&) = delete;
  ~SparseMemory() {
    if (ok()) munmap(data_, size_);
  }
  bool ok() const { return data_ != MAP_FAILED; }
  template <class T>
  T* as() const { return static_cast<T*>(data_); }

 private:
  void* data_;
  size_t size_;
};

// Heads 2^32 elements apart, in inputs, output and entries.
void offsets_of_more_than_32_bits_are_right() {
  const Case c = make_case({1, 2, 2, 3, 40, 4, 4}, 6);
  constexpr int64_t far = (int64_t(1) << 32) + 2;  // a multiple of the 3 queries
  const SparseMemory query(far * 8), key(far * 8), value(far * 8), grad_output(far * 8), output(far * 8);
  const SparseMemory indices(far * 8), weights(far * 8);
  for (const SparseMemory* memory : {&query, &key, &value, &grad_output, &output, &indices, &weights})
    if (!memory->ok()) {
      std::printf("  skipped: no address space of 7 * 32 GiB\n");
      return;
    }
  const auto spread = [&](const SparseMemory& to, const Array& from) {
    const size_t bytes_of_head = from.bytes.size() / 2;
    for (int64_t h = 0; h < 2; ++h)
      std::memcpy(to.as<float>() + h * far, from.bytes.data() + h * bytes_of_head, bytes_of_head);
    topk::View view = from.view();
    view.data = to.as<float>();
    view.stride[1] = far;
    return view;
  };
  HeadKArrays far_heads(c);
  far_heads.first[1] = far / 3;
  far_heads.view.total_k = 2 * far_heads.first[1];
  on_every_target([&] {
    const Result near = run(c);
    Result r = near;
    topk::AttentionForward call = forward_call(c, far_heads, r.output);
    call.query = spread(query, c.query);
    call.key = spread(key, c.key);
    call.value = spread(value, c.value);
    call.output = output.as<float>();
    call.output_stride[1] = far;
    call.output_stride[2] = 4;
    call.indices = indices.as<int32_t>();
    call.weights = weights.as<float>();
    if (!kernels->attention.forward(call, parallel())) complain("no memory");
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t n = 0; n < 3 * 4; ++n)
        if (output.as<float>()[h * far + n] != near.output.get(0, h, n / 4, n % 4)) complain("the output differs");
      for (int64_t n = 0; n < 3 * 6; ++n)
        if (indices.as<int32_t>()[h * far + n] != near.indices[h * 18 + n]) complain("indices differ");
    }
    topk::AttentionBackward grads = {};
    grads.sizes = c.sizes;
    grads.dtype = c.dtype;
    grads.grad_output = spread(grad_output, c.grad_output);
    grads.query = call.query;
    grads.key = call.key;
    grads.value = call.value;
    grads.indices = call.indices;
    grads.weights = call.weights;
    grads.head_k = far_heads.view;
    grads.scale = c.scale;
    r.grad_key = zeros(c.dtype, near.grad_key.shape);
    r.grad_value = zeros(c.dtype, near.grad_value.shape);
    grads.grad_query = r.grad_query.data();
    grads.grad_key = r.grad_key.data();
    grads.grad_value = r.grad_value.data();
    if (!kernels->attention.backward(grads, parallel())) complain("no memory");
    if (r.grad_query.bytes != near.grad_query.bytes) complain("grad_query differs");
    if (r.grad_key.bytes != near.grad_key.bytes) complain("grad_key differs");
    if (r.grad_value.bytes != near.grad_value.bytes) complain("grad_value differs");
  });
}

// ---------------------------------------------------------------------------------------------------------------------

}  // namespace

// What rows send to all keys that they see, under causality.
bool send_rest(const Case& c, Result& r, const RestArrays& rest) {
  topk::SendRest call = {};
  call.sizes = c.sizes;
  call.dtype = c.dtype;
  call.query = c.query.view();
  call.grad_output = c.grad_output.view();
  call.key = c.key.view();
  call.value = c.value.view();
  for (int n = 0; n < 3; ++n) call.weights[n] = rest.sent[n].data();
  call.scale = c.scale;
  call.interval = c.interval;
  call.grad_key = r.grad_key.data();
  call.grad_value = r.grad_value.data();
  return kernels->attention.send_rest(call, parallel());
}

double product_of(const Array& a, const Array& b) {
  double sum = 0;
  for (int64_t n = 0; n < a.shape[0]; ++n)
    for (int64_t h = 0; h < a.shape[1]; ++h)
      for (int64_t i = 0; i < a.shape[2]; ++i)
        for (int64_t x = 0; x < a.shape[3]; ++x) sum += a.get(n, h, i, x) * b.get(n, h, i, x);
  return sum;
}

// The output of a row is linear in values, so grad_output . output is grad_value . value, of all rows and keys.
void the_rest_enters_the_softmax_and_its_values_get_their_gradients() {
  for (int64_t interval : {0, 4})
    for (int64_t num_queries : {1, 23, 41})
      for (int64_t group : {1, 5})
        for (DType dtype : kDtypes) {
          const int64_t num_keys = num_queries == 23 ? 17 : num_queries + 9, dim = group == 1 ? 20 : 3;
          context = text("interval=%d N=%d group=%d %s", int(interval), int(num_queries), int(group), name_of(dtype));
          Case c = make_case({1, 2 * group, 2, num_queries, num_keys, dim, dim + 2}, 5, dtype);
          c.is_causal = interval != 0;
          c.interval = interval;
          c.lift = 0.375;
          for (int64_t h = 0; h < c.sizes.num_heads; ++h) c.mass_scale.push_back(0.5 * double(h));
          const Expected expected = define(c);
          on_every_target([&] {
            RestArrays rest(c);
            Result r;
            forward(c, r, &rest);
            if (!rest.ok) complain("no memory for sums");
            compare(c, r, expected);  // there are no gradients yet
            backward(c, r, 31, &rest);
            if (!r.ok) complain("no memory");
            if (interval == 0) return;
            if (!send_rest(c, r, rest)) complain("no memory to send");
            const double one = product_of(c.grad_output, r.output), other = product_of(r.grad_value, c.value);
            const double allowed = std::sqrt(double(c.grad_output.count())) *
                                   std::max(rounding_of(dtype), 8 * rounding_of(accumulation(dtype)));
            if (!(std::fabs(one - other) <= allowed))
              complain("grad_output . output is %.9g, grad_value . value %.9g", one, other);
          });
        }
}

#define CLAIM(function) {#function, function}
const std::vector<Claim> attention_claims = {
    CLAIM(every_head_size_is_right),
    CLAIM(value_size_may_differ_from_head_size),
    CLAIM(every_number_of_keys_and_every_k_is_right),
    CLAIM(every_number_of_queries_is_right),
    CLAIM(real_scores_keep_the_best_to_rounding),
    CLAIM(causal_rows_align_at_the_end),
    CLAIM(masks_of_every_dtype_and_shape_are_right),
    CLAIM(biases_of_every_shape_are_added_and_get_gradients),
    CLAIM(relative_biases_are_added_and_get_gradients),
    CLAIM(query_heads_may_share_key_heads),
    CLAIM(every_head_may_have_its_own_k),
    CLAIM(arrays_may_have_any_strides),
    CLAIM(broken_hidden_keys_never_show),
    CLAIM(broken_visible_keys_make_the_row_nan),
    CLAIM(rows_without_keys_are_zero),
    CLAIM(of_tied_keys_the_lower_index_is_kept),
    CLAIM(scores_in_any_order_are_right),
    CLAIM(misleading_samples_change_nothing),
    CLAIM(extreme_scores_are_right),
    CLAIM(weights_follow_the_exponential),
    CLAIM(halves_round_to_nearest_ties_to_even),
    CLAIM(dropout_draws_as_the_other_backends_do),
    CLAIM(the_number_of_threads_changes_no_bit),
    CLAIM(keys_that_many_rows_keep_get_all_their_gradients),
    CLAIM(gradients_of_more_rows_than_a_chunk_are_right),
    {"screened_keys_are_those_of_all_scores", [] { screened_keys_are_those_of_all_scores(); }},
    CLAIM(an_index_of_other_keys_is_found),
    CLAIM(gradients_not_wanted_change_no_bit_of_others),
    CLAIM(entries_need_not_be_saved),
    CLAIM(the_rest_enters_the_softmax_and_its_values_get_their_gradients),
    CLAIM(want_of_memory_is_reported),
    CLAIM(offsets_of_more_than_32_bits_are_right),
};

}  // namespace topk_test
