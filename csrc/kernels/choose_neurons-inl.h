// The k best neurons of each token.
//
// A block of tokens is scored against one panel of neurons after another. Memory holds all pre-activations of the block,
// token by token: with a model size of several hundred, writing one costs far less than computing it.

constexpr int64_t kPreActivationBytes = 4 << 20, kMostTokensPerBlock = 192;
// With fewer tokens than this all threads together read the weights once, without packing them.
constexpr int64_t kFewTokens = 12;
constexpr int64_t kNeuronsPerTask = 64, kRowsAtOnce = 2;

template <class A>
int64_t padded_neurons(int64_t num_neurons) {
  return ceil_div<int64_t>(num_neurons, kPanel<A>) * kPanel<A> + kLanes<A>;
}

// |activation(gate) * in| of a gated layer, with what it cuts and adds; NaN stays.
template <class A>
inline Vector<A> gated_rank(const ChooseNeurons& call, Vector<A> value, Vector<A> gate) {
  const Vector<A> most = broadcast(A(call.limit));
  gate = gate > most ? most : gate;
  value = value > most ? most : value;
  value = value < -most ? -most : value;
  return absolute<A>(activate<A>(call.activation, gate) * (value + A(call.offset)));
}

// The k best of a token's neurons, from its pre-activations; `spare` holds as many.
template <class A>
void choose_neurons_of_token(const ChooseNeurons& call, int64_t token, A* in, A* gate, A* spare) {
  const int64_t n = call.num_neurons, k = call.k;
  const A *b_in = static_cast<const A*>(call.b_in), *b_gate = static_cast<const A*>(call.b_gate);
  for (int64_t i = 0; b_in != nullptr && i < n; ++i) in[i] += b_in[i];
  for (int64_t i = 0; b_gate != nullptr && i < n; ++i) gate[i] += b_gate[i];
  const int64_t padded = ceil_div<int64_t>(n, kLanes<A>) * kLanes<A>;
  // NaN counts as the best of all.
  const Vector<A> best = broadcast(kInfinity<A>);
  for (int64_t i = 0; i < padded; i += kLanes<A>) {
    const Vector<A> value = load(in + i);
    const Vector<A> rank = gate == nullptr ? value : gated_rank<A>(call, value, load(gate + i));
    store<A>(spare + i, rank != rank ? best : rank);
  }
  Vector<A> lowest = broadcast(kInfinity<A>);
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) {
    const Vector<A> v = load(spare + i);
    lowest = v < lowest ? v : lowest;
  }
  A low = lowest[0];
  for (int lane = 1; lane < kLanes<A>; ++lane) low = smaller<A>(low, lowest[lane]);
  for (; i < n; ++i) low = smaller(low, spare[i]);

  const Cut<A> cut = find_cut(spare, n, k, k, low, n);
  int64_t num_equal_left = k;
  if (cut.count > k)  // too many are equal to the worst
    for (i = 0; i < n; ++i) num_equal_left -= spare[i] > cut.at;
  int32_t* neurons = call.neurons + token * k;
  A* values = static_cast<A*>(call.values) + token * k;
  A* gates = gate == nullptr ? nullptr : static_cast<A*>(call.gates) + token * k;
  const Vector<A> bound = broadcast(cut.at);
  int64_t to = 0;
  for (i = 0; i < n; i += kLanes<A>) {
    uint32_t bits = not_less(load(spare + i), bound);
    if (n - i < kLanes<A>) bits &= (1u << (n - i)) - 1;
    for (; bits != 0; bits &= bits - 1) {
      const int64_t neuron = i + __builtin_ctz(bits);
      if (cut.count > k && !(spare[neuron] > cut.at) && num_equal_left-- <= 0) continue;
      neurons[to] = int32_t(neuron);
      values[to] = in[neuron];
      if (gates != nullptr) gates[to] = gate[neuron];
      ++to;
    }
  }
}

// out[t * stride + r] = rows[r] . x[t] for a few rows and tokens at once, which share each other's loads.
template <class A, int kRows, int kTokens>
inline void dots(const A* const* rows, const A* x, int64_t dim, A* out, int64_t stride) {
  Vector<A> sums[kRows][kTokens] = {};
  int64_t d = 0;
  for (; d + kLanes<A> <= dim; d += kLanes<A>) {
    Vector<A> row[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) row[r] = load(rows[r] + d);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const Vector<A> token = load(x + t * dim + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r][t] = multiply_add<A>(row[r], token, sums[r][t]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      A sum = sum_of_lanes<A>(sums[r][t]);
      for (int64_t i = d; i < dim; ++i) sum += rows[r][i] * x[t * dim + i];
      out[t * stride + r] = sum;
    }
  }
}

// A few rows with all tokens. Each product is summed in the same order whichever rows and tokens it is computed with.
template <class A, int kRows>
inline void dots_of_rows(const A* const* rows, const A* x, int64_t num_tokens, int64_t dim, A* out, int64_t stride) {
  int64_t t = 0;
  for (; t + 4 <= num_tokens; t += 4) dots<A, kRows, 4>(rows, x + t * dim, dim, out + t * stride, stride);
  for (; t < num_tokens; ++t) dots<A, kRows, 1>(rows, x + t * dim, dim, out + t * stride, stride);
}

template <class T, class A>
class NeuronChoice {
 public:
  NeuronChoice(const ChooseNeurons& call, int64_t max_tokens) : call_(call), stride_(padded_neurons<A>(call.num_neurons)) {
    const int64_t tiles = ceil_div<int64_t>(max_tokens, kTileRows);
    arena_.allocate([&](Arena& arena) {
      x_ = arena.take<A>(tiles * kTileRows * call.model_size);
      panel_ = arena.take<A>(kPanel<A> * call.model_size);
      spare_rows_ = arena.take<A>(kLanes<A> * call.model_size);
      in_ = arena.take<A>(tiles * kTileRows * stride_);
      gate_ = call.w_gate.data == nullptr ? nullptr : arena.take<A>(tiles * kTileRows * stride_);
      spare_ = arena.take<A>(stride_);
    });
  }

  bool ready() const { return arena_.ready(); }

  void run(int64_t first_token, int64_t num_tokens) {
    const int64_t tiles = ceil_div<int64_t>(num_tokens, kTileRows);
    const T* x = static_cast<const T*>(call_.x.data);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * kTileRows;
      pack_columns<T, A, false>(x + (first_token + first) * call_.x.row_stride, call_.x.row_stride, num_tokens - first,
                         kTileRows, call_.model_size, A(1), x_ + first * call_.model_size, kTileRows, spare_rows_);
    }
    score(call_.w_in, num_tokens, in_);
    if (gate_ != nullptr) score(call_.w_gate, num_tokens, gate_);
    for (int64_t t = 0; t < num_tokens; ++t)
      choose_neurons_of_token<A>(call_, first_token + t, in_ + t * stride_,
                                 gate_ == nullptr ? nullptr : gate_ + t * stride_, spare_);
  }

 private:
  void score(const Matrix& weights, int64_t num_tokens, A* to) {
    const A no_threshold[kTileRows] = {};
    uint64_t reached[kTileRows];
    const T* rows = static_cast<const T*>(weights.data);
    for (int64_t first = 0; first < call_.num_neurons; first += kPanel<A>) {
      pack_columns<T, A, false>(rows + first * weights.row_stride, weights.row_stride, call_.num_neurons - first, kPanel<A>,
                         call_.model_size, A(1), panel_, kPanel<A>, spare_rows_);
      for (int64_t t = 0; t < num_tokens; t += kTileRows)
        score_tile(smaller<int64_t>(kTileRows, num_tokens - t), x_ + t * call_.model_size, panel_, call_.model_size,
                   no_threshold, to + t * stride_ + first, stride_, reached);
    }
  }

  const ChooseNeurons& call_;
  const int64_t stride_;
  Arena arena_;
  A *x_ = nullptr, *panel_ = nullptr, *spare_rows_ = nullptr, *in_ = nullptr, *gate_ = nullptr, *spare_ = nullptr;
};

// A few tokens: threads share the neurons. Almost all time goes into reading the weights.
template <class T, class A>
bool choose_neurons_of_few(const ChooseNeurons& call, const Parallel& parallel) {
  struct State {
    const ChooseNeurons& call;
    int64_t stride;
    A *x, *in, *gate, *spare;
    bool ok;
  } state = {call, padded_neurons<A>(call.num_neurons), nullptr, nullptr, nullptr, nullptr, true};
  const bool has_gate = call.w_gate.data != nullptr;
  Arena arena;
  const bool has_memory = arena.allocate([&](Arena& arrays) {
    state.x = arrays.take<A>(call.num_tokens * call.model_size);
    state.in = arrays.take<A>(call.num_tokens * state.stride);
    state.gate = has_gate ? arrays.take<A>(call.num_tokens * state.stride) : nullptr;
    state.spare = arrays.take<A>(call.num_tokens * state.stride);
  });
  if (!has_memory) return false;
  for (int64_t t = 0; t < call.num_tokens; ++t)
    for (int64_t d = 0; d < call.model_size; ++d)
      state.x[t * call.model_size + d] = A(widen(static_cast<const T*>(call.x.data)[t * call.x.row_stride + d]));
  parallel.run(ceil_div(call.num_neurons, kNeuronsPerTask), &state, [](void* opaque, int64_t task) {
    State& state = *static_cast<State*>(opaque);
    const ChooseNeurons& call = state.call;
    Arena arena;
    A* spare = nullptr;
    if (!arena.allocate([&](Arena& arrays) { spare = arrays.take<A>(kRowsAtOnce * call.model_size); })) {
      __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
      return;
    }
    const int64_t first = task * kNeuronsPerTask, last = smaller(first + kNeuronsPerTask, call.num_neurons);
    const Matrix* const weights[] = {&call.w_in, &call.w_gate};
    A* const to[] = {state.in, state.gate};
    for (int part = 0; part < (state.gate == nullptr ? 1 : 2); ++part) {
      const T* const table = static_cast<const T*>(weights[part]->data);
      const int64_t stride = weights[part]->row_stride;
      int64_t f = first;
      for (; f < last; f += kRowsAtOnce) {
        const int64_t num_rows = smaller(kRowsAtOnce, last - f);
        const A* rows[kRowsAtOnce];
        for (int64_t r = 0; r < num_rows; ++r)
          rows[r] = widened<T, A>(table + (f + r) * stride, call.model_size, spare + r * call.model_size);
        A* const out = to[part] + f;
        if (num_rows == kRowsAtOnce) {
          dots_of_rows<A, kRowsAtOnce>(rows, state.x, call.num_tokens, call.model_size, out, state.stride);
        } else {
          for (int64_t r = 0; r < num_rows; ++r)
            dots_of_rows<A, 1>(rows + r, state.x, call.num_tokens, call.model_size, out + r, state.stride);
        }
      }
    }
  });
  if (!state.ok) return false;
  parallel.run(call.num_tokens, &state, [](void* opaque, int64_t t) {
    State& state = *static_cast<State*>(opaque);
    choose_neurons_of_token<A>(state.call, t, state.in + t * state.stride,
                               state.gate == nullptr ? nullptr : state.gate + t * state.stride,
                               state.spare + t * state.stride);
  });
  return true;
}

template <class T, class A>
bool run_choose_neurons(const ChooseNeurons& call, const Parallel& parallel) {
  if (call.num_tokens < kFewTokens) return choose_neurons_of_few<T, A>(call, parallel);
  const int64_t num_tables = call.w_gate.data == nullptr ? 1 : 2;
  const int64_t token_bytes = padded_neurons<A>(call.num_neurons) * int64_t(sizeof(A)) * num_tables;
  int64_t block = smaller<int64_t>(kPreActivationBytes / token_bytes, kMostTokensPerBlock);
  block = larger<int64_t>(block, 4 * kTileRows);
  block = smaller(block, ceil_div(call.num_tokens, parallel.num_threads));
  block = ceil_div<int64_t>(block, kTileRows) * kTileRows;
  struct State {
    const ChooseNeurons& call;
    int64_t block, num_blocks, next;
    bool ok;
  } state = {call, block, ceil_div(call.num_tokens, block), 0, true};
  parallel.run(smaller(parallel.num_threads, state.num_blocks), &state, [](void* opaque, int64_t) {
    State& state = *static_cast<State*>(opaque);
    NeuronChoice<T, A> worker(state.call, state.block);
    if (!worker.ready()) {
      __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
      return;
    }
    for (;;) {
      const int64_t n = __atomic_fetch_add(&state.next, 1, __ATOMIC_RELAXED);
      if (n >= state.num_blocks) return;
      worker.run(n * state.block, smaller(state.block, state.call.num_tokens - n * state.block));
    }
  });
  return state.ok;
}
