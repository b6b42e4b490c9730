// Vector operations for screening that the compiler's own vectors lack, and the loop of 8-bit products: a section for each
// kind of vectors, and on x86 two loops: VNNI adds four products of bytes to a 32-bit sum at once. Vectors are those of
// vectors-inl.h.
//
// What a section defines; "count" of kLanes<float> numbers or more means all:
//   kKeyOffset                    added to the numbers of stored keys: the x86 instruction takes one factor without a sign
//   lower_of, higher_of           lane by lane, for numbers; of NaN any result
//   absolute, nan_lanes           the second with one bit per lane
//   least_lane, most_lane, sum_of_floats, sum_of_doubles, sum_of_ints
//   rounded, square_root          the first to the nearest whole numbers, the second of one number
//   kQuerySteps, reach_of         what a query is rounded to: the largest lane of reach_of(its vectors) becomes kQuerySteps
//   load_widened                  `count` numbers of a row as float32, and zeros
//   store_bytes                   each lane's lowest byte
//   append_set_bits               writes first + the number of each set bit; returns how many. Writes up to 16 beyond them.
//   Sums                          a vector of sums of products, as the compiler keeps it in a register
//   add_products                  adds Q.K for kRows rows and kPartKeys keys; query[d * kTileRows + r] holds four dimensions
//   PassedBits                    a bit for each key of a panel and each row whose sum is not negative, gathered part by part
//   KeyPieces                     `words` words of four bytes of each of kLanes<float> keys, transposed
//   number_in                     number i of each word: a word holds one, or two of half precision

constexpr int kIndexPanel = 32;                                    // keys of a panel of the index
constexpr int kPartKeys = 2 * kLanes<float>;                       // keys that are multiplied at once
constexpr int kPanelParts = kIndexPanel / kPartKeys, kPanelVectors = 2 * kPanelParts;
constexpr int kRowLanes = (kTileRows + kLanes<float> - 1) / kLanes<float> * kLanes<float>;  // the rows of a tile in whole vectors

inline int64_t whole_vectors(int64_t count) { return ceil_div<int64_t>(count, kLanes<float>) * kLanes<float>; }

inline FloatVector as_float(IntVector v) { return __builtin_convertvector(v, FloatVector); }

// The lowest set bit's number; any where none is set.
inline int lowest_bit(uint64_t bits) { return __builtin_ctzll(bits | uint64_t(1) << 63); }

// Without VNNI no instruction adds four products of bytes to 32 bits.
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
#define TOPK_SUMS_OF_16_BITS
#endif

#if defined(__AVX512F__)
// ------------------------------------------------------------------------------------------ AVX-512, with VNNI or without

constexpr int kKeyOffset = 128;

inline FloatVector lower_of(FloatVector a, FloatVector b) { return (FloatVector)_mm512_min_ps((__m512)a, (__m512)b); }
inline FloatVector higher_of(FloatVector a, FloatVector b) { return (FloatVector)_mm512_max_ps((__m512)a, (__m512)b); }
inline FloatVector absolute(FloatVector v) { return (FloatVector)_mm512_abs_ps((__m512)v); }
inline uint32_t nan_lanes(FloatVector v) { return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q); }
inline float least_lane(FloatVector v) { return _mm512_reduce_min_ps((__m512)v); }
inline float most_lane(FloatVector v) { return _mm512_reduce_max_ps((__m512)v); }
inline float sum_of_floats(FloatVector v) { return _mm512_reduce_add_ps((__m512)v); }
inline double sum_of_doubles(DoubleVector v) { return _mm512_reduce_add_pd((__m512d)v); }
inline int32_t sum_of_ints(IntVector v) { return _mm512_reduce_add_epi32((__m512i)v); }
inline IntVector rounded(FloatVector v) { return (IntVector)_mm512_cvtps_epi32((__m512)v); }
inline float square_root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1u << count) - 1); }
inline FloatVector load_widened(const float* from, int64_t count) {
  return (FloatVector)_mm512_maskz_loadu_ps(first_lanes(count), from);
}
inline FloatVector load_widened(const BFloat16* from, int64_t count) {
  return (FloatVector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), from)), 16);
}
inline FloatVector load_widened(const Float16* from, int64_t count) {
  return (FloatVector)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}

inline void store_bytes(uint8_t* to, IntVector v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)v));
}

#if defined(__AVX512VBMI2__)
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
#endif

inline IntVector load_bytes(const uint8_t* from) { return (IntVector)_mm512_load_si512(from); }
#if defined(TOPK_SUMS_OF_16_BITS)
inline FloatVector add_neighbours(FloatVector v) { return v + (FloatVector)_mm512_permute_ps((__m512)v, 0xb1); }
inline FloatVector add_next_quads(FloatVector v) { return v + (FloatVector)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xb1); }
inline IntVector pair_sums(IntVector keys, int32_t query) {
  return (IntVector)_mm512_maddubs_epi16((__m512i)keys, _mm512_set1_epi32(query));
}
inline IntVector add_16_bits(IntVector a, IntVector b) { return (IntVector)_mm512_add_epi16((__m512i)a, (__m512i)b); }
inline IntVector widened_sums(IntVector pairs) { return (IntVector)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi16(1)); }
#else
inline IntVector add_dot(IntVector sums, IntVector keys, int32_t query) {
  return (IntVector)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)keys, _mm512_set1_epi32(query));
}
#endif
inline uint32_t not_negative(const IntVector* sums) {
  return ~_mm512_kunpackw(_mm512_movepi32_mask((__m512i)sums[1]), _mm512_movepi32_mask((__m512i)sums[0]));
}

// 32 bytes of a key. Zeros from element `count` on.
template <class T, bool kWhole>
inline __m256 half_of(const T* from, int64_t count) {
  if constexpr (kWhole)
    return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  else
    return _mm256_castsi256_ps(_mm256_maskz_loadu_epi8(__mmask32((uint64_t(1) << (count * int64_t(sizeof(T)))) - 1), from));
}

template <class T, bool kWhole>
inline __attribute__((always_inline)) __m512 two_pieces(const T* low, const T* high, int64_t count) {
  const __m256 first = half_of<T, kWhole>(low, count), second = half_of<T, kWhole>(high, count);  // clang's function is a macro
  return _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
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

struct KeyPieces {
  static constexpr int words = 8;
  __m512 low[4], high[4];  // keys 0 to 7, keys 8 to 15

  template <class T, bool kWhole>
  __attribute__((always_inline)) void load(const T* keys, const int64_t* offsets, int64_t count) {
    __m512 rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) rows[i] = two_pieces<T, kWhole>(keys + offsets[i], keys + offsets[4 + i], count);
    transpose_blocks(rows, low);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) rows[i] = two_pieces<T, kWhole>(keys + offsets[8 + i], keys + offsets[12 + i], count);
    transpose_blocks(rows, high);
  }

  // Blocks 0 and 2 hold the first four words of a piece, 1 and 3 the last.
  __attribute__((always_inline)) FloatVector word(int w) const {
    return w < 4 ? (FloatVector)_mm512_shuffle_f32x4(low[w % 4], high[w % 4], 0x88)
                 : (FloatVector)_mm512_shuffle_f32x4(low[w % 4], high[w % 4], 0xdd);
  }
};

inline FloatVector number_in(FloatVector words, int i, Float16) {
  const __m512i bits = (__m512i)words;
  return (FloatVector)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(i == 0 ? bits : _mm512_srli_epi32(bits, 16)));
}

#elif defined(__AVX2__)
// --------------------------------------------------------------------------------------------- AVX2, with AVX-VNNI or without

constexpr int kKeyOffset = 128;

inline FloatVector lower_of(FloatVector a, FloatVector b) { return (FloatVector)_mm256_min_ps((__m256)a, (__m256)b); }
inline FloatVector higher_of(FloatVector a, FloatVector b) { return (FloatVector)_mm256_max_ps((__m256)a, (__m256)b); }
inline FloatVector absolute(FloatVector v) { return (FloatVector)((IntVector)v & 0x7fffffff); }
inline uint32_t nan_lanes(FloatVector v) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q)));
}
inline IntVector rounded(FloatVector v) { return (IntVector)_mm256_cvtps_epi32((__m256)v); }
inline float square_root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

// Half of the lanes of v, and the others in their place.
inline __m128 low_half(FloatVector v) { return _mm256_castps256_ps128((__m256)v); }
inline __m128 high_half(FloatVector v) { return _mm256_extractf128_ps((__m256)v, 1); }
inline __m128 swap_pairs(__m128 v) { return _mm_movehl_ps(v, v); }
inline __m128 swap_lanes(__m128 v) { return _mm_movehdup_ps(v); }
inline float least_lane(FloatVector v) {
  const __m128 four = _mm_min_ps(low_half(v), high_half(v)), two = _mm_min_ps(four, swap_pairs(four));
  return _mm_cvtss_f32(_mm_min_ss(two, swap_lanes(two)));
}
inline float most_lane(FloatVector v) {
  const __m128 four = _mm_max_ps(low_half(v), high_half(v)), two = _mm_max_ps(four, swap_pairs(four));
  return _mm_cvtss_f32(_mm_max_ss(two, swap_lanes(two)));
}
inline float sum_of_floats(FloatVector v) {
  const __m128 four = _mm_add_ps(low_half(v), high_half(v)), two = _mm_add_ps(four, swap_pairs(four));
  return _mm_cvtss_f32(_mm_add_ss(two, swap_lanes(two)));
}
inline double sum_of_doubles(DoubleVector v) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
inline int32_t sum_of_ints(IntVector v) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
}

inline FloatVector load_widened(const float* from, int64_t count) { return load_some(from, count); }
inline __m128i load_halves(const void* from, int64_t count) {
  if (count >= 8) return _mm_loadu_si128(static_cast<const __m128i*>(from));
  __m128i bits = _mm_setzero_si128();
  __builtin_memcpy(&bits, from, size_t(count) * 2);
  return bits;
}
inline FloatVector load_widened(const BFloat16* from, int64_t count) {
  return (FloatVector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(from, count)), 16);
}
inline FloatVector load_widened(const Float16* from, int64_t count) {
  return (FloatVector)_mm256_cvtph_ps(load_halves(from, count));
}

inline void store_bytes(uint8_t* to, IntVector v) {
  const __m128i low = _mm256_castsi256_si128((__m256i)v), high = _mm256_extracti128_si256((__m256i)v, 1);
  const __m128i lowest = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(_mm_shuffle_epi8(low, lowest), _mm_shuffle_epi8(high, lowest)));
}

inline IntVector load_bytes(const uint8_t* from) { return (IntVector)_mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }
#if defined(TOPK_SUMS_OF_16_BITS)
inline FloatVector add_neighbours(FloatVector v) { return v + (FloatVector)_mm256_permute_ps((__m256)v, 0xb1); }
inline FloatVector add_next_quads(FloatVector v) { return v + (FloatVector)_mm256_permute2f128_ps((__m256)v, (__m256)v, 0x01); }
inline IntVector pair_sums(IntVector keys, int32_t query) {
  return (IntVector)_mm256_maddubs_epi16((__m256i)keys, _mm256_set1_epi32(query));
}
inline IntVector add_16_bits(IntVector a, IntVector b) { return (IntVector)_mm256_add_epi16((__m256i)a, (__m256i)b); }
inline IntVector widened_sums(IntVector pairs) { return (IntVector)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1)); }
#else
inline IntVector add_dot(IntVector sums, IntVector keys, int32_t query) {
#if defined(TOPK_AVXVNNI_BY_AVX512)
  // For tests alone: the same instruction as processors with AVX-512 encode it, and nothing else of theirs.
  __asm__("%{evex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(keys), "x"(_mm256_set1_epi32(query)));
  return sums;
#else
  return (IntVector)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)keys, _mm256_set1_epi32(query));
#endif
}
#endif
inline uint32_t not_negative(const IntVector* sums) {
  return 0xffff ^ uint32_t(_mm256_movemask_ps((__m256)sums[0]) | _mm256_movemask_ps((__m256)sums[1]) << 8);
}

// 16 bytes of a key. Zeros from element `count` on.
template <class T, bool kWhole>
inline __attribute__((always_inline)) __m128 quarter_of(const T* from, int64_t count) {
  if (kWhole) return _mm_loadu_ps(reinterpret_cast<const float*>(from));
  __m128 bits = _mm_setzero_ps();
  __builtin_memcpy(&bits, from, size_t(count) * sizeof(T));
  return bits;
}

struct KeyPieces {
  static constexpr int words = 4;
  __m256 columns[4];

  template <class T, bool kWhole>
  __attribute__((always_inline)) void load(const T* keys, const int64_t* offsets, int64_t count) {
    __m256d pairs[4];  // pairs of words of keys 0 and 1, 2 and 3, with those of keys 4 and 5, 6 and 7
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256 even = two_keys<T, kWhole>(keys + offsets[2 * i], keys + offsets[2 * i + 4], count);
      const __m256 odd = two_keys<T, kWhole>(keys + offsets[2 * i + 1], keys + offsets[2 * i + 5], count);
      pairs[2 * i] = _mm256_castps_pd(_mm256_unpacklo_ps(even, odd));
      pairs[2 * i + 1] = _mm256_castps_pd(_mm256_unpackhi_ps(even, odd));
    }
    columns[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(pairs[0], pairs[2]));
    columns[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(pairs[0], pairs[2]));
    columns[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(pairs[1], pairs[3]));
    columns[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(pairs[1], pairs[3]));
  }

  template <class T, bool kWhole>
  static __attribute__((always_inline)) __m256 two_keys(const T* low, const T* high, int64_t count) {
    const __m128 first = quarter_of<T, kWhole>(low, count), second = quarter_of<T, kWhole>(high, count);
    return _mm256_insertf128_ps(_mm256_castps128_ps256(first), second, 1);
  }

  __attribute__((always_inline)) FloatVector word(int w) const { return (FloatVector)columns[w]; }
};

inline FloatVector number_in(FloatVector words, int i, Float16) {
  const __m256i halves = i == 0 ? _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,
                                                   0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1)
                                : _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1,
                                                   2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)words, halves), 0x08);
  return (FloatVector)_mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}

#else
// ----------------------------------------------------------------------------------------- NEON with dot products

constexpr int kKeyOffset = 0;

inline FloatVector lower_of(FloatVector a, FloatVector b) { return (FloatVector)vminq_f32((float32x4_t)a, (float32x4_t)b); }
inline FloatVector higher_of(FloatVector a, FloatVector b) { return (FloatVector)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
inline FloatVector absolute(FloatVector v) { return (FloatVector)vabsq_f32((float32x4_t)v); }
inline uint32_t lanes_set(IntVector lanes) {
  const uint32x4_t bits = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32((uint32x4_t)lanes, bits));
}
inline uint32_t nan_lanes(FloatVector v) { return lanes_set((IntVector)(v != v)); }
inline float least_lane(FloatVector v) { return vminvq_f32((float32x4_t)v); }
inline float most_lane(FloatVector v) { return vmaxvq_f32((float32x4_t)v); }
inline float sum_of_floats(FloatVector v) { return vaddvq_f32((float32x4_t)v); }
inline double sum_of_doubles(DoubleVector v) { return vaddvq_f64((float64x2_t)v); }
inline int32_t sum_of_ints(IntVector v) { return vaddvq_s32((int32x4_t)v); }
inline IntVector rounded(FloatVector v) { return (IntVector)vcvtnq_s32_f32((float32x4_t)v); }
inline float square_root(float x) { return vget_lane_f32(vsqrt_f32(vdup_n_f32(x)), 0); }

inline FloatVector load_widened(const float* from, int64_t count) { return load_some(from, count); }
inline uint16x4_t load_halves(const void* from, int64_t count) {
  uint64_t bits = 0;
  if (count >= 4)
    __builtin_memcpy(&bits, from, 8);
  else
    __builtin_memcpy(&bits, from, size_t(count) * 2);
  return vcreate_u16(bits);
}
inline FloatVector load_widened(const BFloat16* from, int64_t count) { return (FloatVector)vshll_n_u16(load_halves(from, count), 16); }
inline FloatVector load_widened(const Float16* from, int64_t count) {
  return (FloatVector)vcvt_f32_f16(vreinterpret_f16_u16(load_halves(from, count)));
}

inline void store_bytes(uint8_t* to, IntVector v) {
  const uint16x4_t halves = vmovn_u32((uint32x4_t)v);
  const uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(halves, halves))), 0);
  __builtin_memcpy(to, &bytes, 4);
}

// g++ 12 copies sums of type IntVector in every step.
using Sums = int32x4_t;

// A row's sums with four keys each in low and high.
template <int kLane>
inline __attribute__((always_inline)) void add_row(int8x16_t low, int8x16_t high, int8x16_t query, Sums* sums) {
  sums[0] = vdotq_laneq_s32(sums[0], low, query, kLane);
  sums[1] = vdotq_laneq_s32(sums[1], high, query, kLane);
}

template <int kRows>
inline __attribute__((always_inline)) void add_products(const int32_t* query, const uint8_t* keys, int64_t quads,
                                                        Sums (&sums)[kRows][2]) {
#pragma GCC unroll 1
  for (int64_t d = 0; d < quads; ++d) {
    const int8x16_t low = vreinterpretq_s8_u8(vld1q_u8(keys)), high = vreinterpretq_s8_u8(vld1q_u8(keys + 16));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r += 4) {
      const int8x16_t q = vreinterpretq_s8_s32(vld1q_s32(query + r));
      add_row<0>(low, high, q, sums[r]);
      if constexpr (kRows >= 4) {
        add_row<1>(low, high, q, sums[r + 1]);
        add_row<2>(low, high, q, sums[r + 2]);
        add_row<3>(low, high, q, sums[r + 3]);
      }
    }
    query += kTileRows;
    keys += 4 * kIndexPanel;
  }
}

template <int kRows>
class PassedBits {
 public:
  // A byte of each row, of its eight keys.
  __attribute__((always_inline)) void add(int part, const Sums (&sums)[kRows][2]) {
    static_assert(kRows <= 8, "a byte for each row fits half a vector");
    const uint8x16_t bits = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t two_rows[4] = {};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r += 2) {
      const int8x16_t first = vreinterpretq_s8_s16(high_parts(sums[r]));
      const int8x16_t second = vreinterpretq_s8_s16(high_parts(sums[r + 1 < kRows ? r + 1 : r]));
      two_rows[r / 2] = vandq_u8(vcgezq_s8(vuzp2q_s8(first, second)), bits);
    }
    const uint8x16_t low = vpaddq_u8(two_rows[0], two_rows[1]), high = vpaddq_u8(two_rows[2], two_rows[3]);
    const uint8x16_t sum = vpaddq_u8(low, high);
    bytes_.val[part] = vget_low_u8(vpaddq_u8(sum, sum));
  }

  // bits[r * stride] gets those of row r.
  void store(uint32_t* bits, int64_t stride) const {
    uint32_t words[8];
    vst4_u8(reinterpret_cast<uint8_t*>(words), bytes_);
    for (int r = 0; r < kRows; ++r) bits[r * stride] = words[r];
  }

 private:
  static int16x8_t high_parts(const Sums* sums) {
    return vuzp2q_s16(vreinterpretq_s16_s32(sums[0]), vreinterpretq_s16_s32(sums[1]));
  }

  uint8x8x4_t bytes_;
};

// 16 bytes of a key. Zeros from element `count` on.
template <class T, bool kWhole>
inline __attribute__((always_inline)) float32x4_t quarter_of(const T* from, int64_t count) {
  if (kWhole) return vreinterpretq_f32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(from)));
  float32x4_t bits = vdupq_n_f32(0);
  __builtin_memcpy(&bits, from, size_t(count) * sizeof(T));
  return bits;
}

struct KeyPieces {
  static constexpr int words = 4;
  float32x4_t columns[4];

  template <class T, bool kWhole>
  __attribute__((always_inline)) void load(const T* keys, const int64_t* offsets, int64_t count) {
    float32x4_t rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) rows[i] = quarter_of<T, kWhole>(keys + offsets[i], count);
    const float32x4_t low = vzip1q_f32(rows[0], rows[2]), high = vzip2q_f32(rows[0], rows[2]);
    const float32x4_t low2 = vzip1q_f32(rows[1], rows[3]), high2 = vzip2q_f32(rows[1], rows[3]);
    columns[0] = vzip1q_f32(low, low2);
    columns[1] = vzip2q_f32(low, low2);
    columns[2] = vzip1q_f32(high, high2);
    columns[3] = vzip2q_f32(high, high2);
  }

  __attribute__((always_inline)) FloatVector word(int w) const { return (FloatVector)columns[w]; }
};

inline FloatVector number_in(FloatVector words, int i, Float16) {
  const uint32x4_t bits = (uint32x4_t)words;
  return (FloatVector)vcvt_f32_f16(vreinterpret_f16_u16(i == 0 ? vmovn_u32(bits) : vshrn_n_u32(bits, 16)));
}
#endif

// ------------------------------------------------------------------------------------------- what sections share

inline FloatVector number_in(FloatVector words, int, float) { return words; }
inline FloatVector number_in(FloatVector words, int i, BFloat16) {
  const IntVector bits = (IntVector)words;
  return (FloatVector)(i == 0 ? bits << 16 : bits & int32_t(0xffff0000));
}

// One bit for each number of a panel that is not below t.
inline uint32_t panel_not_less(const float* numbers, float t) {
  uint32_t bits = 0;
#pragma GCC unroll 8
  for (int v = 0; v < kPanelVectors; ++v) bits |= not_less(load(numbers + v * kLanes<float>), broadcast(t)) << (v * kLanes<float>);
  return bits;
}

// A bit of the sample and period - 1 of the others in turn, `count` times; `sampled` has a bit in each place of the sample's.
inline uint64_t interleaved_bits(uint64_t sample, uint64_t others, uint64_t sampled, int64_t period, int64_t count) {
#if defined(__BMI2__)
  (void)period, (void)count;
  return _pdep_u64(sample, sampled) | _pdep_u64(others, ~sampled);
#else
  (void)sampled;
  const uint64_t before_next = (uint64_t(1) << (period - 1)) - 1;
  uint64_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits |= ((sample >> i & 1) | (others >> i * (period - 1) & before_next) << 1) << i * period;
  return bits;
#endif
}

// Writes the lanes whose bit is set, one after another; returns how many. Writes a whole vector.
inline int64_t keep_lanes(FloatVector v, uint32_t bits, float* to) {
  store<float>(to, gathered_lanes(v, bits));
  return count_bits(bits);
}

#if !defined(__AVX512VBMI2__)
inline int64_t append_set_bits(uint64_t bits, int32_t first, int32_t* to) {
  const int count = count_bits(bits);
  // Few are set. A branch for each would often go wrong.
  for (int written = 0; written < count || written == 0; written += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      to[written + i] = first + lowest_bit(bits);
      bits &= bits - 1;
    }
  return count;
}
#endif

#if !defined(TOPK_SUMS_OF_16_BITS)
constexpr int kQuerySteps = 127;
inline FloatVector reach_of(FloatVector v) { return absolute(v); }
#endif

#if defined(__AVX2__)
// g++ 12 keeps sums of type __m512i in memory where an operation on integers reads them after the loop.
using Sums = IntVector;

#if defined(TOPK_SUMS_OF_16_BITS)
// vpmaddubsw adds two products to 16 bits, and here two of its sums are added before they are widened. Nothing may leave 16 bits
// (vpmaddubsw would cut it off at 32,767, the addition wrap around), though a key's bytes are 1 to 255. So a query is rounded
// such that of its four numbers that meet in one sum those of one sign come to 128 at most: every part of the sum then lies
// within 128 * 255 = 32,640. Before rounding they come to 126 at most, and rounding adds half a step for each of four. This makes
// the steps of a query like Gaussian noise 1.8 times as large. Keys of 7 bits would have steps twice as large, and keys' are the
// larger ones, as 32 keys share a scale.
constexpr int kQuerySteps = 126;

// The sums, of either sign, of elements d, d + 1, d + 4 and d + 5 of each eight, and of the others: the four that meet.
inline FloatVector reach_of(FloatVector v) {
  const FloatVector zero = {}, up = higher_of(v, zero), down = higher_of(-v, zero);
  return higher_of(add_next_quads(add_neighbours(up)), add_next_quads(add_neighbours(down)));
}

// A vector of keys at a time: with both there are not registers enough.
template <int kRows>
inline __attribute__((always_inline)) void add_products(const int32_t* query, const uint8_t* keys, int64_t quads,
                                                        Sums (&sums)[kRows][2]) {
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const uint8_t* key = keys + v * kVectorBytes;
    const int32_t* numbers = query;
    int64_t d = 0;
#pragma GCC unroll 1
    for (; d + 2 <= quads; d += 2) {
      const IntVector first = load_bytes(key), second = load_bytes(key + 4 * kIndexPanel);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const IntVector four = add_16_bits(pair_sums(first, numbers[r]), pair_sums(second, numbers[kTileRows + r]));
        sums[r][v] += widened_sums(four);
      }
      numbers += 2 * kTileRows;
      key += 2 * 4 * kIndexPanel;
    }
    if (d == quads) continue;
    const IntVector last = load_bytes(key);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sums[r][v] += widened_sums(pair_sums(last, numbers[r]));
  }
}
#else
template <int kRows>
inline __attribute__((always_inline)) void add_products(const int32_t* query, const uint8_t* keys, int64_t quads,
                                                        Sums (&sums)[kRows][2]) {
#pragma GCC unroll 1
  for (int64_t d = 0; d < quads; ++d) {
    const IntVector low = load_bytes(keys), high = load_bytes(keys + kVectorBytes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      sums[r][0] = add_dot(sums[r][0], low, query[r]);
      sums[r][1] = add_dot(sums[r][1], high, query[r]);
    }
    query += kTileRows;
    keys += 4 * kIndexPanel;
  }
}
#endif

template <int kRows>
class PassedBits {
 public:
  __attribute__((always_inline)) void add(int part, const Sums (&sums)[kRows][2]) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) bits_[r] = (part == 0 ? 0 : bits_[r]) | not_negative(sums[r]) << (part * kPartKeys % 32);
  }

  // bits[r * stride] gets those of row r.
  __attribute__((always_inline)) void store(uint32_t* bits, int64_t stride) const {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) bits[r * stride] = bits_[r];
  }

 private:
  uint32_t bits_[kRows];
};
#endif
