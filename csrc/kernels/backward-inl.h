// Top-k attention, backward: reads only the kept keys.
//
// The rows of one head group are computed in chunks, in two phases. Phase one, parallel over rows: the gradient of each
// kept score, and of the query; each entry goes to the bucket of its range of keys. Phase two, parallel over these ranges:
// entries are sorted by key, so that a key's gradient is read and written once for many of them. Each sum runs over rows in
// ascending order: the same bits for any number of threads, and for any size of chunks, ranges and tiles. Biases are summed
// over ranges of their own. Work that no wanted gradient needs is skipped.

constexpr int64_t kChunkBytes = 2 << 20, kMaxBlocksOfChunk = 256;
// Rows whose entries lie together, bucket by bucket.
constexpr int64_t kRowsPerBlock = 64;
// With a rest a task begins with the sums over up to an interval of keys: more blocks share that.
constexpr int64_t kBlocksPerTaskWithRest = 8;
constexpr int64_t kMaxKeysPerRange = 4096;
// What is sorted at a time: blocks until they have so many entries in the range. In real text few rows do, and their
// queries are read from the first-level cache; the limit on rows keeps the others in the second-level cache.
constexpr int64_t kTileEntries = 16 << 10, kTileBytes = 512 << 10;
constexpr int64_t kBiasRanges = 16;
constexpr float kSmallestTellingWeight = 1e-30f;
// Vectors of a sum that stay in registers.
constexpr int kMostSums = kVectorBytes == 64 ? 16 : 8;

// A kept key of a row, and what the row's query and grad_output are multiplied by in the gradients of that key and value.
template <class A>
struct Entry {
  int32_t key, row;  // the row counts from the chunk's first
  A of_key, of_value;
};

// kDim is the head and value size where it is known when compiling, otherwise 0.
template <class T, class A, int kDim>
class Backward {
 public:
  Backward(const AttentionBackward& call, int64_t num_threads)
      : call_(call), s_(call.sizes), rows_of_group_(s_.num_heads / s_.num_key_heads * s_.num_queries) {
    largest_k_ = largest_k_of(call.head_k, s_.num_heads);
    const int64_t chunk_rows = larger<int64_t>(kChunkBytes / (largest_k_ * int64_t(sizeof(Entry<A>))), 1);
    rows_per_block_ = smaller(smaller(kRowsPerBlock, chunk_rows), rows_of_group_);
    blocks_per_task_ = call.rest.active ? kBlocksPerTaskWithRest : 1;
    blocks_per_chunk_ = larger(smaller(chunk_rows / rows_per_block_, kMaxBlocksOfChunk), blocks_per_task_);
    blocks_per_chunk_ = smaller(blocks_per_chunk_, ceil_div(rows_of_group_, rows_per_block_));
    const int64_t row_bytes = larger<int64_t>((s_.head_dim + s_.value_dim) * int64_t(sizeof(A)), 1);
    // Each thread should get several ranges, as they take unequal time.
    const int64_t most_keys = num_threads == 1 ? kMaxKeysPerRange : smaller(kMaxKeysPerRange, s_.num_keys / (4 * num_threads));
    while (int64_t(2) << range_bits_ <= most_keys) ++range_bits_;
    max_tile_blocks_ = larger<int64_t>(kTileBytes / row_bytes / rows_per_block_, 1);
    most_of_block_ = rows_per_block_ * smaller(largest_k_, keys_per_range());
  }

  int64_t num_groups() const { return s_.batch * s_.num_key_heads; }

  // What one chunk needs.
  struct Space {
    Entry<A>* entries;   // [blocks, rows of a block * largest k]
    int32_t* bucket_ends;  // [blocks, ranges]: the ranges of a block follow one another
    A* bias_gradients;   // [rows, largest k], only where a bias gets a gradient
  };
  void take(Arena& arena, Space& space) const {
    if (wants_entries()) {
      space.entries = arena.take<Entry<A>>(blocks_per_chunk_ * rows_per_block_ * largest_k_);
      space.bucket_ends = arena.take<int32_t>(blocks_per_chunk_ * num_ranges());
    }
    if (wants_biases()) space.bias_gradients = arena.take<A>(blocks_per_chunk_ * rows_per_block_ * largest_k_);
  }

  // The whole group, phase after phase. `parallel` runs the tasks of a phase.
  bool run_group(int64_t group, const Space& space, const Parallel& parallel) const {
    const int64_t rows_per_chunk = blocks_per_chunk_ * rows_per_block_;
    for (int64_t first = 0; first < rows_of_group_; first += rows_per_chunk) {
      Chunk chunk = {this, group, first, smaller(rows_per_chunk, rows_of_group_ - first), space, true};
      parallel.run(ceil_div(num_blocks(chunk), blocks_per_task_), &chunk, [](void* opaque, int64_t task) {
        Chunk& chunk = *static_cast<Chunk*>(opaque);
        chunk.self->score_gradients(chunk, task * chunk.self->blocks_per_task_);
      });
      if (!chunk.ok) return false;
      if (wants_entries()) {
        parallel.run(num_ranges(), &chunk, [](void* opaque, int64_t task) {
          Chunk& chunk = *static_cast<Chunk*>(opaque);
          chunk.self->key_gradients(chunk, task);
        });
      }
      if (call_.grad_relative_bias != nullptr) {
        parallel.run(kBiasRanges, &chunk, [](void* opaque, int64_t task) {
          Chunk& chunk = *static_cast<Chunk*>(opaque);
          chunk.self->relative_bias_gradients(chunk, task);
        });
      }
      if (call_.grad_bias != nullptr) {
        parallel.run(kBiasRanges, &chunk, [](void* opaque, int64_t task) {
          Chunk& chunk = *static_cast<Chunk*>(opaque);
          chunk.self->bias_gradients(chunk, task);
        });
      }
      if (!chunk.ok) return false;
    }
    return true;
  }

 private:
  struct Chunk {
    const Backward* self;
    int64_t group, first_row, num_rows;
    Space space;
    bool ok;
  };

  // One row of a chunk: where its parts are.
  struct Row {
    int64_t place, batch, head, query, number, k, count;  // place: its number in the chunk
    const int32_t* indices;
    const A* weights;
  };

  bool wants_entries() const { return call_.grad_key != nullptr || call_.grad_value != nullptr; }
  bool wants_biases() const { return call_.grad_bias != nullptr || call_.grad_relative_bias != nullptr; }
  bool needs_score_gradients() const {
    return call_.rest.active || call_.grad_query != nullptr || call_.grad_key != nullptr || call_.mean_grads != nullptr ||
           wants_biases();
  }

  int64_t head_dim() const { return kDim != 0 ? kDim : s_.head_dim; }
  int64_t value_dim() const { return kDim != 0 ? kDim : s_.value_dim; }
  int64_t keys_per_range() const { return int64_t(1) << range_bits_; }
  int64_t num_ranges() const { return ceil_div(s_.num_keys, keys_per_range()); }
  int64_t num_blocks(const Chunk& chunk) const { return ceil_div(chunk.num_rows, rows_per_block_); }

  Row row_of(const Chunk& chunk, int64_t place) const {
    Row row;
    const int64_t key_head = chunk.group % s_.num_key_heads;
    row.place = place;
    row.batch = chunk.group / s_.num_key_heads;
    row.head = key_head * (s_.num_heads / s_.num_key_heads) + (chunk.first_row + place) / s_.num_queries;
    row.query = (chunk.first_row + place) % s_.num_queries;
    row.number = (row.batch * s_.num_heads + row.head) * s_.num_queries + row.query;
    row.k = call_.head_k.k[row.head];
    const int64_t first =
        (row.batch * call_.head_k.total_k + call_.head_k.first_k[row.head]) * s_.num_queries + row.query * row.k;
    row.indices = call_.indices + first;
    row.weights = static_cast<const A*>(call_.weights) + first;
    row.count = num_filled(row.indices, row.k);
    return row;
  }

  // On to the next row; after the last one of the chunk the row means nothing.
  void step(const Chunk& chunk, Row& row) const {
    if (row.place + 1 == chunk.num_rows) return;
    if (row.query + 1 == s_.num_queries) {
      row = row_of(chunk, row.place + 1);
      return;
    }
    ++row.place;
    ++row.query;
    ++row.number;
    row.indices += row.k;
    row.weights += row.k;
    row.count = num_filled(row.indices, row.k);
  }

  static int64_t num_filled(const int32_t* indices, int64_t k) {
    if (indices[k - 1] >= 0) return k;
    int64_t count = 0;
    while (count < k && indices[count] >= 0) ++count;
    return count;
  }

  const T* at(const View& view, int64_t batch, int64_t head, int64_t row) const {
    return static_cast<const T*>(view.data) + batch * view.stride[0] + head * view.stride[1] + row * view.stride[2];
  }

  // What a task of phase one works with: one row at a time.
  struct RowSpace {
    A *grad, *spare, *grad_query;
    A* query;  // [D], scaled
    // [k], rounded up to whole vectors:
    A *scores, *biases;            // the gradients of the row's scores, and of what is added to them
    A *drops, *values;             // dropout's factors, and the weights of the row in its values' gradients
    A *products, *value_products;  // query . key and grad_output . value of the kept keys
    int32_t *cuts, *shifts;  // [rows of a block, ranges] and [ranges]: see open_buckets() and fill_buckets()
    int64_t first_row;             // the row of the chunk at the first place of the sums over seen keys
  };

  void score_gradients(Chunk& chunk, int64_t first_block) const {
    Arena arena;
    RowSpace space = {};
    SeenSums<T, A, true> seen(call_.rest, s_, call_.is_causal);
    const bool has_memory = arena.allocate([&](Arena& arrays) {
      space.grad = arrays.take<A>(value_dim());
      space.spare = arrays.take<A>(larger(head_dim(), value_dim()));
      space.grad_query = arrays.take<A>(head_dim());
      A** const of_entries[] = {&space.scores, &space.biases,   &space.drops,
                                &space.values, &space.products, &space.value_products};
      for (A** const array : of_entries) *array = arrays.take<A>(ceil_div<int64_t>(largest_k_, kLanes<A>) * kLanes<A>);
      if (wants_entries()) {
        space.cuts = arrays.take<int32_t>(rows_per_block_ * num_ranges());
        space.shifts = arrays.take<int32_t>(num_ranges());
      }
      if (call_.rest.active || call_.softcap > 0) space.query = arrays.take<A>(head_dim());
      if (!call_.rest.active) return;
      seen.take(arrays, kRowsPerBlock);
    });
    if (!has_memory) {
      __atomic_store_n(&chunk.ok, false, __ATOMIC_RELAXED);
      return;
    }
    const int64_t first = first_block * rows_per_block_;
    const int64_t last = smaller(first + blocks_per_task_ * rows_per_block_, chunk.num_rows);
    int64_t prepared = first;  // rows before this one have their sums over seen keys
    Row row = row_of(chunk, first);
    for (int64_t r = first; r < last; ++r, step(chunk, row)) {
      if (wants_entries() && r % rows_per_block_ == 0) open_buckets(chunk, row, space.cuts);
      if (call_.rest.active && r == prepared) {
        space.first_row = r;
        prepared = smaller(smaller(last, r + kRowsPerBlock), r + s_.num_queries - row.query);
        for (int64_t i = r; i < prepared; ++i) {
          A* const to = seen.row(i - r);
          const A* const from = widened<T, A>(at(call_.grad_output, row.batch, row.head, row.query + i - r), value_dim(), to);
          for (int64_t e = 0; e < value_dim(); ++e) to[e] = from[e];
        }
        seen.prepare(0, row.batch, row.head, row.query, prepared - r);
      }
      const A* values = row.weights;
      if (call_.dropout.active) {
        const DropoutRow draw(call_.dropout, row.number);
        const A factor = A(1 / (1 - call_.dropout.p));
        for (int64_t j = 0; j < row.count; ++j) {
          space.drops[j] = draw.keeps(row.indices[j]) ? factor : A(0);
          space.values[j] = row.weights[j] * space.drops[j];
        }
        values = space.values;
      }
      if (needs_score_gradients()) {
        if (call_.rest.active) {
          differentiate_with_rest(chunk, row, values, seen.seen(r - space.first_row), space);
          values = space.values;
        } else {
          differentiate(chunk, row, space);
        }
      }
      if (wants_entries()) fill_buckets(chunk, row, space.scores, values, space.cuts + r % rows_per_block_ * num_ranges(), space.shifts);
      if (!wants_biases()) continue;
      A* const biases = chunk.space.bias_gradients + r * largest_k_;
      const A* const from = call_.rest.active ? space.biases : space.scores;
      for (int64_t j = 0; j < row.count; ++j) biases[j] = from[j];
    }
  }

  // grad_output . value of the row's kept keys, to space.value_products. Returns the gradients of their weights: these
  // after dropout, in space.scores, or these themselves.
  const A* weight_gradients(const Chunk& chunk, const Row& row, const A* grad_output, const RowSpace& space) const {
    const T* const values = at(call_.value, row.batch, chunk.group % s_.num_key_heads, 0);
    A* const products = space.value_products;
    dot_with_rows<T, A>(grad_output, values, call_.value.stride[2], row.indices, row.count, value_dim(), products, space.spare);
    if (!call_.dropout.active) return products;
    for (int64_t j = 0; j < row.count; ++j) space.scores[j] = products[j] * space.drops[j];
    return space.scores;
  }

  const A* grad_output_of(const Row& row, const RowSpace& space) const {
    return widened<T, A>(at(call_.grad_output, row.batch, row.head, row.query), value_dim(), space.grad);
  }

  // The gradients of a row's scores, and of its query.
  void differentiate(const Chunk& chunk, const Row& row, const RowSpace& space) const {
    const A* const grads = weight_gradients(chunk, row, grad_output_of(row, space), space);
    // Softmax: p * (dp - sum of p * dp).
    const A mean = dot(row.weights, grads, row.count);
    if (call_.mean_grads != nullptr) static_cast<A*>(call_.mean_grads)[row.number] = mean;
    for (int64_t j = 0; j < row.count; ++j) space.scores[j] = row.weights[j] * (grads[j] - mean);
    if (call_.softcap > 0) pass_soft_cap(chunk, row, space);
    if (call_.grad_query == nullptr) return;
    sum_keys(chunk, row, space);
    write_grad_query(row, space);
  }

  // The gradients of the row's scores before the cap; the scores are computed again.
  void pass_soft_cap(const Chunk& chunk, const Row& row, const RowSpace& space) const {
    scale_query(row, space);
    const T* const keys = at(call_.key, row.batch, chunk.group % s_.num_key_heads, 0);
    dot_with_rows<T, A>(space.query, keys, call_.key.stride[2], row.indices, row.count, head_dim(), space.products, space.spare);
    for (int64_t j = 0; j < row.count; j += kLanes<A>)
      store<A>(space.scores + j, load(space.scores + j) * soft_cap_slope<A>(load(space.products + j), A(call_.softcap)));
  }

  void scale_query(const Row& row, const RowSpace& space) const {
    const A* const query = widened<T, A>(at(call_.query, row.batch, row.head, row.query), head_dim(), space.query);
    for (int64_t d = 0; d < head_dim(); ++d) space.query[d] = query[d] * A(call_.scale);
  }

  // query . key of the kept keys. Where nothing is added to scores, the logarithms of weights tell how far they are from the
  // first one; that costs an eighth of the products. Weights that underflow do not tell. In float64 it gains nothing.
  void multiply_keys(const Chunk& chunk, const Row& row, const RowSpace& space) const {
    const T* const keys = at(call_.key, row.batch, chunk.group % s_.num_key_heads, 0);
    int64_t count = row.count;
    if constexpr (sizeof(A) == 4) {
      int64_t normal = 0;
      if (call_.rest.score_sums == nullptr)
        for (int64_t j = 0; j < count; ++j) normal += row.weights[j] > kSmallestTellingWeight;
      if (normal == count) count = smaller<int64_t>(count, 1);
    }
    dot_with_rows<T, A>(space.query, keys, call_.key.stride[2], row.indices, count, head_dim(), space.products, space.spare);
    if constexpr (sizeof(A) == 4) {
      if (count == row.count) return;
      const A first = space.products[0] - logarithm(broadcast(row.weights[0]))[0];
      for (int64_t j = 0; j < row.count; j += kLanes<A>)
        store<A>(space.products + j, first + logarithm(load_some(row.weights + j, row.count - j)));
    }
  }

  void sum_keys(const Chunk& chunk, const Row& row, const RowSpace& space) const {
    weighted_sum_of_rows<T, A>(at(call_.key, row.batch, chunk.group % s_.num_key_heads, 0), call_.key.stride[2], row.indices,
                               space.scores, row.count, head_dim(), space.grad_query, space.spare);
  }

  void write_grad_query(const Row& row, const RowSpace& space) const {
    T* const to = static_cast<T*>(call_.grad_query) + row.number * head_dim();
    for (int64_t d = 0; d < head_dim(); ++d) to[d] = narrow_to<T>(space.grad_query[d] * A(call_.scale));
  }

  // The same for a row with a rest: the gradients of its entries less what the rest sends to all keys that the row sees,
  // the weights of its values, and what it sends. `dropped` are the weights after dropout.
  void differentiate_with_rest(const Chunk& chunk, const Row& row, const A* dropped,
                               const typename SeenSums<T, A, true>::Seen& seen, const RowSpace& space) const {
    const A mass = static_cast<const A*>(call_.mass)[row.number];
    A* const sent[5] = {static_cast<A*>(call_.sent[0]), static_cast<A*>(call_.sent[1]), static_cast<A*>(call_.sent[2]),
                        static_cast<A*>(call_.sent[3]), static_cast<A*>(call_.sent[4])};
    const A* const grad_output = grad_output_of(row, space);
    const A* const grads = weight_gradients(chunk, row, grad_output, space);
    A mean = dot(row.weights, grads, row.count);
    if (call_.mean_grads != nullptr) static_cast<A*>(call_.mean_grads)[row.number] = mean;
    if (mass == 0) {
      for (int64_t j = 0; j < row.count; ++j) {
        space.scores[j] = space.biases[j] = row.weights[j] * (grads[j] - mean);
        space.values[j] = dropped[j];
      }
      for (A* const array : sent) array[row.number] = 0;
      if (call_.grad_query == nullptr) return;
      sum_keys(chunk, row, space);
      write_grad_query(row, space);
      return;
    }
    scale_query(row, space);
    multiply_keys(chunk, row, space);
    const A *const products = space.products, *const value_products = space.value_products;
    const A product_sum = sum_of(products, row.count), value_sum = sum_of(value_products, row.count);
    const A both_sum = dot(products, value_products, row.count);
    const A count = A(seen.count - row.count);
    const A scale = static_cast<const A*>(call_.rest.mass_scale)[row.head], lift = A(call_.rest.lift);
    const A mean_product = (dot(space.query, seen.keys, head_dim()) - product_sum) / count;
    const A rest_value_sum = dot(grad_output, seen.values, value_dim()) - value_sum;
    const A mean_value = rest_value_sum / count;
    const A rest_both = dot(space.query, seen.result, head_dim()) - both_sum;
    const A grad_rest = ((1 - mean_product) * rest_value_sum + rest_both) / count;
    mean += scale * mass * grad_rest;
    if (call_.mean_grads != nullptr) static_cast<A*>(call_.mean_grads)[row.number] = mean;
    const A share = scale * mass / count, grad_mass = mass * (grad_rest - mean), grad_score = scale * grad_mass;
    const A to_bias = (1 - lift) * grad_score / count, to_key = to_bias - share * mean_value;
    const A of_value = share * (1 - mean_product);
    A *const biases = space.biases, *const scores = space.scores, *const values = space.values;
    // Vectors by hand: with so many arrays the compiler does not see that they are apart. One whole vector is always room.
    for (int64_t j = 0; j < row.count; j += kLanes<A>) {
      const int64_t lanes = smaller<int64_t>(kLanes<A>, row.count - j);
      const Vector<A> of_bias = load_some(row.weights + j, lanes) * (load_some(grads + j, lanes) - mean) - to_bias;
      store<A>(biases + j, of_bias);
      store<A>(scores + j, of_bias - share * (load(value_products + j) - mean_value));
      store<A>(values + j, load_some(dropped + j, lanes) - share * load(products + j) - of_value);
    }
    const int64_t cut = call_.cuts[row.number];
    biases[cut] += lift * grad_score;
    scores[cut] += lift * grad_score;
    sent[0][row.number] = to_key;
    sent[1][row.number] = of_value;
    sent[2][row.number] = share;
    sent[3][row.number] = to_bias;
    sent[4][row.number] = grad_mass;
    if (call_.grad_query == nullptr) return;
    sum_keys(chunk, row, space);
    add_multiple<A>(to_key, seen.keys, space.grad_query, head_dim());
    add_multiple<A>(share, seen.result, space.grad_query, head_dim());
    write_grad_query(row, space);
  }

  Entry<A>* entries_of(const Chunk& chunk, int64_t block) const {
    return chunk.space.entries + block * rows_per_block_ * largest_k_;
  }

  // Finds where the buckets of a block lie, of which this is the first row, and where each of its rows is cut into ranges.
  void open_buckets(const Chunk& chunk, Row row, int32_t* cuts) const {
    const int64_t ranges = num_ranges(), last = smaller(row.place + rows_per_block_, chunk.num_rows);
    int32_t* const ends = chunk.space.bucket_ends + row.place / rows_per_block_ * ranges;
    for (int64_t range = 0; range < ranges; ++range) ends[range] = 0;
    for (int64_t r = row.place; r < last; ++r, step(chunk, row), cuts += ranges) {
      for (int64_t range = 0; range < ranges; ++range) {
        cuts[range] = int32_t(first_not_below(row.indices, row.count, (range + 1) << range_bits_));
        ends[range] += cuts[range] - (range == 0 ? 0 : cuts[range - 1]);
      }
    }
    // Where each bucket begins: its end so far.
    for (int64_t range = 0, total = 0; range < ranges; ++range) {
      const int64_t count = ends[range];
      ends[range] = int32_t(total);
      total += count;
    }
  }

  void fill_buckets(const Chunk& chunk, const Row& row, const A* of_keys, const A* of_values, const int32_t* cuts,
                    int32_t* shifts) const {
    const int64_t block = row.place / rows_per_block_, ranges = num_ranges();
    int32_t* const ends = chunk.space.bucket_ends + block * ranges;
    Entry<A>* const entries = entries_of(chunk, block);
    for (int64_t range = 0; range < ranges; ++range) {
      const int32_t first = range == 0 ? 0 : cuts[range - 1];
      shifts[range] = ends[range] - first;
      ends[range] += cuts[range] - first;
    }
    // Free of branches, and no entry waits for the one before.
    for (int64_t j = 0; j < row.count; ++j)
      entries[j + shifts[row.indices[j] >> range_bits_]] = {row.indices[j], int32_t(row.place), of_keys[j] * A(call_.scale),
                                                            of_values[j]};
  }

  struct Bucket {
    const Entry<A>*first, *last;
  };
  Bucket bucket(const Chunk& chunk, int64_t block, int64_t range) const {
    const int32_t* const ends = chunk.space.bucket_ends + block * num_ranges();
    return {entries_of(chunk, block) + (range == 0 ? 0 : ends[range - 1]), entries_of(chunk, block) + ends[range]};
  }

  // The entries of some blocks in a range, sorted by key, and the rows that they name.
  struct Sorted {
    int32_t* ends;  // [keys of a range + 1]: where the entries of each key end
    Entry<A>* entries;
    A *queries, *grads;  // copies of the rows, where they are not as they are needed
  };

  void key_gradients(Chunk& chunk, int64_t range) const {
    Arena arena;
    Sorted sorted = {};
    const bool has_memory = arena.allocate([&](Arena& arrays) {
      sorted.ends = arrays.take<int32_t>(keys_per_range() + 1);
      sorted.entries = arrays.take<Entry<A>>(kTileEntries + most_of_block_);
      const int64_t rows = smaller(max_tile_blocks_, blocks_per_chunk_) * rows_per_block_;
      if (copies_rows(call_.query)) sorted.queries = arrays.take<A>(rows * head_dim());
      if (copies_rows(call_.grad_output)) sorted.grads = arrays.take<A>(rows * value_dim());
    });
    if (!has_memory) {
      __atomic_store_n(&chunk.ok, false, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t block = 0; block < num_blocks(chunk);) {
      const int64_t first = block, most = smaller(num_blocks(chunk), first + max_tile_blocks_);
      int64_t count = 0;
      for (; block < most && count < kTileEntries; ++block) {
        const Bucket of_block = bucket(chunk, block, range);
        count += of_block.last - of_block.first;
      }
      if (count == 0) continue;
      sort(chunk, range, first, block, sorted);
      add_sorted(chunk, range, first * rows_per_block_, smaller(block * rows_per_block_, chunk.num_rows), sorted);
    }
  }

  void sort(const Chunk& chunk, int64_t range, int64_t first_block, int64_t last_block, const Sorted& sorted) const {
    const int64_t first_key = range * keys_per_range(), num_keys = smaller(keys_per_range(), s_.num_keys - first_key);
    int32_t* const ends = sorted.ends;
    for (int64_t key = 0; key <= num_keys; ++key) ends[key] = 0;
    // Counted one key on, so that the sums are where the entries of each key begin.
    for (int64_t block = first_block; block < last_block; ++block) {
      const Bucket from = bucket(chunk, block, range);
      for (const Entry<A>* entry = from.first; entry < from.last; ++entry) ++ends[entry->key - first_key + 1];
    }
    for (int64_t key = 0; key < num_keys; ++key) ends[key + 1] += ends[key];
    for (int64_t block = first_block; block < last_block; ++block) {
      const Bucket from = bucket(chunk, block, range);
      for (const Entry<A>* entry = from.first; entry < from.last; ++entry)
        sorted.entries[ends[entry->key - first_key]++] = *entry;
    }
  }

  // Whether rows of an array have another type, or those of several heads no common stride.
  bool copies_rows(const View& rows) const {
    return sizeof(T) != sizeof(A) || (s_.num_heads > s_.num_key_heads && rows.stride[1] != s_.num_queries * rows.stride[2]);
  }

  // A row for each of the chunk's from first_row on, as they are or as copies.
  struct Rows {
    const A* of(const Entry<A>& entry) const { return first + (entry.row - first_row) * stride; }

    const A* first;
    int64_t first_row, stride;
  };
  Rows rows_from(const Chunk& chunk, int64_t first_row, int64_t last_row, const View& view, int64_t dim, A* copies) const {
    Row row = row_of(chunk, first_row);
    const T* const first = at(view, row.batch, row.head, row.query);
    if (!copies_rows(view)) return {reinterpret_cast<const A*>(first), first_row, view.stride[2]};
    for (int64_t r = first_row; r < last_row; ++r, step(chunk, row)) {
      const T* const from = at(view, row.batch, row.head, row.query);
      for (int64_t x = 0; x < dim; ++x) copies[(r - first_row) * dim + x] = widen(from[x]);
    }
    return {copies, first_row, dim};
  }

  // Gradients of the keys and values of a range: each gets its entries, in the order of rows.
  void add_sorted(const Chunk& chunk, int64_t range, int64_t first_row, int64_t last_row, const Sorted& sorted) const {
    const int64_t first_key = range * keys_per_range(), num_keys = smaller(keys_per_range(), s_.num_keys - first_key);
    const int64_t number = chunk.group * s_.num_keys + first_key;
    A *grad_key = static_cast<A*>(call_.grad_key), *grad_value = static_cast<A*>(call_.grad_value);
    Rows queries = {}, grads = {};
    if (grad_key != nullptr) {
      grad_key += number * head_dim();
      queries = rows_from(chunk, first_row, last_row, call_.query, head_dim(), sorted.queries);
    }
    if (grad_value != nullptr) {
      grad_value += number * value_dim();
      grads = rows_from(chunk, first_row, last_row, call_.grad_output, value_dim(), sorted.grads);
    }
    const Entry<A>* entry = sorted.entries;
    for (int64_t key = 0; key < num_keys; ++key) {
      const Entry<A>* const last = sorted.entries + sorted.ends[key];
      if (entry == last) continue;
      if (kDim % kLanes<A> == 0 && kDim != 0 && 2 * kDim <= kMostSums * kLanes<A> && grad_key != nullptr && grad_value != nullptr) {
        add_both(entry, last, queries, grads, grad_key + key * kDim, grad_value + key * kDim);
      } else {
        if (grad_key != nullptr)
          add_entries(entry, last, &Entry<A>::of_key, queries, head_dim(), grad_key + key * head_dim());
        if (grad_value != nullptr)
          add_entries(entry, last, &Entry<A>::of_value, grads, value_dim(), grad_value + key * value_dim());
      }
      entry = last;
    }
  }

  static void add_both(const Entry<A>* entry, const Entry<A>* last, const Rows& queries, const Rows& grads, A* grad_key,
                       A* grad_value) {
    constexpr int kVectors = kDim >= kLanes<A> ? kDim / kLanes<A> : 1;
    Vector<A> of_key[kVectors], of_value[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      of_key[v] = load(grad_key + v * kLanes<A>);
      of_value[v] = load(grad_value + v * kLanes<A>);
    }
    for (; entry < last; ++entry) {
      const A *const query = queries.of(*entry), *const grad = grads.of(*entry);
      const Vector<A> to_key = broadcast(entry->of_key), to_value = broadcast(entry->of_value);
      for (int v = 0; v < kVectors; ++v) {
        of_key[v] = multiply_add<A>(to_key, load(query + v * kLanes<A>), of_key[v]);
        of_value[v] = multiply_add<A>(to_value, load(grad + v * kLanes<A>), of_value[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store<A>(grad_key + v * kLanes<A>, of_key[v]);
      store<A>(grad_value + v * kLanes<A>, of_value[v]);
    }
  }

  // to[0 .. dim) += the entries' weights times their rows
  static void add_entries(const Entry<A>* entry, const Entry<A>* last, A Entry<A>::*weight, const Rows& rows, int64_t dim,
                          A* to) {
    constexpr int kVectors = kMostSums / 2;
    int64_t x = 0;
    for (; x + kVectors * kLanes<A> <= dim; x += kVectors * kLanes<A>) add_part<kVectors>(entry, last, weight, rows, x, to);
    for (; x + kLanes<A> <= dim; x += kLanes<A>) add_part<1>(entry, last, weight, rows, x, to);
    if constexpr (kDim == 0 || kDim % kLanes<A> != 0)
      for (; x < dim; ++x)
        for (const Entry<A>* e = entry; e < last; ++e) to[x] += e->*weight * rows.of(*e)[x];
  }

  template <int kVectors>
  static void add_part(const Entry<A>* entry, const Entry<A>* last, A Entry<A>::*weight, const Rows& rows, int64_t x, A* to) {
    Vector<A> sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = load(to + x + v * kLanes<A>);
    for (; entry < last; ++entry) {
      const A* const row = rows.of(*entry) + x;
      const Vector<A> factor = broadcast(entry->*weight);
      for (int v = 0; v < kVectors; ++v) sums[v] = multiply_add<A>(factor, load(row + v * kLanes<A>), sums[v]);
    }
    for (int v = 0; v < kVectors; ++v) store<A>(to + x + v * kLanes<A>, sums[v]);
  }

  void relative_bias_gradients(Chunk& chunk, int64_t range) const {
    const int64_t positions = s_.num_queries + s_.num_keys - 1, per_range = ceil_div(positions, kBiasRanges);
    Row row = row_of(chunk, 0);
    for (int64_t r = 0; r < chunk.num_rows; ++r, step(chunk, row)) {
      const A* const biases = chunk.space.bias_gradients + r * largest_k_;
      const int64_t shift = s_.num_queries - 1 - row.query;  // position of key 0
      const int64_t end_key = (range + 1) * per_range - shift;
      double* const of_head = call_.grad_relative_bias + row.head * call_.grad_relative_bias_stride + shift;
      int64_t j = first_not_below(row.indices, row.count, range * per_range - shift);
      for (; j < row.count && row.indices[j] < end_key; ++j) of_head[row.indices[j]] += biases[j];
    }
  }

  // The ranges are of queries where the bias has that axis, otherwise of keys. A bias with neither axis takes one task.
  void bias_gradients(Chunk& chunk, int64_t range) const {
    const int64_t* stride = call_.grad_bias_stride;
    const bool by_query = stride[2] != 0, by_key = !by_query && stride[3] != 0;
    if (!by_query && !by_key && range > 0) return;
    const int64_t length = by_query ? s_.num_queries : s_.num_keys;
    const int64_t per_range = by_query || by_key ? ceil_div(length, kBiasRanges) : length;
    const int64_t first = range * per_range, end = first + per_range;
    Row row = row_of(chunk, 0);
    for (int64_t r = 0; r < chunk.num_rows; ++r, step(chunk, row)) {
      if (by_query && (row.query < first || row.query >= end)) continue;
      const A* const biases = chunk.space.bias_gradients + r * largest_k_;
      A* const of_row = static_cast<A*>(call_.grad_bias) + row.batch * stride[0] + row.head * stride[1] + row.query * stride[2];
      int64_t j = by_query ? 0 : first_not_below(row.indices, row.count, first);
      for (; j < row.count && (by_query || row.indices[j] < end); ++j) of_row[row.indices[j] * stride[3]] += biases[j];
    }
  }

  const AttentionBackward& call_;
  const Sizes s_;
  const int64_t rows_of_group_;
  int64_t largest_k_, rows_per_block_, blocks_per_task_, blocks_per_chunk_, max_tile_blocks_, most_of_block_;
  int range_bits_ = 4;
};

inline void run_serially(int64_t num_tasks, void* state, void (*task)(void*, int64_t)) {
  for (int64_t i = 0; i < num_tasks; ++i) task(state, i);
}

// With many groups each thread takes whole groups. With few, or a bias that groups share, all threads share one group.
template <class T, class A, int kDim>
bool run_backward(const AttentionBackward& call, const Parallel& parallel) {
  const bool has_bias = call.grad_bias != nullptr || call.grad_relative_bias != nullptr;
  const bool shares = has_bias || call.sizes.batch * call.sizes.num_key_heads < 4 * parallel.num_threads;
  const Backward<T, A, kDim> backward(call, shares ? parallel.num_threads : 1);
  if (shares) {
    Arena arena;
    typename Backward<T, A, kDim>::Space space = {};
    if (!arena.allocate([&](Arena& arrays) { backward.take(arrays, space); })) return false;
    for (int64_t group = 0; group < backward.num_groups(); ++group)
      if (!backward.run_group(group, space, parallel)) return false;
    return true;
  }
  struct State {
    const Backward<T, A, kDim>& backward;
    int64_t next;
    bool ok;
  } state = {backward, 0, true};
  parallel.run(parallel.num_threads, &state, [](void* opaque, int64_t) {
    State& state = *static_cast<State*>(opaque);
    const auto& backward = state.backward;
    Arena arena;
    typename Backward<T, A, kDim>::Space space = {};
    bool ok = arena.allocate([&](Arena& arrays) { backward.take(arrays, space); });
    while (ok) {
      const int64_t group = __atomic_fetch_add(&state.next, 1, __ATOMIC_RELAXED);
      if (group >= backward.num_groups()) return;
      ok = backward.run_group(group, space, {run_serially, 1});
    }
    __atomic_store_n(&state.ok, false, __ATOMIC_RELAXED);
  });
  return state.ok;
}
