// Activations of whole vectors, exact to rounding: they rank neurons.

extern "C" double erf(double);

template <class A>
inline Vector<A> absolute(Vector<A> x) {
  return x < Vector<A>{} ? -x : x;
}

// (1 + erf(x / sqrt(2))) / 2. With t = 1 / (1 + 0.4 |z|), erfc(z) exp(z^2) is a polynomial in t: a least-squares fit over
// 0 <= z <= 6 that leaves erfc wrong by less than 3e-9.
inline FloatVector normal_cdf(FloatVector x) {
  const float coefficients[] = {0.0798577873f, -0.421134194f, 0.737813304f, -0.432400702f,
                                0.446257536f,  0.125620874f,  0.23927094f,  0.224714456f};
  const FloatVector z = absolute<float>(x) * 0.707106781f, t = 1.0f / (1.0f + 0.4f * z);
  FloatVector sum = {};
  for (const float c : coefficients) sum = (sum + c) * t;
  const FloatVector tail = 0.5f * sum * exponential(-z * z);
  return x < FloatVector{} ? tail : 1.0f - tail;
}

inline DoubleVector normal_cdf(DoubleVector x) {
  DoubleVector result;
  for (int i = 0; i < kLanes<double>; ++i) result[i] = 0.5 * (1 + erf(x[i] * 0.70710678118654752));
  return result;
}

// x / (1 + exp(-slope * x)), without an exponential that overflows.
template <class A>
inline Vector<A> times_sigmoid(Vector<A> x, A slope) {
  const Vector<A> e = exponential(-absolute<A>(slope * x));
  return (x < Vector<A>{} ? x * e : x) / (A(1) + e);
}

template <class A>
inline Vector<A> activate(Activation activation, Vector<A> x) {
  switch (activation) {
    case Activation::relu: return x <= Vector<A>{} ? Vector<A>{} : x;  // NaN stays
    case Activation::relu_squared: return x <= Vector<A>{} ? Vector<A>{} : x * x;
    case Activation::silu: return times_sigmoid<A>(x, A(1));
    case Activation::quick_gelu: return times_sigmoid<A>(x, A(1.702));
    case Activation::gelu: return x * normal_cdf(x);
    case Activation::gelu_tanh: {
      // (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y))
      const Vector<A> y = A(2 * 0.79788456080286536) * (x + A(0.044715) * x * x * x);
      const Vector<A> e = exponential(-absolute<A>(y));
      return x * (y < Vector<A>{} ? e : A(1) + Vector<A>{}) / (A(1) + e);
    }
    default: return x;
  }
}
