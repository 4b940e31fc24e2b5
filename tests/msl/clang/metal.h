// Metal's keywords and library, declared for clang's C++ for OpenCL: the same rules of address spaces, no
// double, no function pointers, no standard library. Declarations only; nothing is run.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
#define METAL_FUNC inline

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned long size_t;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef half float16_t;

// Storage only: widens by itself, narrows when asked to.
struct bfloat {
  ushort bits;
  bfloat() = default;
  explicit bfloat(float);
  operator float() const;
  operator float() const __constant;  // which OpenCL's generic address space leaves out
};
typedef bfloat bfloat16_t;

typedef int int2 __attribute__((ext_vector_type(2)));
typedef int int3 __attribute__((ext_vector_type(3)));
typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef float float2 __attribute__((ext_vector_type(2)));
typedef float float3 __attribute__((ext_vector_type(3)));
typedef float float4 __attribute__((ext_vector_type(4)));

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")

namespace metal {

#define ONE(name) \
  float name(float);
namespace precise {
ONE(exp) ONE(exp2) ONE(log) ONE(log2) ONE(tanh) ONE(sinh) ONE(cosh) ONE(sin) ONE(cos) ONE(sqrt) ONE(rsqrt) ONE(fabs)
float divide(float, float);
float pow(float, float);
}  // namespace precise
namespace fast {
ONE(exp) ONE(exp2) ONE(log) ONE(log2) ONE(tanh) ONE(sinh) ONE(cosh) ONE(sin) ONE(cos) ONE(sqrt) ONE(rsqrt) ONE(fabs)
float divide(float, float);
float pow(float, float);
}  // namespace fast
ONE(exp) ONE(exp2) ONE(log) ONE(log2) ONE(tanh) ONE(sinh) ONE(cosh) ONE(sin) ONE(cos) ONE(sqrt) ONE(rsqrt) ONE(fabs)
ONE(floor) ONE(ceil) ONE(trunc) ONE(rint)
#undef ONE
float pow(float, float);
float fma(float, float, float);
float copysign(float, float);
float fmin(float, float);
float fmax(float, float);
bool isnan(float);
bool isinf(float);
bool isfinite(float);
template <typename T> T abs(T);
template <typename T> T min(T, T);
template <typename T> T max(T, T);
template <typename T> T clamp(T, T, T);
template <typename T> T select(T, T, bool);

template <typename T> struct numeric_limits;
template <> struct numeric_limits<float> {
  static constexpr float infinity() { return __builtin_inff(); }
  static constexpr float quiet_NaN() { return __builtin_nanf(""); }
  static constexpr float max() { return 3.402823466e38f; }
  static constexpr float epsilon() { return 1.1920929e-7f; }
};
template <typename A, typename B> struct is_same { static constexpr bool value = false; };
template <typename A> struct is_same<A, A> { static constexpr bool value = true; };
template <typename A, typename B> constexpr bool is_same_v = is_same<A, B>::value;

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

template <typename T> T simd_shuffle(T, ushort);
template <typename T> T simd_shuffle_up(T, ushort);
template <typename T> T simd_shuffle_down(T, ushort);
template <typename T> T simd_shuffle_xor(T, ushort);
template <typename T> T simd_broadcast(T, ushort);
template <typename T> T simd_sum(T);
template <typename T> T simd_product(T);
template <typename T> T simd_max(T);
template <typename T> T simd_min(T);
template <typename T> T simd_or(T);
template <typename T> T simd_and(T);
template <typename T> T simd_prefix_inclusive_sum(T);
template <typename T> T simd_prefix_exclusive_sum(T);
bool simd_any(bool);
bool simd_all(bool);

}  // namespace metal

template <typename To, typename From> To as_type(From);
using namespace metal;
