// A vector of floats in place of Metal's float, for the CPU backend (mlx_pararnn/host.py): the cells and
// activations of this folder are compiled with every `float` read as `Vec`, LANES channels at once.
// Plain C++17 for GCC and Clang, any vector unit.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

namespace pararnn {

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Bits __attribute__((vector_size(LANES * 4)));

struct Vec {
  Floats v;
  Vec() = default;
  Vec(Floats all) : v(all) {}
  Vec(float all) : v(all - Floats{}) {}
};

struct Mask {
  Bits lanes;
};

inline Vec operator+(Vec a, Vec b) { return a.v + b.v; }
inline Vec operator-(Vec a, Vec b) { return a.v - b.v; }
inline Vec operator*(Vec a, Vec b) { return a.v * b.v; }
inline Vec operator/(Vec a, Vec b) { return a.v / b.v; }
inline Vec operator-(Vec a) { return -a.v; }
inline Mask operator>(Vec a, Vec b) { return {a.v > b.v}; }
inline Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
inline Mask operator>=(Vec a, Vec b) { return {a.v >= b.v}; }
inline Mask operator<=(Vec a, Vec b) { return {a.v <= b.v}; }
inline Vec choose(Mask condition, Vec a, Vec b) { return condition.lanes ? a.v : b.v; }

}  // namespace pararnn

namespace metal {

using pararnn::Bits;
using pararnn::Floats;
using pararnn::Vec;

inline Vec fabs(Vec x) {
  Bits bits;
  memcpy(&bits, &x, sizeof bits);
  bits &= 0x7fffffff;
  memcpy(&x, &bits, sizeof bits);
  return x;
}

namespace precise {

inline Floats power_of_two(Bits exponent) {
  const Bits bits = (exponent + 127) << 23;
  Floats result;
  memcpy(&result, &bits, sizeof bits);
  return result;
}

// x = k ln 2 + r with |r| <= ln(2) / 2; the series of e^r to its seventh power; 2^k in two factors, so that
// results below the smallest normal number and above the largest number come out as they should.
inline Vec exp(Vec x) {
  x = choose(x < Vec(-104.0f), -104.0f, choose(x > Vec(89.0f), 89.0f, x));
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats k = (x.v * 1.44269504f + ROUND) - ROUND;
  const Floats r = (x.v - k * 0.693145752f) - k * 1.42860677e-6f;
  Floats p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * (r * r) + (r + 1.0f);
  const Bits whole = __builtin_convertvector(k, Bits);
  const Bits half = whole >> 1;
  return p * power_of_two(half) * power_of_two(whole - half);
}

// Near 0 a polynomial in x^2 (fitted to 1e-9, relative), elsewhere by exp.
inline Vec tanh(Vec x) {
  const Vec size = metal::fabs(x);
  const Floats s = x.v * x.v;
  Floats p = s * -0.00627423823f + 0.0210716780f;
  p = p * s - 0.0538523085f;
  p = p * s + 0.133325860f;
  p = p * s - 0.333333164f;
  const Vec far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  return choose(size < 0.55f, x.v + x.v * s * p, choose(x < 0.0f, -far, far));
}

inline Vec log(Vec x) {  // softplus alone needs it
  for (int i = 0; i < LANES; ++i) x.v[i] = std::log(x.v[i]);
  return x;
}

inline Vec sqrt(Vec x) {
  for (int i = 0; i < LANES; ++i) x.v[i] = std::sqrt(x.v[i]);
  return x;
}

}  // namespace precise
}  // namespace metal

namespace pararnn {

// Loads and stores of `count` lanes (the others are 0), from float32, float16 and bfloat16.
struct Bfloat16 {
  uint16_t bits;
};

#ifdef __aarch64__
typedef __fp16 Float16;  // what GCC 12 has there
#else
typedef _Float16 Float16;
#endif

inline Vec load(const float* from, int count) {
  Vec x(0.0f);
  if (count == LANES) {
    memcpy(&x, from, sizeof x);
  } else {
    memcpy(&x, from, count * sizeof(float));
  }
  return x;
}

inline void store(float* to, Vec x, int count) {
  if (count == LANES) {
    memcpy(to, &x, sizeof x);
  } else {
    memcpy(to, &x, count * sizeof(float));
  }
}

typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));

template <typename T>
inline Halves load_halves(const T* from, int count) {
  Halves x{};
  memcpy(&x, from, count == LANES ? sizeof x : count * sizeof(T));
  return x;
}

inline Vec load(const Bfloat16* from, int count) {
  const Words bits = __builtin_convertvector(load_halves(from, count), Words) << 16;
  Vec x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline void store(Bfloat16* to, Vec x, int count) {
  Words bits;
  memcpy(&bits, &x, sizeof bits);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Words nan = (bits >> 16) | 0x40;
  const Halves halves = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded, Halves);
  memcpy(to, &halves, count * sizeof(Bfloat16));
}

inline Vec load(const Float16* from, int count) {
  Float16 halves[LANES] = {};
  memcpy(halves, from, count * sizeof(Float16));
  Vec x;
  for (int i = 0; i < LANES; ++i) x.v[i] = halves[i];
  return x;
}

inline void store(Float16* to, Vec x, int count) {
  for (int i = 0; i < count; ++i) to[i] = static_cast<Float16>(x.v[i]);
}

// Runs work(0) ... work(items - 1) on up to `threads` threads.
template <typename Work>
void in_parallel(int64_t items, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto take = [&] {
    for (int64_t i = next++; i < items; i = next++) work(i);
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads && i < items; ++i) others.emplace_back(take);
  take();
  for (auto& other : others) other.join();
}

}  // namespace pararnn
