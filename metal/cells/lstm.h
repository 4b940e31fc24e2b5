namespace pararnn {

// ParaLSTM. State c, h; u: f, o, c; w: a_f, a_o, a_c, c_f, c_o. Equations: mlx_pararnn/cells/lstm.py.
template <typename Forget, typename Output, typename Candidate, typename State>
struct LSTM {
  enum { SLOTS = 2, GATES = 3, PARAMS = 5, OUTPUT = 1 };

  template <typename S>
  static void step(thread S* state, const thread float* u, const thread float* w) {
    const S h = state[1];
    const S f = apply<Forget>(w[0] * h + u[0] + w[3] * state[0]);
    const S n = apply<Candidate>(w[2] * h + u[2]);
    const S c = f * state[0] + (1.0f - f) * n;
    const S o = apply<Output>(w[1] * h + u[1] + w[4] * c);
    state[0] = c;
    state[1] = o * apply<State>(c);
  }
};

}  // namespace pararnn
