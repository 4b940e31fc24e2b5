// The tangents of the CPU's duals: a vector, and whether it is known to be 0. Of the many inputs of a step most numbers
// depend on few. Once a step is inlined and its loops over tangents are unrolled, the compiler knows which are 0 and
// leaves out what is done with them, as it may not for a float that happens to be 0. Comes after cpu.h, before dual.h.

namespace pararnn {

struct Tangent {
  Vec v;
  bool zero;
  Tangent() = default;
  Tangent(float all) : v(all), zero(all == 0.0f) {}
  Tangent(Vec x) : v(x), zero(false) {}

  // Friends are found for tangents alone: a plain number is not taken for one.
  friend Tangent operator+(Tangent a, Tangent b) {
    if (a.zero) return b;
    if (b.zero) return a;
    return a.v + b.v;
  }
  friend Tangent operator-(Tangent a, Tangent b) {
    if (b.zero) return a;
    if (a.zero) return -b.v;
    return a.v - b.v;
  }
  friend Tangent operator*(Tangent a, Vec b) {
    if (a.zero) return a;
    return a.v * b;
  }
  friend Tangent operator*(Vec a, Tangent b) { return b * a; }
  friend Tangent operator/(Tangent a, Vec b) {
    if (a.zero) return a;
    return a.v * (1.0f / b);  // one division for all tangents, which takes as long as ten multiplications
  }
  friend Tangent choose(Mask condition, Tangent a, Tangent b) {
    Tangent chosen(choose(condition, a.v, b.v));
    chosen.zero = a.zero && b.zero;
    return chosen;
  }
};

}  // namespace pararnn
