// Dual numbers: a value and N tangents. A cell's step run on them gives its Jacobian, derived by the chain rule
// and not by hand; with N = 0 it is the plain step. Everything is float32, whatever the model's dtype.
//
// The values must not depend on N, not in the last bit: Newton's answer is the sequential one only where a start
// that is right gives an end that is right (README.md). The one thing that would change them is a multiplication
// fused with the addition after it in one run of the step and not in another. So contraction is off; where a
// compiler of Metal's does not know the pragma, its safe mode fuses within a statement at most (specification,
// 1.6.3), and here each operation is its own function; and where the compiler fuses whatever it sees (FUSES: CUDA),
// sums are rounded on their own by name.

#pragma METAL fp contract(off)

namespace pararnn {

#if FUSES
inline float sum(float a, float b) { return __fadd_rn(a, b); }
#else
inline float sum(float a, float b) { return a + b; }
#endif

template <int N>
struct Dual {
  float v;
  float d[N > 0 ? N : 1];
};

// A constant: no tangents.
template <int N>
inline Dual<N> constant_dual(float v) {
  Dual<N> r;
  r.v = v;
  for (int i = 0; i < N; ++i) r.d[i] = 0.0f;
  return r;
}

// f(x), given its value and its slope at x.
template <int N>
inline Dual<N> chain(Dual<N> x, float value, float slope) {
  Dual<N> r;
  r.v = value;
  for (int i = 0; i < N; ++i) r.d[i] = slope * x.d[i];
  return r;
}

template <int N>
inline Dual<N> operator+(Dual<N> a, Dual<N> b) {
  Dual<N> r;
  r.v = sum(a.v, b.v);
  for (int i = 0; i < N; ++i) r.d[i] = a.d[i] + b.d[i];
  return r;
}

template <int N>
inline Dual<N> operator-(Dual<N> a, Dual<N> b) {
  Dual<N> r;
  r.v = sum(a.v, -b.v);
  for (int i = 0; i < N; ++i) r.d[i] = a.d[i] - b.d[i];
  return r;
}

template <int N>
inline Dual<N> operator*(Dual<N> a, Dual<N> b) {
  Dual<N> r;
  r.v = a.v * b.v;
  for (int i = 0; i < N; ++i) r.d[i] = a.d[i] * b.v + a.v * b.d[i];
  return r;
}

template <int N>
inline Dual<N> operator/(Dual<N> a, Dual<N> b) {
  Dual<N> r;
  r.v = a.v / b.v;
  for (int i = 0; i < N; ++i) r.d[i] = (a.d[i] - r.v * b.d[i]) / b.v;
  return r;
}

template <int N>
inline Dual<N> operator+(Dual<N> a, float b) {
  a.v = sum(a.v, b);
  return a;
}

template <int N>
inline Dual<N> operator+(float a, Dual<N> b) {
  b.v = sum(a, b.v);
  return b;
}

template <int N>
inline Dual<N> operator-(Dual<N> a, float b) {
  a.v = sum(a.v, -b);
  return a;
}

template <int N>
inline Dual<N> operator-(float a, Dual<N> b) {
  return chain(b, sum(a, -b.v), -1.0f);
}

template <int N>
inline Dual<N> operator*(float a, Dual<N> b) {
  return chain(b, a * b.v, a);
}

template <int N>
inline Dual<N> operator*(Dual<N> a, float b) {
  return chain(a, a.v * b, b);
}

inline float choose(bool condition, float a, float b) { return condition ? a : b; }

inline float maximum(float a, float b) { return choose(a > b, a, b); }

// At a tie each side gets half of the slope, as in PyTorch.
template <int N>
inline Dual<N> maximum(Dual<N> a, Dual<N> b) {
  const float first = choose(a.v > b.v, 1.0f, choose(a.v < b.v, 0.0f, 0.5f));
  Dual<N> r;
  r.v = choose(a.v > b.v, a.v, b.v);
  for (int i = 0; i < N; ++i) r.d[i] = first * a.d[i] + (1.0f - first) * b.d[i];
  return r;
}

template <int N>
inline Dual<N> maximum(Dual<N> a, float b) {
  return maximum(a, constant_dual<N>(b));
}

// The value of either scalar.
inline float value_of(float x) { return x; }

template <int N>
inline float value_of(Dual<N> x) {
  return x.v;
}

}  // namespace pararnn
