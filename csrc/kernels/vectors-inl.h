// Vectors of one CPU target, in the compiler's own vector types. The few operations that those lack are written for each
// target. Included once per target, inside the target's namespace.

// Bytes of a vector register, rows and vectors of a score tile: rows * vectors accumulators, the vectors of a key panel
// and a broadcast query must fit the registers.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 12, kTileVectors = 2;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileRows = 6, kTileVectors = 2;
#elif defined(__ARM_NEON)
constexpr int kVectorBytes = 16, kTileRows = 8, kTileVectors = 3;
#else
constexpr int kVectorBytes = 16, kTileRows = 6, kTileVectors = 2;
#endif

typedef float FloatVector __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
typedef int32_t IntVector __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef int64_t LongVector __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));

template <class A>
struct Types;

template <>
struct Types<float> {
  using Vector = FloatVector;
  using Ints = IntVector;  // as many lanes of the same width
  using Int = int32_t;
  static constexpr float largest = 3.402823466e+38f;
};

template <>
struct Types<double> {
  using Vector = DoubleVector;
  using Ints = LongVector;
  using Int = int64_t;
  static constexpr double largest = 1.7976931348623157e+308;
};

template <class A>
using Vector = typename Types<A>::Vector;

template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);

// Keys of a panel: what one score tile is wide.
template <class A>
constexpr int kPanel = kTileVectors * kLanes<A>;

template <class A>
constexpr A kInfinity = A(__builtin_inf());

template <class I>
inline I smaller(I a, I b) {
  return b < a ? b : a;
}

template <class I>
inline I larger(I a, I b) {
  return a < b ? b : a;
}

template <class I>
inline I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

template <class A>
inline Vector<A> load(const A* from) {
  return *reinterpret_cast<const Vector<A>*>(from);
}

template <class A>
inline void store(A* to, Vector<A> v) {
  *reinterpret_cast<Vector<A>*>(to) = v;
}

template <class A>
inline Vector<A> broadcast(A x) {
  return x - Vector<A>{};  // not a sum: 0 + x is no copy of x = -0
}

// The first `count` elements and zeros, or a whole vector; reads nothing else.
template <class A>
inline Vector<A> load_some(const A* from, int64_t count) {
  if (count >= kLanes<A>) return load(from);
  A lanes[kLanes<A>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
}

// a * b + c, fused where the target can; the build lets the compiler contract exactly this (-ffp-contract=fast).
template <class A>
inline Vector<A> multiply_add(Vector<A> a, Vector<A> b, Vector<A> c) {
  return a * b + c;
}

// Lanes of a and b, those of b numbered from kLanes on.
template <class A>
inline Vector<A> shuffle_lanes(Vector<A> a, Vector<A> b, typename Types<A>::Ints lanes) {
#if defined(__clang__)
  Vector<A> result;
  for (int i = 0; i < kLanes<A>; ++i) result[i] = lanes[i] < kLanes<A> ? a[lanes[i]] : b[lanes[i] - kLanes<A>];
  return result;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

template <class A>
inline A sum_of_lanes(Vector<A> v) {
  A sums[kLanes<A>];
  store<A>(sums, v);
  for (int half = kLanes<A> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

template <class A>
inline A largest_lane(Vector<A> v) {
  A high = v[0];
  for (int lane = 1; lane < kLanes<A>; ++lane) high = larger<A>(high, v[lane]);
  return high;
}

#if defined(__AVX512F__)
// The same without a way through memory, in the same order.
template <>
inline float sum_of_lanes<float>(FloatVector v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <>
inline float largest_lane<float>(FloatVector v) {
  return _mm512_reduce_max_ps((__m512)v);
}
#endif

// One bit per lane: not (a < b), which holds for NaN.
#if defined(__AVX512F__)
inline uint32_t not_less(FloatVector a, FloatVector b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ);
}
inline uint32_t not_less(DoubleVector a, DoubleVector b) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NLT_UQ);
}
#elif defined(__AVX2__)
inline uint32_t not_less(FloatVector a, FloatVector b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLT_UQ)));
}
inline uint32_t not_less(DoubleVector a, DoubleVector b) {
  return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_NLT_UQ)));
}
#elif defined(__SSE2__)
inline uint32_t not_less(FloatVector a, FloatVector b) {
  return uint32_t(_mm_movemask_ps(_mm_cmpnlt_ps((__m128)a, (__m128)b)));
}
inline uint32_t not_less(DoubleVector a, DoubleVector b) {
  return uint32_t(_mm_movemask_pd(_mm_cmpnlt_pd((__m128d)a, (__m128d)b)));
}
#else
#if defined(__aarch64__)
inline uint32_t not_less(FloatVector a, FloatVector b) {
  const uint32x4_t lanes = {1, 2, 4, 8};
  return vaddvq_u32(vbicq_u32(lanes, vcltq_f32((float32x4_t)a, (float32x4_t)b)));
}
#endif
template <class V>
inline uint32_t not_less(V a, V b) {
  uint32_t bits = 0;
  auto less = a < b;
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(a[0]); ++lane) bits |= uint32_t(less[lane] == 0) << lane;
  return bits;
}
#endif

#if defined(__AVX512F__)
inline int count_bits(uint64_t bits) { return int(_mm_popcnt_u64(bits)); }
#else
inline int count_bits(uint64_t bits) { return __builtin_popcountll(bits); }
#endif

// How many of values[0 .. n) are not below t. Reads no further than n rounded up to whole vectors.
template <class A>
inline int64_t count_not_less(const A* values, int64_t n, A t) {
  int64_t count = 0, i = 0;
  const Vector<A> bound = broadcast<A>(t);
  for (; i + kLanes<A> <= n; i += kLanes<A>) count += count_bits(not_less(load(values + i), bound));
  if (i < n) count += count_bits(not_less(load(values + i), bound) & ((1u << (n - i)) - 1));
  return count;
}

#if defined(TOPK_SCREENS)
// The lanes whose bit is set, one after another, and then anything.
#if defined(__AVX512F__)
inline FloatVector gathered_lanes(FloatVector v, uint32_t bits) { return (FloatVector)_mm512_maskz_compress_ps(__mmask16(bits), (__m512)v); }
#elif defined(__AVX2__)
inline FloatVector gathered_lanes(FloatVector v, uint32_t bits) {
  // The numbers of these lanes, a byte for each. dispatch.cpp leaves processors that extract bits slowly to other kernels.
  const uint64_t lanes = _pext_u64(0x0706050403020100, _pdep_u64(bits, 0x0101010101010101) * 0xff);
  return (FloatVector)_mm256_permutevar8x32_ps((__m256)v, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(lanes))));
}
#else
struct LaneBytes {
  uint8_t of[16][16];
};

// For each set of lanes, the numbers of their bytes.
constexpr LaneBytes bytes_of_lanes() {
  LaneBytes bytes = {};
  for (int set = 0; set < 16; ++set) {
    int to = 0;
    for (int byte = 0; byte < 16; ++byte)
      if ((set >> byte / 4 & 1) != 0) bytes.of[set][to++] = uint8_t(byte);
  }
  return bytes;
}

inline FloatVector gathered_lanes(FloatVector v, uint32_t bits) {
  static constexpr LaneBytes kBytes = bytes_of_lanes();
  return (FloatVector)vqtbl1q_u8((uint8x16_t)v, vld1q_u8(kBytes.of[bits]));
}
#endif
#endif

// Write the lanes of v whose bit is set, and first_index + lane for each, one after another; returns how many. Writes a
// whole vector of room whatever the count.
inline int64_t append_lanes(const float* v, int32_t first_index, uint32_t bits, float* values, int32_t* indices) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 mask = __mmask16(bits);
  // Compress in a register, then store all of it: compressing to memory is microcode on Zen 4.
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(mask, _mm512_loadu_ps(v)));
  const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(first_index));
  _mm512_storeu_si512(indices, _mm512_maskz_compress_epi32(mask, index));
  return count_bits(bits);
#else
  int64_t count = 0;
  for (; bits != 0; bits &= bits - 1) {
    const int lane = __builtin_ctz(bits);
    values[count] = v[lane];
    indices[count++] = first_index + lane;
  }
  return count;
#endif
}

inline int64_t append_lanes(const double* v, int32_t first_index, uint32_t bits, double* values, int32_t* indices) {
  int64_t count = 0;
  for (; bits != 0; bits &= bits - 1) {
    const int lane = __builtin_ctz(bits);
    values[count] = v[lane];
    indices[count++] = first_index + lane;
  }
  return count;
}

// The same for lanes that have an index each. The output may overlap the input if it begins no later.
template <class A>
inline int64_t compact_lanes(const A* v, const int32_t* index, uint32_t bits, A* values, int32_t* indices) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __m512i kept = _mm512_maskz_compress_epi32(__mmask16(bits), _mm512_loadu_si512(index));
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(__mmask16(bits), _mm512_loadu_ps(v)));
    _mm512_storeu_si512(indices, kept);
    return count_bits(bits);
  }
#elif defined(TOPK_SCREENS)
  if constexpr (sizeof(A) == 4) {
    const FloatVector kept = gathered_lanes(*reinterpret_cast<const FloatVector*>(index), bits);
    store<float>(values, gathered_lanes(load(v), bits));
    *reinterpret_cast<FloatVector*>(indices) = kept;
    return count_bits(bits);
  }
#endif
  int64_t count = 0;
  for (; bits != 0; bits &= bits - 1) {
    const int lane = __builtin_ctz(bits);
    values[count] = v[lane];
    indices[count++] = index[lane];
  }
  return count;
}

// exp(x) for x <= 0 or NaN: 2^n * e^r with |r| <= ln(2) / 2, e^r by its Taylor series to the last bit that shows.
inline FloatVector exponential(FloatVector x) {
  const FloatVector lowest = broadcast<float>(-87.0f);
  const IntVector underflows = x < lowest;
  const FloatVector clamped = underflows ? lowest : x;
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest whole number.
  const FloatVector magic = broadcast<float>(12582912.0f);
  const FloatVector shifted = clamped * 1.44269504f + magic;
  const FloatVector n = shifted - magic;
  const FloatVector r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  FloatVector sum = broadcast<float>(1.0f / 5040);
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  const IntVector power = ((IntVector)shifted << 23) + 0x3f800000;
  const FloatVector result = sum * (FloatVector)power;
  // NaN cannot be shifted by: return it.
  return x != x ? x : underflows ? FloatVector{} : result;
}

inline DoubleVector exponential(DoubleVector x) {
  const DoubleVector lowest = broadcast<double>(-708.0);
  const LongVector underflows = x < lowest;
  const DoubleVector clamped = underflows ? lowest : x;
  const DoubleVector magic = broadcast<double>(6755399441055744.0);
  const DoubleVector shifted = clamped * 1.4426950408889634 + magic;
  const DoubleVector n = shifted - magic;
  const DoubleVector r = (clamped - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  DoubleVector sum = broadcast<double>(1.0 / 6227020800.0);
  const double inverse_factorials[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0,
                                       1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,     1.0 / 120.0,
                                       1.0 / 24.0,        1.0 / 6.0,        0.5,             1.0,
                                       1.0};
  for (const double factor : inverse_factorials) sum = sum * r + factor;
  const LongVector power = ((LongVector)shifted << 52) + 0x3ff0000000000000;
  const DoubleVector result = sum * (DoubleVector)power;
  return x != x ? x : underflows ? DoubleVector{} : result;
}

// log(x) for x > 0 that is not subnormal: x = 2^n * m with m from sqrt(1/2) to sqrt(2), and with t = (m - 1) / (m + 1)
// log(m) = 2 t (1 + t^2 / 3 + t^4 / 5 + ...), to the last bit that shows.
inline FloatVector logarithm(FloatVector x) {
  const IntVector n = ((IntVector)x - 0x3f3504f3) >> 23;  // the bits of sqrt(1/2)
  const FloatVector m = (FloatVector)((IntVector)x - (n << 23));
  const FloatVector t = (m - 1.0f) / (m + 1.0f), square = t * t;
  FloatVector sum = broadcast<float>(1.0f / 9);
  sum = sum * square + 1.0f / 7;
  sum = sum * square + 1.0f / 5;
  sum = sum * square + 1.0f / 3;
  const FloatVector exponent = __builtin_convertvector(n, FloatVector);
  return exponent * 0.693359375f + (exponent * -2.12194440e-4f + (2.0f * t + 2.0f * t * square * sum));
}
