// The gradients of the elementwise work around the recurrence, and the cross entropy with its own, on a CPU; comes
// after cpu.h and cpu_rows.h. cpu_elementwise.cpp has what is differentiated. `slope` is the loss's derivative by an
// output; weights, and sums over rows, which are their gradients, are float32.

namespace pararnn {

constexpr int64_t BLOCK = 64;  // rows whose sum one thread makes

// Runs work(block, sums) for every block; then total[i] is the sum over blocks of sums[i], added up in the order of
// the blocks: the same bits whatever the number of threads.
template <typename Work>
void sum_of_blocks(int64_t blocks, int64_t width, void* total, int threads, const Work& work) {
  std::vector<float> sums(blocks * width, 0.0f);
  in_parallel(blocks, threads, [&](int64_t block) { work(block, &sums[block * width]); });
  constexpr int64_t PIECE = 1024;
  in_parallel((width + PIECE - 1) / PIECE, threads, [&](int64_t piece) {
    const int64_t begin = piece * PIECE, end = begin + PIECE < width ? begin + PIECE : width;
    vectors(end - begin, [&](int64_t i, int n) {
      Vec sum(0.0f);
      for (int64_t block = 0; block < blocks; ++block) sum = sum + load(&sums[block * width + begin + i], n);
      store(static_cast<float*>(total) + begin + i, sum, n);
    });
  });
}

// *to += what
inline void add(float* to, Vec what, int count) { store(to, load(to, count) + what, count); }

inline float total(Vec x) {
  float sum = 0.0f;
  for (int lane = 0; lane < LANES; ++lane) sum += x.v[lane];
  return sum;
}

struct SiluAt {
  Vec value, slope;
};

inline SiluAt silu_at(Vec x) {
  const Vec s = 1.0f / (1.0f + metal::precise::exp(-x)), y = x * s;
  return {y, s + y * (1.0f - s)};
}

// in: gate, up, slope; out: the gradients of gate and up
template <typename T>
void swiglu_gradient(const void* const* in, void* const* out, const int64_t* size, const float*, int threads) {
  const int64_t rows = size[0], width = size[1];
  rows_in_parallel(rows, threads, [&](int64_t row) {
    const T* gate = static_cast<const T*>(in[0]) + row * size[2];
    const T* up = static_cast<const T*>(in[1]) + row * size[3];
    const T* slope = static_cast<const T*>(in[2]) + row * size[4];
    T* to_gate = static_cast<T*>(out[0]) + row * width;
    T* to_up = static_cast<T*>(out[1]) + row * width;
    vectors(width, [&](int64_t i, int n) {
      const SiluAt at = silu_at(load(gate + i, n));
      const Vec dy = load(slope + i, n);
      store(to_gate + i, dy * load(up + i, n) * at.slope, n);
      store(to_up + i, dy * at.value, n);
    });
  });
}

// y = x * s * weight with s = 1 / sqrt(mean(x^2) + eps), so that
// dx = s * (slope * weight) - x * s^3 * mean(slope * weight * x), and dweight = sum over rows of slope * x * s.
// With a gate, y is multiplied by silu(gate).
template <typename T, bool GATED>
void norm_gradient(const T* x,
                   int64_t x_stride,
                   const T* gate,
                   int64_t gate_stride,
                   const float* weight,
                   const T* slope,
                   int64_t slope_stride,
                   T* to_x,
                   T* to_gate,
                   void* to_weight,
                   int64_t rows,
                   int64_t width,
                   float eps,
                   int threads) {
  sum_of_blocks((rows + BLOCK - 1) / BLOCK, width, to_weight, threads, [&](int64_t block, float* sums) {
    std::vector<float> weighted(width);  // a row's slope * weight
    const int64_t end = (block + 1) * BLOCK < rows ? (block + 1) * BLOCK : rows;
    for (int64_t row = block * BLOCK; row < end; ++row) {
      const T* from = x + row * x_stride;
      const Vec scale = norm_scale(from, width, eps);
      Vec products(0.0f);
      vectors(width, [&](int64_t i, int n) {
        const Vec value = load(from + i, n), w = load(weight + i, n);
        Vec dy = load(slope + row * slope_stride + i, n);
        if (GATED) {
          const SiluAt at = silu_at(load(gate + row * gate_stride + i, n));
          store(to_gate + row * width + i, dy * (value * scale * w) * at.slope, n);
          dy = dy * at.value;
        }
        add(sums + i, dy * (value * scale), n);
        dy = dy * w;
        store(&weighted[i], dy, n);
        products = products + dy * value;
      });
      const Vec shift = scale * scale * scale * Vec(total(products) / float(width));
      vectors(width, [&](int64_t i, int n) {
        store(to_x + row * width + i, load(&weighted[i], n) * scale - load(from + i, n) * shift, n);
      });
    }
  });
}

// in: x, weight, slope; out: the gradients of x and weight
template <typename T>
void rms_norm_gradient(
    const void* const* in, void* const* out, const int64_t* size, const float* eps, int threads) {
  norm_gradient<T, false>(static_cast<const T*>(in[0]), size[2], nullptr, 0, static_cast<const float*>(in[1]),
                          static_cast<const T*>(in[2]), size[3], static_cast<T*>(out[0]), nullptr, out[1],
                          size[0], size[1], eps[0], threads);
}

// in: hidden, gate, weight, slope; out: the gradients of hidden, gate and weight
template <typename T>
void gated_norm_gradient(
    const void* const* in, void* const* out, const int64_t* size, const float* eps, int threads) {
  norm_gradient<T, true>(static_cast<const T*>(in[0]), size[2], static_cast<const T*>(in[1]), size[3],
                         static_cast<const float*>(in[2]), static_cast<const T*>(in[3]), size[4],
                         static_cast<T*>(out[0]), static_cast<T*>(out[1]), out[2], size[0], size[1], eps[0],
                         threads);
}

// in: x, window, weight (K, width), bias, the slopes of y and of the new window;
// out: the gradients of x, of the window, and (K + 1, width), of the weight and in the last row of the bias.
// Places count the inputs from the window's first: step t reads the places t ... t + K - 1.
template <typename T, int TAPS>
void conv_gradient_of_taps(const void* const* in, void* const* out, const int64_t* size, int threads) {
  const int64_t B = size[0], steps = size[1], width = size[2], K = TAPS ? TAPS : size[3];
  const int64_t blocks = (steps + BLOCK - 1) / BLOCK;
  const float* weight = static_cast<const float*>(in[2]);
  const float* bias = static_cast<const float*>(in[3]);
  sum_of_blocks(B * blocks, (K + 1) * width, out[2], threads, [&](int64_t item, float* sums) {
    const int64_t b = item / blocks, begin = item % blocks * BLOCK;
    const int64_t end = begin + BLOCK < steps ? begin + BLOCK : steps;
    const T* x = static_cast<const T*>(in[0]) + b * size[4];
    const T* window = static_cast<const T*>(in[1]) + b * (K - 1) * width;
    const T* slope = static_cast<const T*>(in[4]) + b * size[6];
    const T* window_slope = static_cast<const T*>(in[5]) + b * (K - 1) * width;
    T* to_x = static_cast<T*>(out[0]) + b * steps * width;
    T* to_window = static_cast<T*>(out[1]) + b * (K - 1) * width;
    std::vector<float> newest(K * width, 0.0f);  // the slope before SiLU of step t, at t % K
    // What a place is given comes from the K steps up to it, those of the block before among them.
    const int64_t last = end == steps ? steps + K - 1 : end;
    for (int64_t t = begin < K ? 0 : begin - K + 1; t < last; ++t) {
      T* to = t < K - 1 ? to_window + t * width : to_x + (t - K + 1) * width;
      vectors(width, [&](int64_t i, int n) {
        const auto input = [&](int64_t place) {
          return load(place < K - 1 ? window + place * width + i : x + (place - K + 1) * size[5] + i, n);
        };
        Vec dz(0.0f), given(0.0f);
        if (t < steps) {
          Vec z = load(bias + i, n);
          for (int64_t k = 0; k < K; ++k) z = z + load(weight + k * width + i, n) * input(t + k);
          dz = load(slope + t * size[7] + i, n) * silu_at(z).slope;
        } else {
          given = load(window_slope + (t - steps) * width + i, n);
        }
        store(&newest[t % K * width + i], dz, n);
        if (t < begin) return;
        if (t < steps) {
          for (int64_t k = 0; k < K; ++k) add(sums + k * width + i, dz * input(t + k), n);
          add(sums + K * width + i, dz, n);
        }
        for (int64_t k = 0; k < K; ++k) {
          given = given + load(weight + k * width + i, n) * load(&newest[(t + K - k) % K * width + i], n);
        }
        store(to + i, given, n);
      });
    }
  });
}

template <typename T>
void conv_silu_gradient(
    const void* const* in, void* const* out, const int64_t* size, const float*, int threads) {
  if (size[3] == 4) {
    conv_gradient_of_taps<T, 4>(in, out, size, threads);
  } else {
    conv_gradient_of_taps<T, 0>(in, out, size, threads);
  }
}

// in: logits, targets (int32, each below the width); out: a row's -log(softmax(logits)[target]), and what softmax
// takes: the row's largest logit, and the sum of exp(logit - largest)
template <typename T>
void cross_entropy(const void* const* in, void* const* out, const int64_t* size, const float*, int threads) {
  const int64_t rows = size[0], width = size[1];
  rows_in_parallel(rows, threads, [&](int64_t row) {
    const T* logits = static_cast<const T*>(in[0]) + row * size[2];
    const auto lane = [&](int64_t i) { return load(logits + i, 1).v[0]; };
    const int64_t whole = width - width % LANES;
    Vec tops(lane(0));
    for (int64_t i = 0; i < whole; i += LANES) {
      const Vec x = load(logits + i, LANES);
      tops = choose(x > tops, x, tops);
    }
    float top = tops.v[0];
    for (int k = 1; k < LANES; ++k) top = tops.v[k] > top ? tops.v[k] : top;
    for (int64_t i = whole; i < width; ++i) top = lane(i) > top ? lane(i) : top;
    Vec sums(0.0f);
    for (int64_t i = 0; i < whole; i += LANES) {
      sums = sums + metal::precise::exp(load(logits + i, LANES) - top);
    }
    float sum = total(sums);
    for (int64_t i = whole; i < width; ++i) sum += metal::precise::exp(lane(i) - top).v[0];
    static_cast<float*>(out[0])[row] = std::log(sum) - (lane(static_cast<const int32_t*>(in[1])[row]) - top);
    static_cast<float*>(out[1])[row] = top;
    static_cast<float*>(out[2])[row] = sum;
  });
}

// in: logits, targets, the largest logits and the sums of cross_entropy, the losses' slopes; out: the gradient of the
// logits
template <typename T>
void cross_entropy_gradient(
    const void* const* in, void* const* out, const int64_t* size, const float*, int threads) {
  const int64_t rows = size[0], width = size[1];
  rows_in_parallel(rows, threads, [&](int64_t row) {
    const T* logits = static_cast<const T*>(in[0]) + row * size[2];
    const int64_t target = static_cast<const int32_t*>(in[1])[row];
    const float top = static_cast<const float*>(in[2])[row], slope = static_cast<const float*>(in[4])[row];
    const float scale = slope / static_cast<const float*>(in[3])[row];
    T* to = static_cast<T*>(out[0]) + row * width;
    vectors(width, [&](int64_t i, int n) {
      store(to + i, metal::precise::exp(load(logits + i, n) - top) * scale, n);
    });
    store(to + target, metal::precise::exp(load(logits + target, 1) - top) * scale - slope, 1);
  });
}

}  // namespace pararnn

#define PARARNN_EXPORT_EACH(dtype, T)                         \
  PARARNN_EXPORT(swiglu_gradient, dtype, T, void* const*)     \
  PARARNN_EXPORT(rms_norm_gradient, dtype, T, void* const*)   \
  PARARNN_EXPORT(gated_norm_gradient, dtype, T, void* const*) \
  PARARNN_EXPORT(conv_silu_gradient, dtype, T, void* const*)  \
  PARARNN_EXPORT(cross_entropy, dtype, T, void* const*)       \
  PARARNN_EXPORT(cross_entropy_gradient, dtype, T, void* const*)
PARARNN_DTYPES(PARARNN_EXPORT_EACH)
