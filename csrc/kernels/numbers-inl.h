// Half-precision numbers as the kernels read and write them. Written without branches, so that loops vectorise.

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

inline float widen(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  // The exponent's bias differs by 112; the product also makes subnormal numbers right.
  const uint32_t finite = to_bits(from_bits(magnitude) * from_bits((127 + 112) << 23));
  return from_bits((magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000 : finite) | sign);
}

template <class T>
T narrow(float x);

// Both round to the nearest, ties to even.
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {uint16_t(x != x ? (bits >> 16) | 0x40 : rounded)};
}

template <>
inline Float16 narrow<Float16>(float x) {
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    result = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65,520 and above round to infinity
    result = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the last bits
    result = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    result = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  return {uint16_t(result | sign)};
}

template <class T, class A>
inline T narrow_to(A x) {
  if constexpr (sizeof(T) == sizeof(A))
    return x;
  else
    return narrow<T>(x);
}
