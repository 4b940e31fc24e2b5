// The twelve activations of Apple's ParaRNN cells: a value and a slope each, from which a dual's follows.
// Constants are Apple's: gelu is the tanh approximation, leaky_relu 0.01, elu and softplus 1, half_sigmoid
// sigmoid / 2. `precise` keeps exp and tanh finite and accurate whatever the compiler's math mode.
// `choose` and not ?:, since the CPU backend reads this text with a vector in place of each float.

namespace pararnn {

struct Identity {
  static float value(float x) { return x; }
  static float slope(float, float) { return 1.0f; }
};

struct Exp {
  static float value(float x) { return metal::precise::exp(x); }
  static float slope(float, float y) { return y; }
};

struct Tanh {
  static float value(float x) { return metal::precise::tanh(x); }
  static float slope(float, float y) { return 1.0f - y * y; }
};

struct Sigmoid {
  static float value(float x) { return 1.0f / (1.0f + metal::precise::exp(-x)); }
  static float slope(float, float y) { return y * (1.0f - y); }
};

struct HalfSigmoid {
  static float value(float x) { return 0.5f * Sigmoid::value(x); }
  static float slope(float, float y) { return y * (1.0f - 2.0f * y); }
};

struct Relu {
  static float value(float x) { return choose(x > 0.0f, x, choose(x <= 0.0f, 0.0f, x)); }
  static float slope(float x, float) { return choose(x > 0.0f, 1.0f, 0.0f); }
};

struct LeakyRelu {
  static float value(float x) { return choose(x > 0.0f, x, 0.01f * x); }
  static float slope(float x, float) { return choose(x > 0.0f, 1.0f, 0.01f); }
};

// exp(x) - 1 without cancellation near 0: there its series, elsewhere the difference.
inline float exp_minus_one(float x) {
  const float series = x * (1.0f + x * (0.5f + x * (1.6666667e-1f + x * (4.1666668e-2f + x * 8.3333338e-3f))));
  return choose(metal::fabs(x) < 0.125f, series, metal::precise::exp(x) - 1.0f);
}

struct Elu {
  static float value(float x) { return choose(x > 0.0f, x, exp_minus_one(x)); }
  static float slope(float x, float y) { return choose(x > 0.0f, 1.0f, y + 1.0f); }
};

struct Selu {
  static float value(float x) { return 1.05070099f * choose(x > 0.0f, x, 1.67326324f * exp_minus_one(x)); }
  static float slope(float x, float y) { return choose(x > 0.0f, 1.05070099f, y + 1.75809934f); }
};

struct Gelu {
  static float inner(float x) { return metal::precise::tanh(0.797884561f * (x + 0.044715f * x * x * x)); }
  static float value(float x) { return 0.5f * x * (1.0f + inner(x)); }
  static float slope(float x, float) {
    const float t = inner(x);
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.797884561f * (1.0f + 0.134145f * x * x);
  }
};

struct Silu {
  static float value(float x) { return x * Sigmoid::value(x); }
  static float slope(float x, float y) {
    const float s = Sigmoid::value(x);
    return s + y * (1.0f - s);
  }
};

struct Softplus {
  static float value(float x) {
    const float e = metal::precise::exp(-metal::fabs(x));
    // log(1 + e), with the series where 1 + e would round e away
    const float log1p = choose(e < 1e-4f, e * (1.0f - 0.5f * e), metal::precise::log(1.0f + e));
    return choose(x > 0.0f, x, 0.0f) + log1p;
  }
  static float slope(float x, float) { return Sigmoid::value(x); }
};

template <typename A>
inline float apply(float x) {
  return A::value(x);
}

template <typename A, int N>
inline Dual<N> apply(Dual<N> x) {
  const float y = A::value(x.v);
  return chain(x, y, A::slope(x.v, y));
}

}  // namespace pararnn
