// A vector of floats in place of Metal's float, for the CPU backend (mlx_pararnn/compute/cpu.py): the cells and
// activations of this folder are compiled with every `float` read as `Vec`, LANES channels at once.
// Plain C++17 for GCC and Clang, any vector unit.

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <new>
#include <thread>
#include <vector>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

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

// A struct that Python fills, and beside it the table by which Python checks its own when a library is loaded
// (compute/cpu_build.py). FIELDS(F) lists the fields as F(type, name); the last entry has the struct's size.
struct LayoutEntry {
  const char* name;
  int64_t offset, size;
};
#define PARARNN_FIELD(type, name) type name;
#define PARARNN_LAYOUT_ENTRY(type, name) {#name, offsetof(Described, name), sizeof(Described::name)},
#define PARARNN_STRUCT(Struct, FIELDS)                                                              \
  struct Struct {                                                                                   \
    FIELDS(PARARNN_FIELD)                                                                           \
  };                                                                                                \
  extern "C" const LayoutEntry* pararnn_layout_##Struct() {                                         \
    typedef Struct Described;                                                                       \
    static const LayoutEntry all[] = {FIELDS(PARARNN_LAYOUT_ENTRY){nullptr, 0, sizeof(Described)}}; \
    return all;                                                                                     \
  }

// EXPORT(name, type) for each dtype that a library has functions of; compute/texts.py may say which one.
#ifndef PARARNN_DTYPES
#define PARARNN_DTYPES(EXPORT) \
  EXPORT(float32, float) EXPORT(float16, pararnn::Float16) EXPORT(bfloat16, pararnn::Bfloat16)
#endif

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

// x = k ln 2 + r with |r| <= ln(2) / 2; e^r by a polynomial (fitted to 5e-9, relative); 2^k as 2 * 2^(k - 1), so
// that what is above the largest number becomes infinite. What is about the smallest normal number or less
// becomes 0.
inline Vec exp(Vec x) {
  x = choose(x < Vec(-87.0f), -87.0f, choose(x > Vec(89.0f), 89.0f, x));
  // Adding 1.5 * 2^23 rounds to a whole number, which is then the sum's last bits; with 126 more they are the
  // exponent of 2^(k - 1).
  constexpr float ROUND = 12582912.0f + 126.0f;
  const Floats sum = x.v * 1.44269504f + ROUND;
  const Floats k = sum - ROUND;
  Bits half;
  memcpy(&half, &sum, sizeof half);
  half <<= 23;
  Floats scale;
  memcpy(&scale, &half, sizeof scale);
  const Floats r = (x.v - k * 0.693145752f) - k * 1.42860677e-6f;
  Floats p = r * 0.00138144672f + 0.00836878084f;
  p = p * r + 0.0416683927f;
  p = p * r + 0.166665196f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + (r + 1.0f);
  return (p + p) * scale;
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

// Loads and stores of `count` lanes (the others are 0), from float32, float16 and bfloat16. The halves are converted
// by their bits where no instruction does it: GCC before 12 and Clang before 15 have no such type on every machine.
struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));

// Whether an instruction loads and stores some lanes; GCC's sanitizer would not see where these are.
#if LANES == 16 && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(__SANITIZE_ADDRESS__)
#define PARARNN_MASKS 1
#else
#define PARARNN_MASKS 0
#endif

// The first `count` lanes, the others 0. Whole vectors have a path of their own: a memcpy of any size is a call.
template <typename Lanes, typename T>
inline Lanes load_lanes(const T* from, int count) {
  Lanes x{};
  if (count == LANES) {
    memcpy(&x, from, sizeof x);
    return x;
  }
#if PARARNN_MASKS
  const __mmask16 some = __mmask16((1u << count) - 1);
  if constexpr (sizeof(T) == 4) return (Lanes)_mm512_maskz_loadu_epi32(some, from);
  if constexpr (sizeof(T) == 2) return (Lanes)_mm256_maskz_loadu_epi16(some, from);
#endif
  memcpy(&x, from, count * sizeof(T));
  return x;
}

template <typename Lanes, typename T>
inline void store_lanes(T* to, Lanes x, int count) {
  if (count == LANES) {
    memcpy(to, &x, sizeof x);
    return;
  }
#if PARARNN_MASKS
  const __mmask16 some = __mmask16((1u << count) - 1);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(to, some, (__m512i)x);
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(to, some, (__m256i)x);
#else
  memcpy(to, &x, count * sizeof(T));
#endif
}

inline Vec load(const float* from, int count) { return load_lanes<Floats>(from, count); }

inline void store(float* to, Vec x, int count) { store_lanes(to, x.v, count); }

inline Vec load(const Bfloat16* from, int count) {
  const Words bits = __builtin_convertvector(load_lanes<Halves>(from, count), Words) << 16;
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
  store_lanes(to, halves, count);
}

inline Vec load(const Float16* from, int count) {
#if LANES == 16 && defined(__AVX512F__)
  return Floats(_mm512_cvtph_ps((__m256i)load_lanes<Halves>(from, count)));
#elif LANES == 8 && defined(__F16C__)
  return Floats(_mm256_cvtph_ps((__m128i)load_lanes<Halves>(from, count)));
#elif LANES == 4 && defined(__aarch64__)
  return Floats(vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)load_lanes<Halves>(from, count))));
#else
  const Words half = __builtin_convertvector(load_lanes<Halves>(from, count), Words);
  Words bits = (half & 0x7fff) << 13;
  Floats x;
  memcpy(&x, &bits, sizeof x);
  x = x * 5.192296858534828e33f;  // 2^112, the difference of the exponents' biases; right for subnormals too
  memcpy(&bits, &x, sizeof bits);
  const Words none = half & 0;
  bits |= (half & 0x7c00) == 0x7c00 ? none + 0x7f800000 : none;  // infinities and NaN stay what they are
  bits |= (half & 0x8000) << 16;
  memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

inline void store(Float16* to, Vec x, int count) {
  Words bits, size, tiny;
  memcpy(&bits, &x, sizeof bits);
  size = bits & 0x7fffffff;
  const Words normal = (size - (112 << 23) + 0xfff + ((size >> 13) & 1)) >> 13;  // to nearest, ties to even
  const Floats shifted = metal::fabs(x).v + 0.5f;  // whose last place is the smallest half: this rounds
  memcpy(&tiny, &shifted, sizeof tiny);
  tiny -= 0x3f000000;
  const Words none = bits & 0;
  Words half = size < 0x38800000 ? tiny : normal;    // 2^-14
  half = size >= 0x47800000 ? none + 0x7c00 : half;  // 2^16
  half = size > 0x7f800000 ? none + 0x7e00 : half;   // NaN
  const Halves halves = __builtin_convertvector(half | ((bits >> 16) & 0x8000), Halves);
  store_lanes(to, halves, count);
}

// work(begin, lanes) for the vectors of a row.
template <typename Work>
inline void vectors(int64_t width, const Work& work) {
  for (int64_t i = 0; i < width; i += LANES) work(i, width - i < LANES ? int(width - i) : LANES);
}

// Threads that run take(1), take(2) ...; fewer than asked for where no more are to be had.
template <typename Take>
std::vector<std::thread> started(int count, const Take& take) {
  std::vector<std::thread> threads;
  try {
    threads.reserve(count > 0 ? count : 0);
    while (int(threads.size()) < count) threads.emplace_back(std::cref(take), int(threads.size()) + 1);
  } catch (const std::exception&) {
    // no memory or no number for one more: those that there are do the work
  }
  return threads;
}

// Runs work(0) ... work(items - 1) on up to `threads` threads. Throws bad_alloc if one of them did, when all have ended.
template <typename Work>
void in_parallel(int64_t items, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const auto take = [&](int) {
    try {
      for (int64_t i = next++; i < items && !failed; i = next++) work(i);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  std::vector<std::thread> others = started(int(items < threads ? items : threads) - 1, take);
  take(0);
  for (auto& other : others) other.join();
  if (failed) throw std::bad_alloc();
}

// Runs work(member, members, meet) on up to `threads` threads at once; meet() returns when all have called it. Throws
// bad_alloc if one of them did, when all have ended: meet() throws it in the others.
template <typename Work>
void together(int threads, const Work& work) {
  std::atomic<int> members{0};  // 0: not known yet
  std::atomic<int64_t> arrived{0};
  std::atomic<bool> failed{false};
  const auto wait = [](const auto& done) {
    for (int tries = 0; !done(); ++tries) {
      if (tries > 1000) std::this_thread::yield();  // the others may have no core of their own
    }
  };
  const auto take = [&](int member) {
    wait([&] { return members > 0; });
    const int64_t size = members;
    try {
      work(member, members, [&] {
        const int64_t all = (arrived++ / size + 1) * size;
        wait([&] { return arrived >= all || failed; });
        if (failed) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  std::vector<std::thread> others = started(threads - 1, take);
  members = int(others.size()) + 1;
  take(0);
  for (auto& other : others) other.join();
  if (failed) throw std::bad_alloc();
}

// What a function that Python calls returns: 0, or 1 for too little memory. No exception may leave it.
template <typename Work>
int status_of(const Work& work) {
  try {
    work();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace pararnn
