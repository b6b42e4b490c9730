// One block of scratch memory cut into aligned arrays. Asked twice for the same arrays: first only to add up their
// bytes, then, allocated, to hand them out.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena() { __builtin_free(memory_); }

  template <class T>
  T* take(int64_t count) {
    const size_t start = used_;
    used_ += (size_t(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(aligned_ + start);
  }

  bool allocate(const Arena& size) {
    memory_ = static_cast<char*>(__builtin_malloc(size.used_ + kAlign));
    aligned_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_) + kAlign - 1) / kAlign * kAlign);
    return memory_ != nullptr;
  }

  bool ready() const { return memory_ != nullptr; }

 private:
  static constexpr size_t kAlign = 64;
  char *memory_ = nullptr, *aligned_ = nullptr;
  size_t used_ = 0;
};
