// Top-k attention, forward: scores, selection, softmax and the weighted sum of values, block of rows by block of rows.
//
// How a block of rows finds its k best keys (exact for all data; only the speed depends on the guess):
//   1. Score a sample of key panels that are spread over all keys the block may see. It gives each row a threshold that
//      more than k keys almost certainly reach: the rank that k has in the sample, plus a margin.
//   2. Score all other panels. Compare each score while it is in a register, and store only what reaches the threshold.
//      A row whose store is full keeps its k best and raises its threshold to the worst of them.
//   3. Take the k best of what was stored. If fewer than k keys reached a guessed threshold, compute the row again
//      with a lower one, at last without.

// Rows of one head group that are worked on together.
struct RowBlock {
  int64_t batch, key_head, first_row, num_rows;
};

// Bytes for a thread's stored candidates and packed keys, so that they stay in the second-level cache.
constexpr int64_t kCandidateBytes = 640 << 10, kPackedKeyBytes = 384 << 10;
constexpr int64_t kManyKeys = 16384;
// Below this many visible keys the sample is all of them.
constexpr int64_t kSampleAll = 512, kSmallestSample = 256;

inline int64_t largest_k_of(const HeadK& head_k, int64_t num_heads) {
  int64_t largest_k = 1;
  for (int64_t h = 0; h < num_heads; ++h) largest_k = larger(largest_k, head_k.k[h]);
  return largest_k;
}

inline int64_t capacity_for(int64_t k, int64_t num_keys) { return smaller(3 * k + 128, num_keys); }

template <class A>
int64_t slots_for(int64_t k, int64_t num_keys) {
  return capacity_for(k, num_keys) + kPanel<A> + kLanes<A>;  // a whole panel may come in when it is nearly full
}

template <class A>
int64_t rows_per_block(const Sizes& sizes, int64_t largest_k, int64_t num_threads, int64_t bytes) {
  const int64_t total = sizes.batch * sizes.num_heads * sizes.num_queries;
  const int64_t row_bytes = slots_for<A>(largest_k, sizes.num_keys) * int64_t(sizeof(A) + sizeof(int32_t));
  const int64_t that_fit = larger<int64_t>(bytes / row_bytes, 8 * kTileRows);
  const int64_t for_balance = larger<int64_t>(ceil_div(total, 4 * num_threads), 4 * kTileRows);
  return ceil_div<int64_t>(smaller(that_fit, for_balance), kTileRows) * kTileRows;
}

template <class T, class A>
class Forward {
 public:
  struct Shared {};  // what all workers of a call read: nothing here

  Forward(const AttentionForward& call, int64_t max_rows, const Shared* = nullptr)
      : call_(call), s_(call.sizes), seen_(call.rest, s_, call.is_causal) {
    largest_k_ = largest_k_of(call.head_k, s_.num_heads);
    capacity_ = capacity_for(largest_k_, s_.num_keys);
    slots_ = slots_for<A>(largest_k_, s_.num_keys);
    const int64_t all_panels = ceil_div<int64_t>(s_.num_keys, kPanel<A>);
    key_panels_ = kPackedKeyBytes / (s_.head_dim * int64_t(sizeof(A)) * kPanel<A>);
    key_panels_ = larger<int64_t>(key_panels_, ceil_div<int64_t>(kSampleAll, kPanel<A>));
    key_panels_ = smaller(key_panels_, all_panels);
    const int64_t tiles = ceil_div<int64_t>(max_rows, kTileRows);
    arena_.allocate([&](Arena& arena) {
      query_ = arena.take<A>(tiles * kTileRows * s_.head_dim);
      keys_ = arena.take<A>(key_panels_ * kPanel<A> * s_.head_dim);
      scores_ = arena.take<A>(kTileRows * key_panels_ * kPanel<A>);
      additive_ = arena.take<A>(kPanel<A>);
      thresholds_ = arena.take<A>(tiles * kTileRows);
      rows_ = arena.take<Row>(max_rows);
      candidate_scores_ = arena.take<A>(max_rows * slots_);
      candidate_indices_ = arena.take<int32_t>(max_rows * slots_);
      spare_scores_ = arena.take<A>(slots_);
      spare_indices_ = arena.take<int32_t>(slots_);
      weights_ = arena.take<A>(slots_);
      sums_ = arena.take<A>(s_.value_dim);
      spare_row_ = arena.take<A>(s_.value_dim);
      spare_rows_ = arena.take<A>(kLanes<A> * s_.head_dim);
      if (call.rest.active) {
        products_ = arena.take<A>(slots_);
        spare_key_ = arena.take<A>(s_.head_dim);
        seen_.take(arena, max_rows);
      }
      panels_ = arena.take<int32_t>(all_panels);
      sampled_ = arena.take<int32_t>(all_panels);
    });
  }

  bool ready() const { return arena_.ready(); }

  // What the candidates of a block may take. Every block packs all keys again. With many keys larger blocks are faster,
  // although their candidates leave the cache.
  static int64_t candidate_bytes(int64_t num_keys) { return num_keys > kManyKeys ? 2 * kCandidateBytes : kCandidateBytes; }

  void run(const RowBlock& block) {
    start(block);
    score_block();
  }

 protected:
  struct Row {
    int64_t head, query, k;
    int64_t visible;  // keys before this one are not in the row's future
    int64_t number;   // in the block
    bool is_guess;
    Candidates<A> found;
  };

  // Scores all keys.
  void score_block() {
    pack_queries();
    const int64_t num_panels = ceil_div<int64_t>(most_visible_, kPanel<A>);
    const int64_t num_sampled = choose_sample(num_panels);
    visit_sample(num_sampled);
    visit(num_panels - num_sampled);
    if (call_.rest.active) prepare_rest();
    int64_t num_left = finish_found();
    if (num_left == 0) return;
    for (int64_t p = 0; p < num_panels; ++p) panels_[p] = int32_t(p);
    for (int64_t tries = 0; num_left > 0; ++tries) {
      block_.num_rows = num_left;
      for (int64_t r = 0; r < num_left; ++r) {
        thresholds_[r] = lower_guess(r, tries == 2);
        Candidates<A>& found = rows_[r].found;
        found = {found.scores, found.indices, 0, 0, thresholds_[r]};
      }
      pack_queries();
      visit(num_panels);
      num_left = finish_found();
    }
  }

  // Finish the rows that found their keys. The others move together, so that they share tiles; returns how many they are.
  int64_t finish_found() {
    int64_t num_left = 0;
    for (int64_t r = 0; r < block_.num_rows; ++r) {
      const Row& row = rows_[r];
      if (!row.is_guess || row.found.count >= row.k)
        finish(r);
      else
        rows_[num_left++] = row;
    }
    return num_left;
  }

  // The next guess of a row that found too few keys, half as far again below the best score as the one before, or what all
  // keys reach. Without any a row would store and cut most of its keys.
  A lower_guess(int64_t r, bool takes_all) {
    Row& row = rows_[r];
    A best = row.found.threshold;
    for (int64_t i = 0; i < row.found.count; ++i) best = larger(best, row.found.scores[i]);
    const A lower = best - A(1.5) * (best - row.found.threshold);
    row.is_guess = !takes_all && lower < row.found.threshold && lower > -Types<A>::largest;
    return row.is_guess ? lower : -Types<A>::largest;
  }

  void start(const RowBlock& block) {
    block_ = block;
    additive_part_ = Additive<A>(call_, block.batch);
    const int64_t heads_per_key_head = s_.num_heads / s_.num_key_heads;
    most_visible_ = 0;
    for (int64_t r = 0; r < block.num_rows; ++r) {
      Row& row = rows_[r];
      row.head = block.key_head * heads_per_key_head + (block.first_row + r) / s_.num_queries;
      row.query = (block.first_row + r) % s_.num_queries;
      row.k = call_.head_k.k[row.head];
      row.visible = num_not_in_future(s_, call_.is_causal, row.query);
      most_visible_ = larger(most_visible_, row.visible);
      row.number = r;
      row.is_guess = false;
      thresholds_[r] = -Types<A>::largest;  // -inf, a hidden key, never reaches it
      row.found = {candidate_scores_ + r * slots_, candidate_indices_ + r * slots_, 0, 0, thresholds_[r]};
    }
  }

  const T* query_row(int64_t r) const {
    const Row& row = rows_[r];
    return static_cast<const T*>(call_.query.data) + block_.batch * call_.query.stride[0] +
           row.head * call_.query.stride[1] + row.query * call_.query.stride[2];
  }

  const T* keys_of_block() const {
    return static_cast<const T*>(call_.key.data) + block_.batch * call_.key.stride[0] + block_.key_head * call_.key.stride[1];
  }

  void pack_queries() {
    for (int64_t r = 0; r < block_.num_rows; ++r)
      pack_columns<T, A, true>(query_row(r), 0, 1, 1, s_.head_dim, A(call_.scale), query_of(r / kTileRows) + r % kTileRows,
                               kTileRows, spare_rows_);
    for (int64_t r = block_.num_rows; r % kTileRows != 0; ++r) {
      thresholds_[r] = kInfinity<A>;
      A* column = query_of(r / kTileRows) + r % kTileRows;
      for (int64_t d = 0; d < s_.head_dim; ++d) column[d * kTileRows] = 0;
    }
  }

  A* query_of(int64_t tile) { return query_ + tile * kTileRows * s_.head_dim; }

  // Fills sampled_ with the panels of the sample and panels_ with all others, both ascending.
  int64_t choose_sample(int64_t num_panels) {
    int64_t num_sampled = num_panels;
    if (most_visible_ > kSampleAll) {
      const int64_t wanted = larger<int64_t>(kSmallestSample, most_visible_ / 8);
      num_sampled = smaller(key_panels_, ceil_div<int64_t>(wanted, kPanel<A>));
    }
    int64_t others = 0;
    for (int64_t p = 0, next = 0; p < num_panels; ++p) {
      if (next < num_sampled && p == (2 * next + 1) * num_panels / (2 * num_sampled))
        sampled_[next++] = int32_t(p);
      else
        panels_[others++] = int32_t(p);
    }
    return num_sampled;
  }

  void pack(const int32_t* panels, int64_t count) {
    const T* keys = keys_of_block();
    for (int64_t p = 0; p < count; ++p) {
      const int64_t first = int64_t(panels[p]) * kPanel<A>;
      if (p + 1 < count) {
        const int64_t next = int64_t(panels[p + 1]) * kPanel<A>;
        for (int64_t r = next; r < smaller(next + kPanel<A>, s_.num_keys); ++r)
          prefetch_row(keys + r * call_.key.stride[2], s_.head_dim);
      }
      pack_columns<T, A, true>(keys + first * call_.key.stride[2], call_.key.stride[2], s_.num_keys - first, kPanel<A>,
                         s_.head_dim, A(1), keys_ + p * kPanel<A> * s_.head_dim, kPanel<A>, spare_rows_);
    }
  }

  int64_t num_tiles() const { return ceil_div<int64_t>(block_.num_rows, kTileRows); }
  int64_t rows_of(int64_t tile) const { return smaller<int64_t>(kTileRows, block_.num_rows - tile * kTileRows); }

  // The largest and the smallest number of keys that a row of the tile may see.
  int64_t most_visible_of(int64_t tile) const {
    int64_t most = 0;
    for (int64_t r = 0; r < rows_of(tile); ++r) most = larger(most, rows_[tile * kTileRows + r].visible);
    return most;
  }
  int64_t least_visible_of(int64_t tile) const {
    int64_t least = s_.num_keys;
    for (int64_t r = 0; r < rows_of(tile); ++r) least = smaller(least, rows_[tile * kTileRows + r].visible);
    return least;
  }

  // Add biases, hide what is hidden, and compare again.
  void finish_tile(int64_t tile, int64_t first_key, A* scores, int64_t stride, uint64_t* reached) {
    const A* additive = nullptr;
    for (int64_t r = 0; r < rows_of(tile); ++r) {
      const Row& row = rows_[tile * kTileRows + r];
      const bool same = r > 0 && !additive_part_.varies_with_query() && rows_[tile * kTileRows + r - 1].head == row.head;
      if (additive_part_.any() && !same)
        additive = additive_part_.panel(row.head, row.query, first_key, additive_);
      reached[r] = finish_panel(scores + r * stride, additive, row.visible - first_key, thresholds_[tile * kTileRows + r]);
    }
  }

  void visit_sample(int64_t num_sampled) {
    pack(sampled_, num_sampled);
    const int64_t stride = num_sampled * kPanel<A>;
    uint64_t reached[kTileRows];
    for (int64_t tile = 0; tile < num_tiles(); ++tile) {
      const int64_t least_visible = least_visible_of(tile);
      for (int64_t p = 0; p < num_sampled; ++p) {
        const int64_t first_key = int64_t(sampled_[p]) * kPanel<A>;
        A* scores = scores_ + p * kPanel<A>;
        score_tile(rows_of(tile), query_of(tile), keys_ + p * kPanel<A> * s_.head_dim, s_.head_dim,
                   thresholds_ + tile * kTileRows, scores, stride, reached);
        if (additive_part_.any() || first_key + kPanel<A> > least_visible)
          finish_tile(tile, first_key, scores, stride, reached);
      }
      for (int64_t r = 0; r < rows_of(tile); ++r) {
        guess_threshold(tile * kTileRows + r, scores_ + r * stride, num_sampled);
        Row& row = rows_[tile * kTileRows + r];
        for (int64_t p = 0; p < num_sampled; ++p)
          take(tile * kTileRows + r, scores_ + r * stride + p * kPanel<A>, int64_t(sampled_[p]) * kPanel<A>);
        row.found.second_run = row.found.count;
      }
    }
  }

  // Set the threshold to a score that, judging by the sample, a few more than k keys reach. Where the sample holds all
  // keys that the row sees, exactly k reach it.
  void guess_threshold(int64_t r, const A* scores, int64_t num_sampled) {
    Row& row = rows_[r];
    int64_t seen = 0;
    for (int64_t p = 0; p < num_sampled; ++p)
      seen += smaller<int64_t>(kPanel<A>, larger<int64_t>(0, row.visible - int64_t(sampled_[p]) * kPanel<A>));
    if (seen == 0) return;
    const int64_t n = num_sampled * kPanel<A>;
    const Eligible<A> eligible = eligible_among(scores, n);
    int64_t rank = row.k, most = row.k;
    if (seen < row.visible) {
      const double expected = double(row.k) * double(seen) / double(row.visible);
      rank = int64_t(expected + 3.3 * __builtin_sqrt(expected) + 2);
      most = rank + rank / 8;
    }
    if (eligible.count <= rank) return;
    thresholds_[r] = row.found.threshold = find_cut(scores, n, rank, most, eligible.lowest, eligible.count).at;
    row.is_guess = seen < row.visible;
  }

  // Score panels_[0 .. count) and take what reaches the thresholds.
  void visit(int64_t count) {
    uint64_t reached[kTileRows];
    A* const scores = scores_;
    for (int64_t first = 0; first < count; first += key_panels_) {
      const int64_t in_block = smaller(key_panels_, count - first);
      pack(panels_ + first, in_block);
      for (int64_t tile = 0; tile < num_tiles(); ++tile) {
        const int64_t most_visible = most_visible_of(tile), least_visible = least_visible_of(tile);
        for (int64_t p = 0; p < in_block; ++p) {
          const int64_t first_key = int64_t(panels_[first + p]) * kPanel<A>;
          if (first_key >= most_visible) break;
          score_tile(rows_of(tile), query_of(tile), keys_ + p * kPanel<A> * s_.head_dim, s_.head_dim,
                     thresholds_ + tile * kTileRows, scores, kPanel<A>, reached);
          if (additive_part_.any() || first_key + kPanel<A> > least_visible)
            finish_tile(tile, first_key, scores, kPanel<A>, reached);
          take_reached(tile, scores, first_key, reached);
        }
      }
    }
  }

  // Store the scores of a panel whose bits are set. Most rows have none. A loop over the set of rows that have some costs
  // one mispredicted branch for the tile; a branch for each row would cost one for each row.
  void take_reached(int64_t tile, const A* scores, int64_t first_key, const uint64_t* reached) {
    uint32_t rows_left = 0;
    const int64_t num_rows = rows_of(tile);
    for (int64_t r = 0; r < num_rows; ++r) rows_left |= uint32_t(reached[r] != 0) << r;
    for (; rows_left != 0; rows_left &= rows_left - 1) {
      const int r = __builtin_ctz(rows_left);
      Candidates<A>& found = rows_[tile * kTileRows + r].found;
      uint64_t bits = reached[r];
      int64_t count = found.count;
      do {
        const int lane = __builtin_ctzll(bits);
        found.scores[count] = scores[r * kPanel<A> + lane];
        found.indices[count++] = int32_t(first_key) + lane;
        bits &= bits - 1;
      } while (bits != 0);
      found.count = count;
      if (count > capacity_) make_room(tile * kTileRows + r);
    }
  }

  void make_room(int64_t r) {
    Row& row = rows_[r];
    keep_best(row.found, row.k, spare_scores_, spare_indices_, fall_);
    thresholds_[r] = row.found.threshold;
    row.is_guess = false;  // k keys reached it
  }

  // Store those of a panel's scores that reach the row's threshold.
  void take(int64_t r, const A* scores, int64_t first_key) {
    Candidates<A>& found = rows_[r].found;
    const Vector<A> threshold = broadcast(thresholds_[r]);
    for (int v = 0; v < kTileVectors; ++v) {
      const uint32_t lanes = not_less(load(scores + v * kLanes<A>), threshold);
      found.count += append_lanes(scores + v * kLanes<A>, int32_t(first_key + v * kLanes<A>), lanes,
                                  found.scores + found.count, found.indices + found.count);
    }
    if (found.count > capacity_) make_room(r);
  }

  // Softmax, dropout, the sum of values; writes the row's output and entries.
  void finish(int64_t r) {
    Row& row = rows_[r];
    Candidates<A>& found = row.found;
    keep_best(found, row.k, spare_scores_, spare_indices_, fall_);
    const int64_t count = found.count, padded = ceil_div<int64_t>(count, kLanes<A>) * kLanes<A>;
    if (call_.softcap > 0) cap_scores(found.scores, padded, A(call_.softcap));
    for (int64_t i = count; i < padded; ++i) found.scores[i] = -kInfinity<A>;
    Vector<A> highest = broadcast(-kInfinity<A>), total = {};
    for (int64_t i = 0; i < padded; i += kLanes<A>) {
      const Vector<A> v = load(found.scores + i);
      highest = v > highest ? v : highest;
    }
    A high = largest_lane<A>(highest);
    const bool has_sink = call_.sinks != nullptr && count > 0;
    const A sink = has_sink ? static_cast<const A*>(call_.sinks)[row.head] : A(0);
    if (has_sink) high = larger(high, sink);
    for (int64_t i = 0; i < padded; i += kLanes<A>) {
      const Vector<A> power = exponential(load(found.scores + i) - high);
      store<A>(weights_ + i, power);
      total += power;
    }
    const A sum = sum_of_lanes<A>(total) + (has_sink ? exponential_of(sink - high) : A(0));
    RestEntry rest = {};
    if (call_.rest.active) rest = weigh_rest(r, high, sum);
    const A inverse = A(1) / (sum + rest.weight);
    if (call_.log_sums != nullptr) {
      const int64_t number = (block_.batch * s_.num_heads + row.head) * s_.num_queries + row.query;
      const A log_sum = high + A(log(double(sum + rest.weight)));
      static_cast<A*>(call_.log_sums)[number] = count > 0 ? log_sum : kInfinity<A>;
    }
    for (int64_t i = 0; i < padded; i += kLanes<A>) store<A>(weights_ + i, load(weights_ + i) * inverse);

    const int64_t first_entry =
        (block_.batch * call_.head_k.total_k + call_.head_k.first_k[row.head]) * s_.num_queries + row.query * row.k;
    if (call_.indices != nullptr) {
      int32_t* indices = call_.indices + first_entry;
      for (int64_t i = 0; i < row.k; ++i) indices[i] = i < count ? found.indices[i] : -1;
    }
    if (call_.weights != nullptr) {
      A* weights = static_cast<A*>(call_.weights) + first_entry;
      for (int64_t i = 0; i < row.k; ++i) weights[i] = i < count ? weights_[i] : A(0);
    }
    if (call_.dropout.active) {
      const int64_t number = (block_.batch * s_.num_heads + row.head) * s_.num_queries + row.query;
      const DropoutRow draw(call_.dropout, number);
      const A factor = A(1 / (1 - call_.dropout.p));
      // A product, so that NaN stays NaN.
      for (int64_t i = 0; i < count; ++i) weights_[i] *= draw.keeps(found.indices[i]) ? factor : A(0);
    }
    const A share = rest.weight * inverse / A(larger<int64_t>(rest.count, 1));
    if (rest.count > 0)
      for (int64_t i = 0; i < count; ++i) weights_[i] -= share * (1 + kept_products_[i] - rest.mean_product);
    const T* values = static_cast<const T*>(call_.value.data) + block_.batch * call_.value.stride[0] +
                      block_.key_head * call_.value.stride[1];
    weighted_sum_of_rows<T, A>(values, call_.value.stride[2], found.indices, weights_, count, s_.value_dim, sums_,
                               spare_row_);
    if (rest.count > 0) {
      add_multiple<A>(share * (1 - rest.mean_product), seen_.seen(row.number).values, sums_, s_.value_dim);
      add_multiple<A>(share, seen_.seen(row.number).result, sums_, s_.value_dim);
    }
    T* output = static_cast<T*>(call_.output) + block_.batch * call_.output_stride[0] +
                row.head * call_.output_stride[1] + row.query * call_.output_stride[2];
    for (int64_t e = 0; e < s_.value_dim; ++e) output[e] = narrow_to<T>(sums_[e]);
  }

  // The sums over all keys that each row of the block sees.
  void prepare_rest() {
    for (int64_t r = 0; r < block_.num_rows; ++r) {
      A* const to = seen_.row(r);
      const A* const from = widened<T, A>(query_row(r), s_.head_dim, to);
      for (int64_t d = 0; d < s_.head_dim; ++d) to[d] = from[d] * A(call_.scale);
    }
    for (int64_t first = 0, last; first < block_.num_rows; first = last) {
      last = smaller(block_.num_rows, first + s_.num_queries - rows_[first].query);
      seen_.prepare(first, block_.batch, rows_[first].head, rows_[first].query, last - first);
    }
  }

  // What the rest of a row brings into its softmax.
  struct RestEntry {
    A weight;        // beside exp(score - highest score)
    A mean_product;  // of query . key over the rest
    int64_t count;   // 0: the row has none
  };

  // Needs the kept candidates; `sum` is that of exp(score - highest). Sets kept_products_ to their query . key.
  RestEntry weigh_rest(int64_t r, A highest, A sum) {
    const Row& row = rows_[r];
    const auto& seen = seen_.seen(row.number);
    const int64_t number = (block_.batch * s_.num_heads + row.head) * s_.num_queries + row.query, kept = row.found.count;
    const A* scores = row.found.scores;
    int64_t cut = 0;
    const A score_sum = kept > 0 ? sum_of_scores(scores, kept, cut) : A(0);
    const int64_t count = seen.count - kept;
    A mass = 0, mean_product = 0;
    if (count > 0 && kept > 0) {
      const A* query = seen_.row(row.number);
      A product_sum = score_sum;
      kept_products_ = scores;
      if (seen_.adds_to_scores()) {  // the scores are not the products alone
        dot_with_rows<T, A>(query, keys_of_block(), call_.key.stride[2], row.found.indices, kept, s_.head_dim, products_,
                            spare_key_);
        product_sum = 0;
        for (int64_t i = 0; i < kept; ++i) product_sum += products_[i];
        kept_products_ = products_;
      }
      const A total = dot(query, seen.keys, s_.head_dim);
      mean_product = (total - product_sum) / A(count);
      const A mean = (total + seen.score_sum - score_sum) / A(count), lift = A(call_.rest.lift);
      mass = A(count) * exponential_of((1 - lift) * mean + lift * scores[cut] - highest);
    }
    const A weight = static_cast<const A*>(call_.rest.mass_scale)[row.head] * mass;
    static_cast<A*>(call_.mass)[number] = mass / (sum + weight);
    call_.cuts[number] = int32_t(cut);
    if (!(kept > 0 && count > 0)) {
      static_cast<A*>(call_.mass)[number] = 0;
      return {0, 0, 0};
    }
    return {weight, mean_product, count};
  }

  const AttentionForward& call_;
  const Sizes s_;
  SeenSums<T, A, false> seen_;
  const A* kept_products_ = nullptr;
  A *products_ = nullptr, *spare_key_ = nullptr;
  int64_t largest_k_ = 0, capacity_ = 0, slots_ = 0, key_panels_ = 0;
  Arena arena_;
  A *query_, *keys_, *scores_, *additive_, *thresholds_, *candidate_scores_, *spare_scores_, *weights_, *sums_;
  A *spare_row_, *spare_rows_;
  Row* rows_;
  int32_t *candidate_indices_, *spare_indices_, *panels_, *sampled_;
  RowBlock block_ = {};
  int64_t most_visible_ = 0;
  A fall_ = 0;
  Additive<A> additive_part_{call_, 0};
};

// Each free thread takes the next block of rows.
template <class T, class A, class Worker = Forward<T, A>>
bool run_forward(const AttentionForward& call, const Parallel& parallel, const typename Worker::Shared* shared = nullptr) {
  const Sizes& s = call.sizes;
  const int64_t largest_k = largest_k_of(call.head_k, s.num_heads);
  const int64_t rows_of_group = s.num_heads / s.num_key_heads * s.num_queries;
  const int64_t block_rows = smaller(rows_per_block<A>(s, largest_k, parallel.num_threads, Worker::candidate_bytes(s.num_keys)), rows_of_group);
  const int64_t blocks_of_group = ceil_div(rows_of_group, block_rows);

  struct State {
    const AttentionForward& call;
    const typename Worker::Shared* shared;
    int64_t block_rows, rows_of_group, blocks_of_group, num_blocks, next;
    bool ok;
  } state = {call, shared, block_rows, rows_of_group, blocks_of_group, s.batch * s.num_key_heads * blocks_of_group, 0, true};

  const int64_t num_workers = smaller(parallel.num_threads, state.num_blocks);
  parallel.run(num_workers, &state, [](void* opaque, int64_t) {
    State& state = *static_cast<State*>(opaque);
    Worker worker(state.call, state.block_rows, state.shared);
    if (!worker.ready()) {
      __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
      return;
    }
    for (;;) {
      const int64_t n = __atomic_fetch_add(&state.next, 1, __ATOMIC_RELAXED);
      if (n >= state.num_blocks) return;
      const int64_t group = n / state.blocks_of_group;
      // The last rows first: under causality they see the most keys, and long work should start early.
      const int64_t first = (state.blocks_of_group - 1 - n % state.blocks_of_group) * state.block_rows;
      const int64_t key_heads = state.call.sizes.num_key_heads;
      worker.run({group / key_heads, group % key_heads, first, smaller(state.block_rows, state.rows_of_group - first)});
    }
  });
  return state.ok;
}
