// Top-k attention, forward, for few rows of a key head whose keys have a kept index (kept_index-inl.h): the same keys with the
// same bits as without it.
//   1. Ranges of keys: the integer products of all rows with all keys give each score a lower bound, and each panel of 32 keys how
//      far its upper bounds lie above. Biases are added, and what is hidden is hidden.
//   2. Rows: k keys have scores not below the k-th largest lower bound. Only keys whose upper bound reaches it can be among the k
//      best; these are scored from the keys themselves, and everything after is as without an index.
// Bounds are in units of the row's t and less q.c, which is the same for all keys of a row.

#if defined(__AVX512VNNI__)
typedef int32_t Quad;  // four numbers of a query, a byte each
inline int8_t* numbers_of(Quad* quad) { return reinterpret_cast<int8_t*>(quad); }
#else
typedef int64_t Quad;  // the same, two bytes each
inline int16_t* numbers_of(Quad* quad) { return reinterpret_cast<int16_t*>(quad); }
#endif

// The sums over d of Q times K + 128 for kRows rows and a panel, from `base` on, times scale, less what each row has in `errors`:
// bounds[r * stride + lane]. query[d * kTileRows + r] holds four dimensions.
template <int kRows>
__attribute__((noinline)) void bound_panel(int64_t num_rows, const Quad* query, const uint8_t* panel, int64_t quads,
                                           const int32_t* base, float scale, const float* errors, float* bounds, int64_t stride) {
#if defined(__AVX512VNNI__)
  constexpr int kVectors = 2;
  // GCC spills sums of type __m512i to the stack where an operation on integers reads them.
  IntVector sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = (IntVector)_mm512_set1_epi32(base[r]);
#pragma GCC unroll 1
  for (int64_t d = 0; d < quads; ++d) {
    const __m512i low = _mm512_loadu_si512(panel + d * 128), high = _mm512_loadu_si512(panel + d * 128 + 64);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512i q = _mm512_set1_epi32(query[d * kTileRows + r]);
      sums[r][0] = (IntVector)_mm512_dpbusd_epi32((__m512i)sums[r][0], low, q);
      sums[r][1] = (IntVector)_mm512_dpbusd_epi32((__m512i)sums[r][1], high, q);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (r == num_rows) break;
    for (int v = 0; v < kVectors; ++v) {
      const FloatVector x = __builtin_convertvector(sums[r][v], FloatVector) * scale;
      store<float>(bounds + r * stride + v * kLanes<float>, x - errors[r]);
    }
  }
#elif defined(__SSE2__)
  // As many keys at a time as a vector has lanes: their bytes fill one vector, widened they fill two, and each sum has two parts.
  typename Types<float>::Ints even = {}, odd = {};
  for (int lane = 0; lane < kLanes<float>; ++lane) {
    even[lane] = 2 * lane;
    odd[lane] = 2 * lane + 1;
  }
  for (int first = 0; first < kKeptPanel; first += kLanes<float>) {
    IntVector sums[kRows][2] = {};
#pragma GCC unroll 1
    for (int64_t d = 0; d < quads; ++d) {
      const uint8_t* const keys = panel + d * 128 + first * 4;
#if defined(__AVX512F__)
      const __m512i low = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys)));
      const __m512i high = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + 32)));
#elif defined(__AVX2__)
      const __m256i low = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(keys)));
      const __m256i high = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(keys + 16)));
#else
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(keys));
      const __m128i low = _mm_unpacklo_epi8(bytes, _mm_setzero_si128()), high = _mm_unpackhi_epi8(bytes, _mm_setzero_si128());
#endif
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const int64_t numbers = query[d * kTileRows + r];
#if defined(__AVX512F__)
        const __m512i q = _mm512_set1_epi64(numbers);
        sums[r][0] += (IntVector)_mm512_madd_epi16(low, q);
        sums[r][1] += (IntVector)_mm512_madd_epi16(high, q);
#elif defined(__AVX2__)
        const __m256i q = _mm256_set1_epi64x(numbers);
        sums[r][0] += (IntVector)_mm256_madd_epi16(low, q);
        sums[r][1] += (IntVector)_mm256_madd_epi16(high, q);
#else
        const __m128i q = _mm_set1_epi64x(numbers);
        sums[r][0] += (IntVector)_mm_madd_epi16(low, q);
        sums[r][1] += (IntVector)_mm_madd_epi16(high, q);
#endif
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      if (r == num_rows) break;
      const FloatVector low = (FloatVector)sums[r][0], high = (FloatVector)sums[r][1];
      const IntVector sum = (IntVector)shuffle_lanes<float>(low, high, even) + (IntVector)shuffle_lanes<float>(low, high, odd);
      const FloatVector x = __builtin_convertvector(sum + base[r], FloatVector) * scale;
      store<float>(bounds + r * stride + first, x - errors[r]);
    }
  }
#else
  for (int64_t r = 0; r < num_rows; ++r) {
    int32_t sums[kKeptPanel] = {};
    for (int64_t d = 0; d < quads; ++d) {
      int16_t numbers[4];
      __builtin_memcpy(numbers, query + d * kTileRows + r, sizeof(numbers));
      for (int lane = 0; lane < kKeptPanel; ++lane) {
        const uint8_t* const key = panel + d * 128 + lane * 4;
        sums[lane] += key[0] * numbers[0] + key[1] * numbers[1] + key[2] * numbers[2] + key[3] * numbers[3];
      }
    }
    for (int lane = 0; lane < kKeptPanel; ++lane) bounds[r * stride + lane] = float(sums[lane] + base[r]) * scale - errors[r];
  }
#endif
}

inline void bound_few(int64_t num_rows, const Quad* query, const uint8_t* panel, int64_t quads, const int32_t* base, float scale,
                      const float* errors, float* bounds, int64_t stride) {
  switch (num_rows) {
    case 1: return bound_panel<1>(num_rows, query, panel, quads, base, scale, errors, bounds, stride);
    case 2: return bound_panel<2>(num_rows, query, panel, quads, base, scale, errors, bounds, stride);
    case 3: return bound_panel<3>(num_rows, query, panel, quads, base, scale, errors, bounds, stride);
    case 4: return bound_panel<4>(num_rows, query, panel, quads, base, scale, errors, bounds, stride);
    default: return bound_panel<kTileRows>(num_rows, query, panel, quads, base, scale, errors, bounds, stride);
  }
}

// The query of a row, rounded to 8 bits.
struct IndexedQuery {
  float unit;         // t
  float size, error;  // |q| / t and |error of q| / t, rounded up
  double centre;      // q.c
  double centre_size; // the sum of |q c|: q.c is off by a tiny share of it
  bool has_bound;     // false where it has none, as where it is not finite
};

template <class T>
class IndexedRows : public FewRows<T, float> {
  using Base = FewRows<T, float>;
  using Base::additive_part_, Base::block_, Base::call_, Base::capacity_, Base::finish, Base::keys_of_block, Base::make_room;
  using Base::most_visible_, Base::num_tiles, Base::pack_queries, Base::prepare_rest, Base::query_of, Base::query_row, Base::rows_;
  using Base::added_to_block, Base::cut_of, Base::rows_of, Base::s_, Base::start, Base::thresholds_;

 public:
  struct Shared {
    const IndexedForward& call;
    bool* is_stale;
  };
  static constexpr bool kHasErrors = true;

  IndexedRows(const AttentionForward& call, int64_t max_rows, const Shared* shared) : Base(call, max_rows, nullptr), shared_(*shared) {
    quads_ = ceil_div<int64_t>(s_.head_dim, 4);
    width_ = ceil_div<int64_t>(s_.head_dim, 16) * 16;
    const int64_t tiles = ceil_div<int64_t>(max_rows, kTileRows);
    arena_.allocate([&](Arena& arena) {
      numbers_ = arena.take<Quad>(tiles * kTileRows * quads_);
      base_ = arena.take<int32_t>(tiles * kTileRows);
      queries_ = arena.take<IndexedQuery>(max_rows);
      query_ = arena.take<float>(width_);
      centre_ = arena.take<float>(width_);
      errors_ = arena.take<float>(tiles * kTileRows);
      passed_ = arena.take<int32_t>(s_.num_keys + 2 * kKeptPanel);
      chosen_ = arena.take<int32_t>(s_.num_keys + 2 * kKeptPanel);
      bounds_ = arena.take<float>(s_.num_keys + 2 * kKeptPanel);
      scores_ = arena.take<float>(s_.num_keys + 2 * kKeptPanel);
    });
  }

  bool ready() const { return Base::ready() && arena_.ready(); }

  void score(const RowBlock& rows, const RowScores<float>& to, int64_t first, int64_t end) {
    begin(rows);
    const uint32_t without = rows_without_bounds();
    const int64_t last = smaller(end, ceil_div<int64_t>(most_visible_, kBlockKeys<float>));
    if (without != all_rows())
      for (int64_t b = first; b < last; ++b) bound_block(to, b);
    score_all_keys(rows, to, first, end, without);
  }

  void select(const RowBlock& rows, const RowScores<float>& from) {
    begin(rows);
    if (call_.rest.active) prepare_rest();
    has_unscreened_ = index_.num_keys < most_visible_;
    for (int64_t p = 0; p < ceil_div<int64_t>(most_visible_, kKeptPanel) && !has_unscreened_; ++p)
      has_unscreened_ = unscreened_of(p) != 0;
    const uint32_t without = rows_without_bounds();
    uint32_t left = 0;
    for (int64_t r = 0; r < rows.num_rows; ++r) {
      if ((without >> r & 1) != 0) {
        Base::find(r, from.of_row(r));
      } else if (!find_indexed(r, from.of_row(r))) {
        left |= 1u << r;
        continue;
      }
      finish(r);
    }
    if (left == 0) return;
    score_all_keys(rows, from, 0, ceil_div<int64_t>(s_.num_keys, kBlockKeys<float>), left);
    start(rows);
    for (; left != 0; left &= left - 1) {
      const int64_t r = __builtin_ctz(left);
      Base::find(r, from.of_row(r));
      finish(r);
    }
  }

 private:
  // Without an index the keys are read once for all rows of a key head, with one here and there for each row. So a row does without
  // where these rows together keep more than a quarter of the keys, or where as many may be among its k best as all keys are
  // divided by the rows.
  static constexpr int64_t kFewestRead = 4;
  int64_t rows_of_key_head() const { return s_.num_heads / s_.num_key_heads * s_.num_queries; }
  // The lower bound of keys that lie far below others (`add`); hidden ones have -inf.
  static constexpr float kFarBound = -3e38f;

  uint32_t all_rows() const { return (1u << block_.num_rows) - 1; }

  uint32_t rows_without_bounds() const {
    uint32_t rows = 0;
    for (int64_t r = 0; r < block_.num_rows; ++r) rows |= uint32_t(!queries_[r].has_bound) << r;
    return rows;
  }

  // Scores these rows as they are without an index, as many at a time as follow one another: the keys are read once for all.
  void score_all_keys(const RowBlock& rows, const RowScores<float>& to, int64_t first, int64_t end, uint32_t these) {
    while (these != 0) {
      const int r = __builtin_ctz(these), count = __builtin_ctz(~(these >> r));
      Base::score({rows.batch, rows.key_head, rows.first_row + r, count}, to.of_row(r), first, end);
      these &= ~(((1u << count) - 1) << r);
    }
  }

  void begin(const RowBlock& rows) {
    start(rows);
    pack_queries();
    const KeptIndex& index = shared_.call.index;
    const int64_t b = rows.batch, g = rows.key_head;
    index_.num_keys = shared_.call.num_indexed;
    index_.panels = index.panels + b * index.panel_stride[0] + g * index.panel_stride[1];
    index_.numbers = index.numbers + b * index.number_stride[0] + g * index.number_stride[1];
    index_.unscreened = index.unscreened + b * index.unscreened_stride[0] + g * index.unscreened_stride[1];
    index_.centre = index.centre + b * index.centre_stride[0] + g * index.centre_stride[1];
    for (int64_t d = 0; d < width_; ++d) centre_[d] = d < quads_ * 4 ? index_.centre[d] : 0;
    for (int64_t r = 0; r < rows.num_rows; ++r) round_query(r);
  }

  void round_query(int64_t r) {
    const float* const packed = query_of(r / kTileRows) + r % kTileRows;
    for (int64_t d = 0; d < width_; ++d) query_[d] = d < s_.head_dim ? packed[d * kTileRows] : 0;
    FloatVector most = {}, squares = {}, broken = {};
    for (int64_t d = 0; d < width_; d += kLanes<float>) {
      const FloatVector v = load(query_ + d);
      most = larger_lanes(most, size_of(v));
      squares = multiply_add<float>(v, v, squares);
      broken += v * 0.0f;
    }
    IndexedQuery& query = queries_[r];
    query = {1, 0, 0, 0, 0, false};
    const float high = largest_lane(most);
    Quad* const numbers = numbers_ + r / kTileRows * kTileRows * quads_ + r % kTileRows;
    base_[r] = 0;
    query.has_bound = !has_nan(broken) && high > 1e-12f && high < 1e15f &&
                      kFewestRead * rows_of_key_head() * rows_[r].k <= rows_[r].visible;
    if (!query.has_bound) {
      for (int64_t d = 0; d < quads_; ++d) numbers[d * kTileRows] = 0;
      return;
    }
    query.unit = high / 127;
    const float inverse = 1 / query.unit;
    FloatVector errors = {};
    int32_t sum = 0;
    for (int64_t d = 0; d < width_; d += kLanes<float>) {
      const FloatVector v = load(query_ + d);
      IntVector bits;
      const FloatVector e = v - whole(v * inverse, bits) * query.unit;
      errors = multiply_add<float>(e, e, errors);
      for (int i = 0; i < kLanes<float> && d + i < quads_ * 4; ++i) {
        numbers_of(numbers + (d + i) / 4 * kTileRows)[(d + i) % 4] = decltype(*numbers_of(numbers) + 0)(bits[i]);
        sum += bits[i];
        const double product = double(v[i]) * double(centre_[d + i]);
        query.centre += product;
        query.centre_size += product < 0 ? -product : product;
      }
    }
    // What a square root of a sum of squares is off by, at most.
    const float rounded_up = 1 + 1e-4f + float(s_.head_dim) * 1.5e-8f, norm = root(sum_of_lanes<float>(squares)) * rounded_up;
    base_[r] = -128 * sum;
    query.size = norm * inverse * rounded_up;
    query.error = (root(sum_of_lanes<float>(errors)) * rounded_up + 1e-6f * norm) * inverse * rounded_up;
  }

  // The keys of panel p that have no bound, a bit for each.
  uint32_t unscreened_of(int64_t p) const {
    const int64_t left = index_.num_keys - p * kKeptPanel;  // indexed keys of the panel
    const uint32_t beyond = left >= kKeptPanel ? 0 : left <= 0 ? ~0u : ~0u << left;
    return left <= 0 ? beyond : beyond | uint32_t(index_.unscreened[p]);
  }

  // How far a score may be from its integer product, in units of t: the bound of the index, and what float32 rounds away of
  // sums of up to 127^2 D units in converting, scaling and adding.
  float error_of(int64_t r, int64_t p) const {
    const float* const numbers = index_.numbers + 4 * p;
    const IndexedQuery& query = queries_[r];
    return numbers[0] * (query.size * numbers[2] + query.error * numbers[3] + 2 + float(s_.head_dim) / 128) * (1 + 1e-5f);
  }

  void bound_block(const RowScores<float>& to, int64_t b) {
    constexpr int64_t kPanels = kBlockKeys<float> / kKeptPanel;
    for (int64_t p = b * kPanels; p < (b + 1) * kPanels; ++p) {
      const bool is_indexed = p * kKeptPanel < smaller(s_.num_keys, index_.num_keys);
      for (int64_t r = 0; r < block_.num_rows; ++r)
        errors_[r] = to.errors[r * (to.stride / kKeptPanel) + p] = is_indexed && queries_[r].has_bound ? error_of(r, p) : 0;
      if (!is_indexed) continue;
      for (int64_t tile = 0; tile < num_tiles(); ++tile)
        bound_few(rows_of(tile), numbers_ + tile * kTileRows * quads_, index_.panels + p * kept_panel_bytes(s_.head_dim), quads_,
                  base_ + tile * kTileRows, index_.numbers[4 * p], errors_ + tile * kTileRows,
                  to.scores + tile * kTileRows * to.stride + p * kKeptPanel, to.stride);
    }
    const float* added = nullptr;
    for (int64_t r = 0; r < block_.num_rows; ++r) {
      const auto& row = rows_[r];
      const bool is_same = r > 0 && !additive_part_.varies_with_query() && rows_[r - 1].head == row.head;
      if (additive_part_.any() && !is_same) added = added_to_block(row.head, row.query, b * kBlockKeys<float>);
      const RowScores<float> of_row = to.of_row(r);
      for (int64_t p = b * kPanels; p < (b + 1) * kPanels; ++p) {
        float* const bounds = of_row.scores + p * kKeptPanel;
        if (added != nullptr) add(r, added + (p - b * kPanels) * kKeptPanel, bounds, of_row.errors[p]);
        const int64_t visible = smaller<int64_t>(row.visible - p * kKeptPanel, kKeptPanel);
        for (int64_t i = larger<int64_t>(visible, 0); i < kKeptPanel; ++i) bounds[i] = -kInfinity<float>;
        // No bound from below; that from above is infinite, which find_indexed() reads from the index.
        for (uint32_t left = visible > 0 ? unscreened_of(p) : 0; left != 0; left &= left - 1) bounds[__builtin_ctz(left)] = -kInfinity<float>;
      }
      FloatVector best = broadcast(-kInfinity<float>);
      for (int v = 0; v < kBinKeys; ++v) {
        const FloatVector x = load(of_row.scores + b * kBlockKeys<float> + v * kLanes<float>);
        best = x > best ? x : best;
      }
      store<float>(of_row.bests + b * kLanes<float>, best);
    }
  }

  // Adds a panel of biases. What they round away counts as error; NaN, the best of all scores, becomes inf. Masks of numbers may
  // hide keys by -1e9: what that rounds away must not loosen the bounds of the others. So a key that lies far below 0 has the same
  // low bound as all such keys, and find_indexed() looks whether one may count.
  void add(int64_t r, const float* added, float* bounds, float& error) const {
    const float inverse = 1 / queries_[r].unit;
    const FloatVector hidden = broadcast(-kInfinity<float>), infinity = broadcast(kInfinity<float>), lowest = broadcast(kFarBound);
    const FloatVector low = broadcast(2 * kFarBelow), far_below = broadcast(1.2f * kFarBelow * inverse);
    IntVector is_far[kKeptPanel / kLanes<float>];
    FloatVector most = {};
    for (int v = 0; v < kKeptPanel / kLanes<float>; ++v) {
      const FloatVector raw = load(added + v * kLanes<float>), more = raw * inverse, size = size_of(more);
      const FloatVector upper = load(bounds + v * kLanes<float>) + 2 * error + (more + 4e-6f * size);
      is_far[v] = (raw <= low) & (upper <= far_below);
      most = larger_lanes(most, is_far[v] ? FloatVector{} : size < infinity ? size : FloatVector{});
    }
    const float rounding = 2e-6f * largest_lane(most);
    for (int v = 0; v < kKeptPanel / kLanes<float>; ++v) {
      const FloatVector raw = load(added + v * kLanes<float>), more = raw * inverse;
      const FloatVector sum = load(bounds + v * kLanes<float>) + more - rounding, least = sum < lowest ? lowest : sum;
      store<float>(bounds + v * kLanes<float>, raw == hidden ? hidden : is_far[v] ? lowest : least != least ? infinity : least);
    }
    error += rounding;
  }

  // A score, in its own units: weights of scores that lie so far below others are 0.
  static constexpr float kFarBelow = -500;

  // Scores the keys that may be among the k best of row r and stores them; or returns false where bounds do not tell them from
  // enough others.
  bool find_indexed(int64_t r, const RowScores<float>& row) {
    constexpr int64_t kPanels = kBlockKeys<float> / kKeptPanel;
    const int64_t num_blocks = ceil_div<int64_t>(rows_[r].visible, kBlockKeys<float>);
    float cut = cut_of(row.bests, num_blocks * kLanes<float>, rows_[r].k);
    if (!(cut > -Types<float>::largest)) cut = cut_of(row.scores, num_blocks * kBlockKeys<float>, rows_[r].k);
    // Of keys with the bound of those far below, the scores must lie below the k best, or all of them are scored.
    if (additive_part_.any() && cut > -Types<float>::largest && !(cut > kFarBelow / queries_[r].unit)) return false;
    const int64_t most_passed = rows_[r].visible / larger<int64_t>(rows_of_key_head(), 2);
    num_passed_ = 0;
    for (int64_t b = 0; b < num_blocks; ++b) {
      float error = 0;
      for (int64_t p = b * kPanels; p < (b + 1) * kPanels; ++p) error = larger(error, row.errors[p]);
      if (!has_unscreened_ && not_less(load(row.bests + b * kLanes<float>), broadcast(least(cut, error))) == 0) continue;
      for (int64_t p = b * kPanels; p < (b + 1) * kPanels; ++p) pass(r, p, row.scores + p * kKeptPanel, least(cut, row.errors[p]));
      if (num_passed_ > most_passed) return false;
    }
    score_passed(r, row);
    return true;
  }

  // The lower bound of a key whose upper bound is `cut`; never that of a hidden key.
  static float least(float cut, float error) { return larger(cut - 2 * error, -Types<float>::largest); }

  void pass(int64_t r, int64_t p, const float* bounds, float at_least) {
    const int64_t left = rows_[r].visible - p * kKeptPanel;
    if (left <= 0) return;
    const uint32_t seen = left >= kKeptPanel ? ~0u : ~(~0u << left), unscreened = has_unscreened_ ? unscreened_of(p) : 0;
    for (int v = 0; v < kKeptPanel / kLanes<float>; ++v) {
      const uint32_t reached = not_less(load(bounds + v * kLanes<float>), broadcast(at_least));
      const uint32_t of_vector = uint32_t((uint64_t(1) << kLanes<float>) - 1);
      const uint32_t lanes = (reached | (unscreened >> v * kLanes<float> & of_vector)) & (seen >> v * kLanes<float>);
      num_passed_ += append_lanes(bounds + v * kLanes<float>, int32_t(p * kKeptPanel + v * kLanes<float>), lanes,
                                  bounds_ + num_passed_, passed_ + num_passed_);
    }
  }

  // Scores what may be among the k best of all that passed: first the k keys with the best lower bounds, then those of the others
  // whose upper bound reaches the worst of these scores. It lies above the cut, as keys are seldom as far off as they may be.
  void score_passed(int64_t r, const RowScores<float>& row) {
    const int64_t k = rows_[r].k;
    num_chosen_ = 0;
    float cut = -kInfinity<float>;
    if (num_passed_ > k) {
      for (int64_t i = num_passed_; i % kLanes<float> != 0; ++i) bounds_[i] = -kInfinity<float>;
      cut = cut_of(bounds_, ceil_div<int64_t>(num_passed_, kLanes<float>) * kLanes<float>, k);
    }
    for (int64_t i = 0; i < num_passed_; ++i)
      if (bounds_[i] >= cut) chosen_[num_chosen_++] = int32_t(i);
    // Most of these keys are kept, so their values will be wanted.
    const T* const values = static_cast<const T*>(call_.value.data) + block_.batch * call_.value.stride[0] +
                            block_.key_head * call_.value.stride[1];
    score_chosen(r);
    for (int64_t i = 0; i < smaller(num_chosen_, kMostValuesAhead); ++i)
      read_row_ahead(values + passed_[chosen_[i]] * call_.value.stride[2], s_.value_dim);
    if (num_chosen_ < num_passed_) {
      const float least = least_of_chosen(r);
      num_chosen_ = 0;
      for (int64_t i = 0; i < num_passed_; ++i) {
        if (bounds_[i] >= cut) continue;
        const int32_t key = passed_[i];
        if (bounds_[i] + 2 * row.errors[key / kKeptPanel] >= least || is_unscreened(key))
          chosen_[num_chosen_++] = int32_t(i);
        else
          passed_[i] = -1;
      }
      score_chosen(r);
    }
    store_found(r, row);
  }

  static constexpr int64_t kMostValuesAhead = 512;  // more would push one another out of the second-level cache

  static void read_row_ahead(const T* row, int64_t dim) {
    for (int64_t byte = 0; byte < dim * int64_t(sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 2);
  }

  // A number that k of the chosen keys reach, in the units of bounds; a little less, as it is rounded. -inf where fewer have a bound.
  float least_of_chosen(int64_t r) const {
    const IndexedQuery& query = queries_[r];
    if (num_chosen_ < rows_[r].k) return -kInfinity<float>;
    double least = kInfinity<double>;
    for (int64_t i = 0; i < num_chosen_; ++i) {
      const float score = scores_[chosen_[i]] + added_to(r, passed_[chosen_[i]]);
      if (!(score > -Types<float>::largest && score < Types<float>::largest)) return -kInfinity<float>;
      least = smaller(least, double(score));
    }
    const double inverse = 1 / double(query.unit), size = least < 0 ? -least : least;
    const double in_units = (least - query.centre - 1e-6 * size - 1e-9 * query.centre_size) * inverse;
    return in_units > -1e38 && in_units < 1e38 ? float(in_units - 1e-6 * (in_units < 0 ? -in_units : in_units)) : -kInfinity<float>;
  }

  float added_to(int64_t r, int64_t key) const {
    if (!additive_part_.any()) return 0;
    float added;
    additive_part_.strided(rows_[r].head, rows_[r].query, key, 1, 1, &added);
    return added;
  }

  bool is_unscreened(int64_t key) const {
    return has_unscreened_ && (unscreened_of(key / kKeptPanel) >> key % kKeptPanel & 1) != 0;
  }

  void score_chosen(int64_t r) {
    const T* const keys = keys_of_block();
    const float* const query = query_of(r / kTileRows) + r % kTileRows;
    const int64_t stride = call_.key.stride[2];
    if (shared_.call.reads_ahead) read_chosen_ahead(keys, stride);
    // Far ahead: each of these rows is waited for alone otherwise.
    constexpr int64_t kAhead = 8 * kLanes<float>;
    int64_t ahead = 0;
    const auto read_ahead = [&](int64_t end) {
      for (; ahead < smaller(end, num_chosen_); ++ahead) read_row_ahead(keys + passed_[chosen_[ahead]] * stride, s_.head_dim);
    };
    for (int64_t first = 0; first < num_chosen_; first += kLanes<float>) {
      read_ahead(first + kAhead);
      const T* rows[kLanes<float>];
      float scores[kLanes<float>];
      for (int64_t i = 0; i < kLanes<float>; ++i) rows[i] = keys + passed_[chosen_[smaller(first + i, num_chosen_ - 1)]] * stride;
      score_few<T, float>(1, query, rows, false, s_.head_dim, scores, 0);
      for (int64_t i = 0; i < smaller<int64_t>(kLanes<float>, num_chosen_ - first); ++i) scores_[chosen_[first + i]] = scores[i];
    }
  }

  // A page that is waited for alone takes 100 us from a disk like those of virtual machines, one of many that are asked for at
  // once 20 us.
  void read_chosen_ahead(const T* keys, int64_t stride) const {
#if defined(__linux__)
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    uintptr_t asked = 0;
    for (int64_t i = 0; i < num_chosen_; ++i) {
      const uintptr_t row = reinterpret_cast<uintptr_t>(keys + passed_[chosen_[i]] * stride);
      const uintptr_t first = row / page * page, end = row + uintptr_t(s_.head_dim) * sizeof(T);
      if (first == asked && end <= first + page) continue;
      madvise(reinterpret_cast<void*>(first), end - first, MADV_WILLNEED);
      asked = first;
    }
#else
    (void)keys, (void)stride;
#endif
  }

  void store_found(int64_t r, const RowScores<float>& row) {
    int64_t count = 0;
    float lowest = Types<float>::largest;
    bool is_right = true;
    for (int64_t i = 0; i < num_passed_; ++i) {
      const int32_t key = passed_[i];
      if (key < 0) continue;
      const float added = added_to(r, key);
      if (added == -kInfinity<float>) continue;
      is_right = is_right && (is_unscreened(key) || is_within(r, scores_[i], added, bounds_[i], row.errors[key / kKeptPanel]));
      const float score = additive_part_.any() ? scores_[i] + added : scores_[i];
      if (score < -Types<float>::largest) continue;
      lowest = score < lowest ? score : lowest;
      scores_[count] = score;
      passed_[count++] = key;
    }
    if (!is_right) __atomic_store_n(shared_.is_stale, true, __ATOMIC_RELAXED);
    Candidates<float>& found = rows_[r].found;
    found.threshold = lowest;
    for (int64_t i = 0; i < count; i += kLanes<float>) {
      uint32_t lanes = not_less(load(scores_ + i), broadcast(found.threshold));
      if (count - i < kLanes<float>) lanes &= (1u << (count - i)) - 1;
      found.count += compact_lanes(scores_ + i, passed_ + i, lanes, found.scores + found.count, found.indices + found.count);
      if (found.count > capacity_) make_room(r);
    }
  }

  // Whether a key's score lies between its bounds. If not, the index is of other keys.
  bool is_within(int64_t r, float score, float added, float bound, float error) const {
    const IndexedQuery& query = queries_[r];
    const double inverse = 1 / double(query.unit), more = double(added) * inverse;
    if (bound <= kFarBound || !(more > -1e37 && more < 1e37)) return true;  // nothing else counts beside it
    const double exact = (double(score) - query.centre) * inverse + more, above = exact - double(bound);
    const double size = (exact < 0 ? -exact : exact) + (more < 0 ? -more : more);
    const double rounding = 1e-6 * (size + double(error)) + 1e-9 * query.centre_size * inverse + 1e-30;
    return above >= -rounding && above <= 2 * double(error) + rounding;
  }

  const Shared& shared_;
  Arena arena_;
  KeptKeys index_ = {};
  int64_t quads_ = 0, width_ = 0, num_passed_ = 0, num_chosen_ = 0;
  bool has_unscreened_ = false;
  Quad* numbers_ = nullptr;
  int32_t *base_ = nullptr, *passed_ = nullptr, *chosen_ = nullptr;
  IndexedQuery* queries_ = nullptr;
  float *query_ = nullptr, *centre_ = nullptr, *errors_ = nullptr, *bounds_ = nullptr, *scores_ = nullptr;
};

template <class T>
bool run_indexed_rows(const IndexedForward& call, const Parallel& parallel) {
  const typename IndexedRows<T>::Shared shared = {call, call.is_stale};
  return run_few_rows<T, float, IndexedRows<T>>(call.forward, parallel, &shared);
}
