// Rows of keys, values and queries: reading them in the accumulation type, products and sums of them, and the entries
// (ascending indices, dropout) that name them.

// An infinite element becomes NaN, so that a broken key makes every score with it NaN and never a mere -inf.
template <class A>
inline A nan_unless_finite(A x) {
  return x + x * A(0);
}

// The row itself where it has the accumulation type, otherwise a copy in `spare`.
template <class T, class A>
inline const A* widened(const T* row, int64_t dim, A* spare) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return row;
  } else {
    for (int64_t d = 0; d < dim; ++d) spare[d] = widen(row[d]);
    return spare;
  }
}

// One step of a transposition: lanes whose index has the bit `half` change places with those of the partner vector.
template <class A, int half>
inline __attribute__((always_inline)) void exchange(Vector<A>* rows) {
  typename Types<A>::Ints low = {}, high = {};
  for (int lane = 0; lane < kLanes<A>; ++lane) {
    low[lane] = (lane & half) != 0 ? kLanes<A> + lane - half : lane;
    high[lane] = (lane & half) != 0 ? kLanes<A> + lane : lane + half;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<A>; ++i) {
    if ((i & half) != 0) continue;
    const Vector<A> a = rows[i], b = rows[i + half];
    rows[i] = shuffle_lanes<A>(a, b, low);
    rows[i + half] = shuffle_lanes<A>(a, b, high);
  }
}

template <class A>
inline __attribute__((always_inline)) void transpose(Vector<A>* rows) {
  exchange<A, 1>(rows);
  if constexpr (kLanes<A> > 2) exchange<A, 2>(rows);
  if constexpr (kLanes<A> > 4) exchange<A, 4>(rows);
  if constexpr (kLanes<A> > 8) exchange<A, 8>(rows);
}

// Rows of a matrix as columns: to[d * stride + r] for r < width; zeros for rows from num_rows on. With kBreaks an
// infinite element becomes NaN. `spare` holds as many rows as a vector has lanes.
template <class T, class A, bool kBreaks>
void pack_columns(const T* from, int64_t row_stride, int64_t num_rows, int64_t width, int64_t dim, A scale, A* to,
                  int64_t stride, A* spare) {
  for (int64_t first = 0; first < width; first += kLanes<A>) {
    const int64_t in_block = smaller<int64_t>(kLanes<A>, width - first);
    const A* rows[kLanes<A>];
    for (int64_t r = 0; r < in_block; ++r) {
      rows[r] = spare + r * dim;
      if (first + r < num_rows)
        rows[r] = widened<T, A>(from + (first + r) * row_stride, dim, spare + r * dim);
      else
        for (int64_t d = 0; d < dim; ++d) spare[r * dim + d] = 0;
    }
    int64_t d = 0;
    if (in_block == kLanes<A>) {
      for (; d + kLanes<A> <= dim; d += kLanes<A>) {
        Vector<A> block[kLanes<A>];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes<A>; ++r) block[r] = load(rows[r] + d);
        transpose<A>(block);
#pragma GCC unroll 16
        for (int r = 0; r < kLanes<A>; ++r)
          store<A>(to + (d + r) * stride + first, (kBreaks ? block[r] + block[r] * A(0) : block[r]) * scale);
      }
    }
    for (; d < dim; ++d)
      for (int64_t r = 0; r < in_block; ++r)
        to[d * stride + first + r] = (kBreaks ? nan_unless_finite(rows[r][d]) : rows[r][d]) * scale;
  }
}

template <class T>
inline void prefetch_row(const T* row, int64_t dim) {
  for (int64_t byte = 0; byte < dim * int64_t(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
}

// The product of two rows of n elements.
template <class A>
inline A dot(const A* a, const A* b, int64_t n) {
  Vector<A> sums[4] = {};  // one chain of dependent additions would wait for each
  int64_t i = 0;
  for (; i + 4 * kLanes<A> <= n; i += 4 * kLanes<A>)
    for (int v = 0; v < 4; ++v)
      sums[v] = multiply_add<A>(load(a + i + v * kLanes<A>), load(b + i + v * kLanes<A>), sums[v]);
  for (; i + kLanes<A> <= n; i += kLanes<A>) sums[0] = multiply_add<A>(load(a + i), load(b + i), sums[0]);
  A result = sum_of_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (int64_t rest = n % kLanes<A>; rest > 0; --rest, ++i) result += a[i] * b[i];
  return result;
}

// The sum of n elements.
template <class A>
inline A sum_of(const A* x, int64_t n) {
  Vector<A> sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes<A> <= n; i += 2 * kLanes<A>)
    for (int v = 0; v < 2; ++v) sums[v] += load(x + i + v * kLanes<A>);
  for (; i + kLanes<A> <= n; i += kLanes<A>) sums[0] += load(x + i);
  A result = sum_of_lanes<A>(sums[0] + sums[1]);
  for (; i < n; ++i) result += x[i];
  return result;
}

// The sum of each of kCount vectors' lanes, in lane i that of vectors[i]; kCount is the number of lanes at first. Adds
// halves of pairs, so that one addition serves two vectors.
template <class A, int kCount>
inline Vector<A> sums_of_lanes(Vector<A>* vectors) {
  if constexpr (kCount == 1) {
    return vectors[0];
  } else {
    constexpr int kHalf = kCount / 2;
    // Lanes whose index has the bit kHalf hold parts of the second vector of a pair.
    typename Types<A>::Ints low = {}, high = {};
    for (int lane = 0; lane < kLanes<A>; ++lane) {
      const bool second = (lane & kHalf) != 0;
      low[lane] = second ? kLanes<A> + (lane ^ kHalf) : lane;
      high[lane] = second ? kLanes<A> + lane : lane ^ kHalf;
    }
    Vector<A> halves[kHalf];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i)
      halves[i] = shuffle_lanes<A>(vectors[i], vectors[i + kHalf], low) +
                  shuffle_lanes<A>(vectors[i], vectors[i + kHalf], high);
    return sums_of_lanes<A, kHalf>(halves);
  }
}

// to[j] = row . table[indices[j]] for j < count; `spare` holds one row.
template <class T, class A>
void dot_with_rows(const A* row, const T* table, int64_t row_stride, const int32_t* indices, int64_t count, int64_t dim,
                   A* to, A* spare) {
  constexpr int64_t kAhead = 8;
  int64_t j = 0;
  if constexpr (sizeof(T) == sizeof(A)) {
    for (; dim % kLanes<A> == 0 && j + kLanes<A> <= count; j += kLanes<A>) {
      Vector<A> sums[kLanes<A>];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes<A>; ++r) {
        if (j + r + kAhead < count) prefetch_row(table + indices[j + r + kAhead] * row_stride, dim);
        const A* other = reinterpret_cast<const A*>(table + indices[j + r] * row_stride);
        Vector<A> sum = {};
        for (int64_t d = 0; d < dim; d += kLanes<A>) sum = multiply_add<A>(load(row + d), load(other + d), sum);
        sums[r] = sum;
      }
      store<A>(to + j, sums_of_lanes<A, kLanes<A>>(sums));
    }
  }
  for (; j < count; ++j) {
    if (j + kAhead < count) prefetch_row(table + indices[j + kAhead] * row_stride, dim);
    to[j] = dot(row, widened<T, A>(table + indices[j] * row_stride, dim, spare), dim);
  }
}

// to[0 .. n) += factor * x[0 .. n)
template <class A>
inline void add_multiple(A factor, const A* x, A* to, int64_t n) {
  const Vector<A> factors = broadcast(factor);
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) store<A>(to + i, multiply_add<A>(factors, load(x + i), load(to + i)));
  for (int64_t rest = n % kLanes<A>; rest > 0; --rest, ++i) to[i] += factor * x[i];
}

// The first of `count` ascending indices that is not below `bound`.
inline int64_t first_not_below(const int32_t* indices, int64_t count, int64_t bound) {
  int64_t first = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    const bool is_below = indices[first + half] < bound;
    first = is_below ? first + half + 1 : first;
    count = is_below ? count - half - 1 : half;
  }
  return first;
}

// sums[0 .. dim) = sum over j of weights[j] * table[indices[j]], read in the order of j.
template <class T, class A>
void weighted_sum_of_rows(const T* table, int64_t row_stride, const int32_t* indices, const A* weights, int64_t count,
                          int64_t dim, A* sums, A* spare) {
  constexpr int kVectors = 4, kBlock = kVectors * kLanes<A>;
  constexpr int64_t kAhead = 8;
  if (dim % kBlock == 0 && sizeof(T) == sizeof(A)) {
    for (int64_t d = 0; d < dim; d += kBlock) {
      Vector<A> sum[kVectors] = {};
      for (int64_t j = 0; j < count; ++j) {
        if (j + kAhead < count) prefetch_row(table + indices[j + kAhead] * row_stride + d, kBlock);
        const A* row = reinterpret_cast<const A*>(table + indices[j] * row_stride + d);
        const Vector<A> weight = broadcast(weights[j]);
        for (int v = 0; v < kVectors; ++v) sum[v] = multiply_add<A>(weight, load(row + v * kLanes<A>), sum[v]);
      }
      for (int v = 0; v < kVectors; ++v) store(sums + d + v * kLanes<A>, sum[v]);
    }
    return;
  }
  for (int64_t d = 0; d < dim; ++d) sums[d] = 0;
  for (int64_t j = 0; j < count; ++j) {
    if (j + kAhead < count) prefetch_row(table + indices[j + kAhead] * row_stride, dim);
    const A* row = widened<T, A>(table + indices[j] * row_stride, dim, spare);
    for (int64_t d = 0; d < dim; ++d) sums[d] += weights[j] * row[d];
  }
}

// Dropout's draw for one entry; the same hash as backends/dropout.py, the 32-bit finaliser of MurmurHash3 (Appleby).
inline uint32_t mix(uint32_t word) {
  word = (word ^ (word >> 16)) * 0x85EBCA6Bu;
  word = (word ^ (word >> 13)) * 0xC2B2AE35u;
  return word ^ (word >> 16);
}

struct DropoutRow {
  uint32_t row_hash;
  uint64_t threshold;

  DropoutRow(const Dropout& dropout, int64_t row) {
    const uint64_t word = uint64_t(row) ^ dropout.seed;
    row_hash = mix(mix(uint32_t(word)) ^ uint32_t(word >> 32));
    threshold = uint64_t(__builtin_nearbyint(dropout.p * 4294967296.0));
  }

  bool keeps(int32_t column) const { return mix(row_hash ^ (uint32_t(column) * 0x9E3779B1u)) >= threshold; }
};
