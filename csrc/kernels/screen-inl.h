// Screening: which keys may reach a row's threshold, judged by products of 8-bit integers with an error bound that is
// proven, so that no key is missed. Only the keys that pass are scored in float32. Only for targets that multiply bytes.
//
// A row's query q (float32, times the scale of scores) is t Q + an error, Q in -127..127 or, without VNNI, fewer. For key j = c + s K_j + an error:
//   |q.k_j - q.c - t s Q.K_j| <= |q| |error of j| + |error of q| s |K_j|                   (Cauchy-Schwarz, twice)
// and q.k_j as a chain of float32 operations is off by |q| |k_j| (D + 2) 2^-24 at most. Divided by t s, with N = |q| / t,
// R = |error of q| / t, and a panel's error and norm from its index: a key whose score reaches g has
//   Q.K_j >= T / s - N error - R norm,   T = (g - q.c) / t.
// This whole number starts the sums, so that the sign of each is the answer.

// T of a row that takes every key.
constexpr float kTakesAll = -Types<float>::largest;

// bits[r * stride] gets a bit for each of the 32 keys of a panel whose sum, beyond start[r], is not negative.
template <int kRows>
__attribute__((noinline)) void screen_rows(const int32_t* query, const uint8_t* keys, int64_t quads, const int32_t* start,
                                           uint32_t* bits, int64_t stride) {
  PassedBits<kRows> passed;
#pragma GCC unroll 4
  for (int part = 0; part < kPanelParts; ++part) {
    Sums sums[kRows][2];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = (Sums)(IntVector{} + start[r]);
    add_products<kRows>(query, keys + part * 4 * kPartKeys, quads, sums);
    passed.add(part, sums);
  }
  passed.store(bits, stride);
}

// scores[r * stride + lane] = scale * the sum: a score less q.c, in units of t.
template <int kRows>
__attribute__((noinline)) void approximate_rows(const int32_t* query, const uint8_t* keys, int64_t quads, const int32_t* start,
                                                float scale, float* scores, int64_t stride) {
#pragma GCC unroll 4
  for (int part = 0; part < kPanelParts; ++part) {
    Sums sums[kRows][2];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = (Sums)(IntVector{} + start[r]);
    add_products<kRows>(query, keys + part * 4 * kPartKeys, quads, sums);
    float* const to = scores + part * kPartKeys;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      store<float>(to + r * stride, as_float((IntVector)sums[r][0]) * scale);
      store<float>(to + r * stride + kLanes<float>, as_float((IntVector)sums[r][1]) * scale);
    }
  }
}

inline void screen_tile(int64_t num_rows, const int32_t* query, const uint8_t* keys, int64_t quads, const int32_t* start,
                        uint32_t* bits, int64_t stride) {
  if (num_rows == 1)
    screen_rows<1>(query, keys, quads, start, bits, stride);
  else if (num_rows <= 4)
    screen_rows<4>(query, keys, quads, start, bits, stride);
  else
    screen_rows<kTileRows>(query, keys, quads, start, bits, stride);
}

inline void approximate_tile(int64_t num_rows, const int32_t* query, const uint8_t* keys, int64_t quads, const int32_t* start,
                             float scale, float* scores, int64_t stride) {
  if (num_rows <= 4)
    approximate_rows<4>(query, keys, quads, start, scale, scores, stride);
  else
    approximate_rows<kTileRows>(query, keys, quads, start, scale, scores, stride);
}

// A piece is as much of a key as KeyPieces holds: a vector's numbers, or twice as many of half precision.
template <class T>
constexpr int kInWord = 4 / sizeof(T);
template <class T>
constexpr int kPiece = KeyPieces::words * kInWord<T>;

// sum + query . key for a piece of each key of a vector, which begin at these offsets; added in the order of elements. Unless
// kWhole only `count` elements. With kBreaks an infinite element becomes NaN.
template <class T, bool kBreaks, bool kWhole>
inline __attribute__((always_inline)) FloatVector add_pieces(const float* query, const T* keys, const int64_t* offsets, int64_t count,
                                                             FloatVector sum) {
  KeyPieces pieces;
  pieces.load<T, kWhole>(keys, offsets, count);
#pragma GCC unroll 16
  for (int i = 0; i < kPiece<T>; ++i) {
    if (!kWhole && i == count) break;
    FloatVector column = number_in(pieces.word(i / kInWord<T>), i % kInWord<T>, T());
    if (kBreaks) column = column + column * 0.0f;
    sum = multiply_add<float>(broadcast(query[i]), column, sum);
  }
  return sum;
}

// Longer keys are waited for, whatever fills the time: with two groups at once they take 4 % more.
constexpr int64_t kPairedKeyBytes = 256;

// query . key for groups of a vector's keys, each summed in the order of elements as score_tile sums, so that both have the same
// bits. Such a sum waits for each addition: the work on a second group fills the time.
template <class T, bool kBreaks, int kGroups>
inline __attribute__((always_inline)) void score_groups(const float* query, const T* keys, const int64_t* offsets, int64_t dim,
                                                        float* scores) {
  constexpr int kLanesOf = kLanes<float>;
  FloatVector sums[kGroups] = {};
  int64_t d = 0;
#pragma GCC unroll 1
  for (; d + 2 * kPiece<T> <= dim; d += 2 * kPiece<T>) {  // two pieces for each time that an offset is read
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      sums[g] = add_pieces<T, kBreaks, true>(query + d, keys + d, offsets + kLanesOf * g, 0, sums[g]);
      sums[g] = add_pieces<T, kBreaks, true>(query + d + kPiece<T>, keys + d + kPiece<T>, offsets + kLanesOf * g, 0, sums[g]);
    }
  }
  for (; d < dim; d += kPiece<T>) {
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g)
      sums[g] = add_pieces<T, kBreaks, false>(query + d, keys + d, offsets + kLanesOf * g, smaller<int64_t>(kPiece<T>, dim - d), sums[g]);
  }
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) store<float>(scores + kLanesOf * g, sums[g]);
}

// A row's query for the screen and for the scores of keys that pass.
struct ScreenedRow {
  int32_t base;       // -kKeyOffset times the sum of Q: what the offset of stored keys adds, taken back
  float unit;         // t
  float size, error;  // N and R, rounded up; size 0 where the query has no bound, which takes all keys
  float threshold;    // T
  double centre;      // q.c
};

// The screened rows of one block.
template <class T>
class Screen {
 public:
  void take(Arena& arena, int64_t max_rows, int64_t head_dim) {
    quads_ = ceil_div<int64_t>(head_dim, 4);
    head_dim_ = head_dim;
    width_ = whole_vectors(head_dim);
    queries_ = arena.take<float>(max_rows * width_);
    numbers_ = arena.take<uint8_t>(max_rows * width_);
    rows_ = arena.take<ScreenedRow>(max_rows);
    tile_ = arena.take<int32_t>(kTileRows * quads_);
  }

  ScreenedRow& row(int64_t r) { return rows_[r]; }
  const KeyIndex& index() const { return *index_; }

  void start(const KeyIndex& index) { index_ = &index; }

  // Rounds the query of row r.
  void set_query(int64_t r, const T* query, float scale) {
    float* q = queries_ + r * width_;
    ScreenedRow& row = rows_[r];
    FloatVector most = {}, squares = {}, broken = {};
    DoubleVector centre = {};
    for (int64_t d = 0; d < width_; d += kLanes<float>) {
      const FloatVector raw = load_widened(query + d, head_dim_ - d), v = (raw + raw * 0.0f) * scale;
      store<float>(q + d, v);
      broken = multiply_add<float>(v, FloatVector{}, broken);
      most = higher_of(most, reach_of(v));
      squares = multiply_add<float>(v, v, squares);
      for (int half = 0; half < 2; ++half)
        centre = multiply_add<double>(widened_half(q + d + half * kLanes<double>), widened_half(index_->centre + d + half * kLanes<double>), centre);
    }
    const float high = most_lane(most);
    const bool is_ordinary = nan_lanes(broken) == 0 && high > 1e-12f && high < kLargestScreened;
    row = {0, 1, 0, 0, kTakesAll, 0};
    uint8_t* numbers = numbers_ + r * width_;
    if (!is_ordinary) {
      for (int64_t d = 0; d < width_; ++d) numbers[d] = 0;
      return;
    }
    row.unit = high / kQuerySteps;
    const float inverse = 1 / row.unit;
    FloatVector errors = {};
    IntVector sum = {};
    for (int64_t d = 0; d < width_; d += kLanes<float>) {
      const FloatVector v = load(q + d);
      const IntVector n = rounded(v * inverse);
      const FloatVector e = v - as_float(n) * row.unit;
      errors = multiply_add<float>(e, e, errors);
      sum += n;
      store_bytes(numbers + d, n);
    }
    const float norm = square_root(sum_of_floats(squares)) * (1 + 1e-4f);
    row.base = -kKeyOffset * sum_of_ints(sum);
    row.size = norm * inverse * (1 + 1e-4f);
    row.error = (square_root(sum_of_floats(errors)) * (1 + 1e-4f) + 1e-6f * norm) * inverse * (1 + 1e-4f);
    row.centre = sum_of_doubles(centre);
  }

  // The score that row r has where its sum times the scale, as approximate() gives it, is x; a little lower, so that keys
  // which are all alike reach it in spite of roundings.
  float score_at(int64_t r, float x) const {
    const ScreenedRow& row = rows_[r];
    const double product = double(x) * double(row.unit);
    const double score = row.centre + product - 4e-6 * (magnitude(product) + 2 * magnitude(row.centre)) - slack(row);
    return score < Types<float>::largest ? float(score) : Types<float>::largest;  // also where x is infinite
  }

  // Row r takes every key whose score is not below g.
  void set_threshold(int64_t r, float g) {
    ScreenedRow& row = rows_[r];
    row.threshold = kTakesAll;
    if (row.size == 0 || !(g > -Types<float>::largest)) return;
    // What is added to a score rounds it once more, by a share of g where it comes near.
    const double t = (double(g) - row.centre - 1e-6 * magnitude(g) - slack(row)) / double(row.unit), lower = t - 2e-6 * magnitude(t);
    if (lower > -1e37) row.threshold = float(lower < 1e37 ? lower : 1e37);
  }

  // Choose the rows of the next tile.
  void set_tile(const int64_t* rows, int64_t num_rows) {
    num_rows_ = num_rows;
    for (int64_t i = 0; i < kTileRows; ++i) {
      const uint8_t* from = numbers_ + rows[smaller(i, num_rows - 1)] * width_;
      for (int64_t d = 0; d < quads_; ++d) __builtin_memcpy(tile_ + d * kTileRows + i, from + 4 * d, 4);
      const ScreenedRow& row = rows_[rows[smaller(i, num_rows - 1)]];
      base_[i] = row.base;
      thresholds_[i] = row.threshold;
      sizes_[i] = row.size;
      errors_[i] = row.error;
      inverse_units_[i] = 1 / row.unit;
    }
  }

  // Approximate scores of the tile with panel p.
  void approximate(int64_t p, float* scores, int64_t stride) const {
    approximate_tile(num_rows_, tile_, index_->panel(p), quads_, base_, index_->scale[p], scores, stride);
  }

  // Turns approximate scores of row r into those with what is added; -inf hides. Rounded up, as they decide what passes.
  void add_to_approximate(int64_t r, const float* added, int64_t count, float* scores) const {
    const float inverse = 1 / rows_[r].unit;
    const FloatVector hidden = broadcast(-kInfinity<float>), first = broadcast(kInfinity<float>);
    for (int64_t i = 0; i < count; i += kLanes<float>) {
      const FloatVector more = load(added + i), x = load(scores + i), y = more * inverse;
      const FloatVector sum = x + y, rounded_up = sum + (absolute(x) + absolute(y)) * 3e-7f;
      // NaN takes the first place. The lowest numbers may become -inf here; a row that takes all keys takes them too.
      const FloatVector ranked = sum != sum ? first : sum == hidden ? hidden : rounded_up;
      store<float>(scores + i, more == hidden ? hidden : ranked);
    }
  }

  // The keys of `count` panels that may reach the thresholds of the tile's rows: bits[r * stride + p] has one for each.
  // `most_added` is null or holds, for each panel and kRowLanes rows, the most that is added to a score. `starts` has room for as
  // many numbers. They are computed for all panels first, as a tile would wait for its own.
  void screen(int64_t first_panel, int64_t count, const float* most_added, int32_t* starts, uint32_t* bits,
              int64_t stride) const {
    for (int64_t p = 0; p < count; ++p)
      for (int i = 0; i < kRowLanes; i += kLanes<float>) {
        FloatVector thresholds = load(thresholds_ + i);
        if (most_added != nullptr) thresholds = less_added(thresholds, load(most_added + kRowLanes * p + i), load(inverse_units_ + i));
        *reinterpret_cast<IntVector*>(starts + kRowLanes * p + i) = start_of(first_panel + p, i, thresholds);
      }
    for (int64_t p = 0; p < count; ++p)
      screen_tile(num_rows_, tile_, index_->panel(first_panel + p), quads_, starts + kRowLanes * p, bits + p, stride);
    for (int64_t p = 0; index_->has_unscreened && p < count; ++p)
      for (int64_t i = 0; i < num_rows_; ++i) bits[i * stride + p] |= index_->unscreened[first_panel + p];
  }

  // The same for scores that approximate() gave row r, whose panels are the first `count` of the index: a word of bits for each.
  // `limits` has room for a vector more.
  void screen_approximate(int64_t r, int64_t count, const float* scores, float* limits, uint32_t* bits) const {
    const ScreenedRow& row = rows_[r];
    for (int64_t p = 0; p < count; p += kLanes<float>) {
      FloatVector bound = load(index_->inverse + p) * row.threshold;
      bound = bound - load(index_->error + p) * row.size;
      bound = bound - load(index_->norm + p) * row.error;
      const FloatVector limit = (bound - 3.0f) * load(index_->scale + p);
      store<float>(limits + p, limit - absolute(limit) * 1e-6f);
    }
    for (int64_t p = 0; p < count; ++p, scores += kIndexPanel) bits[p] = panel_not_less(scores, limits[p]) | index_->unscreened[p];
  }

  // scores[i] = row r . key indices[i]. Writes less than a vector of scores beyond them, and as many indices.
  void score(int64_t r, const T* keys, int64_t stride, int32_t* indices, int64_t count, float* scores) const {
    if (count == 0) return;
    const int64_t padded = whole_vectors(count);
    for (int64_t i = count; i < padded; ++i) indices[i] = indices[count - 1];
    const float* query = queries_ + r * width_;
    if (index_->has_broken)
      score_keys<true>(query, keys, stride, indices, padded, scores);
    else
      score_keys<false>(query, keys, stride, indices, padded, scores);
  }

 private:
  static double magnitude(double x) { return x < 0 ? -x : x; }

  // q.c is a sum of doubles; the smallest numbers of float32 may be cut off.
  double slack(const ScreenedRow& row) const {
    return 1e-9 * double(row.size) * double(row.unit) * double(index_->centre_norm) + 1e-36;
  }

  // The thresholds of products alone. Where all of a panel is hidden, -inf is added, nothing passes.
  static FloatVector less_added(FloatVector thresholds, FloatVector most_added, FloatVector inverse_units) {
    const FloatVector infinity = broadcast(kInfinity<float>), hidden = -infinity, added = most_added * inverse_units;
    const FloatVector less = thresholds - (added + absolute(added) * 2e-6f);
    const FloatVector of_finite = most_added == infinity || thresholds <= kTakesAll ? hidden : less;
    return most_added == hidden ? infinity : of_finite;
  }

  // What the sums of the tile's rows i .. i + kLanes<float> with panel p start from, so that those of keys that may reach a
  // threshold are not negative.
  IntVector start_of(int64_t p, int i, FloatVector thresholds) const {
    FloatVector bound = thresholds * index_->inverse[p];
    bound = bound - load(sizes_ + i) * index_->error[p];
    bound = bound - load(errors_ + i) * index_->norm[p];
    // Sums beyond 2^30 do not occur: a bound beyond is reached by all or by none.
    const FloatVector limit = broadcast(1073741824.0f);
    bound = higher_of(lower_of(bound, limit), -limit);
    // 3 is more than what these few operations round away, as far as it is not a share of T, N and R, which are rounded.
    return 3 - rounded(bound) + *reinterpret_cast<const IntVector*>(base_ + i);
  }

  // A vector of doubles from numbers of float32.
  static DoubleVector widened_half(const float* from) {
    typedef float Half __attribute__((vector_size(kVectorBytes / 2), aligned(4), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Half*>(from), DoubleVector);
  }

  template <bool kBreaks>
  void score_keys(const float* query, const T* keys, int64_t stride, const int32_t* indices, int64_t padded, float* scores) const {
    const bool may_pair = head_dim_ * int64_t(sizeof(T)) <= kPairedKeyBytes;
    constexpr int kLanesOf = kLanes<float>;
    alignas(64) int64_t offsets[2 * kLanesOf];
    for (int64_t i = 0, groups; i < padded; i += kLanesOf * groups) {
      groups = may_pair && i + 2 * kLanesOf <= padded ? 2 : 1;
      for (int64_t n = 0; n < kLanesOf * groups; ++n) offsets[n] = indices[i + n] * stride;
      if (groups == 2)
        score_groups<T, kBreaks, 2>(query, keys, offsets, head_dim_, scores + i);
      else
        score_groups<T, kBreaks, 1>(query, keys, offsets, head_dim_, scores + i);
    }
  }

  const KeyIndex* index_ = nullptr;
  int64_t quads_ = 0, head_dim_ = 0, width_ = 0, num_rows_ = 0;
  float* queries_ = nullptr;
  uint8_t* numbers_ = nullptr;
  int32_t* tile_ = nullptr;
  ScreenedRow* rows_ = nullptr;
  alignas(64) int32_t base_[kRowLanes] = {};
  alignas(64) float thresholds_[kRowLanes] = {}, sizes_[kRowLanes] = {}, errors_[kRowLanes] = {}, inverse_units_[kRowLanes] = {};
};
