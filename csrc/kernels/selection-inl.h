// The k best of a row's candidates.

// The candidates of one row: scores and key indices in two runs, [0, second_run) and [second_run, count), each ascending
// by index. Only scores that are not below the threshold need to be added.
template <class A>
struct Candidates {
  A* scores;
  int32_t* indices;
  int64_t count;
  int64_t second_run;
  A threshold;
};

inline int32_t ordinal(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline int64_t ordinal(double x) {
  int64_t bits;
  __builtin_memcpy(&bits, &x, 8);
  return bits ^ ((bits >> 63) & 0x7fffffffffffffff);
}

inline float from_ordinal(int32_t n) {
  n ^= (n >> 31) & 0x7fffffff;
  float x;
  __builtin_memcpy(&x, &n, 4);
  return x;
}

inline double from_ordinal(int64_t n) {
  n ^= (n >> 63) & 0x7fffffffffffffff;
  double x;
  __builtin_memcpy(&x, &n, 8);
  return x;
}

// A number strictly between low and high, or low if there is none. The middle of the values converges fast on ordinary
// scores; the middle of the ordinals ends the search of any others.
template <class A>
A between(A low, A high, int step) {
  const A middle = low / 2 + high / 2;
  if (step < 12 && low < middle && middle < high) return middle;
  const auto a = ordinal(low), b = ordinal(high);
  return from_ordinal((a & b) + ((a ^ b) >> 1));
}

template <class A>
struct Cut {
  A at;           // at least k scores are not below it
  int64_t count;  // how many are not below it; more than `most` only if too many scores are equal to `at`
};

template <class A>
struct Eligible {
  int64_t count;  // not below the lowest finite number
  A lowest;       // of those above -inf
};

// What a cut of n scores, whole vectors without NaN, begins with.
template <class A>
Eligible<A> eligible_among(const A* scores, int64_t n) {
  int64_t count = 0;
  Vector<A> lowest = broadcast(Types<A>::largest);
  const Vector<A> hidden = broadcast(-kInfinity<A>), finite = broadcast(-Types<A>::largest);
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    const Vector<A> v = load(scores + i);
    count += count_bits(not_less(v, finite));
    lowest = v > hidden && v < lowest ? v : lowest;
  }
  A low = lowest[0];
  for (int lane = 1; lane < kLanes<A>; ++lane) low = smaller<A>(low, lowest[lane]);
  return {count, low};
}

// Find a cut that between k and `most` of n scores (no NaN) reach. `low` is a cut that at least k reach.
template <class A>
Cut<A> find_cut(const A* scores, int64_t n, int64_t k, int64_t most, A low, int64_t count_at_low) {
  Vector<A> highest = broadcast<A>(low);
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) {
    const Vector<A> v = load(scores + i);
    highest = v > highest ? v : highest;
  }
  A high = largest_lane<A>(highest);
  for (; i < n; ++i) high = larger(high, scores[i]);
  // Invariant: at least k scores reach `low`, fewer than k reach `high`.
  const int64_t count_at_high = count_not_less(scores, n, high);
  if (count_at_high >= k) return {high, count_at_high};
  for (int step = 0; count_at_low > most; ++step) {
    const A middle = between(low, high, step);
    if (middle == low) break;
    const int64_t count = count_not_less(scores, n, middle);
    if (count >= k) {
      low = middle;
      count_at_low = count;
    } else {
      high = middle;
    }
  }
  return {low, count_at_low};
}

// Find a cut that exactly k of n scores reach, or as few more as there can be. All n reach `low`. Tried first is where rows before were
// cut: `fall` is how far up the number of scores that reach a place falls by a factor e.
template <class A>
Cut<A> find_cut_near(const A* scores, int64_t n, int64_t k, A low, A& fall) {
  const A ratio = A(n) / A(k), logarithm = 2 * (ratio - 1) / (ratio + 1), start = low;
  A at = low + fall * logarithm, high = kInfinity<A>;
  Cut<A> cut = {low, n};
  for (int tries = 0; tries < 8; ++tries) {
    if (!(low < at && at < high)) {
      at = low / 2 + high / 2;
      if (!(low < at && at < high)) break;
    }
    const int64_t count = count_not_less(scores, n, at);
    if (count >= k) {
      cut = {at, count};
      low = at;
      if (count == k) break;
    } else {
      high = at;
    }
    at += A(count - k) * fall / A(k);
  }
  if (cut.count != k) cut = find_cut(scores, n, k, k, cut.at, cut.count);
  const A measured = (cut.at - start) / logarithm;
  if (measured > 0 && measured < Types<A>::largest) fall = fall > 0 ? fall + (measured - fall) / 4 : measured;
  return cut;
}

#if defined(__AVX512F__)
// Merge a first run that lies apart with the second, which lies in the place that it has in the row if all of the first come
// before it: 16 at a time, and no branch for each. Writes up to 15 beyond the row.
inline void merge_by_rank(const float* first_scores, const int32_t* first_indices, int64_t first_count, float* scores,
                          int32_t* indices, int64_t count) {
  const int64_t second_count = count - first_count;
  int64_t compared = 0;  // those of the second run before it are lower than what is left of the first
  // The place of entry a of the first run. What was written over the second run is lower than it too.
  const auto place_of = [&](int64_t a) {
    for (;; compared += kLanes<float>) {
      const int64_t left = smaller<int64_t>(second_count - compared, kLanes<float>);
      const __m512i other = _mm512_loadu_si512(indices + first_count + compared);
      const uint32_t lower = _mm512_cmplt_epi32_mask(other, _mm512_set1_epi32(first_indices[a])) & ((1u << left) - 1);
      if (lower != 0xffff) return a + compared + count_bits(lower);
    }
  };
  int64_t a = 0, place = place_of(0);
  for (int64_t to = 0; to < count; to += kLanes<float>) {
    const int64_t first = a;
    uint32_t of_first = 0;
    for (; place < to + kLanes<float>; place = a < first_count ? place_of(a) : count + kLanes<float>) {
      of_first |= 1u << (place - to);
      ++a;
    }
    const int64_t second = first_count + to - first;
    const __m512i index = _mm512_maskz_expand_epi32(__mmask16(of_first), _mm512_loadu_si512(first_indices + first));
    const __m512 score = _mm512_maskz_expand_ps(__mmask16(of_first), _mm512_loadu_ps(first_scores + first));
    const __m512i other_index = _mm512_loadu_si512(indices + second);
    const __m512 other_score = _mm512_loadu_ps(scores + second);
    _mm512_storeu_si512(indices + to, _mm512_mask_expand_epi32(index, __mmask16(~of_first), other_index));
    _mm512_storeu_ps(scores + to, _mm512_mask_expand_ps(score, __mmask16(~of_first), other_score));
  }
}
#endif

// Merge the two runs into one that ascends by index. The spare arrays hold at least as many.
template <class A>
void merge_runs(Candidates<A>& row, A* spare_scores, int32_t* spare_indices) {
  const int64_t first_count = row.second_run, count = row.count;
  row.second_run = count;
  if (first_count == count || first_count == 0 || row.indices[first_count - 1] < row.indices[first_count]) return;
  __builtin_memcpy(spare_scores, row.scores, size_t(first_count) * sizeof(A));
  __builtin_memcpy(spare_indices, row.indices, size_t(first_count) * sizeof(int32_t));
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return merge_by_rank(spare_scores, spare_indices, first_count, row.scores, row.indices, count);
#endif
  int64_t a = 0, b = first_count, to = 0;
  while (a < first_count && b < count) {
    const bool take_first = spare_indices[a] < row.indices[b];
    row.scores[to] = take_first ? spare_scores[a] : row.scores[b];
    row.indices[to++] = take_first ? spare_indices[a] : row.indices[b];
    a += take_first;
    b += !take_first;
  }
  // What is left of the second run is in its place already.
  __builtin_memcpy(row.scores + to, spare_scores + a, size_t(first_count - a) * sizeof(A));
  __builtin_memcpy(row.indices + to, spare_indices + a, size_t(first_count - a) * sizeof(int32_t));
}

// Keep the candidates that reach `at`, in place and in order.
template <class A>
void keep_not_less(Candidates<A>& row, A at) {
  const Vector<A> bound = broadcast<A>(at);
  int64_t to = 0, second_run = 0;
  for (int64_t i = 0; i < row.count; i += kLanes<A>) {
    uint32_t bits = not_less(load(row.scores + i), bound);
    if (row.count - i < kLanes<A>) bits &= (1u << (row.count - i)) - 1;
    if (row.second_run > i) {
      const int64_t first = row.second_run - i;
      second_run += count_bits(first >= kLanes<A> ? bits : bits & ((1u << first) - 1));
    }
    to += compact_lanes(row.scores + i, row.indices + i, bits, row.scores + to, row.indices + to);
  }
  row.count = to;
  row.second_run = second_run;
}

// Keep the k best candidates, of equal ones those with lower indices, ascending by index. Raise the threshold to the worst
// of them. NaN counts as the best of all and becomes inf. With k or fewer candidates all are kept.
template <class A>
__attribute__((noinline)) void keep_best(Candidates<A>& row, int64_t k, A* spare_scores, int32_t* spare_indices, A& fall) {
  if (row.count > k) {
    const Cut<A> cut = find_cut_near(row.scores, row.count, k, row.threshold, fall);
    keep_not_less(row, cut.at);
    row.threshold = cut.at;
  }
  if (count_not_less(row.scores, row.count, kInfinity<A>) > 0) {  // seldom
    for (int64_t i = 0; i < row.count; ++i)
      if (row.scores[i] != row.scores[i]) row.scores[i] = kInfinity<A>;
    if (row.count > k) {
      row.threshold = find_cut(row.scores, row.count, k, k, row.threshold, row.count).at;
      keep_not_less(row, row.threshold);
    }
  }
  merge_runs(row, spare_scores, spare_indices);
  if (row.count > k) {  // too many are equal to the worst
    int64_t num_better = 0;
    for (int64_t i = 0; i < row.count; ++i) num_better += row.scores[i] > row.threshold;
    int64_t num_equal_left = k - num_better, to = 0;
    for (int64_t i = 0; i < row.count; ++i) {
      const bool is_equal = !(row.scores[i] > row.threshold);
      if (is_equal && num_equal_left-- <= 0) continue;
      row.scores[to] = row.scores[i];
      row.indices[to++] = row.indices[i];
    }
    row.count = row.second_run = to;
  }
}
