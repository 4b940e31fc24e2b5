// What the elementwise work and its gradients share; comes after cpu.h. Arrays of B x T rows of `width` numbers; row
// strides count elements, a row's own numbers are neighbours. Computed in float32.

namespace pararnn {

constexpr int64_t ROWS = 16;  // what a thread takes at a time

inline Vec silu(Vec x) { return x / (1.0f + metal::precise::exp(-x)); }

template <typename Work>
void rows_in_parallel(int64_t rows, int threads, const Work& work) {
  in_parallel((rows + ROWS - 1) / ROWS, threads, [&](int64_t item) {
    const int64_t end = (item + 1) * ROWS < rows ? (item + 1) * ROWS : rows;
    for (int64_t row = item * ROWS; row < end; ++row) work(row);
  });
}

// 1 / sqrt(mean(x^2) + eps) of a row
template <typename T>
inline Vec norm_scale(const T* x, int64_t width, float eps) {
  Vec squares(0.0f);
  vectors(width, [&](int64_t i, int n) {
    const Vec value = load(x + i, n);
    squares = squares + value * value;
  });
  float sum = 0.0f;
  for (int lane = 0; lane < LANES; ++lane) sum += squares.v[lane];
  return 1.0f / std::sqrt(sum / float(width) + eps);
}

}  // namespace pararnn

// name_float32 and the like, as cpu.py calls them; OUT is the type of where the results go.
#define PARARNN_EXPORT(name, dtype, T, OUT)                                                               \
  extern "C" int name##_##dtype(const void* const* in, OUT out, const int64_t* size, const float* number, \
                                int threads) {                                                            \
    return pararnn::status_of([&] { pararnn::name<T>(in, out, size, number, threads); });                 \
  }
