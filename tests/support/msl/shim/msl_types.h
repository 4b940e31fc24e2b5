// Scalars, vectors and type tools.
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;

// 16-bit floats: widen by themselves, narrow only when asked to (Metal asks so for bfloat, not for half).
struct half {
  _Float16 bits;
  half() = default;
  explicit half(float x) : bits(static_cast<_Float16>(x)) {}
  operator float() const { return static_cast<float>(bits); }
};

struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = nan ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);  // to even
  }
  operator float() const {
    const uint32_t u = uint32_t(bits) << 16;
    float x;
    __builtin_memcpy(&x, &u, 4);
    return x;
  }
};

typedef half float16_t;
typedef bfloat bfloat16_t;

template <typename T>
struct msl_vec2 {
  T x, y;
  msl_vec2() = default;
  explicit msl_vec2(T a) : x(a), y(a) {}
  msl_vec2(T a, T b) : x(a), y(b) {}
};
template <typename T>
struct alignas(4 * sizeof(T)) msl_vec3 {
  T x, y, z;
  msl_vec3() = default;
  explicit msl_vec3(T a) : x(a), y(a), z(a) {}
  msl_vec3(T a, T b, T c) : x(a), y(b), z(c) {}
};
typedef msl_vec2<uint> uint2;
typedef msl_vec3<uint> uint3;
typedef msl_vec2<int> int2;
typedef msl_vec3<int> int3;
typedef msl_vec2<float> float2;

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_PI_F 3.14159265358979323846f

namespace metal {

template <typename T>
struct numeric_limits;
template <>
struct numeric_limits<float> {
  static constexpr float infinity() { return __builtin_inff(); }
  static constexpr float quiet_NaN() { return __builtin_nanf(""); }
  static constexpr float max() { return 3.402823466e38f; }
  static constexpr float epsilon() { return 1.1920929e-7f; }
};

template <typename A, typename B>
struct is_same {
  static constexpr bool value = false;
};
template <typename A>
struct is_same<A, A> {
  static constexpr bool value = true;
};
template <typename A, typename B>
constexpr bool is_same_v = is_same<A, B>::value;

}  // namespace metal

template <typename To, typename From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
