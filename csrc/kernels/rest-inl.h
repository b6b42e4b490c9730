// Sums over the keys that each row sees, kept or not. Under causality they grow from row to row: from the last sum of the
// table on, one key is added after the other. So they do not depend on where a thread begins.

// The keys that a row sees: those before this one are not in its future.
inline int64_t num_not_in_future(const Sizes& s, bool is_causal, int64_t query) {
  if (!is_causal) return s.num_keys;
  return larger<int64_t>(smaller(query + s.num_keys - s.num_queries + 1, s.num_keys), 0);
}

// In one pass over matrix [X, Y], which need not be in the first-level cache, for kRows rows in turn: with kAdds
// matrix += a[r] [X] times b[r] [Y]; then, for the last kReads rows, to[r] [Y] = x[r] [X] times matrix, or += with kOnto.
template <class A, int kRows, bool kAdds, int kReads = kRows, bool kOnto = false>
void multiply_rows(const A* const* x, const A* const* a, const A* const* b, A* matrix, int64_t num_x, int64_t num_y,
                   A* const* to) {
  constexpr int kVectors = 2, kBlock = kVectors * kLanes<A>;
  int64_t y = 0;
  for (; y + kBlock <= num_y; y += kBlock) {
    Vector<A> sums[kRows][kVectors] = {}, columns[kRows][kVectors];
    if constexpr (kAdds)
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) columns[r][v] = load(b[r] + y + v * kLanes<A>);
    for (int64_t i = 0; i < num_x; ++i) {
      A* const place = matrix + i * num_y + y;
      Vector<A> element[kVectors];
      for (int v = 0; v < kVectors; ++v) element[v] = load(place + v * kLanes<A>);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kAdds) {
          const Vector<A> factor = broadcast(a[r][i]);
          for (int v = 0; v < kVectors; ++v) element[v] = multiply_add<A>(factor, columns[r][v], element[v]);
        }
        if (r >= kRows - kReads) {
          const Vector<A> factor = broadcast(x[r][i]);
          for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add<A>(factor, element[v], sums[r][v]);
        }
      }
      if constexpr (kAdds)
        for (int v = 0; v < kVectors; ++v) store<A>(place + v * kLanes<A>, element[v]);
    }
    for (int r = kRows - kReads; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) {
        A* const place = to[r] + y + v * kLanes<A>;
        store<A>(place, kOnto ? load(place) + sums[r][v] : sums[r][v]);
      }
  }
  for (; y < num_y; ++y) {
    if constexpr (!kOnto)
      for (int r = kRows - kReads; r < kRows; ++r) to[r][y] = 0;
    for (int64_t i = 0; i < num_x; ++i) {
      A element = matrix[i * num_y + y];
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kAdds) element += a[r][i] * b[r][y];
        if (r >= kRows - kReads) to[r][y] += x[r][i] * element;
      }
      if constexpr (kAdds) matrix[i * num_y + y] = element;
    }
  }
}

// matrix [X, Y] += the products of `count` rows a [X] with rows b [Y], of which the r-th are a_of(r) and b_of(r).
template <class A, class RowA, class RowB>
void add_products(A* matrix, int64_t num_x, int64_t num_y, int64_t count, const RowA& a_of, const RowB& b_of) {
  constexpr int kAtOnce = 4;
  const A *a[kAtOnce], *b[kAtOnce];
  for (int64_t first = 0; first < count; first += kAtOnce) {
    const int64_t rows = smaller<int64_t>(kAtOnce, count - first);
    for (int64_t r = 0; r < rows; ++r) {
      a[r] = a_of(first + r);
      b[r] = b_of(first + r);
    }
    if (rows == kAtOnce) {
      multiply_rows<A, kAtOnce, true, 0>(nullptr, a, b, matrix, num_x, num_y, nullptr);
    } else {
      for (int64_t r = 0; r < rows; ++r)
        multiply_rows<A, 1, true, 0>(nullptr, a + r, b + r, matrix, num_x, num_y, nullptr);
    }
  }
}

// For rows that follow one another: the sums of keys and of values, and row times the sum of products. A row is the scaled
// query [D], and its result [E] the sum of (query . key) * value; or, with kBackward, the gradient of the output [E], and
// its result [D] the sum of (grad_output . value) * key.
template <class T, class A, bool kBackward>
class SeenSums {
 public:
  SeenSums(const Rest& rest, const Sizes& sizes, bool is_causal)
      : rest_(rest), s_(sizes), is_causal_(is_causal), num_x_(kBackward ? sizes.value_dim : sizes.head_dim),
        num_y_(kBackward ? sizes.head_dim : sizes.value_dim) {}

  // Called within Arena::allocate.
  void take(Arena& arena, int64_t max_rows) {
    rows_ = arena.take<A>(max_rows * num_x_);
    results_ = arena.take<A>(max_rows * num_y_);
    seen_ = arena.take<Seen>(max_rows);
    if (rest_.interval == 0) return;
    keys_ = arena.take<A>(max_rows * s_.head_dim);
    values_ = arena.take<A>(max_rows * s_.value_dim);
    running_keys_ = arena.take<A>(s_.head_dim);
    running_values_ = arena.take<A>(s_.value_dim);
    running_products_ = arena.take<A>(num_x_ * num_y_);
    spare_ = arena.take<A>(kRowsAtOnce * (s_.head_dim + s_.value_dim));
  }

  // Where to write the row [X] of this place before prepare().
  A* row(int64_t place) { return rows_ + place * num_x_; }

  // The sums of `count` consecutive queries of a head, at places first_place ..
  void prepare(int64_t first_place, int64_t batch, int64_t head, int64_t first_query, int64_t count) {
    const int64_t sum_head = head / (s_.num_heads / rest_.num_sum_heads), table = batch * rest_.num_sum_heads + sum_head;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t query = first_query + i;
      Seen& seen = seen_[first_place + i];
      seen.count = num_not_in_future(s_, is_causal_, query);
      if (rest_.counts != nullptr) seen.count = rest_.counts[at(rest_.count_stride, batch, head, query)];
      seen.score_sum = 0;
      if (rest_.score_sums != nullptr)
        seen.score_sum = static_cast<const A*>(rest_.score_sums)[at(rest_.score_sum_stride, batch, head, query)];
    }
    if (rest_.interval != 0) return prepare_running(first_place, batch, sum_head, table, first_query, count);
    const bool for_all = rest_.products != nullptr;
    const A* const results = static_cast<const A*>(kBackward ? rest_.grad_keys : rest_.score_values);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t entry = table * rest_.num_sums + (for_all ? 0 : first_query + i), place = first_place + i;
      seen_[place].keys = static_cast<const A*>(rest_.key_sums) + entry * s_.head_dim;
      seen_[place].values = static_cast<const A*>(rest_.value_sums) + entry * s_.value_dim;
      seen_[place].result = results_ + place * num_y_;
      if (!for_all)
        seen_[place].result = results + ((batch * s_.num_heads + head) * s_.num_queries + first_query + i) * num_y_;
    }
    if (!for_all) return;
    // Nothing is added, so the table is only read.
    A* const products = const_cast<A*>(static_cast<const A*>(rest_.products)) + table * num_x_ * num_y_;
    for (int64_t i = 0; i < count;) i += multiply<false>(first_place + i, count - i, products);
  }

  struct Seen {
    int64_t count;       // visible keys
    A score_sum;         // of masks and biases
    const A *keys, *values, *result;
  };
  const Seen& seen(int64_t place) const { return seen_[place]; }
  bool adds_to_scores() const { return rest_.score_sums != nullptr; }

 private:
  static constexpr int kRowsAtOnce = 4;

  void prepare_running(int64_t first_place, int64_t batch, int64_t sum_head, int64_t table, int64_t first_query,
                       int64_t count) {
    const T* const keys = static_cast<const T*>(rest_.key.data) + batch * rest_.key.stride[0] + sum_head * rest_.key.stride[1];
    const T* const values =
        static_cast<const T*>(rest_.value.data) + batch * rest_.value.stride[0] + sum_head * rest_.value.stride[1];
    for (int64_t i = 0; i < count;) {
      const int64_t visible = num_not_in_future(s_, is_causal_, first_query + i), entry = visible / rest_.interval;
      const int64_t entry_of_all = table * rest_.num_sums + entry;
      if (entry_of_all != entry_ || visible < end_) load_sums(entry_of_all, entry * rest_.interval);
      while (end_ + 1 < visible) {  // before a first row
        int64_t rows = 0;
        for (; rows < kRowsAtOnce && end_ + 1 < visible; ++rows, ++end_) {
          read(keys, values, end_, rows);
          add_to_sums(rows);
        }
        add_products(
            running_products_, num_x_, num_y_, rows, [&](int64_t r) { return kBackward ? new_values_[r] : new_keys_[r]; },
            [&](int64_t r) { return kBackward ? new_keys_[r] : new_values_[r]; });
      }
      // Rows that add one key each, as long as they stay within the interval.
      int64_t run = 0;
      while (run < kRowsAtOnce && i + run < count && end_ < visible && visible + run < (entry + 1) * rest_.interval &&
             num_not_in_future(s_, is_causal_, first_query + i + run) == visible + run)
        ++run;
      if (run == 0) {
        keep_sums(first_place + i);
        i += multiply<false>(first_place + i, 1, running_products_);
        continue;
      }
      for (int64_t r = 0; r < run; ++r) {
        read(keys, values, end_, r);
        add_to_sums(r);
        keep_sums(first_place + i + r);
        ++end_;
      }
      i += multiply<true>(first_place + i, run, running_products_);
    }
  }

  void load_sums(int64_t entry, int64_t end) {
    const int64_t size = num_x_ * num_y_;
    __builtin_memcpy(running_keys_, static_cast<const A*>(rest_.key_sums) + entry * s_.head_dim, s_.head_dim * sizeof(A));
    __builtin_memcpy(running_values_, static_cast<const A*>(rest_.value_sums) + entry * s_.value_dim,
                     s_.value_dim * sizeof(A));
    __builtin_memcpy(running_products_, static_cast<const A*>(rest_.products) + entry * size, size * sizeof(A));
    entry_ = entry;
    end_ = end;
  }

  A* spare_key(int64_t r) { return spare_ + r * (s_.head_dim + s_.value_dim); }

  // The r-th key and value at hand.
  void read(const T* keys, const T* values, int64_t index, int64_t r) {
    new_keys_[r] = widened<T, A>(keys + index * rest_.key.stride[2], s_.head_dim, spare_key(r));
    new_values_[r] = widened<T, A>(values + index * rest_.value.stride[2], s_.value_dim, spare_key(r) + s_.head_dim);
  }

  void add_to_sums(int64_t r) {
    add_multiple<A>(1, new_keys_[r], running_keys_, s_.head_dim);
    add_multiple<A>(1, new_values_[r], running_values_, s_.value_dim);
  }

  void keep_sums(int64_t place) {
    A *const keys = keys_ + place * s_.head_dim, *const values = values_ + place * s_.value_dim;
    for (int64_t d = 0; d < s_.head_dim; ++d) keys[d] = running_keys_[d];
    for (int64_t e = 0; e < s_.value_dim; ++e) values[e] = running_values_[e];
    seen_[place].keys = keys;
    seen_[place].values = values;
    seen_[place].result = results_ + place * num_y_;
  }

  // Returns how many rows were done: as many as are at hand at once, otherwise one. With kAdds all `count` rows are done.
  template <bool kAdds>
  int64_t multiply(int64_t place, int64_t count, A* products) {
    const A *x[kRowsAtOnce], *const *left = kBackward ? new_values_ : new_keys_,
                             *const *right = kBackward ? new_keys_ : new_values_;
    A* to[kRowsAtOnce];
    for (int64_t r = 0; r < smaller<int64_t>(count, kRowsAtOnce); ++r) {
      x[r] = rows_ + (place + r) * num_x_;
      to[r] = results_ + (place + r) * num_y_;
    }
    if (count >= kRowsAtOnce) {
      multiply_rows<A, kRowsAtOnce, kAdds>(x, left, right, products, num_x_, num_y_, to);
      return kRowsAtOnce;
    }
    for (int64_t r = 0; r < (kAdds ? count : 1); ++r)
      multiply_rows<A, 1, kAdds>(x + r, left + r, right + r, products, num_x_, num_y_, to + r);
    return kAdds ? count : 1;
  }

  static int64_t at(const int64_t* stride, int64_t batch, int64_t head, int64_t query) {
    return batch * stride[0] + head * stride[1] + query * stride[2];
  }

  const Rest& rest_;
  const Sizes& s_;
  const bool is_causal_;
  const int64_t num_x_, num_y_;
  A *rows_ = nullptr, *results_ = nullptr, *keys_ = nullptr, *values_ = nullptr, *spare_ = nullptr;
  A *running_keys_ = nullptr, *running_values_ = nullptr, *running_products_ = nullptr;
  const A *new_keys_[kRowsAtOnce] = {}, *new_values_[kRowsAtOnce] = {};
  Seen* seen_ = nullptr;
  int64_t entry_ = -1, end_ = 0;  // the running sums: from which table entry on, and which keys they hold
};

// Of `count` scores: their sum, and the place of the smallest one, of equal ones the last.
template <class A>
inline A sum_of_scores(const A* scores, int64_t count, int64_t& smallest) {
  Vector<A> sums = {}, lowest = broadcast(kInfinity<A>);
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    const Vector<A> v = load(scores + i);
    sums += v;
    lowest = v < lowest ? v : lowest;
  }
  A sum = sum_of_lanes<A>(sums), low = lowest[0];
  for (int lane = 1; lane < kLanes<A>; ++lane) low = smaller<A>(low, lowest[lane]);
  for (; i < count; ++i) {
    sum += scores[i];
    low = smaller<A>(low, scores[i]);
  }
  // Whole vectors first: the last of them with a score that is not above the lowest.
  int64_t last = count;
  for (; last >= kLanes<A>; last -= kLanes<A>)
    if (not_less(broadcast(low), load(scores + last - kLanes<A>)) != 0) break;
  smallest = larger<int64_t>(last - 1, 0);
  while (smallest > 0 && scores[smallest] > low) --smallest;
  return sum;
}

template <class A>
inline A exponential_of(A x) {
  return exponential(broadcast(x))[0];
}

// Sums over intervals of keys: of keys, values and key times value.
template <class T, class A>
bool run_sum_keys(const SumKeys& call, const Parallel& parallel) {
  struct State {
    const SumKeys& call;
    bool ok;
  } state = {call, true};
  parallel.run(call.batch * call.num_heads * call.num_sums, &state, [](void* opaque, int64_t task) {
    State& state = *static_cast<State*>(opaque);
    const SumKeys& c = state.call;
    const int64_t table = task / c.num_sums, interval = task % c.num_sums;
    const T* const keys = static_cast<const T*>(c.key.data) + table / c.num_heads * c.key.stride[0] +
                          table % c.num_heads * c.key.stride[1] + interval * c.interval * c.key.stride[2];
    const T* const values = static_cast<const T*>(c.value.data) + table / c.num_heads * c.value.stride[0] +
                            table % c.num_heads * c.value.stride[1] + interval * c.interval * c.value.stride[2];
    A* const key_sum = static_cast<A*>(c.key_sums) + task * c.head_dim;
    A* const value_sum = static_cast<A*>(c.value_sums) + task * c.value_dim;
    A* const products = static_cast<A*>(c.products) + task * c.head_dim * c.value_dim;
    Arena arena;
    A *key_spare = nullptr, *value_spare = nullptr;
    if (!arena.allocate([&](Arena& arrays) {
          key_spare = arrays.take<A>(4 * c.head_dim);
          value_spare = arrays.take<A>(4 * c.value_dim);
        })) {
      __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t d = 0; d < c.head_dim; ++d) key_sum[d] = 0;
    for (int64_t e = 0; e < c.value_dim; ++e) value_sum[e] = 0;
    for (int64_t i = 0; i < c.head_dim * c.value_dim; ++i) products[i] = 0;
    add_products(
        products, c.head_dim, c.value_dim, c.interval,
        [&](int64_t r) {
          const A* row = widened<T, A>(keys + r * c.key.stride[2], c.head_dim, key_spare + r % 4 * c.head_dim);
          add_multiple<A>(1, row, key_sum, c.head_dim);
          return row;
        },
        [&](int64_t r) {
          const A* row = widened<T, A>(values + r * c.value.stride[2], c.value_dim, value_spare + r % 4 * c.value_dim);
          add_multiple<A>(1, row, value_sum, c.value_dim);
          return row;
        });
  });
  return state.ok;
}

// What the rest sends to all keys that a row sees, under causality. From the last interval of keys to the first, ever more
// rows see all of it: their sums come first, then each interval goes from its last key to its first.
template <class T, class A>
class SendToKeys {
 public:
  SendToKeys(const SendRest& call, A* key_totals, A* value_totals, A* products, A* turned)
      : call_(call), s_(call.sizes), key_totals_(key_totals), value_totals_(value_totals), products_(products),
        turned_(turned), num_intervals_(ceil_div(call.sizes.num_keys, call.interval)) {}

  int64_t num_tasks() const { return s_.batch * s_.num_key_heads * num_intervals_; }

  // The sums over the rows whose last key lies in the interval.
  bool sum_interval(int64_t task) {
    Space space(s_);
    if (!space.ready()) return false;
    clear(key_total(task), s_.head_dim);
    clear(value_total(task), s_.value_dim);
    clear(products(task), product_size());
    const int64_t first = task % num_intervals_ * call_.interval, last = smaller(first + call_.interval, s_.num_keys);
    for (int64_t head = 0; head < group_size(); ++head) {
      for (int64_t key = first; key < last; key += kAtOnce) {
        const int64_t count = smaller<int64_t>(kAtOnce, last - key);
        for (int64_t r = 0; r < count; ++r) read_row(space, task, head, key + r, r, key_total(task), value_total(task));
        add_products(
            products(task), s_.head_dim, s_.value_dim, count, [&](int64_t r) { return space.query[r]; },
            [&](int64_t r) { return space.grad[r]; });
      }
    }
    return true;
  }

  // From sums over the rows of each interval to sums over those of all later intervals, and the turned products.
  void sum_later(int64_t group) {
    sum_later(key_totals_, group, s_.head_dim);
    sum_later(value_totals_, group, s_.value_dim);
    sum_later(products_, group, product_size());
    for (int64_t c = 0; c < num_intervals_; ++c) {
      const A* from = products(group * num_intervals_ + c);
      A* to = turned_ + (group * num_intervals_ + c) * product_size();
      for (int64_t d = 0; d < s_.head_dim; ++d)
        for (int64_t e = 0; e < s_.value_dim; ++e) to[e * s_.head_dim + d] = from[d * s_.value_dim + e];
    }
  }

  bool send_interval(int64_t task) {
    Space space(s_);
    if (!space.ready()) return false;
    const int64_t first = task % num_intervals_ * call_.interval, last = smaller(first + call_.interval, s_.num_keys);
    // A key is seen by the rows from its own on, so these come first.
    for (int64_t key = last - 1; key >= first;) {
      if (group_size() == 1) {
        const int64_t count = smaller<int64_t>(kAtOnce, key - first + 1);
        for (int64_t r = 0; r < count; ++r) {
          read_row(space, task, 0, key - r, r, key_total(task), value_total(task));
          read_key(space, task, key - r, r);
        }
        if (count == kAtOnce)
          add_and_read<kAtOnce, kAtOnce>(space, task, 0);
        else
          for (int64_t r = 0; r < count; ++r) add_and_read<1, 1>(space, task, r);
        key -= count;
        continue;
      }
      for (int64_t head = 0; head < group_size(); head += kAtOnce) {
        const int64_t count = smaller<int64_t>(kAtOnce, group_size() - head);
        for (int64_t r = 0; r < count; ++r) read_row(space, task, head + r, key, r, key_total(task), value_total(task));
        if (head + count < group_size()) {
          add_and_read<kAtOnce, 0>(space, task, 0);
          continue;
        }
        read_key(space, task, key, count - 1);
        switch (count) {
          case 1: add_and_read<1, 1>(space, task, 0); break;
          case 2: add_and_read<2, 1>(space, task, 0); break;
          case 3: add_and_read<3, 1>(space, task, 0); break;
          default: add_and_read<4, 1>(space, task, 0);
        }
      }
      --key;
    }
    return true;
  }

 private:
  static constexpr int kAtOnce = 4;

  struct Space {
    explicit Space(const Sizes& s) {
      arena.allocate([&](Arena& arrays) {
        for (int r = 0; r < kAtOnce; ++r) {
          queries[r] = arrays.take<A>(s.head_dim);
          keys[r] = arrays.take<A>(s.head_dim);
          grads[r] = arrays.take<A>(s.value_dim);
          values[r] = arrays.take<A>(s.value_dim);
        }
        no_key = arrays.take<A>(s.head_dim);
        no_value = arrays.take<A>(s.value_dim);
      });
    }
    bool ready() const { return arena.ready(); }

    Arena arena;
    A *queries[kAtOnce], *grads[kAtOnce], *keys[kAtOnce], *values[kAtOnce];
    A *to_key[kAtOnce], *to_value[kAtOnce];  // the gradients of the keys and values at hand,
    A *no_key, *no_value;                    // or these, which nobody reads
    const A *query[kAtOnce], *grad[kAtOnce], *key[kAtOnce], *value[kAtOnce];
  };

  // Add the rows at hand to the products, and what these send to the keys and values at hand.
  template <int kRows, int kReads>
  void add_and_read(Space& space, int64_t task, int64_t first) {
    multiply_rows<A, kRows, true, kReads, true>(space.key + first, space.query + first, space.grad + first, products(task),
                                                s_.head_dim, s_.value_dim, space.to_value + first);
    multiply_rows<A, kRows, true, kReads, true>(space.value + first, space.grad + first, space.query + first,
                                                turned_ + task * product_size(), s_.value_dim, s_.head_dim,
                                                space.to_key + first);
  }

  // The key and value, whose gradients get the totals.
  void read_key(Space& space, int64_t task, int64_t key, int64_t r) {
    const int64_t group = task / num_intervals_, batch = group / s_.num_key_heads, head = group % s_.num_key_heads;
    space.key[r] = widened<T, A>(at(call_.key, batch, head, key), s_.head_dim, space.keys[r]);
    space.value[r] = widened<T, A>(at(call_.value, batch, head, key), s_.value_dim, space.values[r]);
    space.to_key[r] = space.no_key;
    space.to_value[r] = space.no_value;
    if (call_.mask != nullptr && !call_.mask[batch * call_.mask_stride[0] + key * call_.mask_stride[1]]) return;
    const int64_t row = group * s_.num_keys + key;
    if (call_.grad_key != nullptr) {
      space.to_key[r] = static_cast<A*>(call_.grad_key) + row * s_.head_dim;
      add_multiple<A>(1, key_total(task), space.to_key[r], s_.head_dim);
    }
    if (call_.grad_value != nullptr) {
      space.to_value[r] = static_cast<A*>(call_.grad_value) + row * s_.value_dim;
      add_multiple<A>(1, value_total(task), space.to_value[r], s_.value_dim);
    }
  }

  // The row of this head whose last key this is, as space.query[r], weighted, and space.grad[r]; adds to the totals. Zeros
  // where there is none, or one without a rest, whatever it holds.
  void read_row(Space& space, int64_t task, int64_t head_of_group, int64_t key, int64_t r, A* keys, A* values) {
    const int64_t group = task / num_intervals_, batch = group / s_.num_key_heads;
    const int64_t head = group % s_.num_key_heads * group_size() + head_of_group;
    const int64_t query = key - (s_.num_keys - s_.num_queries);
    A* const to_query = space.queries[r];
    space.query[r] = to_query;
    const int64_t number = (batch * s_.num_heads + head) * s_.num_queries + query;
    A weight[3] = {};
    if (query >= 0)
      for (int i = 0; i < 3; ++i) weight[i] = static_cast<const A*>(call_.weights[i])[number];
    if (weight[0] == 0 && weight[1] == 0 && weight[2] == 0) {
      clear(to_query, s_.head_dim);
      clear(space.grads[r], s_.value_dim);
      space.grad[r] = space.grads[r];
      return;
    }
    const A* const q = widened<T, A>(at(call_.query, batch, head, query), s_.head_dim, to_query);
    const A* const g = widened<T, A>(at(call_.grad_output, batch, head, query), s_.value_dim, space.grads[r]);
    space.grad[r] = g;
    const A scale = A(call_.scale);
    add_multiple<A>(weight[0] * scale, q, keys, s_.head_dim);
    add_multiple<A>(weight[1], g, values, s_.value_dim);
    for (int64_t d = 0; d < s_.head_dim; ++d) to_query[d] = q[d] * (weight[2] * scale);
  }

  void sum_later(A* sums, int64_t group, int64_t size) {
    constexpr int64_t kTogether = 64;
    for (int64_t first = 0; first < size; first += kTogether) {
      const int64_t count = smaller(kTogether, size - first);
      A* const of_group = sums + group * num_intervals_ * size + first;
      double totals[kTogether] = {};
      for (int64_t c = num_intervals_ - 1; c >= 0; --c) {
        for (int64_t i = 0; i < count; ++i) {
          const double own = of_group[c * size + i];
          of_group[c * size + i] = A(totals[i]);
          totals[i] += own;
        }
      }
    }
  }

  static void clear(A* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = 0;
  }

  static const T* at(const View& view, int64_t batch, int64_t head, int64_t row) {
    return static_cast<const T*>(view.data) + batch * view.stride[0] + head * view.stride[1] + row * view.stride[2];
  }

  int64_t group_size() const { return s_.num_heads / s_.num_key_heads; }
  int64_t product_size() const { return s_.head_dim * s_.value_dim; }
  A* key_total(int64_t task) { return key_totals_ + task * s_.head_dim; }
  A* value_total(int64_t task) { return value_totals_ + task * s_.value_dim; }
  A* products(int64_t task) { return products_ + task * product_size(); }

  const SendRest& call_;
  const Sizes& s_;
  A *key_totals_, *value_totals_, *products_, *turned_;
  const int64_t num_intervals_;
};

template <class T, class A>
bool run_send_rest(const SendRest& call, const Parallel& parallel) {
  const Sizes& s = call.sizes;
  const int64_t num_tasks = s.batch * s.num_key_heads * ceil_div(s.num_keys, call.interval);
  Arena arena;
  A *key_totals = nullptr, *value_totals = nullptr, *products = nullptr, *turned = nullptr;
  if (!arena.allocate([&](Arena& arrays) {
        key_totals = arrays.take<A>(num_tasks * s.head_dim);
        value_totals = arrays.take<A>(num_tasks * s.value_dim);
        products = arrays.take<A>(num_tasks * s.head_dim * s.value_dim);
        turned = arrays.take<A>(num_tasks * s.head_dim * s.value_dim);
      }))
    return false;
  struct State {
    SendToKeys<T, A> send;
    bool ok;
  } state = {{call, key_totals, value_totals, products, turned}, true};
  parallel.run(num_tasks, &state, [](void* opaque, int64_t task) {
    State& state = *static_cast<State*>(opaque);
    if (!state.send.sum_interval(task)) __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
  });
  parallel.run(s.batch * s.num_key_heads, &state, [](void* opaque, int64_t group) {
    static_cast<State*>(opaque)->send.sum_later(group);
  });
  if (!state.ok) return false;
  parallel.run(num_tasks, &state, [](void* opaque, int64_t task) {
    State& state = *static_cast<State*>(opaque);
    if (!state.send.send_interval(task)) __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
  });
  return state.ok;
}
