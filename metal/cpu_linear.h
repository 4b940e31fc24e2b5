// Matrix-vector products on a CPU, for weights of every dtype; comes after cpu.h. A BLAS has none for halves,
// and MLX asks its BLAS for a product of matrices, which takes twice as long for one row.

namespace pararnn {

constexpr int ROWS_AT_ONCE = 8;  // so many streams from memory hide its latency

// y[k] = sum_i weight[k, i] * x[i] for N rows of `width` numbers.
template <int N, typename T>
inline void dot_products(const T* weight, const float* x, int64_t width, float* y) {
  Vec sums[N];
  for (int k = 0; k < N; ++k) sums[k] = Vec(0.0f);
  const auto add = [&](int64_t i, int lanes) {
    const Vec value = load(x + i, lanes);
    for (int k = 0; k < N; ++k) {
      const T* from = weight + k * width + i;
      __builtin_prefetch(from + N * width, 0, 2);  // of the rows that come next
      sums[k] = sums[k] + load(from, lanes) * value;
    }
  };
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) add(i, LANES);
  if (i < width) add(i, int(width - i));
  for (int k = 0; k < N; ++k) {
    y[k] = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) y[k] += sums[k].v[lane];
  }
}

// y[b, begin ... end) = the rows begin ... end of weight (rows, width) times x[b], for B vectors x that are
// x_stride numbers apart.
template <typename T>
void product_rows(const T* weight,
                  const float* x,
                  int64_t x_stride,
                  int64_t width,
                  int64_t B,
                  float* y,
                  int64_t y_stride,
                  int64_t begin,
                  int64_t end) {
  int64_t row = begin;
  for (; row + ROWS_AT_ONCE <= end; row += ROWS_AT_ONCE) {
    for (int64_t b = 0; b < B; ++b) {
      dot_products<ROWS_AT_ONCE>(weight + row * width, x + b * x_stride, width, y + b * y_stride + row);
    }
  }
  for (; row < end; ++row) {
    for (int64_t b = 0; b < B; ++b) {
      dot_products<1>(weight + row * width, x + b * x_stride, width, y + b * y_stride + row);
    }
  }
}

// out (rows, height) = in (rows, width) times weight^T, weight (height, width); for few rows
template <typename T>
void product(const void* const* in, void* out, const int64_t* size, const float*, int threads) {
  const int64_t rows = size[0], width = size[1], height = size[2];
  std::vector<float> x(rows * width), y(rows * height);
  vectors(rows * width, [&](int64_t i, int n) { store(&x[i], load(static_cast<const T*>(in[0]) + i, n), n); });
  const T* weight = static_cast<const T*>(in[1]);
  constexpr int64_t PIECE = 16 * ROWS_AT_ONCE;
  in_parallel((height + PIECE - 1) / PIECE, threads, [&](int64_t item) {
    const int64_t begin = item * PIECE, end = begin + PIECE < height ? begin + PIECE : height;
    product_rows(weight, x.data(), width, width, rows, y.data(), height, begin, end);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t first = row * height + begin;
      vectors(end - begin,
              [&](int64_t i, int n) { store(static_cast<T*>(out) + first + i, load(&y[first + i], n), n); });
    }
  });
}

}  // namespace pararnn
