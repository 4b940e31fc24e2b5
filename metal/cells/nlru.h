namespace pararnn {

// State h; u: a, n; w: w. Equations: mlx_pararnn/cells/nlru.py.
struct NLRU {
  enum { SLOTS = 1, GATES = 2, PARAMS = 1, OUTPUT = 0 };

  template <typename S>
  static void step(thread S* state, const thread float* u, const thread float* w) {
    const float a = apply<Sigmoid>(u[0]);
    const S n = apply<Tanh>(u[1] + w[0] * state[0]);
    state[0] = a * state[0] + (1.0f - a) * n;
  }
};

}  // namespace pararnn
