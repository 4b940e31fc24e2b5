// One token through all layers of a model on a CPU, in one call: what costs MLX some forty primitives a layer.
// Comes after cpu.h, cpu_rows.h, cpu_linear.h, cpu_quantized.h, dual.h, activations.h and a cell's text
// (mlx_pararnn/compute/texts.py assembles it, compute/cpu_token.py calls it; mlx_pararnn/model.py has the same in MLX).
// Weights have one dtype T, or are packed in few bits with scales of that dtype, which another library multiplies with
// (cpu_packed.cpp); everything between them is float32.
//
// Every thread owns a range of channels. What needs all channels (a norm) every thread computes for itself; where
// one thread reads what others wrote, all meet.

namespace pararnn {

// One of cpu_packed.cpp's functions.
typedef const void* (*PackedProducts)(int64_t bits, int64_t group);

// A null pointer: this model has no such part. Matrices as nn.Linear has them, one row an output.
#define LAYER_FIELDS(FIELD)                                                     \
  FIELD(const void*, norm) /* (D); with a bias it is LayerNorm, else RMSNorm */ \
  FIELD(const void*, norm_bias)                                                 \
  FIELD(Matrix, in_proj)        /* (2 D, D): main branch, gate */               \
  FIELD(const void*, conv)      /* (D, K) */                                    \
  FIELD(const void*, conv_bias) /* (D) */                                       \
  FIELD(Matrix, cell_proj)      /* (heads, gates * W, W) */                     \
  FIELD(const void*, bias)      /* (heads, gates * W) */                        \
  FIELD(const float*, params)   /* (PARAMS, D) */                               \
  FIELD(const void*, mixer_norm)                                                \
  FIELD(Matrix, out_proj)                                                       \
  FIELD(const void*, residual_scale) /* (1) */                                  \
  FIELD(const void*, mlp_norm)                                                  \
  FIELD(const void*, mlp_norm_bias)                                             \
  FIELD(Matrix, gate)           /* (I, D) */                                    \
  FIELD(const void*, gate_bias) /* (I) */                                       \
  FIELD(Matrix, up)                                                             \
  FIELD(const void*, up_bias)                                                   \
  FIELD(Matrix, down)           /* (D, I) */                                    \
  FIELD(const void*, down_bias) /* (D) */                                       \
  FIELD(const float*, state)    /* (B, SLOTS, D) */                             \
  FIELD(const void*, window)    /* (B, K - 1, D) */                             \
  FIELD(float*, new_state)                                                      \
  FIELD(void*, new_window)
PARARNN_STRUCT(Layer, LAYER_FIELDS)

#define TOKEN_FIELDS(FIELD)                                       \
  FIELD(const Layer*, layers)                                     \
  FIELD(PackedProducts, packed) /* null: no matrix is packed */   \
  FIELD(const void*, norm)                                        \
  FIELD(const void*, norm_bias)                                   \
  FIELD(Matrix, embedding)   /* (V, D): x is rows of it */        \
  FIELD(const int64_t*, ids) /* (B): which */                     \
  FIELD(const void*, x)      /* (B, D), if ids is null */         \
  FIELD(void*, y)            /* (B, D): the last norm's output */ \
  FIELD(Matrix, head)        /* (vocab, D) */                     \
  FIELD(void*, logits)       /* (B, vocab) */                     \
  FIELD(int64_t, depth)                                           \
  FIELD(int64_t, B)                                               \
  FIELD(int64_t, heads)                                           \
  FIELD(int64_t, W)                                               \
  FIELD(int64_t, taps)                                            \
  FIELD(int64_t, wide) /* I, the width of the MLP */              \
  FIELD(int64_t, vocab)                                           \
  FIELD(float, eps)                                               \
  FIELD(int, mlp_residual)                                        \
  FIELD(int, threads)
PARARNN_STRUCT(Token, TOKEN_FIELDS)

template <typename T>
void layer_norm(const float* x, const T* weight, const T* bias, int64_t width, float eps, float* y) {
  float sum = 0.0f, squares = 0.0f;
  for (int64_t i = 0; i < width; ++i) sum += x[i];
  const float mean = sum / float(width);
  for (int64_t i = 0; i < width; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const Vec scale = 1.0f / std::sqrt(squares / float(width) + eps);
  vectors(width, [&](int64_t i, int n) {
    store(y + i, (load(x + i, n) - mean) * scale * load(weight + i, n) + load(bias + i, n), n);
  });
}

template <typename T>
void norm_of(const float* x, const void* weight, const void* bias, int64_t width, float eps, float* y) {
  const T* w = static_cast<const T*>(weight);
  if (bias) return layer_norm(x, w, static_cast<const T*>(bias), width, eps, y);
  const Vec scale = norm_scale(x, width, eps);
  vectors(width, [&](int64_t i, int n) { store(y + i, load(x + i, n) * scale * load(w + i, n), n); });
}

// y[b, begin ... end) += bias
template <typename T>
void add_bias(const void* bias, float* y, int64_t stride, int64_t B, int64_t begin, int64_t end) {
  if (!bias) return;
  for (int64_t b = 0; b < B; ++b) {
    vectors(end - begin, [&](int64_t i, int n) {
      float* to = y + b * stride + begin + i;
      store(to, load(to, n) + load(static_cast<const T*>(bias) + begin + i, n), n);
    });
  }
}

// What one thread does; `meet` returns when all threads have called it.
template <typename T>
class Decoder {
 public:
  Decoder(const Token& token, float* shared, int member, int members)
      : t(token),
        D(token.heads * token.W),
        B(token.B),
        x(shared),
        gate(x + B * D),
        input(gate + B * D),
        u(input + B * D),
        hidden(u + B * Cell::GATES * D),
        mid(hidden + B * D),
        mine(B * (D + t.wide)) {
    const auto share = [&](int64_t width, int64_t i) {
      return i == members ? width : width / LANES * i / members * LANES;
    };
    begin = share(D, member), end = share(D, member + 1);
    wide_begin = share(t.wide, member), wide_end = share(t.wide, member + 1);
    vocab_begin = share(t.vocab, member), vocab_end = share(t.vocab, member + 1);
  }

  static int64_t shared_size(const Token& t) { return t.B * ((4 + Cell::GATES) * t.heads * t.W + t.wide); }

  template <typename Meet>
  void run(const Meet& meet) {
    for (int64_t b = 0; b < B; ++b) {
      own([&](int64_t i, int n) { store(x + b * D + i, given(b, i, n), n); });
    }
    meet();
    for (int64_t i = 0; i < t.depth; ++i) layer(t.layers[i], meet);
    norms(x, t.norm, t.norm_bias);
    for (int64_t b = 0; b < B; ++b) {
      own([&](int64_t i, int n) { store(static_cast<T*>(t.y) + b * D + i, load(&mine[b * D + i], n), n); });
    }
    if (t.head.weight) logits(meet);
  }

 private:
  const Token& t;
  const int64_t D, B;
  float *x, *gate, *input, *u, *hidden, *mid;  // all threads'
  std::vector<float> mine, arranged, scores;
  int64_t begin, end, wide_begin, wide_end, vocab_begin, vocab_end;

  static const T* at(const void* pointer) { return static_cast<const T*>(pointer); }

  template <typename Work>
  void own(const Work& work) {
    vectors(end - begin, [&](int64_t i, int n) { work(begin + i, n); });
  }

  void norms(const float* from, const void* weight, const void* bias) {
    for (int64_t b = 0; b < B; ++b) norm_of<T>(from + b * D, weight, bias, D, t.eps, &mine[b * D]);
  }

  // What the first layer reads.
  Vec given(int64_t b, int64_t i, int n) {
    if (!t.ids) return load(at(t.x) + b * D + i, n);
    if (!t.embedding.bits) return load(at(t.embedding.weight) + t.ids[b] * D + i, n);
    Vec y(0.0f);
    for (int lane = 0; lane < n; ++lane) y.v[lane] = unpacked<T>(t.embedding, D, t.ids[b], i + lane);
    return y;
  }

  // y[b * stride + begin ... end) = rows of the matrix, `row` being the one for y[0], times x[b]
  struct Product {
    const Matrix* matrix;
    int64_t row;
    float* y;
    int64_t stride, begin, end;
  };

  // Several products with the same B vectors of `width` numbers that are x_stride numbers apart.
  template <int N>
  void multiply(const float* from, int64_t x_stride, int64_t width, const Product (&products)[N]) {
    const PackedProduct<T>* arranged_for = nullptr;
    int64_t stride = 0;
    for (const Product& p : products) {
      if (!p.matrix->bits) {
        const T* rows = at(p.matrix->weight) + p.row * width;
        product_rows(rows, from, x_stride, width, B, p.y, p.stride, p.begin, p.end);
        continue;
      }
      const auto* packed = static_cast<const PackedProduct<T>*>(t.packed(p.matrix->bits, p.matrix->group));
      if (packed != arranged_for) {
        stride = packed->arranged_size(width);
        arranged.resize(B * stride);
        for (int64_t b = 0; b < B; ++b) packed->arrange(from + b * x_stride, width, &arranged[b * stride]);
        arranged_for = packed;
      }
      packed->product_rows(*p.matrix, p.row, arranged.data(), stride, width, B, p.y, p.stride, p.begin, p.end);
    }
  }

  template <typename Meet>
  void layer(const Layer& l, const Meet& meet) {
    norms(x, l.norm, l.norm_bias);
    if (l.in_proj.weight) {
      multiply(mine.data(), D, D,
               {{&l.in_proj, 0, hidden, D, begin, end}, {&l.in_proj, D, gate, D, begin, end}});
      convolve(l);
      meet();
    }
    step(l, l.in_proj.weight ? input : mine.data());
    meet();
    float* mixed = hidden;
    if (l.out_proj.weight) {
      norms(hidden, l.mixer_norm, nullptr);
      for (int64_t b = 0; b < B; ++b) {
        vectors(D, [&](int64_t i, int n) {
          float* y = &mine[b * D + i];
          store(y, load(y, n) * silu(load(gate + b * D + i, n)), n);
        });
      }
      mixed = u;  // of no more use
      multiply(mine.data(), D, D, {{&l.out_proj, 0, mixed, D, begin, end}});
    }
    const Vec scale = l.residual_scale ? load(at(l.residual_scale), 1).v[0] : 1.0f;
    for (int64_t b = 0; b < B; ++b) {
      own([&](int64_t i, int n) {
        float* to = x + b * D + i;
        store(to, load(mixed + b * D + i, n) + scale * load(to, n), n);
      });
    }
    meet();
    norms(x, l.mlp_norm, l.mlp_norm_bias);
    float* y = &mine[B * D];
    const Product up{&l.up, 0, mid, t.wide, wide_begin, wide_end};
    if (l.gate.weight) {
      multiply(mine.data(), D, D, {up, {&l.gate, 0, y, t.wide, wide_begin, wide_end}});
    } else {
      multiply(mine.data(), D, D, {up});
    }
    add_bias<T>(l.up_bias, mid, t.wide, B, wide_begin, wide_end);
    if (l.gate.weight) {
      add_bias<T>(l.gate_bias, y, t.wide, B, wide_begin, wide_end);
    }
    for (int64_t b = 0; b < B; ++b) {
      float* to = mid + b * t.wide;
      if (l.gate.weight) {
        const float* from = y + b * t.wide;
        vectors(wide_end - wide_begin, [&](int64_t i, int n) {
          store(to + wide_begin + i, silu(load(from + wide_begin + i, n)) * load(to + wide_begin + i, n), n);
        });
      } else {  // the exact GELU
        for (int64_t i = wide_begin; i < wide_end; ++i) to[i] *= 0.5f * (1.0f + std::erf(to[i] * 0.707106781f));
      }
    }
    meet();
    multiply(mid, t.wide, t.wide, {{&l.down, 0, hidden, D, begin, end}});
    add_bias<T>(l.down_bias, hidden, D, B, begin, end);
    for (int64_t b = 0; b < B; ++b) {
      own([&](int64_t i, int n) {
        float* to = x + b * D + i;
        const Vec added = load(hidden + b * D + i, n);
        store(to, t.mlp_residual ? load(to, n) + added : added, n);
      });
    }
    meet();
  }

  // The head reads what it would read if it were called alone: y, rounded to T.
  template <typename Meet>
  void logits(const Meet& meet) {
    meet();
    vectors(B * D, [&](int64_t i, int n) { store(&mine[i], load(at(t.y) + i, n), n); });
    const int64_t rows = vocab_end - vocab_begin;
    scores.resize(B * rows);
    multiply(mine.data(), D, D, {{&t.head, vocab_begin, scores.data(), rows, 0, rows}});
    for (int64_t b = 0; b < B; ++b) {
      T* to = static_cast<T*>(t.logits) + b * t.vocab + vocab_begin;
      vectors(rows, [&](int64_t i, int n) { store(to + i, load(&scores[b * rows + i], n), n); });
    }
  }

  // The causal convolution and SiLU of what in_proj left in `hidden`, into `input`.
  void convolve(const Layer& l) {
    const int64_t K = t.taps;
    for (int64_t b = 0; b < B; ++b) {
      const T* window = at(l.window) + b * (K - 1) * D;
      T* moved = static_cast<T*>(l.new_window) + b * (K - 1) * D;
      own([&](int64_t i, int n) {
        Vec y = load(at(l.conv_bias) + i, n);
        for (int64_t k = 0; k < K; ++k) {
          T weight[LANES] = {};
          for (int lane = 0; lane < n; ++lane) weight[lane] = at(l.conv)[(i + lane) * K + k];
          const Vec tap = k < K - 1 ? load(window + k * D + i, n) : load(hidden + b * D + i, n);
          y = y + load(weight, LANES) * tap;
          if (k > 0) store(moved + (k - 1) * D + i, tap, n);
        }
        store(input + b * D + i, silu(y), n);
      });
    }
  }

  // Input projection, bias and the cell's step for this thread's channels, into `hidden`.
  void step(const Layer& l, const float* from) {
    constexpr int SLOTS = Cell::SLOTS, GATES = Cell::GATES, PARAMS = Cell::PARAMS;
    const int64_t W = t.W;
    for (int64_t head = begin / W; head * W < end; ++head) {
      const int64_t first = std::max(begin, head * W), last = std::min(end, (head + 1) * W);
      Product gates[GATES];
      for (int g = 0; g < GATES; ++g) {
        const int64_t row = (head * GATES + g) * W - head * W;  // of the head's channel 0, less that channel
        gates[g] = {&l.cell_proj, row, u + g * D, GATES * D, first, last};
      }
      multiply(from + head * W, D, W, gates);
      for (int g = 0; g < GATES; ++g) {
        add_bias<T>(at(l.bias) + gates[g].row, gates[g].y, GATES * D, B, first, last);
      }
    }
    for (int64_t b = 0; b < B; ++b) {
      own([&](int64_t i, int n) {
        Vec w[PARAMS], gates[GATES], state[SLOTS];
        for (int p = 0; p < PARAMS; ++p) w[p] = load(l.params + p * D + i, n);
        for (int g = 0; g < GATES; ++g) gates[g] = load(u + (b * GATES + g) * D + i, n);
        for (int s = 0; s < SLOTS; ++s) state[s] = load(l.state + (b * SLOTS + s) * D + i, n);
        Cell::step(state, gates, w);
        for (int s = 0; s < SLOTS; ++s) store(l.new_state + (b * SLOTS + s) * D + i, state[s], n);
        store(hidden + b * D + i, state[Cell::OUTPUT], n);
      });
    }
  }
};

template <typename T>
void decode(const Token& token) {
  std::vector<float> shared(Decoder<T>::shared_size(token));
  together(token.threads, [&](int member, int members, const auto& meet) {
    Decoder<T>(token, shared.data(), member, members).run(meet);
  });
}

}  // namespace pararnn

#define PARARNN_EXPORT_DECODE(name, T)                              \
  extern "C" int decode_##name(const pararnn::Token* token) {       \
    return pararnn::status_of([=] { pararnn::decode<T>(*token); }); \
  }
PARARNN_DTYPES(PARARNN_EXPORT_DECODE)
