// The recurrence straight through time on a CPU: groups of vectors of neighbouring channels, shared out to threads.
// Comes after cpu.h, cpu_vectors.h, dual.h, activations.h and a cell's text (mlx_pararnn/compute/texts.py assembles it).

namespace pararnn {

constexpr int WIDTH = GROUP * LANES;  // channels of a group
constexpr int INTERLEAVED = 2;        // groups whose instructions are interleaved: one's fill the other's waits
constexpr int AHEAD = 8;  // steps that u and hidden are fetched ahead: rows longer than what hardware guesses
constexpr int TILE =
    64;  // steps that a thread makes for all its channels before it makes the next: pages stay near

// Shapes as in metal/README.md; strides of u count elements, those of its channels are 1.
typedef int64_t Strides[4];  // sequence, head, step, gate
// mask and states may be null; states are those after every `every`-th step.
#define CALL_FIELDS(FIELD)     \
  FIELD(const void*, u)        \
  FIELD(const float*, params)  \
  FIELD(const float*, initial) \
  FIELD(const uint8_t*, mask)  \
  FIELD(void*, hidden)         \
  FIELD(float*, last)          \
  FIELD(float*, states)        \
  FIELD(Strides, u_strides)    \
  FIELD(int64_t, B)            \
  FIELD(int64_t, heads)        \
  FIELD(int64_t, T)            \
  FIELD(int64_t, W)            \
  FIELD(int64_t, every)        \
  FIELD(int, threads)
PARARNN_STRUCT(Call, CALL_FIELDS)

// Lanes of a group's vector i that are among its first `count` channels.
inline int lanes(int i, int count) {
  const int left = count - i * LANES;
  return left < 0 ? 0 : left < LANES ? left : LANES;
}

template <typename T>
inline VecGroup load_group(const T* from, int count) {
  VecGroup x;
  for (int i = 0; i < GROUP; ++i) {
    const int n = lanes(i, count);
    x.v[i] = n > 0 ? load(from + i * LANES, n) : Vec(0.0f);
  }
  return x;
}

template <typename T>
inline void store_group(T* to, const VecGroup& x, int count) {
  for (int i = 0; i < GROUP; ++i) {
    const int n = lanes(i, count);
    if (n > 0) store(to + i * LANES, x.v[i], n);
  }
}

// Steps from...to of N groups from channel w0 of a head; one alone may have fewer than WIDTH channels. Between
// calls the state is in call.last.
template <typename T, int N>
void run(const Call& call, int64_t b, int64_t head, int64_t w0, int channels, int64_t from, int64_t to) {
  constexpr int SLOTS = Cell::SLOTS, GATES = Cell::GATES, PARAMS = Cell::PARAMS;
  const int count = N > 1 ? WIDTH : channels;  // known to the compiler where it matters
  const int64_t D = call.heads * call.W;
  const int64_t d0 = head * call.W + w0;
  const float* before = (from > 0 ? call.last : call.initial) + b * SLOTS * D + d0;
  VecGroup w[N][PARAMS], state[N][SLOTS];
  for (int n = 0; n < N; ++n) {
    for (int p = 0; p < PARAMS; ++p) w[n][p] = load_group(call.params + p * D + d0 + n * WIDTH, count);
    for (int s = 0; s < SLOTS; ++s) state[n][s] = load_group(before + s * D + n * WIDTH, count);
  }
  const T* u = static_cast<const T*>(call.u) + b * call.u_strides[0] + head * call.u_strides[1] +
               from * call.u_strides[2] + w0;
  T* hidden = static_cast<T*>(call.hidden) + (b * call.T + from) * D + d0;
  for (int64_t t = from; t < to; ++t, u += call.u_strides[2], hidden += D) {
    const bool keep = !call.mask || call.mask[b * call.T + t];
    for (int n = 0; n < N; ++n) {
      if (keep) {
        VecGroup x[GATES];
        for (int g = 0; g < GATES; ++g) {
          const T* gate = u + g * call.u_strides[3] + n * WIDTH;
          for (int i = 0; i < GROUP; ++i) {
            __builtin_prefetch(gate + AHEAD * call.u_strides[2] + i * LANES);
          }
          x[g] = load_group(gate, count);
        }
        Cell::step(state[n], x, w[n]);
      }
      for (int i = 0; i < GROUP; ++i) __builtin_prefetch(hidden + AHEAD * D + n * WIDTH + i * LANES, 1);
      store_group(hidden + n * WIDTH, keep ? state[n][Cell::OUTPUT] : VecGroup(0.0f), count);
    }
    if (call.states && (t + 1) % call.every == 0) {
      float* kept = call.states + (b * (call.T / call.every) + t / call.every) * SLOTS * D + d0;
      for (int n = 0; n < N; ++n) {
        for (int s = 0; s < SLOTS; ++s) store_group(kept + s * D + n * WIDTH, state[n][s], count);
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int s = 0; s < SLOTS; ++s) {
      store_group(call.last + (b * SLOTS + s) * D + d0 + n * WIDTH, state[n][s], count);
    }
  }
}

template <typename T>
void recurrence(const Call& call) {
  // Groups go together unless threads would then be left without work: their numbers are the same, only later.
  const int64_t groups = (call.W + WIDTH - 1) / WIDTH, most = call.W / (INTERLEAVED * WIDTH);
  const bool paired = call.B * call.heads * (groups - (INTERLEAVED - 1) * most) >= call.threads;
  const int64_t wide = paired ? most : 0;
  const int64_t blocks = groups - (INTERLEAVED - 1) * wide;
  const int64_t items = call.B * call.heads * blocks;
  // Two pieces a thread: long rows to read, and a core that is slow or busy leaves one to another.
  const int64_t pieces = items < 2 * call.threads ? items : 2 * call.threads;
  in_parallel(pieces, call.threads, [&](int64_t piece) {
    for (int64_t from = 0; from < call.T; from += TILE) {
      const int64_t to = from + TILE < call.T ? from + TILE : call.T;
      for (int64_t item = items * piece / pieces; item < items * (piece + 1) / pieces; ++item) {
        const int64_t b = item / (call.heads * blocks), head = item / blocks % call.heads,
                      block = item % blocks;
        if (block < wide) {
          run<T, INTERLEAVED>(call, b, head, block * INTERLEAVED * WIDTH, WIDTH, from, to);
        } else {
          const int64_t w0 = wide * INTERLEAVED * WIDTH + (block - wide) * WIDTH;
          run<T, 1>(call, b, head, w0, call.W - w0 < WIDTH ? int(call.W - w0) : WIDTH, from, to);
        }
      }
    }
  });
}

}  // namespace pararnn

#define PARARNN_EXPORT_RECURRENCE(name, T)                             \
  extern "C" int pararnn_##name(const pararnn::Call* call) {           \
    return pararnn::status_of([=] { pararnn::recurrence<T>(*call); }); \
  }
PARARNN_DTYPES(PARARNN_EXPORT_RECURRENCE)
