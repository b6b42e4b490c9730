// Top-k attention, backward: reads only the kept keys.
//
// The rows of one head group are computed in chunks, in two phases. Phase one, parallel over rows: the gradient of each
// kept score (and of the query). Phase two, parallel over ranges of keys: each key's gradient sums its rows in ascending
// order, so the sums are the same for any number of threads. Biases are summed in the same way, over ranges of their own.
// Work that no wanted gradient needs is skipped.

constexpr int64_t kScoreGradientBytes = 2 << 20;
// Gradients of the keys and values of one range should stay in the second-level cache.
constexpr int64_t kKeyRangeBytes = 512 << 10;
constexpr int64_t kRowsPerTask = 64, kBiasRanges = 16;
// With a rest a task begins with the sums over up to an interval of keys: more rows share that.
constexpr int64_t kRowsPerTaskWithRest = 512;

// kDim is the head and value size where it is known when compiling, otherwise 0.
template <class T, class A, int kDim>
class Backward {
 public:
  explicit Backward(const AttentionBackward& call)
      : call_(call), s_(call.sizes), rows_of_group_(s_.num_heads / s_.num_key_heads * s_.num_queries) {
    for (int64_t h = 0; h < s_.num_heads; ++h) largest_k_ = larger(largest_k_, call.head_k.k[h]);
    rows_per_task_ = call.rest.active ? kRowsPerTaskWithRest : kRowsPerTask;
    chunk_rows_ = larger<int64_t>(kScoreGradientBytes / (largest_k_ * int64_t(sizeof(A))), rows_per_task_);
    chunk_rows_ = smaller(chunk_rows_, rows_of_group_);
    const int64_t key_bytes = (s_.head_dim + s_.value_dim) * int64_t(sizeof(A));
    keys_per_range_ = larger<int64_t>(kKeyRangeBytes / key_bytes, 16);
    keys_per_range_ = smaller(keys_per_range_, s_.num_keys);
  }

  int64_t num_groups() const { return s_.batch * s_.num_key_heads; }
  int64_t num_ranges() const { return ceil_div(s_.num_keys, keys_per_range_); }
  // For each kept entry of a chunk: its score's gradient, and with a rest also its bias's and the weight of its value's.
  int64_t num_score_gradients() const { return chunk_rows_ * largest_k_ * (call_.rest.active ? 3 : 1); }

  // The whole group, phase after phase. `parallel` runs the tasks of a phase.
  bool run_group(int64_t group, A* score_gradients, const Parallel& parallel) const {
    for (int64_t first = 0; first < rows_of_group_; first += chunk_rows_) {
      Chunk chunk = {this, group, first, smaller(chunk_rows_, rows_of_group_ - first), score_gradients, true};
      if (needs_score_gradients()) {
        parallel.run(ceil_div(chunk.num_rows, rows_per_task_), &chunk, [](void* opaque, int64_t task) {
          Chunk& chunk = *static_cast<Chunk*>(opaque);
          chunk.self->score_gradients(chunk, task * chunk.self->rows_per_task_);
        });
      }
      if (!chunk.ok) return false;
      if (call_.grad_key != nullptr || call_.grad_value != nullptr) {
        parallel.run(num_ranges(), &chunk, [](void* opaque, int64_t task) {
          Chunk& chunk = *static_cast<Chunk*>(opaque);
          chunk.self->key_gradients(chunk, task);
        });
      }
      if (call_.grad_relative_bias != nullptr) {
        parallel.run(kBiasRanges, &chunk, [](void* opaque, int64_t task) {
          Chunk& chunk = *static_cast<Chunk*>(opaque);
          chunk.self->relative_bias_gradients(chunk, task);
        });
      }
      if (call_.grad_bias != nullptr) {
        parallel.run(kBiasRanges, &chunk, [](void* opaque, int64_t task) {
          Chunk& chunk = *static_cast<Chunk*>(opaque);
          chunk.self->bias_gradients(chunk, task);
        });
      }
      if (!chunk.ok) return false;
    }
    return true;
  }

 private:
  struct Chunk {
    const Backward* self;
    int64_t group, first_row, num_rows;
    A* score_gradients;  // [num_rows, largest k]
    bool ok;
  };

  // One row of a chunk: where its parts are.
  struct Row {
    int64_t batch, head, query, number, count;
    const int32_t* indices;
    const A* weights;
    A* score_gradients;
    A* bias_gradients;  // the score's own where there is no rest
    A* value_weights;   // only with a rest
  };

  bool needs_score_gradients() const {
    return call_.rest.active || call_.grad_query != nullptr || call_.grad_key != nullptr || call_.grad_bias != nullptr ||
           call_.grad_relative_bias != nullptr;
  }

  int64_t head_dim() const { return kDim != 0 ? kDim : s_.head_dim; }
  int64_t value_dim() const { return kDim != 0 ? kDim : s_.value_dim; }

  Row row_of(const Chunk& chunk, int64_t r) const {
    Row row;
    const int64_t key_head = chunk.group % s_.num_key_heads;
    row.batch = chunk.group / s_.num_key_heads;
    row.head = key_head * (s_.num_heads / s_.num_key_heads) + (chunk.first_row + r) / s_.num_queries;
    row.query = (chunk.first_row + r) % s_.num_queries;
    row.number = (row.batch * s_.num_heads + row.head) * s_.num_queries + row.query;
    const int64_t k = call_.head_k.k[row.head];
    const int64_t first =
        (row.batch * call_.head_k.total_k + call_.head_k.first_k[row.head]) * s_.num_queries + row.query * k;
    row.indices = call_.indices + first;
    row.weights = static_cast<const A*>(call_.weights) + first;
    row.count = row.indices[k - 1] >= 0 ? k : num_filled(row.indices, k);
    row.score_gradients = row.bias_gradients = chunk.score_gradients + r * largest_k_;
    row.value_weights = nullptr;
    if (call_.rest.active) {
      row.bias_gradients = row.score_gradients + chunk_rows_ * largest_k_;
      row.value_weights = row.bias_gradients + chunk_rows_ * largest_k_;
    }
    return row;
  }

  static int64_t num_filled(const int32_t* indices, int64_t k) {
    int64_t count = 0;
    while (count < k && indices[count] >= 0) ++count;
    return count;
  }

  const T* at(const View& view, int64_t batch, int64_t head, int64_t row) const {
    return static_cast<const T*>(view.data) + batch * view.stride[0] + head * view.stride[1] + row * view.stride[2];
  }

  void score_gradients(Chunk& chunk, int64_t first) const {
    Arena arena;
    A *grad = nullptr, *spare = nullptr, *grad_query = nullptr;
    SeenSums<T, A, true> seen(call_.rest, s_, call_.is_causal);
    RestSpace rest = {};
    const bool has_memory = arena.allocate([&](Arena& arrays) {
      grad = arrays.take<A>(value_dim());
      spare = arrays.take<A>(larger(head_dim(), value_dim()));
      grad_query = arrays.take<A>(head_dim());
      if (!call_.rest.active) return;
      rest.query = arrays.take<A>(head_dim());
      rest.products = arrays.take<A>(largest_k_);
      rest.value_products = arrays.take<A>(largest_k_);
      seen.take(arrays, kRowsPerTask);
    });
    if (!has_memory) {
      __atomic_store_n(&chunk.ok, false, __ATOMIC_RELAXED);
      return;
    }
    constexpr int64_t kAhead = 8;
    const int64_t key_head = chunk.group % s_.num_key_heads, last = smaller(first + rows_per_task_, chunk.num_rows);
    int64_t prepared = first;  // rows before this one have their sums
    for (int64_t r = first; r < last; ++r) {
      const Row row = row_of(chunk, r);
      if (call_.rest.active && r == prepared) {
        rest.first_row = r;
        prepared = smaller(smaller(last, r + kRowsPerTask), r + s_.num_queries - row.query);
        for (int64_t i = r; i < prepared; ++i) {
          A* const to = seen.row(i - r);
          const A* const from = widened<T, A>(at(call_.grad_output, row.batch, row.head, row.query + i - r), value_dim(), to);
          for (int64_t e = 0; e < value_dim(); ++e) to[e] = from[e];
        }
        seen.prepare(0, row.batch, row.head, row.query, prepared - r);
      }
      const T* values = at(call_.value, row.batch, key_head, 0);
      const T* keys = at(call_.key, row.batch, key_head, 0);
      const A* grad_output = widened<T, A>(at(call_.grad_output, row.batch, row.head, row.query), value_dim(), grad);
      A mean = 0;
      for (int64_t j = 0; j < row.count; ++j) {
        if (j + kAhead < row.count)
          prefetch_row(values + row.indices[j + kAhead] * call_.value.stride[2], value_dim());
        const A* value = widened<T, A>(values + row.indices[j] * call_.value.stride[2], value_dim(), spare);
        row.score_gradients[j] = dot(grad_output, value, value_dim());
      }
      if (call_.rest.active)
        for (int64_t j = 0; j < row.count; ++j) rest.value_products[j] = row.score_gradients[j];
      if (call_.dropout.active) {
        const DropoutRow draw(call_.dropout, row.number);
        const A factor = A(1 / (1 - call_.dropout.p));
        for (int64_t j = 0; j < row.count; ++j)
          row.score_gradients[j] *= draw.keeps(row.indices[j]) ? factor : A(0);
      }
      // Softmax: p * (dp - sum of p * dp).
      for (int64_t j = 0; j < row.count; ++j) mean += row.weights[j] * row.score_gradients[j];
      A to_key = 0, share = 0;
      if (call_.rest.active)
        rest_gradients(row, seen.seen(r - rest.first_row), rest, keys, grad_output, mean, spare, to_key, share);
      else
        for (int64_t j = 0; j < row.count; ++j) row.score_gradients[j] = row.weights[j] * (row.score_gradients[j] - mean);
      if (call_.grad_query == nullptr) continue;
      weighted_sum_of_rows<T, A>(keys, call_.key.stride[2], row.indices, row.score_gradients, row.count, head_dim(),
                                 grad_query, spare);
      if (share != 0 || to_key != 0) {
        add_multiple<A>(to_key, seen.seen(r - rest.first_row).keys, grad_query, head_dim());
        add_multiple<A>(share, seen.seen(r - rest.first_row).result, grad_query, head_dim());
      }
      T* to = static_cast<T*>(call_.grad_query) + row.number * head_dim();
      for (int64_t d = 0; d < head_dim(); ++d) to[d] = narrow_to<T>(grad_query[d] * A(call_.scale));
    }
  }

  struct RestSpace {
    A* query;                      // [D], scaled
    A *products, *value_products;  // [k], query . key and grad_output . value of the kept keys
    int64_t first_row;             // the row of the chunk at the first place of the sums
  };

  // The gradients of a row's entries, less what the rest sends to all keys that the row sees; and what it sends. On entry
  // score_gradients hold grad_output . value after dropout, and mean their mean by weight. Sets the weights in the
  // query's gradient of the sum of keys and of that of (grad_output . value) * key.
  void rest_gradients(const Row& row, const typename SeenSums<T, A, true>::Seen& seen, const RestSpace& space,
                      const T* keys, const A* grad_output, A mean, A* spare, A& to_key, A& share) const {
    const A mass = static_cast<const A*>(call_.mass)[row.number];
    A* const sent[5] = {static_cast<A*>(call_.sent[0]), static_cast<A*>(call_.sent[1]), static_cast<A*>(call_.sent[2]),
                        static_cast<A*>(call_.sent[3]), static_cast<A*>(call_.sent[4])};
    const bool drops = call_.dropout.active;
    const DropoutRow draw(call_.dropout, row.number);
    const A factor = A(1 / (1 - call_.dropout.p));
    if (mass == 0) {
      for (int64_t j = 0; j < row.count; ++j) {
        row.score_gradients[j] = row.bias_gradients[j] = row.weights[j] * (row.score_gradients[j] - mean);
        row.value_weights[j] = row.weights[j] * (drops ? (draw.keeps(row.indices[j]) ? factor : A(0)) : A(1));
      }
      for (A* const array : sent) array[row.number] = 0;
      return;
    }
    const A* query = widened<T, A>(at(call_.query, row.batch, row.head, row.query), head_dim(), space.query);
    for (int64_t d = 0; d < head_dim(); ++d) space.query[d] = query[d] * A(call_.scale);
    A product_sum = 0, value_sum = 0, both_sum = 0;
    for (int64_t j = 0; j < row.count; ++j) {
      const A* key = widened<T, A>(keys + row.indices[j] * call_.key.stride[2], head_dim(), spare);
      space.products[j] = dot(space.query, key, head_dim());
      product_sum += space.products[j];
      value_sum += space.value_products[j];
      both_sum += space.products[j] * space.value_products[j];
    }
    const A count = A(seen.count - row.count);
    const A scale = static_cast<const A*>(call_.rest.mass_scale)[row.head], lift = A(call_.rest.lift);
    const A mean_product = (dot(space.query, seen.keys, head_dim()) - product_sum) / count;
    const A rest_value_sum = dot(grad_output, seen.values, value_dim()) - value_sum;
    const A mean_value = rest_value_sum / count;
    const A rest_both = dot(space.query, seen.result, head_dim()) - both_sum;
    const A grad_rest = ((1 - mean_product) * rest_value_sum + rest_both) / count;
    mean += scale * mass * grad_rest;
    share = scale * mass / count;
    const A grad_mass = mass * (grad_rest - mean), grad_score = scale * grad_mass;
    const A to_bias = (1 - lift) * grad_score / count;
    to_key = to_bias - share * mean_value;
    for (int64_t j = 0; j < row.count; ++j) {
      A of_bias = row.weights[j] * (row.score_gradients[j] - mean) - to_bias;
      if (j == call_.cuts[row.number]) of_bias += lift * grad_score;
      row.bias_gradients[j] = of_bias;
      row.score_gradients[j] = of_bias - share * (space.value_products[j] - mean_value);
      const A weight = row.weights[j] * (drops ? (draw.keeps(row.indices[j]) ? factor : A(0)) : A(1));
      row.value_weights[j] = weight - share * (1 + space.products[j] - mean_product);
    }
    sent[0][row.number] = to_key;
    sent[1][row.number] = share * (1 - mean_product);
    sent[2][row.number] = share;
    sent[3][row.number] = to_bias;
    sent[4][row.number] = grad_mass;
  }

  void key_gradients(Chunk& chunk, int64_t range) const {
    Arena arena;
    A *query_spare = nullptr, *grad_spare = nullptr;
    const bool has_memory = arena.allocate([&](Arena& arrays) {
      query_spare = arrays.take<A>(head_dim());
      grad_spare = arrays.take<A>(value_dim());
    });
    if (!has_memory) {
      __atomic_store_n(&chunk.ok, false, __ATOMIC_RELAXED);
      return;
    }
    A *grad_keys = static_cast<A*>(call_.grad_key), *grad_values = static_cast<A*>(call_.grad_value);
    if (grad_keys != nullptr) grad_keys += chunk.group * s_.num_keys * head_dim();
    if (grad_values != nullptr) grad_values += chunk.group * s_.num_keys * value_dim();
    const int64_t first_key = range * keys_per_range_, end_key = first_key + keys_per_range_;
    const A factor = A(1 / (1 - call_.dropout.p));
    for (int64_t r = 0; r < chunk.num_rows; ++r) {
      const Row row = row_of(chunk, r);
      int64_t j = first_not_below(row.indices, row.count, first_key);
      if (j == row.count || row.indices[j] >= end_key) continue;
      const A* query = widened<T, A>(at(call_.query, row.batch, row.head, row.query), head_dim(), query_spare);
      const A* grad = widened<T, A>(at(call_.grad_output, row.batch, row.head, row.query), value_dim(), grad_spare);
      const DropoutRow draw(call_.dropout, row.number);
      for (; j < row.count && row.indices[j] < end_key; ++j) {
        const int64_t key = row.indices[j];
        if (grad_keys != nullptr)
          add_multiple<A>(row.score_gradients[j] * A(call_.scale), query, grad_keys + key * head_dim(), head_dim());
        if (grad_values == nullptr) continue;
        A weight = row.value_weights != nullptr ? row.value_weights[j] : row.weights[j];
        if (call_.dropout.active && row.value_weights == nullptr) weight *= draw.keeps(int32_t(key)) ? factor : A(0);
        add_multiple<A>(weight, grad, grad_values + key * value_dim(), value_dim());
      }
    }
  }

  void relative_bias_gradients(Chunk& chunk, int64_t range) const {
    const int64_t positions = s_.num_queries + s_.num_keys - 1, per_range = ceil_div(positions, kBiasRanges);
    for (int64_t r = 0; r < chunk.num_rows; ++r) {
      const Row row = row_of(chunk, r);
      const int64_t shift = s_.num_queries - 1 - row.query;  // position of key 0
      const int64_t end_key = (range + 1) * per_range - shift;
      double* const of_head = call_.grad_relative_bias + row.head * call_.grad_relative_bias_stride + shift;
      int64_t j = first_not_below(row.indices, row.count, range * per_range - shift);
      for (; j < row.count && row.indices[j] < end_key; ++j) of_head[row.indices[j]] += row.bias_gradients[j];
    }
  }

  // The ranges are of queries where the bias has that axis, otherwise of keys. A bias with neither axis takes one task.
  void bias_gradients(Chunk& chunk, int64_t range) const {
    const int64_t* stride = call_.grad_bias_stride;
    const bool by_query = stride[2] != 0, by_key = !by_query && stride[3] != 0;
    if (!by_query && !by_key && range > 0) return;
    const int64_t length = by_query ? s_.num_queries : s_.num_keys;
    const int64_t per_range = by_query || by_key ? ceil_div(length, kBiasRanges) : length;
    const int64_t first = range * per_range, end = first + per_range;
    A* const grad = static_cast<A*>(call_.grad_bias);
    for (int64_t r = 0; r < chunk.num_rows; ++r) {
      const int64_t query = (chunk.first_row + r) % s_.num_queries;
      if (by_query && (query < first || query >= end)) continue;
      const Row row = row_of(chunk, r);
      A* const of_row = grad + row.batch * stride[0] + row.head * stride[1] + row.query * stride[2];
      int64_t j = by_query ? 0 : first_not_below(row.indices, row.count, first);
      for (; j < row.count && (by_query || row.indices[j] < end); ++j)
        of_row[row.indices[j] * stride[3]] += row.bias_gradients[j];
    }
  }

  const AttentionBackward& call_;
  const Sizes s_;
  const int64_t rows_of_group_;
  int64_t largest_k_ = 1, rows_per_task_, chunk_rows_, keys_per_range_;
};

inline void run_serially(int64_t num_tasks, void* state, void (*task)(void*, int64_t)) {
  for (int64_t i = 0; i < num_tasks; ++i) task(state, i);
}

// With many groups each thread takes whole groups. With few, or a bias that groups share, all threads share one group.
template <class T, class A, int kDim>
bool run_backward(const AttentionBackward& call, const Parallel& parallel) {
  const Backward<T, A, kDim> backward(call);
  const bool has_bias = call.grad_bias != nullptr || call.grad_relative_bias != nullptr;
  if (has_bias || backward.num_groups() < 4 * parallel.num_threads) {
    Arena arena;
    A* score_gradients = nullptr;
    const int64_t count = backward.num_score_gradients();
    if (!arena.allocate([&](Arena& arrays) { score_gradients = arrays.take<A>(count); })) return false;
    for (int64_t group = 0; group < backward.num_groups(); ++group)
      if (!backward.run_group(group, score_gradients, parallel)) return false;
    return true;
  }
  struct State {
    const Backward<T, A, kDim>& backward;
    int64_t next;
    bool ok;
  } state = {backward, 0, true};
  parallel.run(parallel.num_threads, &state, [](void* opaque, int64_t) {
    State& state = *static_cast<State*>(opaque);
    const auto& backward = state.backward;
    Arena arena;
    A* score_gradients = nullptr;
    const int64_t count = backward.num_score_gradients();
    bool ok = arena.allocate([&](Arena& arrays) { score_gradients = arrays.take<A>(count); });
    while (ok) {
      const int64_t group = __atomic_fetch_add(&state.next, 1, __ATOMIC_RELAXED);
      if (group >= backward.num_groups()) return;
      ok = backward.run_group(group, score_gradients, {run_serially, 1});
    }
    __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
  });
  return state.ok;
}
