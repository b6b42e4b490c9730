// An index of keys that is kept beside them from call to call, for few rows: centred 8-bit integers in panels of 32 keys that
// follow one another, a quarter of what float32 keys take to read. key_index-inl.h builds another one, with a sample, for one call.
//
// c is a centre of the keys, any; s a scale of the panel. Key j is c + s K_j + an error, K_j in -127..127, stored as K_j + 128.
// A query q (times the scale of scores) is t Q + an error. By Cauchy-Schwarz, twice, and with the rounding of a score as one
// chain of float32 products and sums in the error of a key:
//   |(score - q.c) / t - s Q.K_j| <= s (|q| / t * error + |error of q| / t * norm),
// with the panel's largest |error of j| / s and |K_j|. So each key's score lies between two numbers that cost no float32 key.

constexpr int kKeptPanel = 32;
constexpr int64_t kLargestKeptDim = 4096;  // sums of products with more dimensions would leave the exact numbers of 32 bits

// The index of one key head.
struct KeptKeys {
  int64_t num_keys;  // later ones are not indexed: they have no bound
  const uint8_t* panels;  // [P, quads, 32, 4]
  const float* numbers;   // [P, 4]: s, 1 / s, error, norm
  const int32_t* unscreened;  // [P], a bit for each key that has no bound: not finite, or far larger than its panel
  const float* centre;    // [quads * 4]
};

inline int64_t kept_panel_bytes(int64_t head_dim) { return ceil_div<int64_t>(head_dim, 4) * kKeptPanel * 4; }

inline float root(float x) { return float(__builtin_sqrt(double(x))); }

inline FloatVector size_of(FloatVector x) { return (FloatVector)((IntVector)x & 0x7fffffff); }

// NaN counts as nothing here; nan_unless_finite() finds it.
inline FloatVector larger_lanes(FloatVector a, FloatVector b) { return a < b ? b : a; }

inline float largest_lane(FloatVector x) {
  float lanes[kLanes<float>];
  store<float>(lanes, x);
  for (int half = kLanes<float> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = larger(lanes[i], lanes[i + half]);
  return lanes[0];
}

inline bool has_nan(FloatVector x) {
  const float sum = sum_of_lanes<float>(x);
  return sum != sum;
}

// x rounded to a whole number, for |x| below 2^22: as a number, and the same with its bits in the low end.
inline FloatVector whole(FloatVector x, IntVector& bits) {
  const FloatVector magic = broadcast<float>(12582912.0f), shifted = x + magic;  // 1.5 * 2^23
  bits = (IntVector)shifted - 0x4b400000;
  return shifted - magic;
}

typedef uint8_t ByteVector __attribute__((vector_size(kLanes<float>)));

// Builds the panels of one key head from the one that holds key `start` on.
template <class T>
class KeptIndexBuilder {
 public:
  KeptIndexBuilder(const IndexKeys& call, int64_t batch, int64_t head) : num_keys_(call.num_keys), head_dim_(call.head_dim) {
    keys_ = static_cast<const T*>(call.key.data) + batch * call.key.stride[0] + head * call.key.stride[1];
    stride_ = call.key.stride[2];
    panels_ = call.index.panels + batch * call.index.panel_stride[0] + head * call.index.panel_stride[1];
    numbers_ = call.index.numbers + batch * call.index.number_stride[0] + head * call.index.number_stride[1];
    unscreened_ = call.index.unscreened + batch * call.index.unscreened_stride[0] + head * call.index.unscreened_stride[1];
    kept_centre_ = call.index.centre + batch * call.index.centre_stride[0] + head * call.index.centre_stride[1];
    quads_ = ceil_div<int64_t>(head_dim_, 4);
    width_ = ceil_div<int64_t>(head_dim_, 16) * 16;
    arena_.allocate([&](Arena& arena) {
      centre_ = arena.take<float>(width_);
      key_ = arena.take<float>(width_);
      rows_ = arena.take<float>(kKeptPanel * width_);
    });
    if (!arena_.ready()) return;
    for (int64_t d = 0; d < width_; ++d) centre_[d] = key_[d] = d < quads_ * 4 ? kept_centre_[d] : 0;
  }

  bool ready() const { return arena_.ready(); }

  // The mean of keys that are not far larger than most. Any centre is right; a good one makes errors small.
  void find_centre() {
    float sizes[kKeptPanel];
    for (int64_t i = 0; i < kKeptPanel; ++i) sizes[i] = largest_of((2 * i + 1) * num_keys_ / (2 * kKeptPanel));
    const float limit = smaller(16 * median(sizes, kKeptPanel), kLargestKept);
    for (int64_t d = 0; d < width_; ++d) centre_[d] = 0;
    int64_t count = 0;
    for (int64_t j = 0; j < num_keys_; ++j) {
      if (!(largest_of(j) <= limit)) continue;
      ++count;
      for (int64_t d = 0; d < width_; d += kLanes<float>) store<float>(centre_ + d, load(centre_ + d) + load(key_ + d));
    }
    for (int64_t d = 0; d < width_; ++d) centre_[d] /= float(larger<int64_t>(count, 1));
    for (int64_t d = 0; d < quads_ * 4; ++d) kept_centre_[d] = centre_[d];
  }

  void build_panel(int64_t p) {
    count_ = smaller<int64_t>(kKeptPanel, num_keys_ - p * kKeptPanel);
    centre_rows(p * kKeptPanel);
    quantise(p);
  }

 private:
  // Numbers up to this size, and their squares' sums, stay far from the ends of float32.
  static constexpr float kLargestKept = 1e15f;

  // The least of the first `count` of a panel's numbers that is not below half of them. Overwrites the others.
  static float median(float* numbers, int64_t count) {
    for (int64_t i = count; i < kKeptPanel; ++i) numbers[i] = kInfinity<float>;
    float least = kInfinity<float>;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t not_above = kKeptPanel - count_above(numbers, numbers[i]);
      if (2 * not_above >= count) least = smaller(least, numbers[i]);
    }
    return least;
  }

  static int64_t count_above(const float* numbers, float x) {
    int64_t count = 0;
    for (int i = 0; i < kKeptPanel; i += kLanes<float>)
      count += kLanes<float> - count_bits(not_less(broadcast(x), load(numbers + i)));
    return count;
  }

  // Key j in key_, widened; zeros beyond its elements, which the last ones of key_ are from the start.
  void read(int64_t j) {
    const float* const from = widened<T, float>(keys_ + j * stride_, head_dim_, key_);
    if (from != key_) __builtin_memcpy(key_, from, size_t(head_dim_) * sizeof(float));
    for (int64_t d = head_dim_; d < width_; ++d) key_[d] = 0;
  }

  // The largest size of an element of key j, which key_ holds then; infinity where one is not finite.
  float largest_of(int64_t j) {
    read(j);
    FloatVector most = {}, broken = {};
    for (int64_t d = 0; d < width_; d += kLanes<float>) {
      const FloatVector v = load(key_ + d);
      most = larger_lanes(most, size_of(v));
      broken += v * 0.0f;
    }
    return has_nan(broken) ? kInfinity<float> : largest_lane(most);
  }

  // Fills rows_ with the panel's keys less the centre, and sizes_ and norms_.
  void centre_rows(int64_t first_key) {
    bits_ = 0;
    for (int64_t lane = 0; lane < count_; ++lane) {
      float* const row = rows_ + lane * width_;
      const float high = largest_of(first_key + lane);
      FloatVector most = {}, squares = {};
      for (int64_t d = 0; d < width_; d += kLanes<float>) {
        const FloatVector v = load(key_ + d), r = v - load(centre_ + d);
        store<float>(row + d, r);
        most = larger_lanes(most, size_of(r));
        squares = multiply_add<float>(v, v, squares);
      }
      sizes_[lane] = norms_[lane] = 0;
      if (!(high < kLargestKept)) {
        bits_ |= 1u << lane;
      } else {
        sizes_[lane] = largest_lane(most);
        norms_[lane] = root(sum_of_lanes<float>(squares)) * rounded_up();
      }
    }
    // One key far above the rest of its panel would leave no digits for them.
    const float limit = 16 * median(sizes_, count_);
    for (int64_t lane = 0; limit > 0 && lane < count_; ++lane)
      if (sizes_[lane] > limit) bits_ |= 1u << lane;
  }

  // What a square root of a sum of squares is off by, at most.
  float rounded_up() const { return 1 + 1e-5f + float(head_dim_) * 1.5e-8f; }

  void quantise(int64_t p) {
    float largest = 0;
    for (int64_t lane = 0; lane < count_; ++lane)
      if ((bits_ >> lane & 1) == 0) largest = larger(largest, sizes_[lane]);
    // Below this scale squares of errors would underflow.
    const float scale = larger(largest / 127, 1e-15f), inverse = 1 / scale;
    float most_error = 0, most_norm = 0;
    uint8_t* const panel = panels_ + p * kept_panel_bytes(head_dim_);
    for (int64_t lane = 0; lane < kKeptPanel; ++lane) {
      uint8_t* const to = panel + 4 * lane;
      if (lane >= count_ || (bits_ >> lane & 1) != 0) {
        for (int64_t d = 0; d < quads_; ++d) __builtin_memset(to + d * kKeptPanel * 4, 128, 4);
        continue;
      }
      const float* const row = rows_ + lane * width_;
      FloatVector errors = {}, squares = {}, numbers = {};
      for (int64_t d = 0; d < width_; d += kLanes<float>) {
        const FloatVector r = load(row + d);
        IntVector bits;
        const FloatVector number = whole(r * inverse, bits), e = r - number * scale;
        errors = multiply_add<float>(e, e, errors);
        squares = multiply_add<float>(r, r, squares);
        numbers = multiply_add<float>(number, number, numbers);
        const ByteVector bytes = __builtin_convertvector(bits + 128, ByteVector);
        for (int i = 0; i < kLanes<float> && d + i < quads_ * 4; i += 4)
          __builtin_memcpy(to + (d + i) * kKeptPanel, reinterpret_cast<const uint8_t*>(&bytes) + i, 4);
      }
      // Roundings: of the centred key, of these sums, of a score as one chain of float32 products and sums.
      const float error = root(sum_of_lanes<float>(errors)) * rounded_up() + 5e-7f * root(sum_of_lanes<float>(squares)) +
                          1e-7f * norms_[lane] + float(head_dim_ + 2) * 6e-8f * norms_[lane];
      most_error = larger(most_error, error / scale * rounded_up() + 2e-3f);
      most_norm = larger(most_norm, root(sum_of_lanes<float>(numbers)) * rounded_up());
    }
    float* const numbers = numbers_ + 4 * p;
    numbers[0] = scale;
    numbers[1] = inverse;
    numbers[2] = most_error;
    numbers[3] = most_norm;
    unscreened_[p] = int32_t(bits_);
  }

  const int64_t num_keys_, head_dim_;
  const T* keys_;
  int64_t stride_, quads_, width_, count_ = 0;
  uint8_t* panels_;
  float *numbers_, *kept_centre_;
  int32_t* unscreened_;
  Arena arena_;
  float *centre_ = nullptr, *key_ = nullptr, *rows_ = nullptr;
  float sizes_[kKeptPanel], norms_[kKeptPanel];
  uint32_t bits_ = 0;
};

template <class T>
bool run_index_keys(const IndexKeys& call, const Parallel& parallel) {
  // A thread that is woken for less takes longer than the work.
  constexpr int64_t kPanelsOfTask = 64;
  struct State {
    const IndexKeys& call;
    int64_t first_panel, num_panels, num_parts;
    bool ok;
  } state = {call, call.start / kKeptPanel, ceil_div<int64_t>(call.num_keys, kKeptPanel), 1, true};
  const int64_t num_heads = call.batch * call.num_heads, new_panels = state.num_panels - state.first_panel;
  if (call.start == 0)
    parallel.run(num_heads, &state, [](void* opaque, int64_t task) {
      State& state = *static_cast<State*>(opaque);
      KeptIndexBuilder<T> builder(state.call, task / state.call.num_heads, task % state.call.num_heads);
      if (!builder.ready()) return __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
      builder.find_centre();
    });
  if (!state.ok || new_panels <= 0) return state.ok;
  state.num_parts = ceil_div(new_panels, kPanelsOfTask);
  const auto build = [](void* opaque, int64_t task) {
    State& state = *static_cast<State*>(opaque);
    const int64_t head = task / state.num_parts, first = state.first_panel + task % state.num_parts * kPanelsOfTask;
    KeptIndexBuilder<T> builder(state.call, head / state.call.num_heads, head % state.call.num_heads);
    if (!builder.ready()) return __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
    for (int64_t p = first; p < smaller(first + kPanelsOfTask, state.num_panels); ++p) builder.build_panel(p);
  };
  const int64_t num_tasks = num_heads * state.num_parts;
  if (num_heads * new_panels <= kPanelsOfTask)
    for (int64_t task = 0; task < num_tasks; ++task) build(&state, task);
  else
    parallel.run(num_tasks, &state, build);
  return state.ok;
}
