namespace pararnn {

// ParaGRU. State h; u and w: z, r, h. Equations: mlx_pararnn/cells/gru.py.
template <typename Update, typename Reset, typename State>
struct GRU {
  enum { SLOTS = 1, GATES = 3, PARAMS = 3, OUTPUT = 0 };

  template <typename S>
  static void step(thread S* state, const thread float* u, const thread float* w) {
    const S h = state[0];
    const S z = apply<Update>(w[0] * h + u[0]);
    const S r = apply<Reset>(w[1] * h + u[1]);
    const S n = apply<State>(w[2] * (h * r) + u[2]);
    state[0] = z * n + (1.0f - z) * h;
  }
};

}  // namespace pararnn
