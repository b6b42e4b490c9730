// Sums over the keys that a row sees, kept or not. Under causality they grow from row to row: from the last sum of the table
// on, one key is added after the other. So they do not depend on where a thread begins.

// The keys that a row sees: those before this one are not in its future.
inline int64_t num_not_in_future(const Sizes& s, bool is_causal, int64_t query) {
  if (!is_causal) return s.num_keys;
  return larger<int64_t>(smaller(query + s.num_keys - s.num_queries + 1, s.num_keys), 0);
}

template <class T, class A>
class SeenSums {
 public:
  SeenSums(const Rest& rest, const Sizes& sizes, bool is_causal) : rest_(rest), s_(sizes), is_causal_(is_causal) {}

  // Called within Arena::allocate.
  void take(Arena& arena) {
    if (!rest_.active || rest_.interval == 0) return;
    own_keys_ = arena.take<A>(s_.head_dim);
    own_values_ = arena.take<A>(s_.value_dim);
    own_products_ = arena.take<A>(s_.head_dim * s_.value_dim);
    spare_key_ = arena.take<A>(s_.head_dim);
    spare_value_ = arena.take<A>(s_.value_dim);
  }

  // Make the sums those of this row. Fast where the row follows the one before.
  void move_to(int64_t batch, int64_t head, int64_t query) {
    const int64_t visible = num_not_in_future(s_, is_causal_, query);
    const int64_t sum_head = head / (s_.num_heads / rest_.num_sum_heads), table = batch * rest_.num_sum_heads + sum_head;
    row_ = (batch * s_.num_heads + head) * s_.num_queries + query;
    count_ = visible;
    if (rest_.counts != nullptr) count_ = rest_.counts[at(rest_.count_stride, batch, head, query)];
    score_sum_ = 0;
    if (rest_.score_sums != nullptr)
      score_sum_ = static_cast<const A*>(rest_.score_sums)[at(rest_.score_sum_stride, batch, head, query)];
    const int64_t place = rest_.interval == 0 ? (rest_.num_sums == 1 ? 0 : query) : visible / rest_.interval;
    const int64_t entry = table * rest_.num_sums + place, products_size = s_.head_dim * s_.value_dim;
    const A* keys = static_cast<const A*>(rest_.key_sums) + entry * s_.head_dim;
    const A* values = static_cast<const A*>(rest_.value_sums) + entry * s_.value_dim;
    const A* products = rest_.products == nullptr ? nullptr : static_cast<const A*>(rest_.products) + entry * products_size;
    if (rest_.interval == 0) {
      keys_ = keys;
      values_ = values;
      products_ = products;
      return;
    }
    keys_ = own_keys_;
    values_ = own_values_;
    products_ = own_products_;
    if (entry != entry_ || visible < end_) {
      __builtin_memcpy(own_keys_, keys, size_t(s_.head_dim) * sizeof(A));
      __builtin_memcpy(own_values_, values, size_t(s_.value_dim) * sizeof(A));
      __builtin_memcpy(own_products_, products, size_t(products_size) * sizeof(A));
      entry_ = entry;
      end_ = place * rest_.interval;
    }
    const T* key = row_of(rest_.key, batch, sum_head);
    const T* value = row_of(rest_.value, batch, sum_head);
    for (; end_ < visible; ++end_) {
      const A* k = widened<T, A>(key + end_ * rest_.key.stride[2], s_.head_dim, spare_key_);
      const A* v = widened<T, A>(value + end_ * rest_.value.stride[2], s_.value_dim, spare_value_);
      add_multiple<A>(1, k, own_keys_, s_.head_dim);
      add_multiple<A>(1, v, own_values_, s_.value_dim);
      for (int64_t d = 0; d < s_.head_dim; ++d) add_multiple<A>(k[d], v, own_products_ + d * s_.value_dim, s_.value_dim);
    }
  }

  int64_t count() const { return count_; }
  A score_sum() const { return score_sum_; }
  bool adds_to_scores() const { return rest_.score_sums != nullptr; }
  const A* keys() const { return keys_; }      // [D]
  const A* values() const { return values_; }  // [E]

  // to[0 .. E) = sum over visible keys of (query . key) * value, for the row's scaled query
  void score_value(const A* query, A* to) const {
    if (products_ == nullptr) {
      const A* from = static_cast<const A*>(rest_.score_values) + row_ * s_.value_dim;
      for (int64_t e = 0; e < s_.value_dim; ++e) to[e] = from[e];
      return;
    }
    for (int64_t e = 0; e < s_.value_dim; ++e) to[e] = 0;
    for (int64_t d = 0; d < s_.head_dim; ++d) add_multiple<A>(query[d], products_ + d * s_.value_dim, to, s_.value_dim);
  }

  // to[0 .. D) = sum over visible keys of (grad_output . value) * key
  void grad_key(const A* grad_output, A* to) const {
    const A* from = static_cast<const A*>(rest_.grad_keys) + row_ * s_.head_dim;
    for (int64_t d = 0; d < s_.head_dim; ++d)
      to[d] = products_ == nullptr ? from[d] : dot(grad_output, products_ + d * s_.value_dim, s_.value_dim);
  }

 private:
  static int64_t at(const int64_t* stride, int64_t batch, int64_t head, int64_t query) {
    return batch * stride[0] + head * stride[1] + query * stride[2];
  }
  static const T* row_of(const View& view, int64_t batch, int64_t head) {
    return static_cast<const T*>(view.data) + batch * view.stride[0] + head * view.stride[1];
  }

  const Rest& rest_;
  const Sizes& s_;
  const bool is_causal_;
  A *own_keys_ = nullptr, *own_values_ = nullptr, *own_products_ = nullptr, *spare_key_ = nullptr, *spare_value_ = nullptr;
  const A *keys_ = nullptr, *values_ = nullptr, *products_ = nullptr;
  A score_sum_ = 0;
  int64_t count_ = 0, row_ = 0, entry_ = -1, end_ = 0;
};

template <class A>
inline A exponential_of(A x) {
  return exponential(broadcast(x))[0];
}
