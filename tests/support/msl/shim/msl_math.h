// metal_math. Values are the C library's, correct to about half an ulp; Metal's are not. With MSL_LOOSE_MATH
// every transcendental result is moved by up to MSL_LOOSE_MATH ulps (by a hash of the result), which is what
// Metal's tables allow: a kernel that is right only with good libraries shows. fast:: gives what the Metal
// specification allows at worst, such as NaN for tanh of a large argument.
#pragma once
#include "msl_types.h"

namespace metal {
namespace msl_detail {

inline float loose(float x) {
#ifdef MSL_LOOSE_MATH
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  const uint32_t size = u & 0x7fffffffu;
  if (size < 0x01000000u || size > 0x7f000000u || size == 0x3f800000u) return x;  // not 0, 1, inf, NaN
  const uint32_t hash = (u * 2654435761u) >> 16;
  u += hash % (2 * MSL_LOOSE_MATH + 1) - MSL_LOOSE_MATH;
  __builtin_memcpy(&x, &u, 4);
#endif
  return x;
}

}  // namespace msl_detail

#define MSL_LOOSE(name) \
  inline float name(float x) { return msl_detail::loose(__builtin_##name##f(x)); }
#define MSL_EXACT(name) \
  inline float name(float x) { return __builtin_##name##f(x); }

namespace precise {
MSL_LOOSE(exp)
MSL_LOOSE(exp2)
MSL_LOOSE(log)
MSL_LOOSE(log2)
MSL_LOOSE(tanh)
MSL_LOOSE(sin)
MSL_LOOSE(cos)
MSL_LOOSE(sinh)
MSL_LOOSE(cosh)
MSL_EXACT(sqrt)
MSL_EXACT(fabs)
inline float rsqrt(float x) { return msl_detail::loose(1.0f / __builtin_sqrtf(x)); }
inline float divide(float a, float b) { return a / b; }
inline float pow(float a, float b) { return msl_detail::loose(__builtin_powf(a, b)); }
}  // namespace precise

namespace fast {
inline float exp2(float x) { return __builtin_exp2f(x); }
inline float exp(float x) { return __builtin_exp2f(x * 1.44269504f); }
inline float log(float x) { return __builtin_log2f(x) * 0.693147181f; }
inline float tanh(float x) {
  const float t = exp(2.0f * x);
  return (t - 1.0f) / (t + 1.0f);
}
inline float divide(float a, float b) { return a * (1.0f / b); }
MSL_EXACT(sqrt)
MSL_EXACT(fabs)
}  // namespace fast

// Unqualified names mean precise:: in the safe math mode, fast:: in the fast one.
#ifdef MSL_FAST_MATH
using fast::exp;
using fast::exp2;
using fast::log;
using fast::tanh;
#else
using precise::exp;
using precise::exp2;
using precise::log;
using precise::tanh;
#endif
using precise::cos;
using precise::cosh;
using precise::fabs;
using precise::log2;
using precise::pow;
using precise::rsqrt;
using precise::sin;
using precise::sinh;
using precise::sqrt;
MSL_EXACT(floor)
MSL_EXACT(ceil)
MSL_EXACT(trunc)
MSL_EXACT(rint)
inline float copysign(float a, float b) { return __builtin_copysignf(a, b); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float log1p(float x) { return msl_detail::loose(__builtin_log1pf(x)); }  // MLX's preamble has it

template <typename T>
inline T abs(T x) {
  return x < T(0) ? -x : x;
}
template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
inline T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <typename T>
inline T select(T otherwise, T chosen, bool which) {
  return which ? chosen : otherwise;
}
inline float fmin(float a, float b) { return __builtin_fminf(a, b); }
inline float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }

}  // namespace metal

#if FUSES  // CUDA's addition that no compiler fuses: a multiplication does not pass through the empty asm
inline float __fadd_rn(float a, float b) {
  asm("" : "+x"(a));
  asm("" : "+x"(b));
  return a + b;
}
#endif
