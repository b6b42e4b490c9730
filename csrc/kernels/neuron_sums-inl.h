// Sums over chosen neurons and over the tokens that chose them. The rows of a table are long (a model size), and
// several tokens need each of them. The work goes range by range, so that the rows of a range stay in the second-level
// cache.

constexpr int64_t kRangeBytes = 384 << 10;
constexpr int64_t kTokensPerTask = 64;
// Columns that are summed in registers at a time.
template <class A>
constexpr int64_t kColumns = 8 * kLanes<A>;

// Bytes of a row; at least 1, because they are a divisor and the row may be empty.
inline int64_t row_bytes(int64_t size, size_t bytes) { return larger<int64_t>(size * int64_t(bytes), 1); }

inline int64_t rows_of_range(int64_t size, size_t bytes, int64_t num_neurons) {
  return smaller(larger<int64_t>(kRangeBytes / row_bytes(size, bytes), 16), num_neurons);
}

// to[0 .. n) += sum over j of coefficients[j] * row(j)[0 .. n); row(j) returns a pointer.
template <class A, class Row>
inline void add_rows(A* to, int64_t n, const A* coefficients, int64_t count, Row row) {
  int64_t d = 0;
  for (; d + kColumns<A> <= n; d += kColumns<A>) {
    Vector<A> sums[8];
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) sums[v] = load(to + d + v * kLanes<A>);
    for (int64_t j = 0; j < count; ++j) {
      const A* from = row(j) + d;
      const Vector<A> c = broadcast(coefficients[j]);
#pragma GCC unroll 8
      for (int v = 0; v < 8; ++v) sums[v] = multiply_add<A>(c, load(from + v * kLanes<A>), sums[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) store<A>(to + d + v * kLanes<A>, sums[v]);
  }
  if (d == n) return;
  for (int64_t j = 0; j < count; ++j) add_multiple(coefficients[j], row(j) + d, to + d, n - d);
}

// Rows of the accumulation type are read in place. Other rows are converted into `spare`, kWidened at a time.
constexpr int64_t kWidened = 16;

template <class T, class A, class Row>
inline void add_rows_of(A* to, int64_t n, const A* coefficients, int64_t count, Row row, A* spare) {
  if constexpr (sizeof(T) == sizeof(A)) {
    add_rows<A>(to, n, coefficients, count, row);
  } else {
    for (int64_t first = 0; first < count; first += kWidened) {
      const int64_t num_rows = smaller(kWidened, count - first);
      for (int64_t j = 0; j < num_rows; ++j) widened<T, A>(row(first + j), n, spare + j * n);
      add_rows<A>(to, n, coefficients + first, num_rows, [&](int64_t j) { return spare + j * n; });
    }
  }
}

// For a table [X, F]: each task turns a part of the table that fits the cache, then goes through all tokens. A copy of
// the whole table would mostly cost the page faults of its memory.
template <class T, class A>
bool sum_neurons_of_transposed(const SumNeurons& call, const Parallel& parallel) {
  struct State {
    const SumNeurons& call;
    int64_t columns;
    bool ok;
  } state = {call, kColumns<A>, true};
  // With few tokens turning is all the work, and threads share it best in small parts.
  while (call.entries.num_tokens < 8 && state.columns > kLanes<A> &&
         ceil_div(call.size, state.columns) < 4 * parallel.num_threads)
    state.columns /= 2;
  parallel.run(ceil_div(call.size, state.columns), &state, [](void* opaque, int64_t task) {
    State& state = *static_cast<State*>(opaque);
    const SumNeurons& call = state.call;
    const int64_t num_tokens = call.entries.num_tokens, k = call.entries.k, stride = call.table.row_stride;
    const int64_t first_column = task * state.columns, columns = smaller(state.columns, call.size - first_column);
    const int64_t per_range = rows_of_range(columns, sizeof(A), call.num_neurons);
    Arena arena;
    A *rows = nullptr, *spare = nullptr;
    int64_t* next = nullptr;
    const bool has_memory = arena.allocate([&](Arena& arrays) {
      rows = arrays.take<A>(per_range * columns);
      spare = arrays.take<A>(sizeof(T) == sizeof(A) ? 0 : kLanes<A> * per_range);
      next = arrays.take<int64_t>(num_tokens);
    });
    if (!has_memory) {
      __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t t = 0; t < num_tokens; ++t) next[t] = 0;
    const T* const table = static_cast<const T*>(call.table.data) + first_column * stride;
    for (int64_t first = 0; first < call.num_neurons; first += per_range) {
      const int64_t num_rows = smaller(per_range, call.num_neurons - first);
      pack_columns<T, A, false>(table + first, stride, columns, columns, num_rows, A(1), rows, columns, spare);
      for (int64_t t = 0; t < num_tokens; ++t) {
        const int32_t* neurons = call.entries.neurons + t * k;
        const int64_t begin = next[t];
        int64_t j = begin;
        while (j < k && neurons[j] < first + num_rows) ++j;
        next[t] = j;
        if (j == begin) continue;
        add_rows<A>(static_cast<A*>(call.out) + t * call.size + first_column, columns,
                    static_cast<const A*>(call.entries.coefficients) + t * k + begin, j - begin,
                    [&](int64_t i) { return rows + (neurons[begin + i] - first) * columns; });
      }
    }
  });
  return state.ok;
}

template <class T, class A>
bool run_sum_neurons(const SumNeurons& call, const Parallel& parallel) {
  if (call.is_transposed) return sum_neurons_of_transposed<T, A>(call, parallel);
  struct State {
    const SumNeurons& call;
    int64_t column_parts, columns, token_tasks;
    bool ok;
  } state = {call, 1, call.size, ceil_div(call.entries.num_tokens, kTokensPerTask), true};
  if (state.token_tasks < parallel.num_threads) {  // few tokens: threads share the columns
    state.column_parts = smaller(parallel.num_threads, ceil_div<int64_t>(call.size, kColumns<A>));
    state.columns = ceil_div(ceil_div(call.size, state.column_parts), kColumns<A>) * kColumns<A>;
    state.column_parts = ceil_div(call.size, state.columns);
  }
  parallel.run(state.token_tasks * state.column_parts, &state, [](void* opaque, int64_t task) {
    State& state = *static_cast<State*>(opaque);
    const SumNeurons& call = state.call;
    const int64_t first_column = task % state.column_parts * state.columns;
    const int64_t columns = smaller(state.columns, call.size - first_column);
    const int64_t first = task / state.column_parts * kTokensPerTask;
    const int64_t num_tokens = smaller(kTokensPerTask, call.entries.num_tokens - first), k = call.entries.k;
    Arena arena;
    A* spare = nullptr;
    const auto take_arrays = [&](Arena& arrays) { spare = arrays.take<A>(kWidened * columns); };
    if (sizeof(T) != sizeof(A) && !arena.allocate(take_arrays)) {
      __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
      return;
    }
    const T* const table = static_cast<const T*>(call.table.data) + first_column;
    int64_t next[kTokensPerTask] = {};
    const int64_t per_range = num_tokens == 1 ? call.num_neurons : rows_of_range(columns, sizeof(T), call.num_neurons);
    for (int64_t end = per_range; end < call.num_neurons + per_range; end += per_range) {
      for (int64_t t = 0; t < num_tokens; ++t) {
        const int32_t* neurons = call.entries.neurons + (first + t) * k;
        const A* coefficients = static_cast<const A*>(call.entries.coefficients) + (first + t) * k;
        const int64_t begin = next[t];
        int64_t j = begin;
        while (j < k && neurons[j] < end) ++j;
        next[t] = j;
        if (j == begin) continue;
        add_rows_of<T, A>(static_cast<A*>(call.out) + (first + t) * call.size + first_column, columns,
                          coefficients + begin, j - begin,
                          [&](int64_t i) { return table + neurons[begin + i] * call.table.row_stride; }, spare);
      }
    }
  });
  return state.ok;
}

template <class T, class A>
bool run_dot_neurons(const DotNeurons& call, const Parallel& parallel) {
  struct State {
    const DotNeurons& call;
    bool ok;
  } state = {call, true};
  parallel.run(ceil_div(call.num_tokens, kTokensPerTask), &state, [](void* opaque, int64_t task) {
    State& state = *static_cast<State*>(opaque);
    const DotNeurons& call = state.call;
    const int64_t first = task * kTokensPerTask, k = call.k, n = call.size;
    const int64_t num_tokens = smaller(kTokensPerTask, call.num_tokens - first);
    Arena arena;
    A *spare = nullptr, *spare_row = nullptr;
    const bool has_memory = arena.allocate([&](Arena& arrays) {
      spare = arrays.take<A>(n);
      spare_row = arrays.take<A>(n);
    });
    if (!has_memory) {
      __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
      return;
    }
    const T *rows = static_cast<const T*>(call.rows.data), *table = static_cast<const T*>(call.table.data);
    int64_t next[kTokensPerTask] = {};
    const int64_t per_range = rows_of_range(n, sizeof(T), call.num_neurons);
    for (int64_t end = per_range; end < call.num_neurons + per_range; end += per_range) {
      for (int64_t t = 0; t < num_tokens; ++t) {
        const int32_t* neurons = call.neurons + (first + t) * k;
        A* out = static_cast<A*>(call.out) + (first + t) * k;
        int64_t j = next[t];
        if (j == k || neurons[j] >= end) continue;
        const A* row = widened<T, A>(rows + (first + t) * call.rows.row_stride, n, spare_row);
        for (; j < k && neurons[j] < end; ++j)
          out[j] = dot(row, widened<T, A>(table + neurons[j] * call.table.row_stride, n, spare), n);
        next[t] = j;
      }
    }
  });
  return state.ok;
}

// Each task owns a range of neurons and goes through all tokens, in parts whose rows stay in the cache. For each part it
// collects the range's entries neuron by neuron, then sums the entries of each neuron in registers.
template <class T, class A>
bool run_sum_tokens(const SumTokens& call, const Parallel& parallel) {
  struct State {
    const SumTokens& call;
    int64_t per_range, tokens_at_a_time;
    bool ok;
  } state = {call, 0, 0, true};
  state.per_range = larger<int64_t>(ceil_div<int64_t>(call.num_neurons, 8 * parallel.num_threads), 64);
  state.per_range = smaller(state.per_range, call.num_neurons);
  state.tokens_at_a_time = larger<int64_t>(kRangeBytes / row_bytes(call.size, sizeof(T)), 32);
  parallel.run(ceil_div(call.num_neurons, state.per_range), &state, [](void* opaque, int64_t task) {
    State& state = *static_cast<State*>(opaque);
    const SumTokens& call = state.call;
    const int64_t k = call.entries.k, n = call.size, first_neuron = task * state.per_range;
    const int64_t num_neurons = smaller(state.per_range, call.num_neurons - first_neuron);
    const int64_t most_entries = state.tokens_at_a_time * smaller(k, num_neurons);
    Arena arena;
    int64_t *starts = nullptr, *begins = nullptr;
    int32_t* tokens = nullptr;
    A *coefficients = nullptr, *spare = nullptr;
    const bool has_memory = arena.allocate([&](Arena& arrays) {
      starts = arrays.take<int64_t>(num_neurons + 1);
      begins = arrays.take<int64_t>(state.tokens_at_a_time);
      tokens = arrays.take<int32_t>(most_entries);
      coefficients = arrays.take<A>(most_entries);
      spare = arrays.take<A>(sizeof(T) == sizeof(A) ? 0 : kWidened * n);
    });
    if (!has_memory) {
      __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
      return;
    }
    const T* rows = static_cast<const T*>(call.rows.data);
    const A* all_coefficients = static_cast<const A*>(call.entries.coefficients);
    for (int64_t first = 0; first < call.entries.num_tokens; first += state.tokens_at_a_time) {
      const int64_t num_tokens = smaller(state.tokens_at_a_time, call.entries.num_tokens - first);
      // A counting sort by neuron that keeps the order of tokens.
      for (int64_t f = 0; f <= num_neurons; ++f) starts[f] = 0;
      for (int64_t t = 0; t < num_tokens; ++t) {
        const int32_t* neurons = call.entries.neurons + (first + t) * k;
        int64_t j = begins[t] = first_not_below(neurons, k, first_neuron);
        for (; j < k && neurons[j] < first_neuron + num_neurons; ++j) ++starts[neurons[j] - first_neuron + 1];
      }
      for (int64_t f = 0; f < num_neurons; ++f) starts[f + 1] += starts[f];
      for (int64_t t = 0; t < num_tokens; ++t) {
        const int32_t* neurons = call.entries.neurons + (first + t) * k;
        for (int64_t j = begins[t]; j < k && neurons[j] < first_neuron + num_neurons; ++j) {
          const int64_t to = starts[neurons[j] - first_neuron]++;
          tokens[to] = int32_t(t);
          coefficients[to] = all_coefficients[(first + t) * k + j];
        }
      }
      // starts[f] has moved to the end of neuron f, which is the beginning of f + 1.
      for (int64_t f = 0, begin = 0; f < num_neurons; ++f) {
        const int64_t count = starts[f] - begin;
        if (count > 0) {
          add_rows_of<T, A>(static_cast<A*>(call.out) + (first_neuron + f) * n, n, coefficients + begin, count,
                            [&](int64_t i) { return rows + (first + tokens[begin + i]) * call.rows.row_stride; }, spare);
          if (call.bias_out != nullptr)
            for (int64_t i = begin; i < begin + count; ++i)
              static_cast<A*>(call.bias_out)[first_neuron + f] += coefficients[i];
        }
        begin = starts[f];
      }
    }
  });
  return state.ok;
}
