// The recurrence straight through time on a CPU: vectors of neighbouring channels, shared out to threads.
// Stands behind host.h, dual.h, activations.h and a cell's text (mlx_pararnn/host.py assembles it).

namespace pararnn {

constexpr int FLIGHT = 4;  // vectors that go through time together, to hide the latency of a step
constexpr int AHEAD = 8;   // steps that u is fetched ahead: a row of it is longer than what hardware guesses

// Shapes as in metal/README.md; strides of u count elements, those of its channels are 1.
struct Call {
  const void* u;
  const float* params;
  const float* initial;
  const uint8_t* mask;  // or null
  void* hidden;
  float* last;
  float* states;  // or null
  int64_t u_strides[4];  // sequence, head, step, gate
  int64_t B, heads, T, W, every;
  int threads;
};

// N vectors from channel w0 of a head; the last of them has `count` lanes.
template <typename T, int N>
void run(const Call& call, int64_t b, int64_t head, int64_t w0, int count) {
  constexpr int SLOTS = Cell::SLOTS, GATES = Cell::GATES, PARAMS = Cell::PARAMS;
  const int64_t D = call.heads * call.W;
  const int64_t d0 = head * call.W + w0;
  const auto lanes = [&](int n) { return n == N - 1 ? count : LANES; };
  Vec w[N][PARAMS], state[N][SLOTS];
  for (int n = 0; n < N; ++n) {
    for (int p = 0; p < PARAMS; ++p) w[n][p] = load(call.params + p * D + d0 + n * LANES, lanes(n));
    for (int s = 0; s < SLOTS; ++s) {
      state[n][s] = load(call.initial + (b * SLOTS + s) * D + d0 + n * LANES, lanes(n));
    }
  }
  const T* u = static_cast<const T*>(call.u) + b * call.u_strides[0] + head * call.u_strides[1] + w0;
  T* hidden = static_cast<T*>(call.hidden) + b * call.T * D + d0;
  for (int64_t t = 0; t < call.T; ++t, u += call.u_strides[2], hidden += D) {
    const bool keep = !call.mask || call.mask[b * call.T + t];
    for (int n = 0; n < N; ++n) {
      if (keep) {
        Vec x[GATES];
        for (int g = 0; g < GATES; ++g) {
          const T* from = u + g * call.u_strides[3] + n * LANES;
          __builtin_prefetch(from + AHEAD * call.u_strides[2]);
          x[g] = load(from, lanes(n));
        }
        Cell::step(state[n], x, w[n]);
      }
      store(hidden + n * LANES, keep ? state[n][Cell::OUTPUT] : Vec(0.0f), lanes(n));
    }
    if (call.states && (t + 1) % call.every == 0) {
      float* to = call.states + (b * (call.T / call.every) + t / call.every) * SLOTS * D + d0;
      for (int n = 0; n < N; ++n) {
        for (int s = 0; s < SLOTS; ++s) store(to + s * D + n * LANES, state[n][s], lanes(n));
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int s = 0; s < SLOTS; ++s) {
      store(call.last + (b * SLOTS + s) * D + d0 + n * LANES, state[n][s], lanes(n));
    }
  }
}

template <typename T>
void recurrence(const Call& call) {
  // Which channels go together depends on W alone, so that a channel's rounding depends on neither batch nor T.
  const int64_t wide = call.W / (FLIGHT * LANES);
  const int64_t rest = call.W - wide * FLIGHT * LANES;
  const int64_t blocks = wide + (rest + LANES - 1) / LANES;
  in_parallel(call.B * call.heads * blocks, call.threads, [&](int64_t item) {
    const int64_t b = item / (call.heads * blocks), head = item / blocks % call.heads, block = item % blocks;
    if (block < wide) {
      run<T, FLIGHT>(call, b, head, block * FLIGHT * LANES, LANES);
    } else {
      const int64_t w0 = wide * FLIGHT * LANES + (block - wide) * LANES;
      run<T, 1>(call, b, head, w0, call.W - w0 < LANES ? int(call.W - w0) : LANES);
    }
  });
}

}  // namespace pararnn

extern "C" void pararnn_float32(const pararnn::Call* call) { pararnn::recurrence<float>(*call); }
extern "C" void pararnn_float16(const pararnn::Call* call) { pararnn::recurrence<pararnn::Float16>(*call); }
extern "C" void pararnn_bfloat16(const pararnn::Call* call) { pararnn::recurrence<pararnn::Bfloat16>(*call); }
