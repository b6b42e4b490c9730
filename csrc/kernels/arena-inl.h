// One block of scratch memory that is cut into aligned arrays.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena() { __builtin_free(memory_); }

  // Calls take_arrays(*this) twice: first only to add up the bytes of what it takes, then, with memory, to hand it out.
  // Returns false, after the first call, where there is no memory.
  template <class TakeArrays>
  bool allocate(const TakeArrays& take_arrays) {
    take_arrays(*this);
    memory_ = static_cast<char*>(__builtin_malloc(used_ + kAlign));
    if (memory_ == nullptr) return false;
    aligned_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_) + kAlign - 1) / kAlign * kAlign);
    used_ = 0;
    take_arrays(*this);
    return true;
  }

  // The next array, of `count` elements; null in the first of the two calls of allocate().
  template <class T>
  T* take(int64_t count) {
    const size_t start = used_;
    used_ += (size_t(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(aligned_ + start);
  }

  bool ready() const { return memory_ != nullptr; }

 private:
  static constexpr size_t kAlign = 64;
  char *memory_ = nullptr, *aligned_ = nullptr;
  size_t used_ = 0;
};
