// Barriers and simd operations. The default argument records the kernel's line.
#pragma once
#include "msl_rt.h"
#include "msl_types.h"

#define MSL_LINE int line = __builtin_LINE()

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_device_and_threadgroup = 3 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

inline void threadgroup_barrier(mem_flags flags, MSL_LINE) { msl_rt::threadgroup_barrier(int(flags), line); }
inline void simdgroup_barrier(mem_flags flags, MSL_LINE) { msl_rt::simdgroup_barrier(int(flags), line); }

namespace msl_detail {

template <typename T>
inline int meet(T value, int64_t operand, bool uniform, const char* operation, int line) {
  static_assert(sizeof(T) <= 8, "simd operations of at most 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  return msl_rt::meet(bits, operand, uniform, operation, line);
}

template <typename T>
inline T brought(int lane, const char* operation, int line) {
  const uint64_t bits = msl_rt::brought(lane, operation, line);
  T value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace msl_detail

template <typename T>
inline T simd_shuffle_up(T value, ushort delta, MSL_LINE) {
  const int lane = msl_detail::meet(value, delta, true, "simd_shuffle_up", line);
  return lane >= delta ? msl_detail::brought<T>(lane - delta, "simd_shuffle_up", line) : value;
}
template <typename T>
inline T simd_shuffle_down(T value, ushort delta, MSL_LINE) {
  const int lane = msl_detail::meet(value, delta, true, "simd_shuffle_down", line);
  return lane + delta < 32 ? msl_detail::brought<T>(lane + delta, "simd_shuffle_down", line) : value;
}
template <typename T>
inline T simd_shuffle_xor(T value, ushort mask, MSL_LINE) {
  const int lane = msl_detail::meet(value, mask, true, "simd_shuffle_xor", line);
  return msl_detail::brought<T>(lane ^ mask, "simd_shuffle_xor", line);
}
template <typename T>
inline T simd_shuffle(T value, ushort from, MSL_LINE) {
  msl_detail::meet(value, 0, false, "simd_shuffle", line);
  return msl_detail::brought<T>(from, "simd_shuffle", line);
}
template <typename T>
inline T simd_broadcast(T value, ushort from, MSL_LINE) {
  msl_detail::meet(value, from, true, "simd_broadcast", line);
  return msl_detail::brought<T>(from, "simd_broadcast", line);
}

// `expression` joins the result so far `a` with a lane's `b`, lanes in order up to `end`.
#define MSL_REDUCTION(name, start, end, expression)                       \
  template <typename T>                                                   \
  inline T name(T value, MSL_LINE) {                                      \
    const int lane = msl_detail::meet(value, 0, false, #name, line);      \
    (void)lane;                                                           \
    T a = start;                                                          \
    for (int other = 0; other < (end); ++other) {                         \
      if (!msl_rt::lane_exists(other)) continue;                          \
      const T b = msl_detail::brought<T>(other, #name, line);             \
      a = expression;                                                     \
    }                                                                     \
    return a;                                                             \
  }
MSL_REDUCTION(simd_sum, T(0), 32, a + b)
MSL_REDUCTION(simd_product, T(1), 32, a* b)
MSL_REDUCTION(simd_max, value, 32, a < b ? b : a)
MSL_REDUCTION(simd_min, value, 32, b < a ? b : a)
MSL_REDUCTION(simd_or, T(0), 32, a | b)
MSL_REDUCTION(simd_and, T(-1), 32, a & b)
MSL_REDUCTION(simd_prefix_inclusive_sum, T(0), lane + 1, a + b)
MSL_REDUCTION(simd_prefix_exclusive_sum, T(0), lane, a + b)

inline bool simd_any(bool value, MSL_LINE) { return simd_max(int(value), line) != 0; }
inline bool simd_all(bool value, MSL_LINE) { return simd_min(int(value), line) != 0; }

}  // namespace metal
