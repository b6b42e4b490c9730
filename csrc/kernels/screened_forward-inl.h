// Top-k attention, forward, with keys screened by 8-bit products. It keeps the same keys with the same scores, to the bit, as
// scoring all of them, and shares everything that comes after:
//   1. Approximate scores of a sample, every period-th key, give each row a guessed threshold.
//   2. All other keys are screened against it. Those that may reach it are scored in float32 and stored if they do.
//   3. A row of which fewer than k keys reached the guess is screened again with a lower one.
// Where one in kKeysPerPassed keys passes, as with keys that are all alike, the block is given up and all its keys are scored.

// Fewer rows of a key head do not repay its index; nor does screening where k is this share of the keys.
constexpr int64_t kFewestScreenedRows = 64, kFewestScreenedKeys = 1024, kKeysPerKept = 8;
constexpr int64_t kMostScreenedKeys = 1 << 21;  // indices of slots and their halves are exact in float32
constexpr int64_t kIndexBytes = 512 << 10;      // of the index that one chunk of panels takes from the second-level cache
// Of more keys each row takes few: larger blocks and smaller chunks let more rows share the keys that are in the cache.
constexpr int64_t kManyScreenedKeys = 8192;
constexpr int64_t kLargestPeriod = 57;          // no longer than a word of bits
// How far above its expectation the guess takes a rank in the sample, in standard deviations: less where a row that has to be
// screened again costs little.
constexpr double kSampleDeviations = 2, kShortDeviations = 1.5;
constexpr int64_t kShortRow = 4096;
// Where more pass, scoring all takes less time. Without VNNI screening is half as cheap.
#if defined(TOPK_SUMS_OF_16_BITS)
constexpr int64_t kKeysPerPassed = 7;
#else
constexpr int64_t kKeysPerPassed = 5;
#endif

// How many keys a row sees on average, but for masks.
inline int64_t keys_of_row(const AttentionForward& call) {
  const Sizes& s = call.sizes;
  return s.num_keys - (call.is_causal ? smaller(s.num_queries, s.num_keys) / 2 : 0);
}

inline bool screening_pays(const AttentionForward& call) {
  const Sizes& s = call.sizes;
  return s.num_keys >= kFewestScreenedKeys && s.num_keys <= kMostScreenedKeys && s.head_dim >= 16 && s.head_dim <= 4096 &&
         s.num_heads / s.num_key_heads * s.num_queries >= kFewestScreenedRows &&
         largest_k_of(call.head_k, s.num_heads) * kKeysPerKept <= keys_of_row(call);
}

// Bits of passed keys are listed a word at a time, which begins with a key of the sample: a whole number of periods, of which eight
// bytes hold the keys of the sample, and the others, from any bit of the first byte on.
inline int64_t keys_of_word(int64_t period) {
  int64_t keys = 63 / period * period;
  while (keys - keys / period > 57) keys -= period;
  return keys;
}

// The distance between keys of the sample. A large sample takes time, a small one guesses low and lets more keys pass. Odd, as
// keys often come in rows of an even number.
inline int64_t sample_period(int64_t k, int64_t num_keys) {
  int64_t best = 3;
  double least = 0;
  for (int64_t period = 3; period <= kLargestPeriod; period += 2) {
    if (keys_of_word(period) < 48) continue;  // too many words
    // Thousandths of the time of a row, fitted to measurements.
    const double passed = kSampleDeviations * __builtin_sqrt(double(k * period)) + 2.0 * double(period);
    const double time = 0.4 * double(num_keys) / double(period) + 18 * passed;
    if (period == 3 || time < least) {
      least = time;
      best = period;
    }
  }
  return best;
}

template <class T>
class ScreenedForward : public Forward<T, float> {
  using Base = Forward<T, float>;
  using Row = typename Base::Row;
  using Base::additive_part_, Base::block_, Base::call_, Base::capacity_, Base::finish, Base::keys_of_block;
  using Base::largest_k_, Base::lower_guess, Base::make_room, Base::prepare_rest, Base::query_row, Base::rows_;
  using Base::s_, Base::score_block, Base::start, Base::thresholds_;

 public:
  struct Shared {
    const KeyIndex* indexes;  // [B, G]
  };

  ScreenedForward(const AttentionForward& call, int64_t max_rows, const Shared* shared) : Base(call, max_rows), shared_(*shared) {
    const KeyIndex& index = shared->indexes[0];
    chunk_panels_ = whole_periods((s_.num_keys > kManyScreenedKeys ? kIndexBytes / 2 : kIndexBytes) / index.panel_bytes(), index.period);
    word_keys_ = keys_of_word(index.period);
    for (int64_t bit = 0; bit < word_keys_; bit += index.period) sampled_ |= uint64_t(1) << bit;
    const int64_t chunk_slots = larger(smaller(chunk_panels_, index.num_panels), index.sample_panels) * kIndexPanel;
    arena_.allocate([&](Arena& arena) {
      screen_.take(arena, max_rows, s_.head_dim);
      sample_ = arena.take<float>(kTileRows * index.sample_panels * kIndexPanel);
      bits_stride_ = chunk_slots / kIndexPanel + 2;  // eight bytes are read at a time
      bits_ = arena.take<uint32_t>(kTileRows * bits_stride_);
      sample_stride_ = index.sample_panels + 2;
      sample_bits_ = arena.take<uint32_t>(max_rows * sample_stride_);
      starts_ = arena.take<int32_t>(chunk_slots / kIndexPanel * kRowLanes);
      passed_ = arena.take<int32_t>(2 * chunk_slots + 128);
      scores_ = arena.take<float>(2 * chunk_slots + 128);
      if (adds()) {
        const int64_t keys_of_chunk = ceil_div(chunk_slots * index.period, index.period - 1) + kIndexPanel;
        added_ = arena.take<float>(larger(keys_of_chunk, chunk_slots + kIndexPanel));
        most_added_ = arena.take<float>(chunk_slots / kIndexPanel * kRowLanes);
      }
      order_ = arena.take<int64_t>(max_rows);
    });
  }

  bool ready() const { return Base::ready() && arena_.ready(); }

  static int64_t candidate_bytes(int64_t num_keys) {
    return num_keys > kManyScreenedKeys ? smaller(160 * num_keys, 8 * kCandidateBytes) : kCandidateBytes;
  }

  void run(const RowBlock& block) {
    start(block);
    if (screen_block()) return;
    start(block);
    score_block();
  }

 private:
  // False where screening does not pay.
  bool screen_block() {
    num_passed_ = num_screened_ = 0;
    screen_.start(shared_.indexes[block_.batch * s_.num_key_heads + block_.key_head]);
    for (int64_t r = 0; r < block_.num_rows; ++r) {
      screen_.set_query(r, query_row(r), float(call_.scale));
      order_[r] = r;
    }
    if (!visit_sample() || !visit(block_.num_rows)) return false;
    if (call_.rest.active) prepare_rest();
    int64_t left = finish_found(block_.num_rows);
    if (left > block_.num_rows / 4) return false;
    for (int64_t tries = 0; left > 0; ++tries) {
      for (int64_t i = 0; i < left; ++i) {
        set_threshold(order_[i], lower_guess(order_[i], tries == 3));
        rows_[order_[i]].found.count = rows_[order_[i]].found.second_run = 0;
      }
      screen_sample(left);
      visit(left, false);
      left = finish_found(left);
    }
    return true;
  }

  const KeyIndex& index() const { return screen_.index(); }

  // Finish those of the first `count` rows of order_ that found their keys; leaves the others there and returns how many.
  int64_t finish_found(int64_t count) {
    int64_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = order_[i];
      if (rows_[r].is_guess && rows_[r].found.count < rows_[r].k)
        order_[left++] = r;
      else
        finish(r);
    }
    return left;
  }

  void set_threshold(int64_t r, float score) {
    thresholds_[r] = rows_[r].found.threshold = score;
    screen_.set_threshold(r, score);
  }

  bool adds() const { return additive_part_.any(); }

  // Fill the last panel of `count` numbers with -inf.
  static void hide_beyond(int64_t count, float* numbers) {
    for (int64_t i = count; i < ceil_div<int64_t>(count, kIndexPanel) * kIndexPanel; ++i) numbers[i] = -kInfinity<float>;
  }

  bool visit_sample() {
    const int64_t stride = index().sample_panels * kIndexPanel;
    for (int64_t first = 0; first < block_.num_rows; first += kTileRows) {
      const int64_t in_tile = smaller<int64_t>(kTileRows, block_.num_rows - first);
      screen_.set_tile(order_ + first, in_tile);
      int64_t most = 0;
      for (int64_t i = 0; i < in_tile; ++i) most = larger(most, index().sampled_among(rows_[first + i].visible));
      for (int64_t p = 0; p * kIndexPanel < most; ++p) screen_.approximate(p, sample_ + p * kIndexPanel, stride);
      for (int64_t i = 0; i < in_tile; ++i) {
        const int64_t r = first + i, visible = index().sampled_among(rows_[r].visible);
        float* scores = sample_ + i * stride;
        hide_beyond(visible, scores);
        const int64_t panels = ceil_div<int64_t>(visible, kIndexPanel);
        if (adds()) add_to_sample(r, scores, visible);
        guess(r, scores, visible);
        uint32_t* bits = sample_bits_ + r * sample_stride_;
        screen_.screen_approximate(r, panels, scores, scores_, bits);
        for (int64_t p = 0; p < panels; ++p) num_passed_ += count_bits(bits[p]);
        num_screened_ += visible;
      }
      if (too_many_pass()) return false;
    }
    num_passed_ = num_screened_ = 0;  // the sample counts again with the other keys
    return true;
  }

  // Scoring a key that passed takes three times as long as scoring one of many.
  bool too_many_pass() const { return num_passed_ > num_screened_ / kKeysPerPassed + kTileRows * largest_k_; }

  // Set the threshold to a score that, judging by the sample, a few more than k keys reach.
  void guess(int64_t r, const float* scores, int64_t visible) {
    Row& row = rows_[r];
    const double share = visible == 0 ? 1 : double(visible) / double(row.visible), expected = double(row.k) * share;
    const double deviations = row.visible <= kShortRow ? kShortDeviations : kSampleDeviations;
    const int64_t rank = int64_t(expected + deviations * __builtin_sqrt(expected * (1 - share)) + 2);
    int64_t eligible = visible;
    if (adds()) {
      eligible = copy_not_less(scores, whole_vectors(visible), -Types<float>::largest, added_);
      hide_beyond(eligible, added_);
      scores = added_;
    }
    row.is_guess = rank < eligible && screen_.row(r).size > 0;
    if (!row.is_guess) return set_threshold(r, -Types<float>::largest);
    set_threshold(r, screen_.score_at(r, cut_sample(scores, eligible, rank)));
  }

  void add_to_sample(int64_t r, float* scores, int64_t visible) {
    additive_part_.strided(rows_[r].head, rows_[r].query, 0, index().period, visible, added_);
    hide_beyond(visible, added_);
    screen_.add_to_approximate(r, added_, ceil_div<int64_t>(visible, kIndexPanel) * kIndexPanel, scores);
  }

  // Fill most_added_ for the tile's row i, which is row r, and `count` panels.
  void find_most_added_of_row(int64_t i, int64_t r, int64_t first_panel, int64_t count) {
    const Row& row = rows_[r];
    const int64_t step = first_panel < index().sample_panels ? index().period : 1;
    const int64_t first_key = index().key_at(first_panel, 0);
    const int64_t end_key = smaller(index().key_at(first_panel + count - 1, kIndexPanel - 1) + 1, s_.num_keys);
    // The sample's keys lie `step` apart; others lie side by side but for those of the sample, which do no harm.
    const float* added = step == 1 ? additive_part_.row(row.head, row.query) : nullptr;
    if (added != nullptr) {
      added += first_key;
    } else {
      additive_part_.strided(row.head, row.query, first_key, step, ceil_div(end_key - first_key, step), added_);
      added = added_;
    }
    for (int64_t p = 0; p < count; ++p) {
      const int64_t from = (index().key_at(first_panel + p, 0) - first_key) / step;
      const int64_t to = (smaller(index().key_at(first_panel + p, kIndexPanel - 1) + 1, end_key) - first_key + step - 1) / step;
      most_added_[kRowLanes * p + i] = largest_added(added + from, to - from);
    }
  }

  // The same for the tile of rows order_[first .. first + in_tile).
  void find_most_added(int64_t first, int64_t in_tile, int64_t first_panel, int64_t count) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t r = order_[first + smaller(i, in_tile - 1)];
      const Row& row = rows_[r];
      const bool is_same = i > 0 && (i >= in_tile || (!additive_part_.varies_with_query() && rows_[order_[first + i - 1]].head == row.head));
      if (!is_same)
        find_most_added_of_row(i, r, first_panel, count);
      else
        for (int64_t p = 0; p < count; ++p) most_added_[kRowLanes * p + i] = most_added_[kRowLanes * p + i - 1];
    }
  }

  // NaN counts as the largest.
  static float largest_added(const float* added, int64_t count) {
    FloatVector most = broadcast(-kInfinity<float>);
    bool is_broken = false;
    for (int64_t i = 0; i < count; i += kLanes<float>) {
      // Towards the end from the last whole vector, some twice.
      const int64_t from = count < kLanes<float> ? 0 : smaller<int64_t>(i, count - kLanes<float>);
      FloatVector x = load_some(added + from, count);
      if (count < kLanes<float>)
        for (int64_t lane = count; lane < kLanes<float>; ++lane) x[lane] = -kInfinity<float>;
      most = higher_of(most, x);
      is_broken = is_broken || nan_lanes(x) != 0;
    }
    return is_broken ? kInfinity<float> : most_lane(most);
  }

  struct Spread {
    float mean, deviation;
  };

  // A cut that `rank` of n scores, and few more, reach. Rows are much alike: tried first is the place where rows before were cut,
  // in deviations from the mean, then the places where the cut would be if the number of scores that reach it fell as there.
  float cut_sample(const float* scores, int64_t n, int64_t rank) {
    const int64_t padded = ceil_div<int64_t>(n, kIndexPanel) * kIndexPanel, most = rank + rank / 8;
    const Spread spread = spread_of(scores, n);
    float at = spread.mean + deviations_ * spread.deviation, low = -Types<float>::largest;
    for (int tries = 0; tries < 3 && at > -Types<float>::largest && at < Types<float>::largest; ++tries) {
      const int64_t count = count_reaching(at, scores, padded);
      if (count >= rank && count <= most) {
        remember(at, spread);
        return at;
      }
      if (count > most) low = larger(low, at);
      // A little less than a Gaussian's, as most scores have longer tails.
      const float ratio = float(larger<int64_t>(count, 1)) / (float(rank) + 0.5f * float(most - rank));
      const float logarithm = 2 * (ratio - 1) / (ratio + 1), fall = larger(deviations_, 0.5f) + 0.25f;
      at += logarithm / fall * spread.deviation;
    }
    if (low == -Types<float>::largest) low = lowest_finite(scores, padded);
    const int64_t count = copy_not_less(scores, padded, low, scores_);
    const Cut<float> cut = find_cut(scores_, count, rank, most, low, count);
    remember(cut.at, spread);
    return cut.at;
  }

  void remember(float cut, const Spread& spread) {
    if (!(spread.deviation > 0)) return;
    const float deviations = smaller(larger((cut - spread.mean) / spread.deviation, -8.0f), 8.0f);
    deviations_ += 0.25f * (deviations - deviations_);
  }

  static int64_t count_reaching(float at, const float* scores, int64_t padded) {
    int64_t count = 0;
    for (int64_t i = 0; i < padded; i += kIndexPanel) count += count_bits(panel_not_less(scores + i, at));
    return count;
  }

  // Of about 256 scores, whole panels here and there.
  static Spread spread_of(const float* scores, int64_t n) {
    const int64_t step = larger<int64_t>(n / 256, 1) * kIndexPanel;
    FloatVector sum[kPanelVectors] = {}, squares[kPanelVectors] = {};
    int64_t count = 0;
    for (int64_t i = 0; i + kIndexPanel <= n; i += step, count += kIndexPanel)
      for (int v = 0; v < kPanelVectors; ++v) {
        const FloatVector x = load(scores + i + kLanes<float> * v);
        sum[v] += x;
        squares[v] = multiply_add<float>(x, x, squares[v]);
      }
    for (int v = 1; v < kPanelVectors; ++v) {
      sum[0] += sum[v];
      squares[0] += squares[v];
    }
    const float share = 1 / float(larger<int64_t>(count, 1)), mean = sum_of_floats(sum[0]) * share;
    const float variance = sum_of_floats(squares[0]) * share - mean * mean;
    return {mean, square_root(larger(variance, 0.0f))};
  }

  static int64_t copy_not_less(const float* from, int64_t n, float low, float* to) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kLanes<float>) {
      const FloatVector v = load(from + i);
      count += keep_lanes(v, not_less(v, broadcast(low)), to + count);
    }
    return count;
  }

  static float lowest_finite(const float* scores, int64_t n) {
    FloatVector low = broadcast(Types<float>::largest);
    for (int64_t i = 0; i < n; i += kLanes<float>) {
      const FloatVector v = load(scores + i);
      low = v > -kInfinity<float> ? lower_of(low, v) : low;
    }
    return least_lane(low);
  }

  // Screen the sample again for the first `count` rows of order_.
  void screen_sample(int64_t count) {
    const int64_t panels = index().sample_panels;
    for (int64_t first = 0; first < count; first += kTileRows) {
      const int64_t in_tile = smaller<int64_t>(kTileRows, count - first);
      screen_.set_tile(order_ + first, in_tile);
      if (adds()) find_most_added(first, in_tile, 0, panels);
      screen_.screen(0, panels, adds() ? most_added_ : nullptr, starts_, bits_, bits_stride_);
      for (int64_t i = 0; i < in_tile; ++i)
        __builtin_memcpy(sample_bits_ + order_[first + i] * sample_stride_, bits_ + i * bits_stride_, size_t(panels) * sizeof(uint32_t));
    }
  }

  // Screen all keys but the sample's, for the first `count` rows of order_, and take what passes, the sample's too. Returns
  // false, where it may give up, when too many pass.
  bool visit(int64_t count, bool may_give_up = true) {
    const int64_t last_panel = index().num_panels;
    for (int64_t chunk = index().sample_panels, end; chunk < last_panel; chunk = end) {
      end = smaller(chunk + chunk_panels_, last_panel);
      const int64_t first_key = index().first_key_of(chunk);
      const int64_t end_key = end == last_panel ? s_.num_keys : index().first_key_of(end);
      for (int64_t first = 0; first < count; first += kTileRows) {
        const int64_t in_tile = smaller<int64_t>(kTileRows, count - first);
        int64_t most = 0;
        for (int64_t i = 0; i < in_tile; ++i) most = larger(most, rows_[order_[first + i]].visible);
        most = smaller(most, end_key);
        if (most <= first_key) continue;
        screen_.set_tile(order_ + first, in_tile);
        const int64_t panels = ceil_div<int64_t>(index().others_among(most) - index().others_among(first_key), kIndexPanel);
        if (adds() && panels > 0) find_most_added(first, in_tile, chunk, panels);
        screen_.screen(chunk, panels, adds() ? most_added_ : nullptr, starts_, bits_, bits_stride_);
        for (int64_t i = 0; i < in_tile; ++i) {
          const int64_t r = order_[first + i];
          take(r, list_passed(sample_bits_ + r * sample_stride_, bits_ + i * bits_stride_, first_key, smaller(rows_[r].visible, end_key)));
        }
        if (may_give_up && too_many_pass()) return false;
      }
    }
    return true;
  }

  // About as many panels, so that after them comes a key of the sample.
  static int64_t whole_periods(int64_t panels, int64_t period) {
    int64_t unit = 1;
    while (unit * kIndexPanel % (period - 1) != 0) ++unit;
    return larger(panels / unit, int64_t(1)) * unit;
  }

  // Bits first, first + 1 ... of an array of bits, 57 at least.
  static uint64_t bits_from(const uint32_t* bits, uint64_t first) {
    uint64_t word;
    __builtin_memcpy(&word, reinterpret_cast<const char*>(bits) + first / 8, sizeof(word));
    return word >> (first % 8);
  }

  // Fill passed_ with the keys of the bits that are set, ascending, from first_key on and below end_key. The first is the
  // sample's, with the first bit of `sample`; `others` begins with the key after it.
  int64_t list_passed(const uint32_t* sample, const uint32_t* others, int64_t first_key, int64_t end_key) {
    if (end_key <= first_key) return 0;
    // Copies, as the list might be written over the members for all that the compiler knows.
    const int64_t word_keys = word_keys_, period = index().period, in_sample = word_keys / period, in_others = word_keys - in_sample;
    const uint64_t places = sampled_, whole_word = (uint64_t(1) << word_keys) - 1;
    int32_t* const passed = passed_;
    int64_t count = 0, key = first_key;
    uint64_t sampled = uint64_t(first_key / period), other = 0;
    for (; key + word_keys < end_key; key += word_keys, sampled += uint64_t(in_sample), other += uint64_t(in_others))
      count += append_set_bits(interleaved_bits(bits_from(sample, sampled), bits_from(others, other), places, period, in_sample) & whole_word,
                               int32_t(key), passed + count);
    const uint64_t last = interleaved_bits(bits_from(sample, sampled), bits_from(others, other), places, period, in_sample);
    count += append_set_bits(last & ((uint64_t(1) << (end_key - key)) - 1), int32_t(key), passed + count);
    num_passed_ += count;
    num_screened_ += end_key - first_key;
    return count;
  }

  // Score the keys passed_[0 .. count) and store what reaches the threshold.
  void take(int64_t r, int64_t count) {
    if (count == 0) return;
    if (adds()) count = drop_hidden(r, count);
    screen_.score(r, keys_of_block(), call_.key.stride[2], passed_, count, scores_);
    Candidates<float>& found = rows_[r].found;
    for (int64_t i = 0; i < count; i += kLanes<float>) {
      if (adds()) store<float>(scores_ + i, load(scores_ + i) + load(added_ + i));
      uint32_t lanes = not_less(load(scores_ + i), broadcast(found.threshold));
      if (count - i < kLanes<float>) lanes &= (1u << (count - i)) - 1;
      found.count += compact_lanes(scores_ + i, passed_ + i, lanes, found.scores + found.count, found.indices + found.count);
      if (found.count <= capacity_) continue;
      make_room(r);
      screen_.set_threshold(r, found.threshold);
    }
  }

  // Fills added_ with what is added to the scores of the keys passed_[0 .. count) that are not hidden; keeps only those in passed_.
  int64_t drop_hidden(int64_t r, int64_t count) {
    const Row& row = rows_[r];
    const float* added = additive_part_.row(row.head, row.query);
    int64_t to = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t key = passed_[i];
      if (added != nullptr)
        added_[to] = added[key];
      else
        additive_part_.strided(row.head, row.query, key, 1, 1, added_ + to);
      passed_[to] = key;
      to += added_[to] != -kInfinity<float>;
    }
    return to;
  }

  const Shared& shared_;
  Screen<T> screen_;
  Arena arena_;
  int64_t chunk_panels_ = 0, num_passed_ = 0, num_screened_ = 0;
  float deviations_ = 2;
  float *added_ = nullptr, *most_added_ = nullptr;
  float *sample_ = nullptr, *scores_ = nullptr;
  int64_t bits_stride_ = 0, sample_stride_ = 0, word_keys_ = 0;
  uint64_t sampled_ = 0;  // bits of a word of keys that begins with one of the sample
  uint32_t *bits_ = nullptr, *sample_bits_ = nullptr;  // of a tile's rows, of all rows
  int32_t *starts_ = nullptr, *passed_ = nullptr;
  int64_t* order_ = nullptr;
};

// Builds the index of every key head, then runs. Without memory for them all keys are scored.
template <class T>
bool run_screened_forward(const AttentionForward& call, const Parallel& parallel) {
  const Sizes& s = call.sizes;
  const int64_t num_indexes = s.batch * s.num_key_heads;
  const KeyIndex blank(s.num_keys, s.head_dim, sample_period(largest_k_of(call.head_k, s.num_heads), keys_of_row(call)));
  struct State {
    const AttentionForward& call;
    KeyIndex* indexes;
    bool ok;
  } state = {call, nullptr, true};
  Arena arena;
  arena.allocate([&](Arena& arena) {
    state.indexes = arena.take<KeyIndex>(num_indexes);
    for (int64_t i = 0; i < num_indexes; ++i) {
      KeyIndex index = blank;
      index.take(arena);
      if (state.indexes != nullptr) state.indexes[i] = index;
    }
  });
  if (!arena.ready()) return run_forward<T, float>(call, parallel);
  parallel.run(num_indexes, &state, [](void* opaque, int64_t i) {
    State& state = *static_cast<State*>(opaque);
    const View& key = state.call.key;
    const int64_t heads = state.call.sizes.num_key_heads;
    const T* keys = static_cast<const T*>(key.data) + i / heads * key.stride[0] + i % heads * key.stride[1];
    if (!KeyIndexBuilder<T>(state.indexes[i], keys, key.stride[2]).build()) __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
  });
  if (!state.ok) return run_forward<T, float>(call, parallel);
  const typename ScreenedForward<T>::Shared shared = {state.indexes};
  return run_forward<T, float, ScreenedForward<T>>(call, parallel, &shared);
}
