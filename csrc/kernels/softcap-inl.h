// A soft cap c on scores: s becomes c * tanh(s / c). It keeps the order of scores, so only kept ones are capped.

extern "C" double log(double);

// Levels of a continued fraction for tanh(x) where |x| is at most 5/8, to the last bit.
template <class A>
constexpr int kTanhLevels = sizeof(A) == 4 ? 5 : 9;

// A score that is not finite becomes NaN: a broken key makes its row NaN under a cap too.
template <class A>
inline Vector<A> soft_capped(Vector<A> scores, A cap) {
  const Vector<A> x = (scores + scores * A(0)) / cap, square = x * x;
  Vector<A> level = broadcast(A(2 * kTanhLevels<A> - 1));
  for (int i = 2 * kTanhLevels<A> - 3; i > 0; i -= 2) level = A(i) + square / level;
  // 1 - exp(-2 |x|) would lose the digits of small x.
  const Vector<A> e = exponential(-A(2) * absolute<A>(x)), size = (A(1) - e) / (A(1) + e);
  const Vector<A> far = x < Vector<A>{} ? -size : size;
  return cap * (absolute<A>(x) < broadcast(A(0.625)) ? x / level : far);
}

template <class A>
void cap_scores(A* scores, int64_t count, A cap) {
  for (int64_t i = 0; i < count; i += kLanes<A>) store<A>(scores + i, soft_capped<A>(load(scores + i), cap));
}

// Its derivative, 1 - tanh(s / c)^2.
template <class A>
inline Vector<A> soft_cap_slope(Vector<A> scores, A cap) {
  const Vector<A> e = exponential(-A(2) * absolute<A>(scores / cap)), whole = A(1) + e;
  return A(4) * e / (whole * whole);
}
