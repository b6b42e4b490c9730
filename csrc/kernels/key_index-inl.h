// The keys of one head as centred 8-bit integers, with which all scores are screened before few are computed (screen-inl.h
// says how). Built once per call and key head, shared by threads, read only from then on. Only for x86 with VNNI.
//
// c is a centre of the keys, s a scale. Key j of a panel is c + s K_j up to an error, K_j in -127..127, stored as K_j + 128.
//
// Slots: the sample comes first, every `period`-th key, then all other keys in their order. A panel is 32 slots.

constexpr int kIndexPanel = 32;

struct KeyIndex {
  int64_t num_keys, head_dim;
  int64_t period;         // keys 0, period, 2 * period ... are the sample
  int64_t num_sampled, sample_panels, num_panels;
  int64_t quads;          // head_dim / 4, rounded up: four dimensions are multiplied at once
  float* centre;          // [quads * 4]
  float centre_norm;
  uint8_t* keys;          // [num_panels, quads, 32, 4], K + 128
  float *scale, *inverse; // [num_panels], s and 1 / s
  float *error, *norm;    // [num_panels], the largest |error of j| / s, roundings of its float32 score with it, and |K_j|
  uint32_t* unscreened;   // [num_panels], a bit for each key that has no bound: not finite, or far larger than its panel
  bool has_unscreened, has_broken;  // is there any, is any not finite

  KeyIndex(int64_t num_keys, int64_t head_dim, int64_t period)
      : num_keys(num_keys), head_dim(head_dim), period(period), num_sampled(ceil_div(num_keys, period)),
        sample_panels(ceil_div<int64_t>(num_sampled, kIndexPanel)),
        num_panels(sample_panels + ceil_div<int64_t>(num_keys - num_sampled, kIndexPanel)), quads(ceil_div<int64_t>(head_dim, 4)) {}

  void take(Arena& arena) {
    centre = arena.take<float>(quads * 4);
    keys = arena.take<uint8_t>(num_panels * panel_bytes());
    scale = arena.take<float>(num_panels);
    inverse = arena.take<float>(num_panels);
    error = arena.take<float>(num_panels);
    norm = arena.take<float>(num_panels);
    unscreened = arena.take<uint32_t>(num_panels);
  }

  int64_t panel_bytes() const { return quads * kIndexPanel * 4; }
  const uint8_t* panel(int64_t p) const { return keys + p * panel_bytes(); }

  // Of the first `num_visible` keys, how many are in the sample and how many are not: in both they come first.
  int64_t sampled_among(int64_t num_visible) const { return ceil_div(num_visible, period); }
  int64_t others_among(int64_t num_visible) const { return num_visible - sampled_among(num_visible); }

  // The key of the sample before the first of panel p, where that comes right after it.
  int64_t first_key_of(int64_t p) const {
    const int64_t other = (p - sample_panels) * kIndexPanel;
    return other + other / (period - 1);
  }

  // The key in a slot of panel p, counted from that panel's first; not below num_keys where the slot is empty.
  int64_t key_at(int64_t p, int64_t lane) const {
    if (p < sample_panels) return (p * kIndexPanel + lane) * period;
    const int64_t other = (p - sample_panels) * kIndexPanel + lane;
    return other + other / (period - 1) + 1;
  }
};

inline __m512 load_widened(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline __m512 load_widened(const BFloat16* from, __mmask16 lanes) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline __m512 load_widened(const Float16* from, __mmask16 lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, from));
}

// The lanes of a vector that begins at element d of `dim`.
inline __mmask16 lanes_left(int64_t d, int64_t dim) { return dim - d >= 16 ? 0xffff : __mmask16((1u << (dim - d)) - 1); }

// A square root is needed a few times a panel; the instruction, as the library's function may not be there.
inline float square_root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

// Numbers up to this size, and their squares' sums, stay far from the ends of float32.
constexpr float kLargestScreened = 1e15f;

template <class T>
class KeyIndexBuilder {
 public:
  KeyIndexBuilder(KeyIndex& index, const T* keys, int64_t stride) : x_(index), keys_(keys), stride_(stride) {}

  // False where there is no memory.
  bool build() {
    width_ = ceil_div<int64_t>(x_.head_dim, 16) * 16;
    Arena arena;
    const bool has_memory = arena.allocate([&](Arena& arena) {
      centre_ = arena.take<float>(width_);
      rows_ = arena.take<float>(kIndexPanel * width_);
    });
    if (!has_memory) return false;
    find_centre();
    x_.has_unscreened = x_.has_broken = false;
    for (int64_t p = 0; p < x_.num_panels; ++p) {
      centre_rows(p);
      quantise(p);
    }
    return true;
  }

 private:
  // What is not below the median of 32 numbers by more than half of them.
  static float median_of_panel(const float* numbers) {
    const __m512 a = _mm512_loadu_ps(numbers), b = _mm512_loadu_ps(numbers + 16);
    float median = __builtin_inff();
    for (int i = 0; i < kIndexPanel; ++i) {
      const __m512 x = _mm512_set1_ps(numbers[i]);
      const int not_above = count_bits(_mm512_cmp_ps_mask(a, x, _CMP_LE_OQ)) + count_bits(_mm512_cmp_ps_mask(b, x, _CMP_LE_OQ));
      if (not_above >= kIndexPanel / 2) median = smaller(median, numbers[i]);
    }
    return median;
  }

  float largest_of(const T* key) const {
    __m512 most = _mm512_setzero_ps(), broken = most;
    for (int64_t d = 0; d < x_.head_dim; d += 16) {
      const __m512 v = load_widened(key + d, lanes_left(d, x_.head_dim));
      most = _mm512_max_ps(most, _mm512_abs_ps(v));
      broken = _mm512_fmadd_ps(v, _mm512_setzero_ps(), broken);
    }
    return _mm512_cmp_ps_mask(broken, broken, _CMP_UNORD_Q) != 0 ? __builtin_inff() : _mm512_reduce_max_ps(most);
  }

  // Is no element larger, or NaN.
  bool is_within(const T* key, float limit) const {
    __mmask16 within = 0xffff;
    for (int64_t d = 0; d < x_.head_dim; d += 16)
      within &= _mm512_cmp_ps_mask(_mm512_abs_ps(load_widened(key + d, lanes_left(d, x_.head_dim))), _mm512_set1_ps(limit), _CMP_LE_OQ);
    return within == 0xffff;
  }

  // The mean of keys that are not far larger than most. Any centre is right; a good one makes errors small.
  void find_centre() {
    float sizes[kIndexPanel];
    for (int64_t i = 0; i < kIndexPanel; ++i) sizes[i] = largest_of(keys_ + (2 * i + 1) * x_.num_keys / (2 * kIndexPanel) * stride_);
    const float limit = smaller(16 * median_of_panel(sizes), kLargestScreened);
    for (int64_t d = 0; d < width_; ++d) centre_[d] = 0;
    int64_t count = 0;
    for (int64_t j = 0; j < x_.num_keys; ++j) {
      const T* key = keys_ + j * stride_;
      if (!is_within(key, limit)) continue;
      ++count;
      for (int64_t d = 0; d < x_.head_dim; d += 16)
        _mm512_storeu_ps(centre_ + d, _mm512_add_ps(_mm512_loadu_ps(centre_ + d), load_widened(key + d, lanes_left(d, x_.head_dim))));
    }
    float norm = 0;
    for (int64_t d = 0; d < x_.head_dim; ++d) {
      centre_[d] /= float(larger<int64_t>(count, 1));
      norm += centre_[d] * centre_[d];
    }
    for (int64_t d = 0; d < x_.quads * 4; ++d) x_.centre[d] = centre_[d];
    x_.centre_norm = square_root(norm) * 1.0001f;
  }

  // Fills rows_ with the panel's keys less the centre, and sizes_ and norms_.
  void centre_rows(int64_t p) {
    unscreened_ = 0;
    for (int64_t lane = 0; lane < kIndexPanel; ++lane) {
      float* row = rows_ + lane * width_;
      const int64_t j = x_.key_at(p, lane);
      sizes_[lane] = norms_[lane] = 0;
      if (j >= x_.num_keys) {
        for (int64_t d = 0; d < width_; ++d) row[d] = 0;
        continue;
      }
      const T* key = keys_ + j * stride_;
      __m512 most = _mm512_setzero_ps(), broken = most, high = most, squares = most;
      for (int64_t d = 0; d < width_; d += 16) {
        const __m512 v = load_widened(key + d, lanes_left(d, x_.head_dim)), r = _mm512_sub_ps(v, _mm512_loadu_ps(centre_ + d));
        _mm512_storeu_ps(row + d, r);
        broken = _mm512_fmadd_ps(v, _mm512_setzero_ps(), broken);
        high = _mm512_max_ps(high, _mm512_abs_ps(v));
        most = _mm512_max_ps(most, _mm512_abs_ps(r));
        squares = _mm512_fmadd_ps(v, v, squares);
      }
      const bool is_broken = _mm512_cmp_ps_mask(broken, broken, _CMP_UNORD_Q) != 0;
      x_.has_broken = x_.has_broken || is_broken;
      if (is_broken || !(_mm512_reduce_max_ps(high) < kLargestScreened)) {
        unscreened_ |= 1u << lane;
      } else {
        sizes_[lane] = _mm512_reduce_max_ps(most);
        norms_[lane] = square_root(_mm512_reduce_add_ps(squares)) * (1 + 1e-5f);
      }
    }
    // One key far above the rest of its panel would leave no digits for them.
    const float limit = 16 * median_of_panel(sizes_);
    for (int64_t lane = 0; limit > 0 && lane < kIndexPanel; ++lane)
      if (sizes_[lane] > limit) unscreened_ |= 1u << lane;
  }

  void quantise(int64_t p) {
    float largest = 0;
    for (int64_t lane = 0; lane < kIndexPanel; ++lane) {
      if ((unscreened_ >> lane & 1) != 0) continue;
      largest = larger(largest, sizes_[lane]);
    }
    // Below this scale squares of errors would underflow.
    const float scale = larger(largest / 127, 1e-15f), inverse = 1 / scale;
    float most_error = 0, most_norm = 0;
    for (int64_t lane = 0; lane < kIndexPanel; ++lane) {
      uint32_t* to = reinterpret_cast<uint32_t*>(x_.keys + p * x_.panel_bytes()) + lane;
      if ((unscreened_ >> lane & 1) != 0) {
        for (int64_t d = 0; d < x_.quads; ++d) to[d * kIndexPanel] = 0x80808080u;
        continue;
      }
      const float* row = rows_ + lane * width_;
      __m512 errors = _mm512_setzero_ps(), squares = errors, numbers = errors;
      for (int64_t d = 0; d < width_; d += 16) {
        const __m512 r = _mm512_loadu_ps(row + d);
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(r, _mm512_set1_ps(inverse)));
        const __m512 number = _mm512_cvtepi32_ps(rounded), e = _mm512_fnmadd_ps(number, _mm512_set1_ps(scale), r);
        errors = _mm512_fmadd_ps(e, e, errors);
        squares = _mm512_fmadd_ps(r, r, squares);
        numbers = _mm512_fmadd_ps(number, number, numbers);
        alignas(16) uint32_t quads[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(quads), _mm_add_epi8(_mm512_cvtepi32_epi8(rounded), _mm_set1_epi8(-128)));
        for (int64_t i = 0; i < smaller<int64_t>(4, x_.quads - d / 4); ++i) to[(d / 4 + i) * kIndexPanel] = quads[i];
      }
      // Roundings: of the centred key, of these sums, of a score as one chain of float32 products and sums.
      const float error = square_root(_mm512_reduce_add_ps(errors)) * (1 + 1e-5f) +
                          5e-7f * square_root(_mm512_reduce_add_ps(squares)) + 1e-7f * norms_[lane] +
                          float(x_.head_dim + 2) * 6e-8f * norms_[lane];
      most_error = larger(most_error, error / scale * (1 + 1e-5f) + 2e-3f);
      most_norm = larger(most_norm, square_root(_mm512_reduce_add_ps(numbers)) * (1 + 1e-5f));
    }
    x_.scale[p] = scale;
    x_.inverse[p] = inverse;
    x_.error[p] = most_error;
    x_.norm[p] = most_norm;
    x_.unscreened[p] = unscreened_;
    x_.has_unscreened = x_.has_unscreened || unscreened_ != 0;
  }

  KeyIndex& x_;
  const T* keys_;
  int64_t stride_, width_ = 0;
  float *centre_ = nullptr, *rows_ = nullptr;
  float sizes_[kIndexPanel], norms_[kIndexPanel];
  uint32_t unscreened_ = 0;
};
