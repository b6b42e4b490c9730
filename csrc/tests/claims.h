// What the tests of all kernels share: results, threads, targets and random numbers.
#pragma once

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../dispatch.h"
#include "arrays.h"

namespace topk_test {

// A number and the sum of the magnitudes of its terms: rounding errors grow with the latter.
struct Number {
  long double value = 0;
  double mass = 0;

  Number() = default;
  Number(double value) : value(value), mass(std::fabs(value)) {}
  Number(long double value, double mass) : value(value), mass(mass) {}
  Number operator+(Number b) const { return {value + b.value, mass + b.mass}; }
  Number operator-(Number b) const { return {value - b.value, mass + b.mass}; }
  Number operator*(Number b) const { return {value * b.value, mass * b.mass}; }
  void operator+=(Number b) { *this = *this + b; }
};

// ---------------------------------------------------------------------------------------------------------- results

// The allowed error beyond one rounding to the dtype of a result: roundings of the accumulation dtype, relative to the sum
// of the magnitudes of the terms (Number::mass). Each claim prints its own error. Over all claims and targets the largest
// was 1.46 for attention. Feed-forward layers add up to thousands of terms one by one; their largest was 5.26.
constexpr double kAttentionRoundings = 3, kFeedForwardRoundings = 8;
inline double allowed_roundings = kAttentionRoundings;

inline std::string target;            // under test
inline const topk::Kernels* kernels;  // its
inline std::string context;           // which case of a claim
inline int num_complaints;            // of the claim under test
inline double most_roundings;

__attribute__((format(printf, 1, 2))) inline void complain(const char* format, ...) {
  if (++num_complaints > 5) return;
  std::printf("  %s %s: ", target.c_str(), context.c_str());
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

__attribute__((format(printf, 1, 2))) inline std::string text(const char* format, ...) {
  char buffer[200];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

inline void expect_close(const char* what, const Array& got, const std::vector<Number>& want, DType accumulated) {
  const double rounding = rounding_of(accumulated);
  // exp() flushes weights below this to zero.
  const double smallest = accumulated == DType::float64 ? 1e-300 : 1e-37;
  const double last = got.dtype == accumulated ? 0 : rounding_of(got.dtype);
  const double subnormal = got.dtype == DType::float16 ? 0x1p-25 : got.dtype == DType::bfloat16 ? 0x1p-134 : 0;
  size_t n = 0;
  for (int64_t a = 0; a < got.shape[0]; ++a)
    for (int64_t b = 0; b < got.shape[1]; ++b)
      for (int64_t c = 0; c < got.shape[2]; ++c)
        for (int64_t d = 0; d < got.shape[3]; ++d, ++n) {
          const double x = got.get(a, b, c, d), y = double(want[n].value);
          if ((std::isnan(x) && std::isnan(y)) || x == y) continue;  // also where both are infinite
          const double error = double(std::fabs(x - want[n].value)) - last * std::fabs(y) - subnormal - smallest;
          const double roundings = error / (rounding * want[n].mass);
          if (error > 0) most_roundings = std::max(most_roundings, roundings);
          if (error <= 0 || roundings <= allowed_roundings) continue;
          complain("%s[%d, %d, %d, %d] is %.9g, should be %.9g (%.1f roundings)", what, int(a), int(b), int(c), int(d), x,
                   y, roundings);
        }
}

// --------------------------------------------------------------------------------------------------- threads, targets

inline int num_threads = 1;

inline void run_on_threads(int64_t num_tasks, void* state, void (*task)(void*, int64_t)) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < num_tasks; i = next++) task(state, i);
  };
  std::vector<std::thread> others;
  for (int64_t t = 1; t < std::min<int64_t>(num_threads, num_tasks); ++t) others.emplace_back(work);
  work();
  for (std::thread& thread : others) thread.join();
}

inline topk::Parallel parallel() { return {run_on_threads, num_threads}; }

template <class Check>
void on_every_target(Check check) {
  for (const std::string& name : topk::available_targets()) {
    target = name;
    kernels = topk::kernels_of(name);
    check();
  }
}

// ---------------------------------------------------------------------------------------------------------- test data

inline const DType kDtypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

inline std::mt19937 generator;

inline int64_t any_integer(int64_t low, int64_t high) { return low + int64_t(generator() % uint64_t(high - low + 1)); }
inline double any_number() { return int32_t(generator()) * 0x1p-31; }  // in [-1, 1)

inline double small_integer(int64_t, int64_t, int64_t, int64_t) { return double(any_integer(-2, 2)); }
inline double any_element(int64_t, int64_t, int64_t, int64_t) { return any_number(); }
inline double any_quarter(int64_t, int64_t, int64_t, int64_t) { return double(any_integer(-8, 8)) / 4; }

inline Array zeros(DType dtype, Shape shape) {
  return Array(dtype, shape).fill([](int64_t, int64_t, int64_t, int64_t) { return 0.0; });
}

// ------------------------------------------------------------------------------------------------------------- claims

struct Claim {
  const char* name;
  void (*check)();
};

extern const std::vector<Claim> attention_claims, feed_forward_claims;

}  // namespace topk_test
