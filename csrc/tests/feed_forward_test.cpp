// Claims about the feed-forward kernels of every CPU target that this processor can run. Each call goes through the
// interface in feed_forward.h and is compared with feed_forward_definition.h.
//
// Where neurons are chosen, inputs and weights are small integers, so that ranks are exact in every dtype and the chosen
// neurons must agree exactly, ties included (there are many).
#include <set>

#include "feed_forward_definition.h"

namespace topk_test {
namespace {

// ------------------------------------------------------------------------------------------------------- kernel calls

topk::Matrix matrix_of(const Array& array) {
  topk::Matrix matrix;
  if (array.exists()) matrix = {array.data(), array.stride[2]};
  return matrix;
}

const void* data_of(const Array& array) { return array.exists() ? array.data() : nullptr; }

struct Result {
  std::vector<int32_t> neurons;
  Array values, gates;
};

Result choose(const Layer& layer) {
  const DType accumulated = accumulation(layer.dtype);
  Result r;
  r.neurons.assign(layer.num_tokens() * layer.k, -77);
  r.neurons.shrink_to_fit();
  r.values = Array(accumulated, {1, 1, layer.num_tokens(), layer.k});
  if (layer.w_gate.exists()) r.gates = r.values;
  topk::ChooseNeurons call = {};
  call.num_tokens = layer.num_tokens();
  call.model_size = layer.model_size();
  call.num_neurons = layer.num_neurons();
  call.k = layer.k;
  call.dtype = layer.dtype;
  call.x = matrix_of(layer.x);
  call.w_in = matrix_of(layer.w_in);
  call.w_gate = matrix_of(layer.w_gate);
  call.b_in = data_of(layer.b_in);
  call.b_gate = data_of(layer.b_gate);
  call.activation = layer.activation;
  call.neurons = r.neurons.data();
  call.values = r.values.data();
  call.gates = layer.w_gate.exists() ? r.gates.data() : nullptr;
  if (!kernels->feed_forward.choose_neurons(call, parallel())) complain("no memory");
  return r;
}

void compare(const Layer& layer, const Result& r, const Chosen& chosen) {
  const DType accumulated = accumulation(layer.dtype);
  for (size_t n = 0; n < chosen.neurons.size(); ++n)
    if (r.neurons[n] != chosen.neurons[n]) {
      complain("entry %d is neuron %d, should be %d", int(n), int(r.neurons[n]), int(chosen.neurons[n]));
      return;
    }
  expect_close("values", r.values, chosen.values, accumulated);
  if (layer.w_gate.exists()) expect_close("gates", r.gates, chosen.gates, accumulated);
}

// Calls more(result) after the comparison with the definition.
template <class More>
void check(const Layer& layer, More more) {
  const Chosen expected = define(layer);
  on_every_target([&] {
    const Result r = choose(layer);
    compare(layer, r, expected);
    more(r);
  });
}

void check(const Layer& layer) {
  check(layer, [](const Result&) {});
}

topk::Entries entries_of(const Entries& e) {
  return {e.num_tokens(), e.k, e.neurons.data(), e.coefficients.data()};
}

Array sum_neurons(const Entries& e) {
  Array out = e.before;
  topk::SumNeurons call = {entries_of(e), e.num_neurons(), e.size(), e.dtype, matrix_of(e.table), out.data()};
  if (!kernels->feed_forward.sum_neurons(call, parallel())) complain("no memory");
  return out;
}

// The same of a table whose columns lie together.
Array sum_neurons_of_transposed(const Entries& e) {
  Array out = e.before, columns(e.dtype, {1, 1, e.size(), e.num_neurons()}, Layout::gaps);
  columns.fill([&](int64_t, int64_t, int64_t x, int64_t f) { return e.table.get(0, 0, f, x); });
  topk::SumNeurons call = {entries_of(e), e.num_neurons(), e.size(), e.dtype, matrix_of(columns), out.data(), true};
  if (!kernels->feed_forward.sum_neurons(call, parallel())) complain("no memory");
  return out;
}

Array dot_neurons(const Entries& e) {
  Array out(accumulation(e.dtype), {1, 1, e.num_tokens(), e.k});
  topk::DotNeurons call = {e.num_tokens(), e.k,         e.num_neurons(), e.size(), e.dtype,
                           e.neurons.data(), matrix_of(e.rows), matrix_of(e.table), out.data()};
  if (!kernels->feed_forward.dot_neurons(call, parallel())) complain("no memory");
  return out;
}

struct Sums {
  Array out, bias;
};

Sums sum_tokens(const Entries& e) {
  Sums sums = {e.before, e.bias_before};
  topk::SumTokens call = {entries_of(e), e.num_neurons(), e.size(), e.dtype, matrix_of(e.rows), sums.out.data(), nullptr};
  if (sums.bias.exists()) call.bias_out = sums.bias.data();
  if (!kernels->feed_forward.sum_tokens(call, parallel())) complain("no memory");
  return sums;
}

// --------------------------------------------------------------------------------------------------------- test data

Array matrix(DType dtype, int64_t rows, int64_t columns, Layout layout = Layout::contiguous) {
  return Array(dtype, {1, 1, rows, columns}, layout);
}

struct Sizes {
  int64_t tokens, model, neurons;
};

Layer make_layer(Sizes s, int64_t k, DType dtype, bool is_gated, Layout layout = Layout::contiguous) {
  generator.seed(unsigned(s.tokens * 1009 + s.model * 31 + s.neurons));
  Layer layer;
  layer.k = k;
  layer.dtype = dtype;
  layer.x = matrix(dtype, s.tokens, s.model, layout).fill(small_integer);
  layer.w_in = matrix(dtype, s.neurons, s.model, layout).fill(small_integer);
  if (is_gated) layer.w_gate = matrix(dtype, s.neurons, s.model, layout).fill(small_integer);
  return layer;
}

// The claims make the outputs: [T, X] for the sum over neurons, [F, X] for the sum over tokens.
Entries make_entries(int64_t tokens, int64_t neurons, int64_t size, int64_t k, DType dtype,
                     Layout layout = Layout::contiguous) {
  generator.seed(unsigned(tokens * 1009 + size * 31 + neurons));
  Entries e;
  e.k = k;
  e.dtype = dtype;
  for (int64_t t = 0; t < tokens; ++t) {
    std::set<int32_t> some;
    while (int64_t(some.size()) < k) some.insert(int32_t(any_integer(0, neurons - 1)));
    e.neurons.insert(e.neurons.end(), some.begin(), some.end());
  }
  e.neurons.shrink_to_fit();
  e.coefficients = matrix(accumulation(dtype), tokens, k).fill(any_element);
  e.rows = matrix(dtype, tokens, size, layout).fill(any_element);
  e.table = matrix(dtype, neurons, size, layout).fill(any_element);
  return e;
}

Array some_numbers(DType dtype, int64_t rows, int64_t columns) {
  return matrix(accumulation(dtype), rows, columns).fill(any_element);
}

void check_sums(Entries e) {
  const DType accumulated = accumulation(e.dtype);
  e.before = some_numbers(e.dtype, e.num_tokens(), e.size());
  const std::vector<Number> of_neurons = define_sum_neurons(e), dots = define_dot_neurons(e);
  on_every_target([&] {
    const Array sums = sum_neurons(e);
    expect_close("sum over neurons", sums, of_neurons, accumulated);
    if (sum_neurons_of_transposed(e).bytes != sums.bytes) complain("sums over a transposed table differ");
    expect_close("dot product", dot_neurons(e), dots, accumulated);
  });
  e.before = some_numbers(e.dtype, e.num_neurons(), e.size());
  for (bool has_bias : {false, true}) {
    if (has_bias) e.bias_before = some_numbers(e.dtype, 1, e.num_neurons());
    const std::vector<Number> of_tokens = define_sum_tokens(e);
    const std::vector<Number> of_bias = has_bias ? define_bias_sums(e) : std::vector<Number>();
    on_every_target([&] {
      const Sums sums = sum_tokens(e);
      expect_close("sum over tokens", sums.out, of_tokens, accumulated);
      if (has_bias) expect_close("sum of coefficients", sums.bias, of_bias, accumulated);
    });
  }
}

std::set<int64_t> some_ks(int64_t neurons) {
  return {1, std::max<int64_t>(1, neurons / 5), std::max<int64_t>(1, neurons - 1), neurons};
}

// ------------------------------------------------------------------------------------------------------------- claims

void every_number_of_neurons_and_every_k_is_right() {
  for (int64_t neurons : {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 511, 512, 513, 1500})
    for (int64_t tokens : {3, 14})  // read by all threads together, and in blocks
      for (int64_t k : some_ks(neurons))
        for (DType dtype : kDtypes)
          for (bool is_gated : {false, true}) {
            if (neurons > 513 && dtype != DType::float32 && dtype != DType::float64) continue;
            context = text("F=%d k=%d T=%d %s%s", int(neurons), int(k), int(tokens), name_of(dtype), is_gated ? " gated" : "");
            check(make_layer({tokens, 6, neurons}, k, dtype, is_gated));
          }
}

void every_model_size_is_right() {
  for (int64_t model : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 40, 64, 80, 128, 256})
    for (int64_t tokens : {1, 5, 13})
      for (DType dtype : kDtypes)
        for (bool is_gated : {false, true}) {
          context = text("D=%d T=%d %s%s", int(model), int(tokens), name_of(dtype), is_gated ? " gated" : "");
          check(make_layer({tokens, model, 70}, 9, dtype, is_gated));
        }
}

void every_number_of_tokens_is_right() {
  for (int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 23, 24, 25, 100, 191, 192, 193, 400})
    for (DType dtype : {DType::float32, DType::float64, DType::bfloat16}) {
      context = text("T=%d %s", int(tokens), name_of(dtype));
      check(make_layer({tokens, 5, 40}, 7, dtype, tokens % 2 == 0));
    }
}

void biases_are_added_before_neurons_are_ranked() {
  for (DType dtype : kDtypes)
    for (int64_t tokens : {2, 20})
      for (int which = 0; which < 4; ++which)
        for (bool is_gated : {false, true}) {
          if (!is_gated && which > 1) continue;
          context = text("T=%d biases %d %s%s", int(tokens), which, name_of(dtype), is_gated ? " gated" : "");
          Layer layer = make_layer({tokens, 9, 75}, 13, dtype, is_gated);
          if ((which & 1) != 0) layer.b_in = some_numbers(dtype, 1, 75).fill(any_quarter);
          if ((which & 2) != 0) layer.b_gate = some_numbers(dtype, 1, 75).fill(any_quarter);
          check(layer);
        }
}

void rows_may_lie_apart() {
  for (DType dtype : kDtypes)
    for (int64_t size : {5, 17, 64})
      for (int64_t tokens : {3, 15}) {
        context = text("size %d T=%d %s", int(size), int(tokens), name_of(dtype));
        check(make_layer({tokens, size, 70}, 9, dtype, true, Layout::gaps));
        check_sums(make_entries(tokens, 70, size, 9, dtype, Layout::gaps));
      }
}

void of_tied_neurons_the_lower_index_is_kept() {
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16})
    for (int64_t neurons : {40, 513, 2000})
      for (int64_t tokens : {2, 13})
        for (int64_t k : {1, 10, 39})
          for (int64_t num_values : {1, 2, 3})
            for (bool is_gated : {false, true}) {
              context = text("F=%d T=%d k=%d %d values %s%s", int(neurons), int(tokens), int(k), int(num_values),
                             name_of(dtype), is_gated ? " gated" : "");
              Layer layer = make_layer({tokens, 1, neurons}, k, dtype, is_gated);
              const auto value = [&](int64_t, int64_t, int64_t, int64_t) { return double(any_integer(1, num_values)); };
              layer.x.fill([](int64_t, int64_t, int64_t, int64_t) { return 1.0; });
              layer.w_in.fill(value);
              if (is_gated) layer.w_gate.fill(value);
              check(layer, [&](const Result& r) {
                for (size_t n = 0; n < r.neurons.size(); ++n)
                  if (num_values == 1 && r.neurons[n] != int32_t(n % size_t(k)))
                    complain("entry %d is neuron %d", int(n), int(r.neurons[n]));
              });
            }
}

void a_plain_layer_ranks_by_value_and_a_gated_one_by_magnitude() {
  for (DType dtype : kDtypes)
    for (int64_t tokens : {2, 13}) {
      context = text("T=%d %s", int(tokens), name_of(dtype));
      Layer layer = make_layer({tokens, 1, 60}, 20, dtype, false);
      layer.x.fill([](int64_t, int64_t, int64_t, int64_t) { return 1.0; });
      layer.w_in.fill([](int64_t, int64_t, int64_t f, int64_t) { return double(f - 40); });
      layer.activation = Activation::relu;  // ranks are those before it
      check(layer, [](const Result& r) {
        for (size_t n = 0; n < r.neurons.size(); ++n)
          if (r.neurons[n] != int32_t(40 + n % 20)) complain("plain keeps neuron %d", int(r.neurons[n]));
      });
      layer.activation = Activation::identity;
      layer.w_gate = matrix(dtype, 60, 1).fill([](int64_t, int64_t, int64_t f, int64_t) { return f < 20 ? -1.0 : 1.0; });
      check(layer, [](const Result& r) {
        for (size_t n = 0; n < r.neurons.size(); ++n)  // magnitudes fall from 40 to 0, then rise to 19
          if (r.neurons[n] != int32_t(n % 20)) complain("gated keeps neuron %d", int(r.neurons[n]));
      });
    }
}

void every_activation_keeps_the_best_to_rounding() {
  for (Activation activation :
       {Activation::identity, Activation::relu, Activation::silu, Activation::gelu, Activation::gelu_tanh,
        Activation::quick_gelu, Activation::relu_squared})
    for (DType dtype : {DType::float32, DType::float64})
      for (int64_t tokens : {3, 14})
        for (int64_t k : {1, 40, 299}) {
          context = text("activation %d T=%d k=%d %s", int(activation), int(tokens), int(k), name_of(dtype));
          Layer layer = make_layer({tokens, 12, 300}, k, dtype, true);
          layer.activation = activation;
          layer.x.fill([](int64_t, int64_t, int64_t t, int64_t) { return any_number() * double(1 + t); });
          layer.w_in.fill(any_element);
          layer.w_gate.fill(any_element);
          layer.b_in = some_numbers(dtype, 1, 300);
          layer.b_gate = some_numbers(dtype, 1, 300);
          on_every_target([&] {
            const Result r = choose(layer);
            for (int64_t t = 0; t < tokens; ++t) {
              std::vector<bool> is_kept(300);
              double worst_kept = kInf, best_left = -kInf, rounding = 0;
              for (int64_t n = 0; n < k; ++n) is_kept[r.neurons[t * k + n]] = true;
              for (int64_t f = 0; f < 300; ++f) {
                const Number rank = rank_of(layer, t, f);
                // An activation is right to a few roundings of its own.
                rounding = std::max(rounding, rank.mass * rounding_of(dtype) * 3 * allowed_roundings);
                if (is_kept[f]) worst_kept = std::min(worst_kept, double(rank.value));
                if (!is_kept[f]) best_left = std::max(best_left, double(rank.value));
              }
              if (worst_kept < best_left - rounding)
                complain("token %d keeps %.9g and leaves %.9g", int(t), worst_kept, best_left);
            }
            compare(layer, r, define(layer, &r.neurons));
          });
        }
}

void ranks_in_any_order_are_right() {
  for (DType dtype : {DType::float32, DType::float64})
    for (int64_t neurons : {600, 4000})
      for (int64_t k : {1, 40, 300})
        for (int order = 0; order < 5; ++order)
          for (int64_t tokens : {2, 13}) {
            context = text("F=%d k=%d order %d T=%d %s", int(neurons), int(k), order, int(tokens), name_of(dtype));
            Layer layer = make_layer({tokens, 1, neurons}, k, dtype, false);
            layer.x.fill([](int64_t, int64_t, int64_t, int64_t) { return 1.0; });
            layer.w_in.fill([&](int64_t, int64_t, int64_t f, int64_t) -> double {
              switch (order) {
                case 0: return double(f) / 64;
                case 1: return double(neurons - f) / 64;
                case 2: return f < neurons / 2 ? double(f) / 64 : -double(f) / 64;
                case 3: return -std::ldexp(1.0, int(f % 100));  // over a huge range
                default: return double(f * 7919 % neurons) / 64;
              }
            });
            check(layer);
          }
}

void a_broken_neuron_counts_as_the_best() {
  for (DType dtype : kDtypes)
    for (double broken : {kNan, kInf, -kInf})
      for (int64_t tokens : {3, 15})
        for (bool is_gated : {false, true}) {
          context = text("%g T=%d %s%s", broken, int(tokens), name_of(dtype), is_gated ? " gated" : "");
          Layer layer = make_layer({tokens, 8, 90}, 12, dtype, is_gated);
          for (int64_t f = 5; f < 90; f += 17) layer.w_in.set(0, 0, f, f % 8, broken);
          if (is_gated) layer.w_gate.set(0, 0, 33, 2, broken);
          check(layer);
          // More of them than k: those with the lowest indices.
          for (int64_t f = 2; f < 90; f += 2)
            for (int64_t d = 0; d < 8; ++d) layer.w_in.set(0, 0, f, d, kNan);
          check(layer);
        }
}

void a_broken_token_spoils_nobody_else() {
  for (DType dtype : kDtypes)
    for (double broken : {kNan, kInf})
      for (int64_t tokens : {3, 15}) {
        context = text("%g T=%d %s", broken, int(tokens), name_of(dtype));
        Layer layer = make_layer({tokens, 8, 90}, 12, dtype, true);
        on_every_target([&] {
          const Result before = choose(layer);
          layer.x.set(0, 0, 1, 3, broken);
          const Result after = choose(layer);
          layer.x.set(0, 0, 1, 3, 1);
          for (int64_t t = 0; t < tokens; ++t)
            for (int64_t n = 0; n < 12; ++n) {
              const bool is_same = before.neurons[t * 12 + n] == after.neurons[t * 12 + n] &&
                                   before.values.get(0, 0, t, n) == after.values.get(0, 0, t, n) &&
                                   before.gates.get(0, 0, t, n) == after.gates.get(0, 0, t, n);
              if (t != 1 && !is_same) complain("token %d is another one", int(t));
              if (t == 1 && std::isfinite(after.values.get(0, 0, t, n))) complain("the token is finite");
            }
        });
      }
}

void sums_over_any_size_are_right() {
  for (int64_t size : {1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 255, 257, 400})
    for (int64_t tokens : {1, 3, 65})
      for (DType dtype : kDtypes) {
        context = text("X=%d T=%d %s", int(size), int(tokens), name_of(dtype));
        check_sums(make_entries(tokens, 33, size, 9, dtype));
      }
}

void sums_over_any_number_of_neurons_and_tokens_are_right() {
  for (int64_t neurons : {1, 2, 16, 17, 63, 64, 65, 200, 1000})
    for (int64_t tokens : {1, 2, 31, 32, 33, 63, 64, 65, 130})
      for (int64_t k : some_ks(neurons))
        for (DType dtype : {DType::float32, DType::bfloat16}) {
          if (k > 200 && tokens > 33) continue;
          context = text("F=%d T=%d k=%d %s", int(neurons), int(tokens), int(k), name_of(dtype));
          check_sums(make_entries(tokens, neurons, 10, k, dtype));
        }
}

// Rows so long that a range of neurons, or the tokens that are taken at a time, are few.
void sums_go_range_by_range() {
  for (DType dtype : kDtypes)
    for (int64_t tokens : {1, 70}) {
      context = text("T=%d %s", int(tokens), name_of(dtype));
      check_sums(make_entries(tokens, 50, 6000, 20, dtype));
    }
}

void rows_nobody_chose_are_never_read() {
  for (DType dtype : kDtypes)
    for (int64_t tokens : {1, 9}) {
      context = text("T=%d %s", int(tokens), name_of(dtype));
      Entries e = make_entries(tokens, 80, 20, 5, dtype);
      std::vector<bool> is_chosen(80);
      for (int32_t f : e.neurons) is_chosen[f] = true;
      for (int64_t f = 0; f < 80; ++f)
        for (int64_t x = 0; x < 20 && !is_chosen[f]; ++x) e.table.set(0, 0, f, x, kNan);
      check_sums(e);
      e.before = some_numbers(dtype, 80, 20);
      on_every_target([&] {
        const Sums sums = sum_tokens(e);
        for (int64_t f = 0; f < 80; ++f)
          for (int64_t x = 0; x < 20 && !is_chosen[f]; ++x)
            if (sums.out.get(0, 0, f, x) != e.before.get(0, 0, f, x)) complain("neuron %d has changed", int(f));
      });
    }
}

void tokens_are_summed_in_their_order() {
  // In float32 a 2 vanishes beside 2^25: 1 + 1 + 2^25 - 2^25 is 0, and -2^25 + 2^25 + 1 + 1 is 2.
  for (int64_t size : {1, 16, 130}) {
    context = text("X=%d", int(size));
    Entries e = make_entries(4, 3, size, 3, DType::float32);
    const double coefficients[] = {1, 1, 0x1p25, -0x1p25};
    e.coefficients.fill([&](int64_t, int64_t, int64_t t, int64_t j) { return j == 1 ? coefficients[t] : coefficients[3 - t]; });
    e.rows.fill([](int64_t, int64_t, int64_t, int64_t) { return 1.0; });
    e.before = zeros(DType::float32, {1, 1, 3, size});
    on_every_target([&] {
      const Sums sums = sum_tokens(e);
      for (int64_t x = 0; x < size; ++x) {
        if (sums.out.get(0, 0, 1, x) != 0) complain("neuron 1 is %g, should be 0", sums.out.get(0, 0, 1, x));
        if (sums.out.get(0, 0, 0, x) != 2) complain("neuron 0 is %g, should be 2", sums.out.get(0, 0, 0, x));
      }
    });
  }
}

void the_number_of_threads_changes_no_bit() {
  struct Size {
    Sizes sizes;
    int64_t k, row;
  };
  for (const Size& size : {Size{{5, 33, 300}, 40, 300}, Size{{150, 33, 300}, 40, 130}, Size{{400, 8, 1000}, 100, 17}})
    for (DType dtype : kDtypes) {
      Layer layer = make_layer(size.sizes, size.k, dtype, true);
      layer.activation = Activation::gelu;
      layer.x.fill(any_element);
      layer.w_in.fill(any_element);
      layer.w_gate.fill(any_element);
      Entries e = make_entries(size.sizes.tokens, size.sizes.neurons, size.row, size.k, dtype);
      Entries of_tokens = e;
      e.before = some_numbers(dtype, e.num_tokens(), e.size());
      of_tokens.before = some_numbers(dtype, e.num_neurons(), e.size());
      of_tokens.bias_before = some_numbers(dtype, 1, e.num_neurons());
      on_every_target([&] {
        const Result one = choose(layer);
        const Array sums = sum_neurons(e), dots = dot_neurons(e);
        const Sums token_sums = sum_tokens(of_tokens);
        for (int threads : {2, 3, 8}) {
          context = text("T=%d %s, %d threads", int(size.sizes.tokens), name_of(dtype), threads);
          num_threads = threads;
          const Result r = choose(layer);
          if (r.neurons != one.neurons) complain("neurons differ");
          if (r.values.bytes != one.values.bytes) complain("values differ");
          if (r.gates.bytes != one.gates.bytes) complain("gates differ");
          if (sum_neurons(e).bytes != sums.bytes) complain("sums over neurons differ");
          if (sum_neurons_of_transposed(e).bytes != sums.bytes) complain("sums over a transposed table differ");
          if (dot_neurons(e).bytes != dots.bytes) complain("dot products differ");
          const Sums again = sum_tokens(of_tokens);
          if (again.out.bytes != token_sums.out.bytes) complain("sums over tokens differ");
          if (again.bias.bytes != token_sums.bias.bytes) complain("sums of coefficients differ");
          num_threads = 1;
        }
      });
    }
}

void want_of_memory_is_reported() {
  constexpr int64_t huge = int64_t(1) << 50;
  const Layer layer = make_layer({3, 4, 5}, 2, DType::bfloat16, false);
  const Entries e = make_entries(3, 5, 4, 2, DType::bfloat16);
  Array out = some_numbers(DType::bfloat16, 5, 4);
  on_every_target([&] {
    topk::ChooseNeurons call = {};
    call.num_neurons = 5;
    call.k = 2;
    call.model_size = huge;
    call.dtype = layer.dtype;
    for (int64_t tokens : {3, 13}) {
      call.num_tokens = tokens;
      if (kernels->feed_forward.choose_neurons(call, parallel())) complain("choose_neurons found 2^52 bytes");
    }
    const topk::SumNeurons sum = {entries_of(e), 5, huge, e.dtype, matrix_of(e.table), out.data()};
    if (kernels->feed_forward.sum_neurons(sum, parallel())) complain("sum_neurons found 2^52 bytes");
    // A transposed table takes memory by its tokens and neurons.
    topk::SumNeurons transposed = {entries_of(e), huge, 4, e.dtype, matrix_of(e.table), out.data(), true};
    transposed.entries.num_tokens = huge;
    if (kernels->feed_forward.sum_neurons(transposed, parallel())) complain("sum_neurons found 2^53 bytes");
    const topk::DotNeurons dot = {3, 2, 5, huge, e.dtype, e.neurons.data(), matrix_of(e.rows), matrix_of(e.table), out.data()};
    if (kernels->feed_forward.dot_neurons(dot, parallel())) complain("dot_neurons found 2^52 bytes");
    const topk::SumTokens tokens = {entries_of(e), 5, huge, e.dtype, matrix_of(e.rows), out.data(), nullptr};
    if (kernels->feed_forward.sum_tokens(tokens, parallel())) complain("sum_tokens found 2^52 bytes");
  });
}

// ---------------------------------------------------------------------------------------------------------------------

}  // namespace

#define CLAIM(function) {#function, function}
const std::vector<Claim> feed_forward_claims = {
    CLAIM(every_number_of_neurons_and_every_k_is_right),
    CLAIM(every_model_size_is_right),
    CLAIM(every_number_of_tokens_is_right),
    CLAIM(biases_are_added_before_neurons_are_ranked),
    CLAIM(rows_may_lie_apart),
    CLAIM(of_tied_neurons_the_lower_index_is_kept),
    CLAIM(a_plain_layer_ranks_by_value_and_a_gated_one_by_magnitude),
    CLAIM(every_activation_keeps_the_best_to_rounding),
    CLAIM(ranks_in_any_order_are_right),
    CLAIM(a_broken_neuron_counts_as_the_best),
    CLAIM(a_broken_token_spoils_nobody_else),
    CLAIM(sums_over_any_size_are_right),
    CLAIM(sums_over_any_number_of_neurons_and_tokens_are_right),
    CLAIM(sums_go_range_by_range),
    CLAIM(rows_nobody_chose_are_never_read),
    CLAIM(tokens_are_summed_in_their_order),
    CLAIM(the_number_of_threads_changes_no_bit),
    CLAIM(want_of_memory_is_reported),
};

}  // namespace topk_test
