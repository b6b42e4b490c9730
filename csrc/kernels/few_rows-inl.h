// Top-k attention, forward, for few rows of a key head, as where one token is generated for all heads of a group. Such a call
// takes the time of reading the keys, so they are read once, as they lie, and nothing is packed:
//   1. Ranges of keys, on as many threads as there are: the scores of all rows of the key head, 16 keys at a time (a vector's
//      lanes), which are transposed in registers. So each score is summed in the order of d, as score_tile sums it, and has
//      the same bits. The best score of every 8 keys is stored beside them.
//   2. Rows: the k-th largest of these bests is a score that k keys reach, for all data. Only the keys of bests that reach it
//      are looked at again.
// A row's scores are there at once, but only for as many key heads as threads work on: linear in the number of keys.

// Rows of a key head up to which this is faster than packing its keys.
constexpr int64_t kMostFewRows = 16;
// Keys of a task, where the keys of a head are split over threads.
constexpr int64_t kFewestRangeKeys = 1024;

// Keys that share a best score: one lane of as many vectors. A block has a vector of bests.
constexpr int kBinKeys = 8;
template <class A>
constexpr int kBlockKeys = kBinKeys * kLanes<A>;

// Numbers of type T in a lane of A.
template <class T, class A>
constexpr int kParts = sizeof(A) / sizeof(T);

// Number i of each lane, widened.
inline FloatVector number_of(FloatVector lanes, int, float) { return lanes; }
inline DoubleVector number_of(DoubleVector lanes, int, double) { return lanes; }
inline FloatVector number_of(FloatVector lanes, int i, BFloat16) {
  const IntVector bits = (IntVector)lanes;
  return (FloatVector)(i == 0 ? bits << 16 : bits & int32_t(0xffff0000));
}
inline FloatVector number_of(FloatVector lanes, int i, Float16) {
  const IntVector bits = i == 0 ? (IntVector)lanes : (IntVector)lanes >> 16;
  const IntVector size = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  // As widen() does it: the exponent's bias differs by 112.
  const IntVector finite = (IntVector)((FloatVector)size * from_bits((127 + 112) << 23));
  return (FloatVector)((size >= (0x7c00 << 13) ? size | 0x7f800000 : finite) | sign);
}

// A vector of a row, of which `left` numbers are there; zeros beyond.
template <class T, class A, bool kWhole>
inline __attribute__((always_inline)) Vector<A> piece_of_row(const T* from, int64_t left) {
  Vector<A> piece = {};
  __builtin_memcpy(&piece, from, kWhole ? sizeof(piece) : size_t(left) * sizeof(T));
  return piece;
}

// Adds element d of each key, in its lane, to the sums.
template <class A, int kRows, bool kBreaks>
inline __attribute__((always_inline)) void add_element(const A* query, int64_t d, Vector<A> element, Vector<A>* sums) {
  if (kBreaks) element = element + element * A(0);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sums[r] = multiply_add<A>(broadcast(query[d * kTileRows + r]), element, sums[r]);
}

// Adds the elements from d on that a vector holds, or `left` of them, of each key.
template <class T, class A, int kRows, bool kBreaks, bool kWhole>
inline __attribute__((always_inline)) void add_elements(const A* query, const T* const* keys, int64_t d, int64_t left,
                                                        Vector<A>* sums) {
  Vector<A> columns[kLanes<A>];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<A>; ++i) columns[i] = piece_of_row<T, A, kWhole>(keys[i] + d, left);
  transpose<A>(columns);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<A>; ++i) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts<T, A>; ++part) {
      const int64_t element = i * kParts<T, A> + part;
      if (!kWhole && element >= left) return;
      add_element<A, kRows, kBreaks>(query, d + element, number_of(columns[i], part, T()), sums);
    }
  }
}

#if defined(__AVX512F__)
// Whole vectors of 32-bit lanes, half of each at a time: fewer shuffles, and they need no constants.
template <class T, int kRows>
inline __attribute__((always_inline)) void add_halves(const float* query, const T* const* keys, int64_t d, FloatVector* sums) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const int64_t first = d + half * 8 * kParts<T, float>;
    __m512 rows[8];  // of keys 0 to 3 and 8 to 11, of keys 4 to 7 and 12 to 15
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int key = i < 4 ? i : i + 4;
      const __m256 low = _mm256_loadu_ps(reinterpret_cast<const float*>(keys[key] + first));
      const __m256 high = _mm256_loadu_ps(reinterpret_cast<const float*>(keys[key + 4] + first));
      rows[i] = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
    }
    __m512d columns[8];
#pragma GCC unroll 2
    for (int part = 0; part < 8; part += 4) {
      const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(rows[part], rows[part + 1]));
      const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(rows[part], rows[part + 1]));
      const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(rows[part + 2], rows[part + 3]));
      const __m512d e = _mm512_castps_pd(_mm512_unpackhi_ps(rows[part + 2], rows[part + 3]));
      columns[part] = _mm512_unpacklo_pd(a, c);
      columns[part + 1] = _mm512_unpackhi_pd(a, c);
      columns[part + 2] = _mm512_unpacklo_pd(b, e);
      columns[part + 3] = _mm512_unpackhi_pd(b, e);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512 low = _mm512_castpd_ps(columns[i % 4]), high = _mm512_castpd_ps(columns[4 + i % 4]);
      const FloatVector column = (FloatVector)(i < 4 ? _mm512_shuffle_f32x4(low, high, 0x88) : _mm512_shuffle_f32x4(low, high, 0xdd));
#pragma GCC unroll 2
      for (int part = 0; part < kParts<T, float>; ++part)
        add_element<float, kRows, false>(query, first + i * kParts<T, float> + part, number_of(column, part, T()), sums);
    }
  }
}
#endif

// The processor's own reading ahead does not follow several keys at once. Into the second-level cache, as the first one's few
// places for lines on the way would all be taken: the time of 16 keys of 128 falls from 2.4 times that of reading them to 1.0.
constexpr int64_t kBytesAhead = 16 << 10;

// scores[r * stride + lane] = the sum over d of query[d * kTileRows + r] * keys[lane][d], in the order of d, for as many keys as
// a vector has lanes and the first num_rows of kRows rows. With kBreaks an infinite element becomes NaN. Returns whether all
// scores are finite: without kBreaks they are right where they are. `follow` says that keys follow one another in memory.
template <class T, class A, int kRows, bool kBreaks>
__attribute__((noinline)) bool score_keys(int64_t num_rows, const A* query, const T* const* keys, bool follow, int64_t dim,
                                          A* scores, int64_t stride) {
  constexpr int64_t kStep = kLanes<A> * kParts<T, A>;
  constexpr int kStepBytes = kLanes<A> * kVectorBytes;
  const char* ahead = reinterpret_cast<const char*>(keys[0]) + kBytesAhead;
  Vector<A> sums[kRows] = {}, broken = {};
  int64_t d = 0;
#pragma GCC unroll 1
  for (; d + kStep <= dim; d += kStep, ahead += kStepBytes) {
    if (follow) {
#pragma GCC unroll 16
      for (int byte = 0; byte < kStepBytes; byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
    }
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4 && !kBreaks) {
      add_halves<T, kRows>(query, keys, d, sums);
      continue;
    }
#endif
    add_elements<T, A, kRows, kBreaks, true>(query, keys, d, kStep, sums);
  }
  if (d < dim) add_elements<T, A, kRows, kBreaks, false>(query, keys, d, dim - d, sums);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (r == num_rows) break;
    store<A>(scores + r * stride, sums[r]);
    broken += sums[r] * A(0);
  }
  A sum = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) sum += broken[lane];
  return sum == sum;
}

template <class T, class A>
void score_few(int64_t num_rows, const A* query, const T* const* keys, bool follow, int64_t dim, A* scores, int64_t stride) {
  // Up to 4 rows take the time of one: a sum waits for each addition.
  constexpr int kMiddle = kTileRows > 8 ? 8 : kTileRows;
  bool is_finite;
  if (num_rows == 1)
    is_finite = score_keys<T, A, 1, false>(1, query, keys, follow, dim, scores, stride);
  else if (num_rows <= 4)
    is_finite = score_keys<T, A, 4, false>(num_rows, query, keys, follow, dim, scores, stride);
  else if (num_rows <= kMiddle)
    is_finite = score_keys<T, A, kMiddle, false>(num_rows, query, keys, follow, dim, scores, stride);
  else
    is_finite = score_keys<T, A, kTileRows, false>(num_rows, query, keys, follow, dim, scores, stride);
  for (int64_t r = 0; !is_finite && r < num_rows; ++r)
    score_keys<T, A, 1, true>(1, query + r, keys, false, dim, scores + r * stride, stride);
}

// The scores of the rows of one key head. Memory is shared by the threads that work on the head.
template <class A>
struct RowScores {
  A* scores;       // [rows, stride]
  A* bests;        // [rows, stride / kBinKeys]
  int64_t stride;  // a multiple of a block
  A* errors;       // [rows, stride / kErrorKeys], only where scores are bounds

  static constexpr int64_t kErrorKeys = 32;

  void take(Arena& arena, int64_t num_rows, int64_t num_blocks, bool has_errors) {
    // Not a power of two, as the same place of all rows would have the same place in a cache.
    stride = (num_blocks + 1) * kBlockKeys<A>;
    scores = arena.take<A>(num_rows * stride);
    bests = arena.take<A>(num_rows * (stride / kBinKeys));
    errors = arena.take<A>(has_errors ? num_rows * (stride / kErrorKeys) : 0);
  }

  RowScores of_row(int64_t r) const {
    return {scores + r * stride, bests + r * (stride / kBinKeys), stride, errors + r * (stride / kErrorKeys)};
  }
};

template <class T, class A>
class FewRows : public Forward<T, A> {
 protected:
  using Base = Forward<T, A>;
  using Base::additive_part_, Base::block_, Base::call_, Base::capacity_, Base::finish, Base::keys_of_block, Base::make_room;
  using Base::most_visible_, Base::num_tiles, Base::pack_queries, Base::prepare_rest, Base::query_of, Base::rows_;
  using Base::rows_of, Base::s_, Base::start, Base::thresholds_;

 public:
  using Shared = typename Base::Shared;
  static constexpr bool kHasErrors = false;

  FewRows(const AttentionForward& call, int64_t max_rows, const Shared* shared) : Base(call, max_rows, shared) {}

  // Scores blocks [first, end) of the keys for all rows of the key head.
  void score(const RowBlock& rows, const RowScores<A>& to, int64_t first, int64_t end) {
    start(rows);
    pack_queries();
    end = smaller(end, ceil_div<int64_t>(most_visible_, kBlockKeys<A>));
    for (int64_t b = first; b < end; ++b) {
      const int64_t first_key = b * kBlockKeys<A>;
      for (int64_t key = first_key; key < first_key + kBlockKeys<A> && key < s_.num_keys; key += kLanes<A>) score_lanes(to, key);
      close_block(to, b);
    }
  }

  // Finishes rows that are scored; their scores are the first of `from`.
  void select(const RowBlock& rows, const RowScores<A>& from) {
    start(rows);
    if (call_.rest.active) prepare_rest();
    for (int64_t r = 0; r < rows.num_rows; ++r) {
      find(r, from.of_row(r));
      finish(r);
    }
  }

 protected:
  void score_lanes(const RowScores<A>& to, int64_t first_key) {
    const T* const keys = keys_of_block();
    const T* rows[kLanes<A>];
    for (int64_t i = 0; i < kLanes<A>; ++i) rows[i] = keys + smaller(first_key + i, s_.num_keys - 1) * call_.key.stride[2];
    // Where other data lies between keys these are read ahead one by one.
    const bool is_dense = call_.key.stride[2] == s_.head_dim;
    if (!is_dense) {
      const int64_t ahead = first_key + kBytesAhead / (s_.head_dim * int64_t(sizeof(T)));
      for (int64_t key = ahead; key < smaller(ahead + kLanes<A>, s_.num_keys); ++key)
        for (int64_t d = 0; d < s_.head_dim; d += 64 / sizeof(T)) __builtin_prefetch(keys + key * call_.key.stride[2] + d, 0, 2);
    }
    for (int64_t tile = 0; tile < num_tiles(); ++tile) {
      A* const scores = to.scores + tile * kTileRows * to.stride + first_key;
      score_few<T, A>(rows_of(tile), query_of(tile), rows, is_dense && tile == 0, s_.head_dim, scores, to.stride);
    }
  }

  // Add biases, hide what is hidden, and find the bests. NaN, the best of all, becomes inf.
  void close_block(const RowScores<A>& to, int64_t b) {
    const int64_t first_key = b * kBlockKeys<A>;
    const Vector<A> hidden = broadcast(-kInfinity<A>), infinity = broadcast(kInfinity<A>);
    const A* added = nullptr;
    for (int64_t r = 0; r < block_.num_rows; ++r) {
      const auto& row = rows_[r];
      A* const scores = to.scores + r * to.stride + first_key;
      const bool is_same = r > 0 && !additive_part_.varies_with_query() && rows_[r - 1].head == row.head;
      if (additive_part_.any() && !is_same) added = added_to_block(row.head, row.query, first_key);
      if (added != nullptr) {
        for (int v = 0; v < kBinKeys; ++v) {
          const Vector<A> more = load(added + v * kLanes<A>), sum = load(scores + v * kLanes<A>) + more;
          store<A>(scores + v * kLanes<A>, more == hidden ? hidden : sum);
        }
      }
      for (int64_t i = larger<int64_t>(row.visible - first_key, 0); i < kBlockKeys<A>; ++i) scores[i] = -kInfinity<A>;
      Vector<A> best = hidden;
      for (int v = 0; v < kBinKeys; ++v) {
        const Vector<A> x = load(scores + v * kLanes<A>), ranked = x != x ? infinity : x;
        store<A>(scores + v * kLanes<A>, ranked);
        best = ranked > best ? ranked : best;
      }
      store<A>(to.bests + r * (to.stride / kBinKeys) + b * kLanes<A>, best);
    }
  }

  const A* added_to_block(int64_t head, int64_t query, int64_t first_key) {
    const int64_t count = smaller<int64_t>(kBlockKeys<A>, s_.num_keys - first_key);
    const A* const own = count == kBlockKeys<A> ? additive_part_.row(head, query) : nullptr;
    if (own != nullptr) return own + first_key;
    for (int64_t i = count; i < kBlockKeys<A>; ++i) added_[i] = 0;
    additive_part_.strided(head, query, first_key, 1, count, added_);
    return added_;
  }

  // Stores the keys of row r that may be among its k best.
  void find(int64_t r, const RowScores<A>& row_scores) {
    const int64_t num_blocks = ceil_div<int64_t>(rows_[r].visible, kBlockKeys<A>);
    Candidates<A>& found = rows_[r].found;
    found.threshold = cut_of(row_scores.bests, num_blocks * kLanes<A>, rows_[r].k);
    if (!(found.threshold > -Types<A>::largest))
      found.threshold = cut_of(row_scores.scores, num_blocks * kBlockKeys<A>, rows_[r].k);
    thresholds_[r] = found.threshold;
    for (int64_t b = 0; b < num_blocks; ++b) {
      if (not_less(load(row_scores.bests + b * kLanes<A>), broadcast(found.threshold)) == 0) continue;
      for (int64_t key = b * kBlockKeys<A>; key < (b + 1) * kBlockKeys<A>; key += kLanes<A>) {
        const A* const scores = row_scores.scores + key;
        const uint32_t lanes = not_less(load(scores), broadcast(found.threshold));
        found.count += append_lanes(scores, int32_t(key), lanes, found.scores + found.count, found.indices + found.count);
        if (found.count > capacity_) make_room(r);
      }
    }
  }

  // A number that k of the n scores reach, and few more; -largest where no more than k are above -inf.
  static A cut_of(const A* scores, int64_t n, int64_t k) {
    const Eligible<A> eligible = eligible_among(scores, n);
    if (eligible.count <= k) return -Types<A>::largest;
    return find_cut(scores, n, k, k + k / 8, eligible.lowest, eligible.count).at;
  }

  A added_[kBlockKeys<A>];
};

inline bool has_few_rows(const Sizes& s) { return s.num_heads / s.num_key_heads * s.num_queries <= kMostFewRows; }

// How the work of a call is cut: each key head by one thread, or the keys of each over all threads.
struct FewRowsPlan {
  int64_t num_rows;       // of a key head
  int64_t num_groups;     // batches times key heads
  int64_t num_blocks;     // of the keys of a head
  int64_t num_ranges, blocks_of_range;
  int64_t num_workers, num_scored;  // how many key heads have scores at a time

  FewRowsPlan(const Sizes& s, int64_t num_threads, int64_t block_keys) {
    num_rows = s.num_heads / s.num_key_heads * s.num_queries;
    num_groups = s.batch * s.num_key_heads;
    num_blocks = ceil_div(s.num_keys, block_keys);
    // With many key heads for each thread they share the work well; otherwise one that comes last would be waited for.
    const bool splits = num_threads > 1 && num_groups < 4 * num_threads;
    num_ranges = splits ? smaller(ceil_div(8 * num_threads, num_groups), s.num_keys / kFewestRangeKeys) : 1;
    blocks_of_range = larger<int64_t>(ceil_div(num_blocks, larger<int64_t>(num_ranges, 1)), 1);
    num_ranges = larger<int64_t>(ceil_div(num_blocks, blocks_of_range), 1);
    num_workers = smaller(num_threads, num_groups * num_ranges);
    num_scored = num_ranges > 1 ? num_groups : num_workers;
  }
};

template <class T, class A, class Worker = FewRows<T, A>>
bool run_few_rows(const AttentionForward& call, const Parallel& parallel, const typename Worker::Shared* shared = nullptr) {
  struct State {
    const AttentionForward& call;
    const typename Worker::Shared* shared;
    const FewRowsPlan plan;
    RowScores<A>* scores;
    int64_t next_range, next_row;
    bool ok;

    RowBlock rows_of(int64_t group, int64_t first, int64_t count) const {
      const int64_t heads = call.sizes.num_key_heads;
      return {group / heads, group % heads, first, count};
    }
  } state = {call, shared, FewRowsPlan(call.sizes, parallel.num_threads, kBlockKeys<A>), nullptr, 0, 0, true};
  const FewRowsPlan& plan = state.plan;
  Arena arena;
  const bool has_memory = arena.allocate([&](Arena& arena) {
    state.scores = arena.take<RowScores<A>>(plan.num_scored);
    for (int64_t i = 0; i < plan.num_scored; ++i) {
      RowScores<A> scores;
      scores.take(arena, plan.num_rows, plan.num_blocks, Worker::kHasErrors);
      if (state.scores != nullptr) state.scores[i] = scores;
    }
  });
  if (!has_memory) return false;
  parallel.run(plan.num_workers, &state, [](void* opaque, int64_t number) {
    State& state = *static_cast<State*>(opaque);
    const FewRowsPlan& plan = state.plan;
    Worker worker(state.call, plan.num_rows, state.shared);
    if (!worker.ready()) return __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
    for (;;) {
      const int64_t n = __atomic_fetch_add(&state.next_range, 1, __ATOMIC_RELAXED);
      if (n >= plan.num_groups * plan.num_ranges) return;
      const int64_t group = n / plan.num_ranges, first = n % plan.num_ranges * plan.blocks_of_range;
      const RowBlock rows = state.rows_of(group, 0, plan.num_rows);
      const RowScores<A>& scores = state.scores[plan.num_ranges > 1 ? group : number];
      worker.score(rows, scores, first, first + plan.blocks_of_range);
      if (plan.num_ranges == 1) worker.select(rows, scores);
    }
  });
  if (!state.ok || plan.num_ranges == 1) return state.ok;
  parallel.run(plan.num_workers, &state, [](void* opaque, int64_t) {
    State& state = *static_cast<State*>(opaque);
    const FewRowsPlan& plan = state.plan;
    Worker worker(state.call, plan.num_rows, state.shared);
    if (!worker.ready()) return __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
    // The rows of a key head share running sums where they have a rest.
    const int64_t at_once = state.call.rest.active ? plan.num_rows : 1, parts = ceil_div(plan.num_rows, at_once);
    for (;;) {
      const int64_t n = __atomic_fetch_add(&state.next_row, 1, __ATOMIC_RELAXED);
      if (n >= plan.num_groups * parts) return;
      const int64_t group = n / parts, first = n % parts * at_once;
      worker.select(state.rows_of(group, first, at_once), state.scores[group].of_row(first));
    }
  });
  return state.ok;
}
