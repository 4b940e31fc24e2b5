namespace pararnn {

// State c, n, m, h; u and w: i, f, z, o. Equations and the constant: mlx_pararnn/cells/slstm.py.
struct SLSTM {
  enum { SLOTS = 4, GATES = 4, PARAMS = 4, OUTPUT = 3 };

  template <typename S>
  static void step(thread S* state, const thread float* u, const thread float* w) {
    const S h = state[3];
    const S forget = u[1] + w[1] * h + state[2];
    const S input = u[0] + w[0] * h;
    const S m = maximum(forget, input);
    const S i = apply<Exp>(input - m);
    const S f = apply<Exp>(forget - m);
    state[0] = f * state[0] + i * apply<Tanh>(u[2] + w[2] * h);
    state[1] = f * state[1] + i;
    state[2] = m;
    state[3] = apply<Sigmoid>(u[3] + w[3] * h) * state[0] / (state[1] + 1e-6f);
  }
};

}  // namespace pararnn
