// Several vectors in place of one: a cell whose every `float` is read as `Flight` takes them all through a step.
// A step is a chain of a hundred instructions that wait for each other, longer than what a core looks ahead;
// here those of independent vectors stand side by side. Behind cpu.h; the cell stands behind this.

namespace pararnn {

constexpr int FLIGHT = 4;

struct Flight {
  Vec v[FLIGHT];
  Flight() = default;
  Flight(float all) {
    for (int i = 0; i < FLIGHT; ++i) v[i] = all;
  }
};

struct FlightMask {
  Mask v[FLIGHT];
};

template <typename To = Flight, typename Function, typename... From>
inline To each(const Function& function, const From&... from) {
  To to;
  for (int i = 0; i < FLIGHT; ++i) to.v[i] = function(from.v[i]...);
  return to;
}

inline Flight operator+(Flight a, Flight b) { return each([](Vec x, Vec y) { return x + y; }, a, b); }
inline Flight operator-(Flight a, Flight b) { return each([](Vec x, Vec y) { return x - y; }, a, b); }
inline Flight operator*(Flight a, Flight b) { return each([](Vec x, Vec y) { return x * y; }, a, b); }
inline Flight operator/(Flight a, Flight b) { return each([](Vec x, Vec y) { return x / y; }, a, b); }
inline Flight operator-(Flight a) { return each([](Vec x) { return -x; }, a); }
inline FlightMask operator>(Flight a, Flight b) {
  return each<FlightMask>([](Vec x, Vec y) { return x > y; }, a, b);
}
inline FlightMask operator<(Flight a, Flight b) {
  return each<FlightMask>([](Vec x, Vec y) { return x < y; }, a, b);
}
inline FlightMask operator>=(Flight a, Flight b) {
  return each<FlightMask>([](Vec x, Vec y) { return x >= y; }, a, b);
}
inline FlightMask operator<=(Flight a, Flight b) {
  return each<FlightMask>([](Vec x, Vec y) { return x <= y; }, a, b);
}
inline Flight choose(FlightMask condition, Flight a, Flight b) {
  return each([](Mask m, Vec x, Vec y) { return choose(m, x, y); }, condition, a, b);
}

}  // namespace pararnn

namespace metal {

using pararnn::Flight;

inline Flight fabs(Flight x) { return pararnn::each([](Vec y) { return fabs(y); }, x); }

namespace precise {

inline Flight exp(Flight x) { return pararnn::each([](Vec y) { return exp(y); }, x); }
inline Flight tanh(Flight x) { return pararnn::each([](Vec y) { return tanh(y); }, x); }
inline Flight log(Flight x) { return pararnn::each([](Vec y) { return log(y); }, x); }
inline Flight sqrt(Flight x) { return pararnn::each([](Vec y) { return sqrt(y); }, x); }

}  // namespace precise
}  // namespace metal
