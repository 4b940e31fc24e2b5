// The adjoint of the recurrence on a CPU: backwards through time, vectors of neighbouring channels, shared out to
// threads. Comes after cpu.h, dual.h, activations.h, a cell's text, dual_inputs.h and the same text on dual numbers
// (mlx_pararnn/compute/texts.py assembles it). What is computed: mlx_pararnn/compute/adjoint.py.

namespace pararnn {

constexpr int GROUP = 4;  // vectors of a group: independent chains of instructions, which a core runs side by side
constexpr int WIDTH = GROUP * LANES;  // channels of a group
constexpr int AHEAD = 4;              // steps that rows of u are fetched ahead

// Shapes as in metal/README.md; strides count elements, those of channels are 1.
typedef int64_t Strides[4];     // sequence, head, step, gate
typedef int64_t RowStrides[2];  // sequence, step
// mask and d_states may be null. `sums` (B, P, D) has room for each sequence's gradient of params.
#define ADJOINT_FIELDS(FIELD)         \
  FIELD(const void*, u)               \
  FIELD(const float*, params)         \
  FIELD(const float*, initial)        \
  FIELD(const uint8_t*, mask)         \
  FIELD(const float*, boundaries)     \
  FIELD(const void*, d_hidden)        \
  FIELD(const float*, d_last)         \
  FIELD(const float*, d_states)       \
  FIELD(void*, d_u)                   \
  FIELD(float*, d_params)             \
  FIELD(float*, d_initial)            \
  FIELD(float*, sums)                 \
  FIELD(Strides, u_strides)           \
  FIELD(Strides, d_u_strides)         \
  FIELD(RowStrides, d_hidden_strides) \
  FIELD(int64_t, B)                   \
  FIELD(int64_t, heads)               \
  FIELD(int64_t, T)                   \
  FIELD(int64_t, W)                   \
  FIELD(int64_t, every)               \
  FIELD(int64_t, tile)                \
  FIELD(int, threads)
PARARNN_STRUCT(Adjoint, ADJOINT_FIELDS)

constexpr int SLOTS = Cell::SLOTS, GATES = Cell::GATES, PARAMS = Cell::PARAMS;
// A Jacobian that fits the vector registers (GRU, NLRU; LSTM where there are 32) is kept for the way back. Of a larger
// one (sLSTM: 48 numbers) only the state before the step is: to make the step again takes less time.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
constexpr bool KEEPS_JACOBIANS = SLOTS * INPUTS <= REGISTERS;
constexpr int KEPT = KEEPS_JACOBIANS ? SLOTS * INPUTS : SLOTS;

inline tangents::Real seeded(Vec value, int direction) {
  tangents::Real x = constant_dual<INPUTS>(value);
  x.d[direction] = 1.0f;
  return x;
}

// One step on dual numbers: the state after it, with its Jacobian by the state before it, u and w.
inline void derive(const Vec* before, const Vec* u, const Vec* w, tangents::Real* after) {
  tangents::Real x[GATES], p[PARAMS];
  for (int i = 0; i < SLOTS; ++i) after[i] = seeded(before[i], i);
  for (int i = 0; i < GATES; ++i) x[i] = seeded(u[i], SLOTS + i);
  for (int i = 0; i < PARAMS; ++i) p[i] = seeded(w[i], SLOTS + GATES + i);
  TangentCell::step(after, x, p);
}

// One step forwards, and what `step_back` needs of it.
inline void step_forth(Vec* state, const Vec* u, const Vec* w, Vec* kept) {
  if constexpr (KEEPS_JACOBIANS) {
    tangents::Real after[SLOTS];
    derive(state, u, w, after);
    for (int k = 0; k < SLOTS; ++k) {
      state[k] = after[k].v;
      for (int i = 0; i < INPUTS; ++i) {
        if (!after[k].d[i].zero) kept[k * INPUTS + i] = after[k].d[i].v;
      }
    }
  } else {
    for (int k = 0; k < SLOTS; ++k) kept[k] = state[k];
    Cell::step(state, u, w);
  }
}

// One step backwards. lambda: the gradient of the state after the step, then of the state before it.
inline void step_back(const Vec* kept, const Vec* u, const Vec* w, Vec* lambda, Vec* d_u, Vec* d_w) {
  tangents::Real after[SLOTS];
  derive(kept, u, w, after);
  if constexpr (KEEPS_JACOBIANS) {  // the above only says which numbers are 0: the compiler leaves it out
    for (int k = 0; k < SLOTS; ++k) {
      for (int i = 0; i < INPUTS; ++i) after[k].d[i].v = kept[k * INPUTS + i];
    }
  }
  Vec d[INPUTS];
  for (int i = 0; i < INPUTS; ++i) {
    Tangent sum(0.0f);
    for (int k = 0; k < SLOTS; ++k) sum = sum + lambda[k] * after[k].d[i];
    d[i] = sum.v;
  }
  for (int i = 0; i < SLOTS; ++i) lambda[i] = d[i];
  for (int i = 0; i < GATES; ++i) d_u[i] = d[SLOTS + i];
  for (int i = 0; i < PARAMS; ++i) d_w[i] = d[SLOTS + GATES + i];
}

// Steps from...to of a group of `channels` channels from channel w0 of a head: forwards from the tile's boundary, with
// `kept` for what the way back needs of each, then backwards. Between tiles lambda is in call.d_initial.
template <typename T, bool FULL>
__attribute__((flatten)) void run_back(const Adjoint& call,
                                       Vec* kept,
                                       int64_t b,
                                       int64_t head,
                                       int64_t w0,
                                       int channels,
                                       int64_t from,
                                       int64_t to) {
  const int vectors = FULL ? GROUP : (channels + LANES - 1) / LANES;
  const auto lanes = [&](int i) { return FULL || channels - i * LANES >= LANES ? LANES : channels - i * LANES; };
  const int64_t D = call.heads * call.W, d0 = head * call.W + w0;
  const float* params = call.params + d0;
  const float* start = from > 0 ? call.boundaries + (b * (call.T / call.tile) + from / call.tile - 1) * SLOTS * D
                                : call.initial + b * SLOTS * D;
  const float* later = (to < call.T ? call.d_initial : call.d_last) + b * SLOTS * D;
  const T* const u = static_cast<const T*>(call.u) + b * call.u_strides[0] + head * call.u_strides[1] + w0;
  const T* const d_hidden = static_cast<const T*>(call.d_hidden) + b * call.d_hidden_strides[0] + d0;
  T* const d_u = static_cast<T*>(call.d_u) + b * call.d_u_strides[0] + head * call.d_u_strides[1] + w0;
  Vec w[GROUP][PARAMS], state[GROUP][SLOTS], lambda[GROUP][SLOTS], sum[GROUP][PARAMS];
  for (int i = 0; i < vectors; ++i) {
    for (int p = 0; p < PARAMS; ++p) {
      w[i][p] = load(params + p * D + i * LANES, lanes(i));
      sum[i][p] = 0.0f;
    }
    for (int s = 0; s < SLOTS; ++s) {
      state[i][s] = load(start + s * D + d0 + i * LANES, lanes(i));
      lambda[i][s] = load(later + s * D + d0 + i * LANES, lanes(i));
    }
  }

  // What the way back reads and writes of a step is fetched here, where there is most to compute meanwhile.
  for (int64_t t = from; t < to; ++t) {
    if (call.mask && !call.mask[b * call.T + t]) continue;
    const T* row = u + t * call.u_strides[2];
    const T* d_out = d_hidden + t * call.d_hidden_strides[1];
    const T* d_in = d_u + t * call.d_u_strides[2];
    for (int i = 0; i < vectors; ++i) {
      Vec x[GATES];
      __builtin_prefetch(d_out + i * LANES);
      for (int g = 0; g < GATES; ++g) {
        __builtin_prefetch(row + AHEAD * call.u_strides[2] + g * call.u_strides[3] + i * LANES);
        __builtin_prefetch(d_in + g * call.d_u_strides[3] + i * LANES, 1);
        x[g] = load(row + g * call.u_strides[3] + i * LANES, lanes(i));
      }
      step_forth(state[i], x, w[i], kept + ((t - from) * GROUP + i) * KEPT);
    }
  }

  for (int64_t t = to - 1; t >= from; --t) {
    const bool keep = !call.mask || call.mask[b * call.T + t];
    if (call.d_states && (t + 1) % call.every == 0) {
      const float* row = call.d_states + (b * (call.T / call.every) + t / call.every) * SLOTS * D + d0;
      for (int i = 0; i < vectors; ++i) {
        for (int s = 0; s < SLOTS; ++s) lambda[i][s] = lambda[i][s] + load(row + s * D + i * LANES, lanes(i));
      }
    }
    const T* in = u + t * call.u_strides[2];
    const T* d_out = d_hidden + t * call.d_hidden_strides[1];
    T* d_in = d_u + t * call.d_u_strides[2];
    for (int i = 0; i < vectors; ++i) {
      Vec x[GATES], d_x[GATES], d_w[PARAMS];
      if (keep) {
        for (int g = 0; g < GATES; ++g) x[g] = load(in + g * call.u_strides[3] + i * LANES, lanes(i));
        lambda[i][Cell::OUTPUT] = lambda[i][Cell::OUTPUT] + load(d_out + i * LANES, lanes(i));
        step_back(kept + ((t - from) * GROUP + i) * KEPT, x, w[i], lambda[i], d_x, d_w);
        for (int p = 0; p < PARAMS; ++p) sum[i][p] = sum[i][p] + d_w[p];
      } else {
        for (int g = 0; g < GATES; ++g) d_x[g] = 0.0f;
      }
      for (int g = 0; g < GATES; ++g) store(d_in + g * call.d_u_strides[3] + i * LANES, d_x[g], lanes(i));
    }
  }

  float* const d_initial = call.d_initial + b * SLOTS * D + d0;
  float* const sums = call.sums + b * PARAMS * D + d0;
  for (int i = 0; i < vectors; ++i) {
    for (int s = 0; s < SLOTS; ++s) store(d_initial + s * D + i * LANES, lambda[i][s], lanes(i));
    for (int p = 0; p < PARAMS; ++p) {
      float* all = sums + p * D + i * LANES;
      store(all, to < call.T ? sum[i][p] + load(all, lanes(i)) : sum[i][p], lanes(i));
    }
  }
}

// While one of these lives, what this thread computes below the smallest normal float (1.2e-38) is 0. An x86 processor
// takes a hundred times as long for such numbers, and where steps forget, gradients of early ones are full of them. Those
// that it reads are as they are: without instructions for it, float16 is widened by way of them.
struct NoSubnormals {
#ifdef __SSE__
  const unsigned before = __builtin_ia32_stmxcsr();
  NoSubnormals() { __builtin_ia32_ldmxcsr(before | 0x8000); }  // flush to zero
  ~NoSubnormals() { __builtin_ia32_ldmxcsr(before); }
#endif
};

template <typename T>
void adjoint(const Adjoint& call) {
  const int64_t blocks = (call.W + WIDTH - 1) / WIDTH, items = call.B * call.heads * blocks;
  const int64_t pieces = items < 2 * call.threads ? items : 2 * call.threads;
  const int64_t tiles = (call.T + call.tile - 1) / call.tile;
  in_parallel(pieces, call.threads, [&](int64_t piece) {
    [[maybe_unused]] const NoSubnormals here{};
    std::vector<Vec> kept(call.tile * GROUP * KEPT);
    for (int64_t tile = tiles - 1; tile >= 0; --tile) {
      const int64_t from = tile * call.tile, to = from + call.tile < call.T ? from + call.tile : call.T;
      for (int64_t item = items * piece / pieces; item < items * (piece + 1) / pieces; ++item) {
        const int64_t b = item / (call.heads * blocks), head = item / blocks % call.heads;
        const int64_t w0 = item % blocks * WIDTH, left = call.W - w0;
        if (left >= WIDTH) {
          run_back<T, true>(call, kept.data(), b, head, w0, WIDTH, from, to);
        } else {
          run_back<T, false>(call, kept.data(), b, head, w0, int(left), from, to);
        }
      }
    }
  });
  // Sequences are added in their order, so that the sum does not depend on who computed which.
  const int64_t rows = PARAMS * call.heads * call.W;
  vectors(rows, [&](int64_t i, int lanes) {
    Vec sum(0.0f);
    for (int64_t b = 0; b < call.B; ++b) sum = sum + load(call.sums + b * rows + i, lanes);
    store(call.d_params + i, sum, lanes);
  });
}

}  // namespace pararnn

#define PARARNN_EXPORT_ADJOINT(name, T)                                 \
  extern "C" int pararnn_adjoint_##name(const pararnn::Adjoint* call) { \
    return pararnn::status_of([=] { pararnn::adjoint<T>(*call); });     \
  }
PARARNN_DTYPES(PARARNN_EXPORT_ADJOINT)
