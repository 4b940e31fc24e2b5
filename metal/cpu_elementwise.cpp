// The elementwise work around the recurrence on a CPU; comes after cpu.h, cpu_rows.h and cpu_linear.h, whose product
// it exports too. mlx_pararnn/compute/layer_ops.py has the same in MLX's ops; cpu_gradients.cpp has the gradients.

namespace pararnn {

// out = silu(gate) * up
template <typename T>
void swiglu(const void* const* in, void* out, const int64_t* size, const float*, int threads) {
  const int64_t rows = size[0], width = size[1], gate_stride = size[2], up_stride = size[3];
  rows_in_parallel(rows, threads, [&](int64_t row) {
    const T* gate = static_cast<const T*>(in[0]) + row * gate_stride;
    const T* up = static_cast<const T*>(in[1]) + row * up_stride;
    T* to = static_cast<T*>(out) + row * width;
    vectors(width, [&](int64_t i, int n) { store(to + i, silu(load(gate + i, n)) * load(up + i, n), n); });
  });
}

// out = x / sqrt(mean(x^2) + eps) * weight; weight in float32
template <typename T>
void rms_norm(const void* const* in, void* out, const int64_t* size, const float* eps, int threads) {
  const int64_t rows = size[0], width = size[1], stride = size[2];
  const float* weight = static_cast<const float*>(in[1]);
  rows_in_parallel(rows, threads, [&](int64_t row) {
    const T* x = static_cast<const T*>(in[0]) + row * stride;
    T* to = static_cast<T*>(out) + row * width;
    const Vec scale = norm_scale(x, width, eps[0]);
    vectors(width, [&](int64_t i, int n) { store(to + i, load(x + i, n) * scale * load(weight + i, n), n); });
  });
}

// out = rms_norm(hidden) * silu(gate); weight in float32
template <typename T>
void gated_norm(const void* const* in, void* out, const int64_t* size, const float* eps, int threads) {
  const int64_t rows = size[0], width = size[1], hidden_stride = size[2], gate_stride = size[3];
  const float* weight = static_cast<const float*>(in[2]);
  rows_in_parallel(rows, threads, [&](int64_t row) {
    const T* hidden = static_cast<const T*>(in[0]) + row * hidden_stride;
    const T* gate = static_cast<const T*>(in[1]) + row * gate_stride;
    T* to = static_cast<T*>(out) + row * width;
    const Vec scale = norm_scale(hidden, width, eps[0]);
    vectors(width, [&](int64_t i, int n) {
      store(to + i, load(hidden + i, n) * scale * load(weight + i, n) * silu(load(gate + i, n)), n);
    });
  });
}

// out = silu(bias + sum_k weight_k * input_{t - K + 1 + k}), where the K - 1 inputs before the first are the
// window's; weight (K, width) and bias in float32.
template <typename T, int TAPS>
void conv_of_taps(const void* const* in, void* out, const int64_t* size, int threads) {
  const int64_t B = size[0], steps = size[1], width = size[2], K = TAPS ? TAPS : size[3];
  const int64_t x_batch_stride = size[4], x_stride = size[5];
  const float* weight = static_cast<const float*>(in[2]);
  const float* bias = static_cast<const float*>(in[3]);
  rows_in_parallel(B * steps, threads, [&](int64_t row) {
    const int64_t b = row / steps, t = row % steps;
    const T* x = static_cast<const T*>(in[0]) + b * x_batch_stride;
    const T* window = static_cast<const T*>(in[1]) + b * (K - 1) * width;
    T* to = static_cast<T*>(out) + row * width;
    vectors(width, [&](int64_t i, int n) {
      Vec y = load(bias + i, n);
      for (int64_t k = 0; k < K; ++k) {
        const int64_t place = t + k;  // among window and x in a row
        const T* from = place < K - 1 ? window + place * width : x + (place - K + 1) * x_stride;
        y = y + load(weight + k * width + i, n) * load(from + i, n);
      }
      store(to + i, silu(y), n);
    });
  });
}

template <typename T>
void conv_silu(const void* const* in, void* out, const int64_t* size, const float*, int threads) {
  if (size[3] == 4) {  // what models have; the compiler unrolls it
    conv_of_taps<T, 4>(in, out, size, threads);
  } else {
    conv_of_taps<T, 0>(in, out, size, threads);
  }
}

}  // namespace pararnn

#define PARARNN_EXPORT_EACH(dtype, T)         \
  PARARNN_EXPORT(swiglu, dtype, T, void*)     \
  PARARNN_EXPORT(rms_norm, dtype, T, void*)   \
  PARARNN_EXPORT(gated_norm, dtype, T, void*) \
  PARARNN_EXPORT(conv_silu, dtype, T, void*)  \
  PARARNN_EXPORT(product, dtype, T, void*)
PARARNN_DTYPES(PARARNN_EXPORT_EACH)
