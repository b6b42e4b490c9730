// Tiles of scores: a few query rows against one panel of keys.

// scores[r * stride + lane] = sum over d of query[d * kTileRows + r] * keys[d * kPanel + lane], for kRows rows, always
// summed in the order of d, so that equal keys have equal scores. reached[r] gets a bit per lane that is not below
// thresholds[r].
template <class A, int kRows>
__attribute__((noinline)) void score_rows(const A* query, const A* keys, int64_t dim, const A* thresholds, A* scores,
                                          int64_t stride, uint64_t* reached) {
  Vector<A> sums[kRows][kTileVectors] = {};
  for (int64_t d = 0; d < dim; ++d) {
    Vector<A> key[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) key[v] = load(keys + v * kLanes<A>);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector<A> q = broadcast(query[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] = multiply_add<A>(q, key[v], sums[r][v]);
    }
    query += kTileRows;
    keys += kPanel<A>;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Vector<A> threshold = broadcast(thresholds[r]);
    uint64_t bits = 0;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      bits |= uint64_t(not_less(sums[r][v], threshold)) << (v * kLanes<A>);
      store(scores + r * stride + v * kLanes<A>, sums[r][v]);
    }
    reached[r] = bits;
  }
}

template <class A>
void score_tile(int64_t num_rows, const A* query, const A* keys, int64_t dim, const A* thresholds, A* scores,
                int64_t stride, uint64_t* reached) {
  if (num_rows == 1)
    score_rows<A, 1>(query, keys, dim, thresholds, scores, stride, reached);
  else if (num_rows <= 4)
    score_rows<A, 4>(query, keys, dim, thresholds, scores, stride, reached);
  else
    score_rows<A, kTileRows>(query, keys, dim, thresholds, scores, stride, reached);
}

// The additive part of scores for one batch: masks and biases of all kinds.
template <class A>
class Additive {
 public:
  Additive(const AttentionForward& call, int64_t batch) : num_queries_(call.sizes.num_queries) {
    relative_ = static_cast<const A*>(call.relative_bias);
    relative_stride_ = call.relative_bias_stride;
    const View* const views[] = {&call.bias, &call.attn_mask};
    for (const View* view : views) {
      if (view->data == nullptr) continue;
      dense_[num_dense_] = *view;
      first_[num_dense_++] = batch * view->stride[0];
      varies_with_query_ = varies_with_query_ || view->stride[2] != 0;
    }
    varies_with_query_ = varies_with_query_ || relative_ != nullptr;
    num_keys_ = call.sizes.num_keys;
  }

  bool any() const { return relative_ != nullptr || num_dense_ > 0; }
  bool varies_with_query() const { return varies_with_query_; }

  // What is added to the scores of keys first_key .. first_key + kPanel; -inf hides a key. Points into the call's own
  // array where that holds these numbers as they are, otherwise to `spare`.
  const A* panel(int64_t head, int64_t query, int64_t first_key, A* spare) const {
    const bool is_whole = first_key + kPanel<A> <= num_keys_;
    const A* const own = is_whole ? row(head, query) : nullptr;
    if (own != nullptr) return own + first_key;
    const int64_t count = smaller<int64_t>(kPanel<A>, num_keys_ - first_key);
    for (int64_t i = count; i < kPanel<A>; ++i) spare[i] = A(0);
    strided(head, query, first_key, 1, count, spare);
    return spare;
  }

  // The same of `count` keys, first_key and every `step`-th after it.
  void strided(int64_t head, int64_t query, int64_t first_key, int64_t step, int64_t count, A* to) const {
    const A* const relative = relative_row(head, query);
    for (int64_t i = 0; i < count; ++i) to[i] = relative != nullptr ? relative[first_key + i * step] : A(0);
    for (int part = 0; part < num_dense_; ++part) {
      const int64_t first = offset(part, head, query, first_key), stride = step * dense_[part].stride[3];
      switch (dense_[part].dtype) {
        case DType::float32: add(static_cast<const float*>(dense_[part].data) + first, stride, count, to); break;
        case DType::float64: add(static_cast<const double*>(dense_[part].data) + first, stride, count, to); break;
        case DType::bfloat16: add(static_cast<const BFloat16*>(dense_[part].data) + first, stride, count, to); break;
        case DType::float16: add(static_cast<const Float16*>(dense_[part].data) + first, stride, count, to); break;
        case DType::boolean: hide(static_cast<const uint8_t*>(dense_[part].data) + first, stride, count, to); break;
      }
    }
  }

  // What is added to the score of key 0, those of others behind it, where the call's own array holds these numbers; else null.
  const A* row(int64_t head, int64_t query) const {
    if (num_dense_ == 0) return relative_row(head, query);
    if (num_dense_ == 1 && relative_ == nullptr && dense_[0].stride[3] == 1 && has_type(dense_[0].dtype))
      return static_cast<const A*>(dense_[0].data) + offset(0, head, query, 0);
    return nullptr;
  }

 private:
  // The relative bias of key 0, those of others behind it; null without one.
  const A* relative_row(int64_t head, int64_t query) const {
    return relative_ == nullptr ? nullptr : relative_ + head * relative_stride_ - query + num_queries_ - 1;
  }

  static bool has_type(DType dtype) { return dtype == (sizeof(A) == 4 ? DType::float32 : DType::float64); }

  int64_t offset(int part, int64_t head, int64_t query, int64_t key) const {
    const int64_t* stride = dense_[part].stride;
    return first_[part] + head * stride[1] + query * stride[2] + key * stride[3];
  }

  // -inf stays -inf, also where inf or NaN is added to it.
  template <class T>
  static void add(const T* from, int64_t stride, int64_t count, A* to) {
    for (int64_t i = 0; i < count; ++i) {
      const A x = A(widen(from[i * stride]));
      to[i] = to[i] == -kInfinity<A> || x == -kInfinity<A> ? -kInfinity<A> : to[i] + x;
    }
  }

  static void hide(const uint8_t* visible, int64_t stride, int64_t count, A* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = visible[i * stride] ? to[i] : -kInfinity<A>;
  }

  const A* relative_ = nullptr;
  int64_t relative_stride_ = 0, num_queries_, num_keys_ = 0;
  View dense_[2];
  int64_t first_[2] = {0, 0};
  int num_dense_ = 0;
  bool varies_with_query_ = false;
};

// Add `additive` (may be null) to one row's scores of a panel and hide the lanes from `visible` on. A hidden score becomes
// -inf, also where it was NaN. Returns one bit per lane that is not below the threshold.
template <class A>
uint64_t finish_panel(A* scores, const A* additive, int64_t visible, A threshold) {
  if (additive != nullptr) {
    for (int v = 0; v < kTileVectors; ++v) {
      const Vector<A> more = load(additive + v * kLanes<A>), hidden = broadcast(-kInfinity<A>);
      const Vector<A> sum = load(scores + v * kLanes<A>) + more;
      store<A>(scores + v * kLanes<A>, more == hidden ? hidden : sum);
    }
  }
  for (int64_t i = larger<int64_t>(visible, 0); i < kPanel<A>; ++i) scores[i] = -kInfinity<A>;
  uint64_t bits = 0;
  for (int v = 0; v < kTileVectors; ++v)
    bits |= uint64_t(not_less(load(scores + v * kLanes<A>), broadcast(threshold))) << (v * kLanes<A>);
  return bits;
}
