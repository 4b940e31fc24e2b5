// Calls of the CPU backend's functions, made of a fuzzer's bytes; comes after a text of mlx_pararnn/compute/texts.py
// (native.py puts them together). The first bytes choose shapes, strides and threads as Python may give them, the others
// are numbers. Every array has its own memory, of its size and no more. A call is made twice,
// by one thread and by one or several, with results that hold different rubbish before: a difference is a finding, and
// what a sanitizer sees is one.

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>

namespace fuzz {

struct Input {
  const uint8_t *at, *end;
  uint32_t seed = 1;
  int kind = 0;  // of numbers

  uint8_t byte() {
    if (at < end) return *at++;
    seed = seed * 1664525u + 1013904223u;
    return uint8_t(seed >> 24);
  }

  // a ... b
  int64_t among(int64_t a, int64_t b) { return a + (byte() | (b - a > 255 ? byte() << 8 : 0)) % (b - a + 1); }

  bool coin() { return byte() & 1; }

  // of the second call: several in one of 16 executions, since threads that meet take longer than all else
  int threads() { return byte() % 16 ? 1 : int(among(2, 4)); }

  uint32_t word() {
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits = bits << 8 | byte();
    return bits;
  }

  float number() {
    static const float extreme[] = {0.0f, -0.0f, 1.0f, -1.0f, 3e38f, -3e38f, 1e-45f, -1e-38f, 88.8f, -88.8f, 65504.0f,
                                    65520.0f, 5.9e-8f, std::numeric_limits<float>::infinity(),
                                    -std::numeric_limits<float>::infinity(),
                                    std::numeric_limits<float>::quiet_NaN()};
    if (kind == 0) return (int(byte()) - 128) / 128.0f;
    if (kind == 1) return extreme[byte() % 16];
    float x;
    const uint32_t bits = word();
    memcpy(&x, &bits, sizeof x);
    return x;
  }
};

template <typename T>
struct Array {
  int64_t count;
  // aligned as T is and no better: a view may begin anywhere in its memory
  std::unique_ptr<char, decltype(&free)> room;
  T* data;
  explicit Array(int64_t n, int64_t before = 0)
      : count(n),
        room(static_cast<char*>(malloc((n + before) * sizeof(T))), free),
        data(reinterpret_cast<T*>(room.get()) + before) {}
};

template <typename T>
Array<T> numbers(Input& in, int64_t count) {
  Array<T> made(count, in.byte() % 4);
  // of large arrays a part is drawn and repeated: the fuzzer's bytes go further
  const int64_t drawn = count < 128 ? count : 128;
  for (int64_t i = 0; i < drawn; ++i) pararnn::store(made.data + i, pararnn::Vec(in.number()), 1);
  for (int64_t i = drawn; i < count; ++i) made.data[i] = made.data[i - drawn];
  return made;
}

// Room for results, with rubbish in it.
template <typename T>
Array<T> rubbish(int64_t count, int byte) {
  Array<T> made(count);
  memset(made.data, byte, count * sizeof(T));
  return made;
}

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "finding: %s\n", what);
  abort();
}

template <typename T>
float value(const T* from) {
  return pararnn::load(from, 1).v[0];
}

// One thread's results and several threads'; NaN may be any.
template <typename T>
void same(const Array<T>& a, const Array<T>& b, const char* what) {
  if (!memcmp(a.data, b.data, a.count * sizeof(T))) return;
  for (int64_t i = 0; i < a.count; ++i) {
    const float x = value(a.data + i), y = value(b.data + i);
    if ((x == x || y == y) && memcmp(a.data + i, b.data + i, sizeof(T))) fail(what);
  }
}

// Of moderate numbers a result is a number.
template <typename T>
void is_number(const Input& in, const Array<T>& a, const char* what) {
  for (int64_t i = 0; in.kind == 0 && i < a.count; ++i) {
    const float x = value(a.data + i);
    if (!(x == x)) fail(what);
  }
}

inline std::unique_ptr<Array<uint8_t>> some_mask(Input& in, int64_t count) {
  if (in.coin()) return nullptr;
  auto mask = std::make_unique<Array<uint8_t>>(count);
  for (int64_t i = 0; i < count; ++i) mask->data[i] = in.coin();
  return mask;
}

// Steps, heads and gates as a projection leaves them: heads outside or inside of steps, rows further apart or not.
inline void strides(Input& in, int64_t heads, int64_t T, int64_t W, int64_t gates, int64_t* to) {
  const int64_t row = gates * W + (in.coin() ? in.among(0, 5) : 0);
  const bool outside = in.coin();
  to[1] = outside ? T * row : row, to[2] = outside ? row : heads * row;
  to[0] = heads * T * row, to[3] = W;
}

inline int64_t extent(const int64_t* strides, int64_t B, int64_t heads, int64_t T, int64_t gates, int64_t W) {
  return (B - 1) * strides[0] + (heads - 1) * strides[1] + (T - 1) * strides[2] + (gates - 1) * strides[3] + W;
}

template <typename T>
void one(Input& in);

}  // namespace fuzz

#if defined(FUZZ_RECURRENCE)

namespace fuzz {

template <typename T>
int called(const pararnn::Call* call) {
  return std::is_same<T, float>::value              ? pararnn_float32(call)
         : std::is_same<T, pararnn::Float16>::value ? pararnn_float16(call)
                                                    : pararnn_bfloat16(call);
}

template <typename T>
void one(Input& in) {
  using namespace pararnn;
  const int64_t B = in.among(1, 3), heads = in.among(1, 3), W = in.among(1, 2 * WIDTH + 5);
  const int64_t steps = in.among(1, W < 20 ? 2 * TILE + 2 : 5), D = heads * W;
  const int64_t every = in.coin() ? in.among(1, steps) : 0;
  int64_t u_strides[4];
  strides(in, heads, steps, W, Cell::GATES, u_strides);
  const auto mask = some_mask(in, B * steps);
  const auto u = numbers<T>(in, extent(u_strides, B, heads, steps, Cell::GATES, W));
  const auto params = numbers<float>(in, Cell::PARAMS * D), initial = numbers<float>(in, B * Cell::SLOTS * D);
  std::vector<Array<T>> hidden;
  std::vector<Array<float>> last, states;
  for (int turn = 0; turn < 2; ++turn) {
    const int old = turn ? 0x5A : 0xA5, threads = turn ? in.threads() : 1;
    hidden.push_back(rubbish<T>(B * steps * D, old));
    last.push_back(rubbish<float>(initial.count, old));
    states.push_back(rubbish<float>(every ? B * (steps / every) * Cell::SLOTS * D : 0, old));
    Call call{u.data, params.data, initial.data, mask ? mask->data : nullptr, hidden.back().data, last.back().data,
              every ? states.back().data : nullptr, {}, B, heads, steps, W, every, threads};
    memcpy(call.u_strides, u_strides, sizeof u_strides);
    if (called<T>(&call)) fail("no memory");
  }
  same(hidden[0], hidden[1], "hidden states depend on threads, or are not written");
  same(last[0], last[1], "last states depend on threads, or are not written");
  same(states[0], states[1], "kept states depend on threads, or are not written");
  is_number(in, last[0], "a state is no number");
}

}  // namespace fuzz

#elif defined(FUZZ_ADJOINT)

namespace fuzz {

template <typename T>
int called(const pararnn::Adjoint* call) {
  return std::is_same<T, float>::value              ? pararnn_adjoint_float32(call)
         : std::is_same<T, pararnn::Float16>::value ? pararnn_adjoint_float16(call)
                                                    : pararnn_adjoint_bfloat16(call);
}

template <typename T>
void one(Input& in) {
  using namespace pararnn;
  const int64_t B = in.among(1, 3), heads = in.among(1, 3), W = in.among(1, WIDTH + 5), D = heads * W;
  const int64_t steps = in.among(1, W < 20 ? 20 : 5), tile = in.among(1, steps + 2);
  const int64_t every = in.coin() ? in.among(1, steps) : 0;
  int64_t u_strides[4], d_u_strides[4];
  strides(in, heads, steps, W, GATES, u_strides);
  memcpy(d_u_strides, u_strides, sizeof u_strides);
  const int64_t apart = D + (in.coin() ? in.among(0, 5) : 0);
  const auto mask = some_mask(in, B * steps);
  const int64_t length = extent(u_strides, B, heads, steps, GATES, W);
  const auto u = numbers<T>(in, length), d_hidden = numbers<T>(in, (B * steps - 1) * apart + D);
  const auto params = numbers<float>(in, PARAMS * D), initial = numbers<float>(in, B * SLOTS * D);
  const auto boundaries = numbers<float>(in, B * (steps / tile) * SLOTS * D);
  const auto d_last = numbers<float>(in, B * SLOTS * D);
  const auto d_states = numbers<float>(in, every ? B * (steps / every) * SLOTS * D : 0);
  std::vector<Array<T>> d_u;
  std::vector<Array<float>> d_params, d_initial;
  for (int turn = 0; turn < 2; ++turn) {
    const int old = turn ? 0x5A : 0xA5, threads = turn ? in.threads() : 1;
    d_u.push_back(rubbish<T>(length, old));
    d_params.push_back(rubbish<float>(PARAMS * D, old));
    d_initial.push_back(rubbish<float>(B * SLOTS * D, old));
    auto sums = rubbish<float>(B * PARAMS * D, old);
    Adjoint call{u.data, params.data, initial.data, mask ? mask->data : nullptr,
                 boundaries.count ? boundaries.data : nullptr, d_hidden.data, d_last.data,
                 every ? d_states.data : nullptr, d_u.back().data, d_params.back().data, d_initial.back().data,
                 sums.data, {}, {}, {steps * apart, apart}, B, heads, steps, W, every, tile, threads};
    memcpy(call.u_strides, u_strides, sizeof u_strides);
    memcpy(call.d_u_strides, d_u_strides, sizeof d_u_strides);
    if (called<T>(&call)) fail("no memory");
  }
  same(d_params[0], d_params[1], "gradients of params depend on threads, or are not written");
  same(d_initial[0], d_initial[1], "gradients of the state depend on threads, or are not written");
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t place = 0; place < heads * steps * GATES * W; ++place) {
      const int64_t w = place % W, g = place / W % GATES, t = place / W / GATES % steps, h = place / W / GATES / steps;
      const int64_t i = b * u_strides[0] + h * u_strides[1] + t * u_strides[2] + g * u_strides[3] + w;
      const float x = value(d_u[0].data + i), y = value(d_u[1].data + i);
      if (x != y && (x == x || y == y)) fail("gradients of u depend on threads, or are not written");
    }
  }
}

}  // namespace fuzz

#elif defined(FUZZ_ELEMENTWISE) || defined(FUZZ_GRADIENTS)

namespace fuzz {

// Rows that are `apart` numbers apart.
inline int64_t rows_of(int64_t rows, int64_t apart, int64_t width) { return (rows - 1) * apart + width; }

#define FUZZ_OF(name) \
  (std::is_same<T, float>::value ? name##_float32 : std::is_same<T, pararnn::Float16>::value ? name##_float16 : name##_bfloat16)

template <typename T>
void one(Input& in) {
  const int which = in.byte() % 6;
  const int64_t width = in.among(1, 70), rows = in.among(1, 40), steps = in.among(1, 80), B = in.among(1, 3);
  const int64_t apart = width + in.among(0, 5), also = width + in.among(0, 5), third = width + in.among(0, 5);
  const int64_t taps = in.among(2, 5);
  const float eps = in.kind == 0 ? 1e-3f : in.number();
  const int threads = in.threads();
  std::vector<Array<T>> halves;
  std::vector<Array<float>> floats;
  std::vector<const void*> given;
  const auto take = [&](int64_t count) {
    halves.push_back(numbers<T>(in, count));
    given.push_back(halves.back().data);
  };
  const auto take_floats = [&](int64_t count) {
    floats.push_back(numbers<float>(in, count));
    given.push_back(floats.back().data);
  };
#if defined(FUZZ_ELEMENTWISE)
  const auto call = [&](auto* function, std::vector<int64_t> size, int64_t count) {
    auto a = rubbish<T>(count, 0xA5), b = rubbish<T>(count, 0x5A);
    if (function(given.data(), a.data, size.data(), &eps, 1)) fail("no memory");
    if (function(given.data(), b.data, size.data(), &eps, threads)) fail("no memory");
    same(a, b, "a result depends on threads, or is not written");
    if (eps > 0) is_number(in, a, "a result is no number");
  };
  if (which == 0) {
    take(rows_of(rows, apart, width)), take(rows_of(rows, also, width));
    call(FUZZ_OF(swiglu), {rows, width, apart, also}, rows * width);
  } else if (which == 1) {
    take(rows_of(rows, apart, width)), take_floats(width);
    call(FUZZ_OF(rms_norm), {rows, width, apart}, rows * width);
  } else if (which == 2) {
    take(rows_of(rows, apart, width)), take(rows_of(rows, also, width)), take_floats(width);
    call(FUZZ_OF(gated_norm), {rows, width, apart, also}, rows * width);
  } else if (which == 3) {
    const int64_t between = rows_of(steps, apart, width) + in.among(0, 3);
    take((B - 1) * between + rows_of(steps, apart, width)), take(B * (taps - 1) * width);
    take_floats(taps * width), take_floats(width);
    call(FUZZ_OF(conv_silu), {B, steps, width, taps, between, apart}, B * steps * width);
  } else {
    const int64_t height = in.among(1, 300);
    take(B * width), take(height * width);
    call(FUZZ_OF(product), {B, width, height}, B * height);
  }
#else
  // counts of the results: of T, and last of float32
  const auto call = [&](auto* function, std::vector<int64_t> size, std::vector<int64_t> of_t,
                        std::vector<int64_t> of_float) {
    std::vector<Array<T>> results[2];
    std::vector<Array<float>> sums[2];
    for (int turn = 0; turn < 2; ++turn) {
      std::vector<void*> out;
      results[turn].reserve(of_t.size()), sums[turn].reserve(of_float.size());
      for (const int64_t count : of_t) {
        results[turn].push_back(rubbish<T>(count, turn ? 0xA5 : 0x5A));
        out.push_back(results[turn].back().data);
      }
      for (const int64_t count : of_float) {
        sums[turn].push_back(rubbish<float>(count, turn ? 0xA5 : 0x5A));
        out.push_back(sums[turn].back().data);
      }
      if (function(given.data(), out.data(), size.data(), &eps, turn ? threads : 1)) fail("no memory");
    }
    for (size_t k = 0; k < of_t.size(); ++k) same(results[0][k], results[1][k], "a gradient depends on threads");
    for (size_t k = 0; k < of_float.size(); ++k) same(sums[0][k], sums[1][k], "a sum depends on threads");
  };
  const int64_t all = rows * width;
  if (which == 0) {
    take(rows_of(rows, apart, width)), take(rows_of(rows, also, width)), take(rows_of(rows, third, width));
    call(FUZZ_OF(swiglu_gradient), {rows, width, apart, also, third}, {all, all}, {});
  } else if (which == 1) {
    take(rows_of(rows, apart, width)), take_floats(width), take(rows_of(rows, also, width));
    call(FUZZ_OF(rms_norm_gradient), {rows, width, apart, also}, {all}, {width});
  } else if (which == 2) {
    take(rows_of(rows, apart, width)), take(rows_of(rows, also, width)), take_floats(width);
    take(rows_of(rows, third, width));
    call(FUZZ_OF(gated_norm_gradient), {rows, width, apart, also, third}, {all, all}, {width});
  } else if (which == 3) {
    const int64_t between = rows_of(steps, apart, width) + in.among(0, 3);
    const int64_t slopes = rows_of(steps, also, width) + in.among(0, 3);
    take((B - 1) * between + rows_of(steps, apart, width)), take(B * (taps - 1) * width);
    take_floats(taps * width), take_floats(width);
    take((B - 1) * slopes + rows_of(steps, also, width)), take(B * (taps - 1) * width);
    call(FUZZ_OF(conv_silu_gradient), {B, steps, width, taps, between, apart, slopes, also},
         {B * steps * width, B * (taps - 1) * width}, {(taps + 1) * width});
  } else {
    Array<int32_t> targets(rows);
    for (int64_t i = 0; i < rows; ++i) targets.data[i] = int32_t(in.among(0, width - 1));
    take(rows_of(rows, apart, width)), given.push_back(targets.data);
    if (which == 4) {
      call(FUZZ_OF(cross_entropy), {rows, width, apart}, {}, {rows, rows, rows});
    } else {
      take_floats(rows), take_floats(rows), take_floats(rows);
      call(FUZZ_OF(cross_entropy_gradient), {rows, width, apart}, {all}, {});
    }
  }
#endif
}

}  // namespace fuzz

#elif defined(FUZZ_TOKEN)

namespace fuzz {

template <typename T>
int called(const pararnn::Token* token) {
  return std::is_same<T, float>::value              ? decode_float32(token)
         : std::is_same<T, pararnn::Float16>::value ? decode_float16(token)
                                                    : decode_bfloat16(token);
}

template <typename T>
pararnn::PackedProducts packed() {
  return std::is_same<T, float>::value              ? packed_float32
         : std::is_same<T, pararnn::Float16>::value ? packed_float16
                                                    : packed_bfloat16;
}

// What a model's arrays are kept in while they are read.
template <typename T>
struct Kept {
  Input& in;
  std::vector<Array<T>> halves;
  std::vector<Array<float>> floats;
  std::vector<Array<uint32_t>> words;

  const void* half(int64_t count) {
    halves.push_back(numbers<T>(in, count));
    return halves.back().data;
  }
  const void* maybe(int64_t count) { return in.coin() ? half(count) : nullptr; }
  const float* whole(int64_t count) {
    floats.push_back(numbers<float>(in, count));
    return floats.back().data;
  }
  // Plain, or packed where its rows are whole groups.
  pararnn::Matrix matrix(int64_t rows, int64_t width) {
    static const int64_t bits_of[] = {2, 3, 4, 5, 6, 8}, groups_of[] = {32, 64, 128};
    const int64_t bits = bits_of[in.byte() % 6], group = groups_of[in.byte() % 3];
    if (width % group || in.coin()) return {half(rows * width), nullptr, nullptr, 0, 0};
    words.emplace_back(rows * (width / 32 * bits), in.byte() % 4);
    auto& packed = words.back();
    const int64_t drawn = packed.count < 512 ? packed.count : 512;
    for (int64_t i = 0; i < drawn; ++i) packed.data[i] = in.word();
    for (int64_t i = drawn; i < packed.count; ++i) packed.data[i] = packed.data[i - drawn];
    const void* scales = half(rows * (width / group));
    return {packed.data, scales, half(rows * (width / group)), bits, group};
  }
};

template <typename T>
void one(Input& in) {
  using namespace pararnn;
  static const int64_t widths[] = {1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 33, 64, 96, 128};
  const int64_t depth = in.among(1, 2), B = in.among(1, 5), W = widths[in.byte() % 14];
  const int64_t heads = W > 64 ? 1 : W > 16 ? in.among(1, 2) : in.among(1, 4), D = heads * W, taps = in.among(2, 4);
  const int64_t wide = in.coin() ? 32 * in.among(1, 4) : in.among(1, 40), vocab = in.among(1, 40), rows = in.among(1, 40);
  const int64_t gates = Cell::GATES * W;
  Kept<T> kept{in, {}, {}, {}};
  kept.halves.reserve(200), kept.floats.reserve(50), kept.words.reserve(50);
  const bool gated = in.coin(), by_ids = in.coin(), with_gate = in.coin(), with_head = in.coin();
  std::vector<Layer> layers(depth);
  for (auto& l : layers) {
    l = Layer{};
    l.norm = kept.half(D), l.norm_bias = kept.maybe(D);
    if (gated) {
      l.in_proj = kept.matrix(2 * D, D);
      l.conv = kept.half(D * taps), l.conv_bias = kept.half(D);
      l.mixer_norm = kept.half(D), l.out_proj = kept.matrix(D, D);
      l.window = kept.half(B * (taps - 1) * D);
    }
    l.cell_proj = kept.matrix(heads * gates, W), l.bias = kept.half(heads * gates);
    l.params = kept.whole(Cell::PARAMS * D), l.residual_scale = kept.maybe(1);
    l.mlp_norm = kept.half(D), l.mlp_norm_bias = kept.maybe(D);
    if (with_gate) l.gate = kept.matrix(wide, D), l.gate_bias = kept.maybe(wide);
    l.up = kept.matrix(wide, D), l.up_bias = kept.maybe(wide);
    l.down = kept.matrix(D, wide), l.down_bias = kept.maybe(D);
    l.state = kept.whole(B * Cell::SLOTS * D);
  }
  Token token{};
  token.packed = packed<T>();
  token.norm = kept.half(D), token.norm_bias = kept.maybe(D);
  Array<int64_t> ids(B);
  for (int64_t b = 0; b < B; ++b) ids.data[b] = in.among(0, rows - 1);
  if (by_ids) {
    token.embedding = kept.matrix(rows, D), token.ids = ids.data;
  } else {
    token.x = kept.half(B * D);
  }
  if (with_head) token.head = kept.matrix(vocab, D);
  token.depth = depth, token.B = B, token.heads = heads, token.W = W, token.taps = gated ? taps : 1;
  token.wide = wide, token.vocab = with_head ? vocab : 0;
  token.eps = in.kind == 0 ? 1e-5f : in.number(), token.mlp_residual = in.coin();
  std::vector<Array<T>> y, logits, windows[2];
  std::vector<Array<float>> states[2];
  for (int turn = 0; turn < 2; ++turn) {
    const int old = turn ? 0xA5 : 0x5A;
    for (auto& l : layers) {
      states[turn].push_back(rubbish<float>(B * Cell::SLOTS * D, old));
      windows[turn].push_back(rubbish<T>(gated ? B * (taps - 1) * D : 0, old));
      l.new_state = states[turn].back().data, l.new_window = windows[turn].back().data;
    }
    y.push_back(rubbish<T>(B * D, old)), logits.push_back(rubbish<T>(B * token.vocab, old));
    token.y = y.back().data, token.logits = logits.back().data, token.layers = layers.data();
    token.threads = turn ? in.threads() : 1;
    if (called<T>(&token)) fail("no memory");
  }
  same(y[0], y[1], "the output depends on threads, or is not written");
  same(logits[0], logits[1], "logits depend on threads, or are not written");
  for (int64_t i = 0; i < depth; ++i) {
    same(states[0][i], states[1][i], "states depend on threads, or are not written");
    same(windows[0][i], windows[1][i], "windows depend on threads, or are not written");
    is_number(in, states[0][i], "a state is no number");
  }
}

}  // namespace fuzz

#endif

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input in{data, data + size};
  const int dtype = in.byte() % 3;
  in.kind = in.byte() % 3;
  for (size_t i = 0; i < size; ++i) in.seed = in.seed * 31 + data[i];
  if (dtype == 0) {
    fuzz::one<float>(in);
  } else if (dtype == 1) {
    fuzz::one<pararnn::Float16>(in);
  } else {
    fuzz::one<pararnn::Bfloat16>(in);
  }
  return 0;
}
