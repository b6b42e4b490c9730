// Screening: which keys may reach a row's threshold, judged by products of 8-bit integers with an error bound that is
// proven, so that no key is missed. Only the keys that pass are scored in float32. Only for x86 with VNNI.
//
// A row's query q (float32, times the scale of scores) is t Q + an error, Q in -127..127. For key j = c + s K_j + an error:
//   |q.k_j - q.c - t s Q.K_j| <= |q| |error of j| + |error of q| s |K_j|                   (Cauchy-Schwarz, twice)
// and q.k_j as a chain of float32 operations is off by |q| |k_j| (D + 2) 2^-24 at most. Divided by t s, with N = |q| / t,
// R = |error of q| / t, and a panel's error and norm from its index: a key whose score reaches g has
//   Q.K_j >= T / s - N error - R norm,   T = (g - q.c) / t.
// This whole number starts the sums, so that the sign of each is the answer.

// T of a row that takes every key.
constexpr float kTakesAll = -Types<float>::largest;

// Sums of Q.(K + 128) beyond `start` for kRows rows and the 32 keys of a panel. query[d * kTileRows + r] holds four dimensions.
// The compiler spills sums of type __m512i to the stack where an operation on integers reads them: hence this type.
typedef int32_t ScreenSums __attribute__((vector_size(64)));

template <int kRows>
inline __attribute__((always_inline)) void add_products(const int32_t* query, const uint8_t* keys, int64_t quads,
                                                        ScreenSums (&sums)[kRows][2]) {
#pragma GCC unroll 1
  for (int64_t d = 0; d < quads; ++d) {
    const __m512i low = _mm512_load_si512(keys), high = _mm512_load_si512(keys + 64);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512i q = _mm512_set1_epi32(query[r]);
      sums[r][0] = (ScreenSums)_mm512_dpbusd_epi32((__m512i)sums[r][0], low, q);
      sums[r][1] = (ScreenSums)_mm512_dpbusd_epi32((__m512i)sums[r][1], high, q);
    }
    query += kTileRows;
    keys += 4 * kIndexPanel;
  }
}

// bits[r * stride] gets a bit for each key whose sum is not negative.
template <int kRows>
__attribute__((noinline)) void screen_rows(const int32_t* query, const uint8_t* keys, int64_t quads, const int32_t* start,
                                           uint32_t* bits, int64_t stride) {
  ScreenSums sums[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = (ScreenSums)_mm512_set1_epi32(start[r]);
  add_products<kRows>(query, keys, quads, sums);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    bits[r * stride] = ~_mm512_kunpackw(_mm512_movepi32_mask((__m512i)sums[r][1]), _mm512_movepi32_mask((__m512i)sums[r][0]));
}

// scores[r * stride + lane] = scale * the sum: a score less q.c, in units of t.
template <int kRows>
__attribute__((noinline)) void approximate_rows(const int32_t* query, const uint8_t* keys, int64_t quads, const int32_t* start,
                                                float scale, float* scores, int64_t stride) {
  ScreenSums sums[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = (ScreenSums)_mm512_set1_epi32(start[r]);
  add_products<kRows>(query, keys, quads, sums);
  const __m512 unit = _mm512_set1_ps(scale);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(scores + r * stride, _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)sums[r][0]), unit));
    _mm512_storeu_ps(scores + r * stride + 16, _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)sums[r][1]), unit));
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

// The lowest bits of `bits`, in their order, in the places that are set in `places`.
inline uint64_t deposit_bits(uint64_t bits, uint64_t places) { return _pdep_u64(bits, places); }

// Writes first + the number of each set bit; returns how many. Writes up to 16 numbers beyond them.
inline int64_t append_set_bits(uint64_t bits, int32_t first, int32_t* to) {
  alignas(64) static constexpr uint8_t kNumbers[64] = {
      0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
      32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  const __m512i set = _mm512_maskz_compress_epi8(bits, _mm512_load_si512(kNumbers)), base = _mm512_set1_epi32(first);
  const int count = count_bits(bits);
  _mm512_storeu_si512(to, _mm512_add_epi32(base, _mm512_cvtepu8_epi32(_mm512_castsi512_si128(set))));
  if (__builtin_expect(count > 16, 0)) {
    _mm512_storeu_si512(to + 16, _mm512_add_epi32(base, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(set, 1))));
    _mm512_storeu_si512(to + 32, _mm512_add_epi32(base, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(set, 2))));
    _mm512_storeu_si512(to + 48, _mm512_add_epi32(base, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(set, 3))));
  }
  return count;
}

// 32 bytes of a key from an element on: eight numbers, or sixteen of half precision. Zeros from element `count` on.
template <class T>
constexpr int kPiece = 32 / sizeof(T);

template <class T, bool kWhole>
inline __m256 piece_of(const T* from, int64_t count) {
  if constexpr (kWhole)
    return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  else
    return _mm256_castsi256_ps(_mm256_maskz_loadu_epi8(__mmask32((uint64_t(1) << (count * int64_t(sizeof(T)))) - 1), from));
}

template <class T, bool kWhole>
inline __attribute__((always_inline)) __m512 two_pieces(const T* low, const T* high, int64_t count) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(piece_of<T, kWhole>(low, count)), piece_of<T, kWhole>(high, count), 1);
}

// Transposes each block of 4 by 4 lanes of four rows.
inline __attribute__((always_inline)) void transpose_blocks(const __m512* rows, __m512* columns) {
  const __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1])), high = _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1]));
  const __m512d low2 = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3])), high2 = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3]));
  columns[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, low2));
  columns[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, low2));
  columns[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, high2));
  columns[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, high2));
}

// Number i of each lane: lanes hold one number, or two of half precision.
inline __m512 number_in(__m512 lanes, int, float) { return lanes; }
inline __m512 number_in(__m512 lanes, int i, BFloat16) {
  const __m512i bits = _mm512_castps_si512(lanes);
  return _mm512_castsi512_ps(i == 0 ? _mm512_slli_epi32(bits, 16) : _mm512_and_si512(bits, _mm512_set1_epi32(int32_t(0xffff0000))));
}
inline __m512 number_in(__m512 lanes, int i, Float16) {
  const __m512i bits = _mm512_castps_si512(lanes);
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(i == 0 ? bits : _mm512_srli_epi32(bits, 16)));
}

// sum + query . key for a piece of each of 16 keys, which begin at these offsets; added in the order of elements. With kBreaks
// an infinite element becomes NaN.
template <class T, bool kBreaks, bool kWhole>
inline __attribute__((always_inline)) __m512 add_pieces(const float* query, const T* keys, const int64_t* offsets, int64_t count,
                                                        __m512 sum) {
  __m512 rows[4], low[4], high[4];  // keys 0 to 7, keys 8 to 15
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) rows[i] = two_pieces<T, kWhole>(keys + offsets[i], keys + offsets[4 + i], count);
  transpose_blocks(rows, low);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) rows[i] = two_pieces<T, kWhole>(keys + offsets[8 + i], keys + offsets[12 + i], count);
  transpose_blocks(rows, high);
  constexpr int kInLane = 4 / sizeof(T);
#pragma GCC unroll 16
  for (int i = 0; i < kPiece<T>; ++i) {
    if (!kWhole && i == count) break;
    // Blocks 0 and 2 hold the first four lanes of a piece, 1 and 3 the last.
    const int lane = i / kInLane;
    const __m512 lanes = lane < 4 ? _mm512_shuffle_f32x4(low[lane % 4], high[lane % 4], 0x88) : _mm512_shuffle_f32x4(low[lane % 4], high[lane % 4], 0xdd);
    __m512 column = number_in(lanes, i % kInLane, T());
    if (kBreaks) column = _mm512_fmadd_ps(column, _mm512_setzero_ps(), column);
    sum = _mm512_fmadd_ps(_mm512_set1_ps(query[i]), column, sum);
  }
  return sum;
}

// Longer keys are waited for, whatever fills the time: with two groups at once they take 4 % more.
constexpr int64_t kPairedKeyBytes = 256;

// query . key for groups of 16 keys, each summed in the order of elements as score_tile sums, so that both have the same bits.
// Such a sum waits for each addition: the work on a second group fills the time.
template <class T, bool kBreaks, int kGroups>
inline __attribute__((always_inline)) void score_groups(const float* query, const T* keys, const int64_t* offsets, int64_t dim,
                                                        float* scores) {
  __m512 sums[kGroups];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) sums[g] = _mm512_setzero_ps();
  int64_t d = 0;
#pragma GCC unroll 1
  for (; d + 2 * kPiece<T> <= dim; d += 2 * kPiece<T>) {  // two pieces for each time that an offset is read
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      sums[g] = add_pieces<T, kBreaks, true>(query + d, keys + d, offsets + 16 * g, 0, sums[g]);
      sums[g] = add_pieces<T, kBreaks, true>(query + d + kPiece<T>, keys + d + kPiece<T>, offsets + 16 * g, 0, sums[g]);
    }
  }
  for (; d < dim; d += kPiece<T>) {
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g)
      sums[g] = add_pieces<T, kBreaks, false>(query + d, keys + d, offsets + 16 * g, smaller<int64_t>(kPiece<T>, dim - d), sums[g]);
  }
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) _mm512_storeu_ps(scores + 16 * g, sums[g]);
}

// A row's query for the screen and for the scores of keys that pass.
struct ScreenedRow {
  int32_t base;       // -128 times the sum of Q: what the offset of stored keys adds, taken back
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
    queries_ = arena.take<float>(max_rows * head_dim);
    numbers_ = arena.take<int32_t>(max_rows * quads_);
    rows_ = arena.take<ScreenedRow>(max_rows);
    tile_ = arena.take<int32_t>(kTileRows * quads_);
  }

  ScreenedRow& row(int64_t r) { return rows_[r]; }
  const KeyIndex& index() const { return *index_; }

  void start(const KeyIndex& index) { index_ = &index; }

  // Rounds the query of row r.
  void set_query(int64_t r, const T* query, float scale) {
    float* q = queries_ + r * head_dim_;
    ScreenedRow& row = rows_[r];
    __m512 most = _mm512_setzero_ps(), squares = most, broken = most;
    __m512d centre = _mm512_setzero_pd();
    for (int64_t d = 0; d < head_dim_; d += 16) {
      const __mmask16 lanes = lanes_left(d, head_dim_);
      const __m512 raw = load_widened(query + d, lanes);
      const __m512 v = _mm512_mul_ps(_mm512_fmadd_ps(raw, _mm512_setzero_ps(), raw), _mm512_set1_ps(scale));
      const __m512 c = _mm512_maskz_loadu_ps(lanes, index_->centre + d);
      _mm512_mask_storeu_ps(q + d, lanes, v);
      broken = _mm512_fmadd_ps(v, _mm512_setzero_ps(), broken);
      most = _mm512_max_ps(most, _mm512_abs_ps(v));
      squares = _mm512_fmadd_ps(v, v, squares);
      centre = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_castps512_ps256(c)), centre);
      centre = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(c, 1)), centre);
    }
    const float high = _mm512_reduce_max_ps(most);
    const bool is_ordinary = _mm512_cmp_ps_mask(broken, broken, _CMP_UNORD_Q) == 0 && high > 1e-12f && high < kLargestScreened;
    row = {0, 1, 0, 0, kTakesAll, 0};
    int32_t* numbers = numbers_ + r * quads_;
    numbers[quads_ - 1] = 0;  // its last bytes may stand for no dimension
    if (!is_ordinary) {
      for (int64_t d = 0; d < quads_; ++d) numbers[d] = 0;
      return;
    }
    row.unit = high / 127;
    const float inverse = 1 / row.unit;
    __m512 errors = _mm512_setzero_ps();
    __m512i sum = _mm512_setzero_si512();
    for (int64_t d = 0; d < head_dim_; d += 16) {
      const __mmask16 lanes = lanes_left(d, head_dim_);
      const __m512 v = _mm512_maskz_loadu_ps(lanes, q + d);
      const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(inverse)));
      const __m512 e = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(n), _mm512_set1_ps(row.unit), v);
      errors = _mm512_fmadd_ps(e, e, errors);
      sum = _mm512_add_epi32(sum, n);
      _mm_mask_storeu_epi8(reinterpret_cast<int8_t*>(numbers) + d, lanes, _mm512_cvtepi32_epi8(n));
    }
    const float norm = square_root(_mm512_reduce_add_ps(squares)) * (1 + 1e-4f);
    row.base = -128 * _mm512_reduce_add_epi32(sum);
    row.size = norm * inverse * (1 + 1e-4f);
    row.error = (square_root(_mm512_reduce_add_ps(errors)) * (1 + 1e-4f) + 1e-6f * norm) * inverse * (1 + 1e-4f);
    row.centre = _mm512_reduce_add_pd(centre);
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
      const int32_t* from = numbers_ + rows[smaller(i, num_rows - 1)] * quads_;
      for (int64_t d = 0; d < quads_; ++d) tile_[d * kTileRows + i] = from[d];
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
    const __m512 inverse = _mm512_set1_ps(1 / rows_[r].unit), hidden = _mm512_set1_ps(-kInfinity<float>);
    for (int64_t i = 0; i < count; i += 16) {
      const __m512 more = _mm512_loadu_ps(added + i), x = _mm512_loadu_ps(scores + i), y = _mm512_mul_ps(more, inverse);
      const __m512 sum = _mm512_add_ps(x, y), sizes = _mm512_add_ps(_mm512_abs_ps(x), _mm512_abs_ps(y));
      // NaN takes the first place. The lowest numbers may become -inf here; a row that takes all keys takes them too.
      const __mmask16 is_number = _mm512_cmp_ps_mask(sum, sum, _CMP_ORD_Q), is_least = _mm512_cmp_ps_mask(sum, hidden, _CMP_EQ_OQ);
      const __m512 rounded_up = _mm512_mask_mov_ps(_mm512_fmadd_ps(sizes, _mm512_set1_ps(3e-7f), sum), is_least, hidden);
      const __m512 ranked = _mm512_mask_mov_ps(_mm512_set1_ps(kInfinity<float>), is_number, rounded_up);
      _mm512_storeu_ps(scores + i, _mm512_mask_mov_ps(ranked, _mm512_cmp_ps_mask(more, hidden, _CMP_EQ_OQ), hidden));
    }
  }

  // The keys of `count` panels that may reach the thresholds of the tile's rows: bits[r * stride + p] has one for each.
  // `most_added` is null or holds, for each panel and 16 rows, the most that is added to a score. `starts` has room for as many
  // numbers. They are computed for all panels first, as a tile would wait for its own.
  void screen(int64_t first_panel, int64_t count, const float* most_added, int32_t* starts, uint32_t* bits,
              int64_t stride) const {
    for (int64_t p = 0; p < count; ++p) {
      __m512 thresholds = _mm512_load_ps(thresholds_);
      if (most_added != nullptr) thresholds = less_added(thresholds, _mm512_load_ps(most_added + 16 * p));
      _mm512_store_si512(starts + 16 * p, start_of(first_panel + p, thresholds));
    }
    for (int64_t p = 0; p < count; ++p)
      screen_tile(num_rows_, tile_, index_->panel(first_panel + p), quads_, starts + 16 * p, bits + p, stride);
    for (int64_t p = 0; index_->has_unscreened && p < count; ++p)
      for (int64_t i = 0; i < num_rows_; ++i) bits[i * stride + p] |= index_->unscreened[first_panel + p];
  }

  // The same for scores that approximate() gave row r, whose panels are the first `count` of the index: a word of bits for each.
  // `limits` has room for 15 numbers more.
  void screen_approximate(int64_t r, int64_t count, const float* scores, float* limits, uint32_t* bits) const {
    const ScreenedRow& row = rows_[r];
    for (int64_t p = 0; p < count; p += 16) {
      __m512 bound = _mm512_mul_ps(_mm512_set1_ps(row.threshold), _mm512_loadu_ps(index_->inverse + p));
      bound = _mm512_fnmadd_ps(_mm512_set1_ps(row.size), _mm512_loadu_ps(index_->error + p), bound);
      bound = _mm512_fnmadd_ps(_mm512_set1_ps(row.error), _mm512_loadu_ps(index_->norm + p), bound);
      const __m512 limit = _mm512_mul_ps(_mm512_sub_ps(bound, _mm512_set1_ps(3)), _mm512_loadu_ps(index_->scale + p));
      _mm512_storeu_ps(limits + p, _mm512_fnmadd_ps(_mm512_set1_ps(1e-6f), _mm512_abs_ps(limit), limit));
    }
    for (int64_t p = 0; p < count; ++p, scores += kIndexPanel) {
      const __m512 least = _mm512_set1_ps(limits[p]);
      const __mmask16 low = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores), least, _CMP_NLT_UQ);
      const __mmask16 high = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + 16), least, _CMP_NLT_UQ);
      bits[p] = _mm512_kunpackw(high, low) | index_->unscreened[p];
    }
  }

  // scores[i] = row r . key indices[i]. Writes up to 16 scores beyond them, and as many indices.
  void score(int64_t r, const T* keys, int64_t stride, int32_t* indices, int64_t count, float* scores) const {
    if (count == 0) return;
    const int64_t padded = ceil_div<int64_t>(count, 16) * 16;
    for (int64_t i = count; i < padded; ++i) indices[i] = indices[count - 1];
    const float* query = queries_ + r * head_dim_;
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
  __m512 less_added(__m512 thresholds, __m512 most_added) const {
    const __m512 infinity = _mm512_set1_ps(kInfinity<float>), hidden = _mm512_sub_ps(_mm512_setzero_ps(), infinity);
    const __m512 added = _mm512_mul_ps(most_added, _mm512_load_ps(inverse_units_));
    const __m512 rounded_up = _mm512_fmadd_ps(_mm512_abs_ps(added), _mm512_set1_ps(2e-6f), added);
    const __mmask16 takes_all = _mm512_cmp_ps_mask(thresholds, _mm512_set1_ps(kTakesAll), _CMP_LE_OQ);
    const __m512 less = _mm512_mask_mov_ps(_mm512_sub_ps(thresholds, rounded_up), takes_all, hidden);
    const __m512 of_finite = _mm512_mask_mov_ps(less, _mm512_cmp_ps_mask(most_added, infinity, _CMP_EQ_OQ), hidden);
    return _mm512_mask_mov_ps(of_finite, _mm512_cmp_ps_mask(most_added, hidden, _CMP_EQ_OQ), infinity);
  }

  // What the tile's sums with panel p start from, so that those of keys that may reach a threshold are not negative.
  __m512i start_of(int64_t p, __m512 thresholds) const {
    __m512 bound = _mm512_mul_ps(thresholds, _mm512_set1_ps(index_->inverse[p]));
    bound = _mm512_fnmadd_ps(_mm512_load_ps(sizes_), _mm512_set1_ps(index_->error[p]), bound);
    bound = _mm512_fnmadd_ps(_mm512_load_ps(errors_), _mm512_set1_ps(index_->norm[p]), bound);
    // Sums beyond 2^30 do not occur: a bound beyond is reached by all or by none.
    const __m512 limit = _mm512_set1_ps(1073741824.0f);
    bound = _mm512_max_ps(_mm512_min_ps(bound, limit), _mm512_sub_ps(_mm512_setzero_ps(), limit));
    // 3 is more than what these few operations round away, as far as it is not a share of T, N and R, which are rounded.
    const __m512i start = _mm512_sub_epi32(_mm512_set1_epi32(3), _mm512_cvtps_epi32(bound));
    return _mm512_add_epi32(start, _mm512_load_si512(base_));
  }

  template <bool kBreaks>
  void score_keys(const float* query, const T* keys, int64_t stride, const int32_t* indices, int64_t padded, float* scores) const {
    const bool may_pair = head_dim_ * int64_t(sizeof(T)) <= kPairedKeyBytes;
    alignas(64) int64_t offsets[32];
    for (int64_t i = 0, groups; i < padded; i += 16 * groups) {
      groups = may_pair && i + 32 <= padded ? 2 : 1;
      for (int64_t v = 0; v < 2 * groups; ++v) {
        const __m512i index = _mm512_cvtepi32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices + i + 8 * v)));
        _mm512_store_si512(offsets + 8 * v, _mm512_mullo_epi64(index, _mm512_set1_epi64(stride)));
      }
      if (groups == 2)
        score_groups<T, kBreaks, 2>(query, keys, offsets, head_dim_, scores + i);
      else
        score_groups<T, kBreaks, 1>(query, keys, offsets, head_dim_, scores + i);
    }
  }

  const KeyIndex* index_ = nullptr;
  int64_t quads_ = 0, head_dim_ = 0, num_rows_ = 0;
  float* queries_ = nullptr;
  int32_t *numbers_ = nullptr, *tile_ = nullptr;
  ScreenedRow* rows_ = nullptr;
  alignas(64) int32_t base_[16] = {};
  alignas(64) float thresholds_[16] = {}, sizes_[16] = {}, errors_[16] = {}, inverse_units_[16] = {};
};
