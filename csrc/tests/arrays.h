// Arrays of any dtype and layout for the tests. Each has memory of its own, not one element more than it needs, so that
// AddressSanitizer sees every step past the end.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../attention.h"

namespace topk_test {

using topk::DType;

constexpr double kInf = INFINITY, kNan = NAN;

inline int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::float32: return 4;
    case DType::float64: return 8;
    case DType::bfloat16:
    case DType::float16: return 2;
    case DType::boolean: return 1;
  }
  return 0;
}

inline DType accumulation(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

inline const char* name_of(DType dtype) {
  const char* const names[] = {"float32", "float64", "bfloat16", "float16", "bool"};
  return names[int(dtype)];
}

// Half the distance from 1 to the next number: what rounding to nearest may add to a number, relative to it.
inline double rounding_of(DType dtype) {
  const int bits[] = {24, 53, 8, 11, 1};
  return std::ldexp(1.0, -bits[int(dtype)]);
}

// x at the nearest multiple of 2^lowest_unit with no more than `digits` binary digits; ties go to the even one.
inline double round_half(double x, int digits, int lowest_unit, double largest) {
  if (!std::isfinite(x) || x == 0) return x;
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - digits, lowest_unit));
  const double rounded = std::nearbyint(x / unit) * unit;
  return std::fabs(rounded) > largest ? std::copysign(kInf, x) : std::copysign(rounded, x);
}

// x as a number of the dtype.
inline double round_to(DType dtype, double x) {
  switch (dtype) {
    case DType::float32: return float(x);
    case DType::float64: return x;
    case DType::bfloat16: return round_half(x, 8, -133, 0x1.fep127);
    case DType::float16: return round_half(x, 11, -24, 65504);
    case DType::boolean: return x != 0;
  }
  return x;
}

inline uint16_t float16_bits(double x) {  // of a number that float16 has
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7e00;
  if (std::isinf(x)) return sign | 0x7c00;
  if (x < 0x1p-14) return uint16_t(sign | int(x * 0x1p24));
  int exponent;
  const double fraction = std::frexp(x, &exponent);  // in [1/2, 1)
  return uint16_t(sign | ((exponent + 14) << 10) | (int(fraction * 2048) - 1024));
}

inline double float16_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  double x = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  if (exponent == 31) x = fraction == 0 ? kInf : kNan;
  return (bits & 0x8000) != 0 ? -x : x;
}

inline void write(DType dtype, double x, void* to) {
  x = round_to(dtype, x);
  const float single = float(x);
  uint32_t single_bits;
  std::memcpy(&single_bits, &single, 4);
  const uint16_t bfloat = uint16_t(single_bits >> 16 | (std::isnan(x) ? 0x40 : 0)), half = float16_bits(x);
  const uint8_t truth = x != 0;
  switch (dtype) {
    case DType::float32: std::memcpy(to, &single, 4); break;
    case DType::float64: std::memcpy(to, &x, 8); break;
    case DType::bfloat16: std::memcpy(to, &bfloat, 2); break;
    case DType::float16: std::memcpy(to, &half, 2); break;
    case DType::boolean: std::memcpy(to, &truth, 1); break;
  }
}

inline double read(DType dtype, const void* from) {
  float single;
  double x;
  uint16_t half;
  switch (dtype) {
    case DType::float32: std::memcpy(&single, from, 4); return single;
    case DType::float64: std::memcpy(&x, from, 8); return x;
    case DType::bfloat16: {
      std::memcpy(&half, from, 2);
      const uint32_t bits = uint32_t(half) << 16;
      std::memcpy(&single, &bits, 4);
      return single;
    }
    case DType::float16: std::memcpy(&half, from, 2); return float16_value(half);
    case DType::boolean: return *static_cast<const uint8_t*>(from);
  }
  return 0;
}

enum class Layout {
  contiguous,
  heads_inside,  // axes 1 and 2 lie the other way round, as a projection leaves them
  gaps,          // starts one element late, three unused elements after each row, two unused rows after each head
};

using Shape = std::array<int64_t, 4>;

class Array {
 public:
  Array() = default;
  Array(DType dtype, Shape shape, Layout layout = Layout::contiguous) : dtype(dtype), shape(shape) {
    const int64_t row = shape[3] + (layout == Layout::gaps ? 3 : 0);
    const int64_t rows = shape[2] + (layout == Layout::gaps ? 2 : 0);
    stride = {shape[1] * rows * row, rows * row, row, 1};
    if (layout == Layout::heads_inside) stride = {shape[2] * shape[1] * row, row, shape[1] * row, 1};
    first_ = layout == Layout::gaps ? 1 : 0;
    int64_t last = first_;
    for (int axis = 0; axis < 4; ++axis) last += (shape[axis] - 1) * stride[axis];
    const bool is_empty = shape[0] * shape[1] * shape[2] * shape[3] == 0;
    bytes = std::vector<uint8_t>(is_empty ? 0 : (last + 1) * bytes_of(dtype), 0xa5);
  }

  bool exists() const { return shape[3] > 0; }
  void* data() { return bytes.data() + first_ * bytes_of(dtype); }
  const void* data() const { return bytes.data() + first_ * bytes_of(dtype); }
  int64_t count() const { return shape[0] * shape[1] * shape[2] * shape[3]; }

  // An index on an axis of size 1 broadcasts.
  double get(int64_t a, int64_t b, int64_t c, int64_t d) const { return read(dtype, &bytes[place(a, b, c, d)]); }
  void set(int64_t a, int64_t b, int64_t c, int64_t d, double x) { write(dtype, x, &bytes[place(a, b, c, d)]); }

  // make(a, b, c, d) for every element.
  template <class Make>
  Array& fill(Make make) {
    for (int64_t a = 0; a < shape[0]; ++a)
      for (int64_t b = 0; b < shape[1]; ++b)
        for (int64_t c = 0; c < shape[2]; ++c)
          for (int64_t d = 0; d < shape[3]; ++d) set(a, b, c, d, make(a, b, c, d));
    return *this;
  }

  std::array<int64_t, 4> broadcast_stride() const {
    std::array<int64_t, 4> strides = stride;
    for (int axis = 0; axis < 4; ++axis)
      if (shape[axis] == 1) strides[axis] = 0;
    return strides;
  }

  topk::View view() const {
    topk::View view;
    if (!exists()) return view;
    view.data = data();
    view.dtype = dtype;
    const auto strides = broadcast_stride();
    for (int axis = 0; axis < 4; ++axis) view.stride[axis] = strides[axis];
    return view;
  }

  DType dtype = DType::float32;
  Shape shape = {0, 0, 0, 0}, stride = {0, 0, 0, 0};
  std::vector<uint8_t> bytes;

 private:
  size_t place(int64_t a, int64_t b, int64_t c, int64_t d) const {
    const auto strides = broadcast_stride();
    return size_t((first_ + a * strides[0] + b * strides[1] + c * strides[2] + d * strides[3]) * bytes_of(dtype));
  }

  int64_t first_ = 0;
};

}  // namespace topk_test
