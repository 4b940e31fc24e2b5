// A cell's text with a dual number in place of each float: its inputs u and w then have tangents too, and a step
// gives the derivatives by all that it reads. Comes after activations.h and `using Real = Dual<...>`; after it the
// cell's text, in the namespace `tangents` (mlx_pararnn/compute/texts.py puts it there).
//
// Here is what a text may do with a float and dual.h does not have for a state.

namespace pararnn {

template <int N>
inline Dual<N> operator-(Dual<N> a) {
  return chain(a, -a.v, -1.0f);
}

template <int N>
inline Dual<N> operator/(Dual<N> a, float b) {
  return chain(a, a.v / b, 1.0f / b);
}

template <int N>
inline Dual<N> operator/(float a, Dual<N> b) {
  const float value = a / b.v;
  return chain(b, value, -value / b.v);
}

template <int N>
inline auto operator>(Dual<N> a, Dual<N> b) {
  return a.v > b.v;
}

template <int N>
inline auto operator>(Dual<N> a, float b) {
  return a.v > b;
}

template <int N>
inline auto operator>(float a, Dual<N> b) {
  return a > b.v;
}

template <int N>
inline auto operator<(Dual<N> a, Dual<N> b) {
  return a.v < b.v;
}

template <int N>
inline auto operator<(Dual<N> a, float b) {
  return a.v < b;
}

template <int N>
inline auto operator<(float a, Dual<N> b) {
  return a < b.v;
}

template <int N>
inline auto operator>=(Dual<N> a, Dual<N> b) {
  return a.v >= b.v;
}

template <int N>
inline auto operator>=(Dual<N> a, float b) {
  return a.v >= b;
}

template <int N>
inline auto operator>=(float a, Dual<N> b) {
  return a >= b.v;
}

template <int N>
inline auto operator<=(Dual<N> a, Dual<N> b) {
  return a.v <= b.v;
}

template <int N>
inline auto operator<=(Dual<N> a, float b) {
  return a.v <= b;
}

template <int N>
inline auto operator<=(float a, Dual<N> b) {
  return a <= b.v;
}

template <typename Condition, int N>
inline Dual<N> choose(Condition condition, Dual<N> a, Dual<N> b) {
  Dual<N> r;
  r.v = choose(condition, a.v, b.v);
  for (int i = 0; i < N; ++i) r.d[i] = choose(condition, a.d[i], b.d[i]);
  return r;
}

template <typename Condition, int N>
inline Dual<N> choose(Condition condition, Dual<N> a, float b) {
  return choose(condition, a, constant_dual<N>(b));
}

template <typename Condition, int N>
inline Dual<N> choose(Condition condition, float a, Dual<N> b) {
  return choose(condition, constant_dual<N>(a), b);
}

}  // namespace pararnn

namespace metal {

template <int N>
inline pararnn::Dual<N> fabs(pararnn::Dual<N> x) {
  return pararnn::chain(x, metal::fabs(x.v), pararnn::choose(x.v < 0.0f, -1.0f, 1.0f));
}

namespace precise {

template <int N>
inline pararnn::Dual<N> exp(pararnn::Dual<N> x) {
  const float y = metal::precise::exp(x.v);
  return pararnn::chain(x, y, y);
}

template <int N>
inline pararnn::Dual<N> tanh(pararnn::Dual<N> x) {
  const float y = metal::precise::tanh(x.v);
  return pararnn::chain(x, y, 1.0f - y * y);
}

template <int N>
inline pararnn::Dual<N> log(pararnn::Dual<N> x) {
  return pararnn::chain(x, metal::precise::log(x.v), 1.0f / x.v);
}

template <int N>
inline pararnn::Dual<N> sqrt(pararnn::Dual<N> x) {
  const float y = metal::precise::sqrt(x.v);
  return pararnn::chain(x, y, 0.5f / y);
}

}  // namespace precise
}  // namespace metal

namespace tangents {

using namespace pararnn;

// An activation of the text's own takes duals here: its value and its slope are what counts, not how it has them.
template <typename A>
inline auto activated(Real x, int) -> decltype(A::value(x)) {
  const Real at = constant_dual<INPUTS>(x.v);
  const Real y = A::value(at);
  return chain(x, y.v, A::slope(at, y).v);
}

template <typename A>
inline Real activated(Real x, long) {
  const float y = A::value(x.v);
  return chain(x, y, A::slope(x.v, y));
}

template <typename A>
inline Real apply(Real x) {
  return activated<A>(x, 0);
}

}  // namespace tangents
