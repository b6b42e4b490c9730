// The keys of one head as centred 8-bit integers, with which all scores are screened before few are computed (screen-inl.h
// says how). Built once per call and key head, shared by threads, read only from then on.
//
// c is a centre of the keys, s a scale. Key j of a panel is c + s K_j up to an error, K_j in -127..127, stored as
// K_j + kKeyOffset.
//
// Slots: the sample comes first, every `period`-th key, then all other keys in their order. A panel is 32 slots.

struct KeyIndex {
  int64_t num_keys, head_dim;
  int64_t period;         // keys 0, period, 2 * period ... are the sample
  int64_t num_sampled, sample_panels, num_panels;
  int64_t quads;          // head_dim / 4, rounded up: four dimensions are multiplied at once
  float* centre;          // [whole_vectors(head_dim)], zeros at the end
  float centre_norm;
  uint8_t* keys;          // [num_panels, quads, 32, 4], K + kKeyOffset
  float *scale, *inverse; // [num_panels], s and 1 / s
  float *error, *norm;    // [num_panels], the largest |error of j| / s, roundings of its float32 score with it, and |K_j|
  uint32_t* unscreened;   // [num_panels], a bit for each key that has no bound: not finite, or one of few far larger than its panel
  bool has_unscreened, has_broken;  // is there any, is any not finite

  KeyIndex(int64_t num_keys, int64_t head_dim, int64_t period)
      : num_keys(num_keys), head_dim(head_dim), period(period), num_sampled(ceil_div(num_keys, period)),
        sample_panels(ceil_div<int64_t>(num_sampled, kIndexPanel)),
        num_panels(sample_panels + ceil_div<int64_t>(num_keys - num_sampled, kIndexPanel)), quads(ceil_div<int64_t>(head_dim, 4)) {}

  void take(Arena& arena) {
    centre = arena.take<float>(whole_vectors(head_dim));
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

// Numbers up to this size, and their squares' sums, stay far from the ends of float32.
constexpr float kLargestScreened = 1e15f;

template <class T>
class KeyIndexBuilder {
 public:
  KeyIndexBuilder(KeyIndex& index, const T* keys, int64_t stride) : x_(index), keys_(keys), stride_(stride) {}

  // False where there is no memory.
  bool build() {
    width_ = whole_vectors(x_.head_dim);
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
    float median = __builtin_inff();
    for (int i = 0; i < kIndexPanel; ++i) {
      int not_above = 0;
      for (int v = 0; v < kPanelVectors; ++v) not_above += count_bits(not_less(broadcast(numbers[i]), load(numbers + v * kLanes<float>)));
      if (not_above >= kIndexPanel / 2) median = smaller(median, numbers[i]);
    }
    return median;
  }

  float largest_of(const T* key) const {
    FloatVector most = {}, broken = {};
    for (int64_t d = 0; d < x_.head_dim; d += kLanes<float>) {
      const FloatVector v = load_widened(key + d, x_.head_dim - d);
      most = higher_of(most, absolute(v));
      broken = multiply_add<float>(v, FloatVector{}, broken);
    }
    return nan_lanes(broken) != 0 ? __builtin_inff() : most_lane(most);
  }

  // Is every element smaller, and none NaN.
  bool is_below(const T* key, float limit) const {
    uint32_t others = 0;
    for (int64_t d = 0; d < x_.head_dim; d += kLanes<float>)
      others |= not_less(absolute(load_widened(key + d, x_.head_dim - d)), broadcast(limit));
    return others == 0;
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
      if (!is_below(key, limit)) continue;
      ++count;
      for (int64_t d = 0; d < x_.head_dim; d += kLanes<float>)
        store<float>(centre_ + d, load(centre_ + d) + load_widened(key + d, x_.head_dim - d));
    }
    float norm = 0;
    for (int64_t d = 0; d < x_.head_dim; ++d) {
      centre_[d] /= float(larger<int64_t>(count, 1));
      norm += centre_[d] * centre_[d];
    }
    for (int64_t d = 0; d < width_; ++d) x_.centre[d] = centre_[d];
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
      FloatVector most = {}, broken = {}, high = {}, squares = {};
      for (int64_t d = 0; d < width_; d += kLanes<float>) {
        const FloatVector v = load_widened(key + d, x_.head_dim - d), r = v - load(centre_ + d);
        store<float>(row + d, r);
        broken = multiply_add<float>(v, FloatVector{}, broken);
        high = higher_of(high, absolute(v));
        most = higher_of(most, absolute(r));
        squares = multiply_add<float>(v, v, squares);
      }
      const bool is_broken = nan_lanes(broken) != 0;
      x_.has_broken = x_.has_broken || is_broken;
      if (is_broken || !(most_lane(high) < kLargestScreened)) {
        unscreened_ |= 1u << lane;
      } else {
        sizes_[lane] = most_lane(most);
        norms_[lane] = square_root(sum_of_floats(squares)) * (1 + 1e-5f);
      }
    }
    // A few keys far above the rest of their panel would leave no digits for them. Many are what queries choose from: they need the
    // digits, and a key of which none are left lies far below them.
    const float limit = 16 * median_of_panel(sizes_);
    uint32_t far_above = 0;
    for (int64_t lane = 0; limit > 0 && lane < kIndexPanel; ++lane) far_above |= uint32_t(sizes_[lane] > limit) << lane;
    if (count_bits(far_above) <= kFewKeys) unscreened_ |= far_above;
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
        for (int64_t d = 0; d < x_.quads; ++d) to[d * kIndexPanel] = kOffsets;
        continue;
      }
      const float* row = rows_ + lane * width_;
      FloatVector errors = {}, squares = {}, numbers = {};
      for (int64_t d = 0; d < width_; d += kLanes<float>) {
        const FloatVector r = load(row + d);
        const IntVector whole = rounded(r * inverse);
        const FloatVector number = as_float(whole), e = r - number * scale;
        errors = multiply_add<float>(e, e, errors);
        squares = multiply_add<float>(r, r, squares);
        numbers = multiply_add<float>(number, number, numbers);
        uint32_t quads[kLanes<float> / 4];
        store_bytes(reinterpret_cast<uint8_t*>(quads), whole + kKeyOffset);
        for (int64_t i = 0; i < smaller<int64_t>(kLanes<float> / 4, x_.quads - d / 4); ++i) to[(d / 4 + i) * kIndexPanel] = quads[i];
      }
      // Roundings: of the centred key, of these sums, of a score as one chain of float32 products and sums.
      const float error = square_root(sum_of_floats(errors)) * (1 + 1e-5f) +
                          5e-7f * square_root(sum_of_floats(squares)) + 1e-7f * norms_[lane] +
                          float(x_.head_dim + 2) * 6e-8f * norms_[lane];
      most_error = larger(most_error, error / scale * (1 + 1e-5f) + 2e-3f);
      most_norm = larger(most_norm, square_root(sum_of_floats(numbers)) * (1 + 1e-5f));
    }
    x_.scale[p] = scale;
    x_.inverse[p] = inverse;
    x_.error[p] = most_error;
    x_.norm[p] = most_norm;
    x_.unscreened[p] = unscreened_;
    x_.has_unscreened = x_.has_unscreened || unscreened_ != 0;
  }

  static constexpr int kFewKeys = 3;  // of a panel
  static constexpr uint32_t kOffsets = kKeyOffset * 0x01010101u;  // of four zeros

  KeyIndex& x_;
  const T* keys_;
  int64_t stride_, width_ = 0;
  float *centre_ = nullptr, *rows_ = nullptr;
  float sizes_[kIndexPanel], norms_[kIndexPanel];
  uint32_t unscreened_ = 0;
};
