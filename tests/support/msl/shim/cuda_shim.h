// CUDA's built-ins that metal/cuda_compat.h and the kernels' CUDA text use, on the harness's runtime: a warp is a
// simdgroup, a block a threadgroup. What is not here, such as the fast intrinsics (__expf, __fdividef), does not
// compile: a kernel must not use it.
#pragma once
#include <math.h>

#include "msl_rt.h"
#include "msl_simd.h"
#include "msl_types.h"

#define __device__
#define __global__
#define __shared__ "threadgroup arrays are declared by MSL_THREADGROUP"
#define __grid_constant__

typedef half __half;
typedef bfloat __nv_bfloat16;

struct dim3 {
  uint x, y, z;
  dim3(uint x = 1, uint y = 1, uint z = 1) : x(x), y(y), z(z) {}
};

inline dim3 cuda_shim_dim3(const uint32_t* at) { return dim3(at[0], at[1], at[2]); }
#define threadIdx (cuda_shim_dim3(msl_rt::here().thread_in_threadgroup))
#define blockIdx (cuda_shim_dim3(msl_rt::here().threadgroup_in_grid))
#define blockDim (cuda_shim_dim3(msl_rt::here().threads_per_threadgroup))
#define gridDim (cuda_shim_dim3(msl_rt::here().threadgroups_per_grid))

constexpr int CUDA_SHIM_FENCES = msl_rt::FENCE_DEVICE | msl_rt::FENCE_THREADGROUP;
inline void __syncthreads(MSL_LINE) { msl_rt::threadgroup_barrier(CUDA_SHIM_FENCES, line); }
inline void __syncwarp(MSL_LINE) { msl_rt::simdgroup_barrier(CUDA_SHIM_FENCES, line); }

inline void cuda_shim_all_lanes(unsigned mask) {
  if (mask != 0xffffffffu) __builtin_trap();
}
inline int __any_sync(unsigned mask, int v, MSL_LINE) {
  cuda_shim_all_lanes(mask);
  return metal::simd_any(v != 0, line);
}
inline int __all_sync(unsigned mask, int v, MSL_LINE) {
  cuda_shim_all_lanes(mask);
  return metal::simd_all(v != 0, line);
}
template <typename T>
inline T __shfl_sync(unsigned mask, T v, int from, MSL_LINE) {
  cuda_shim_all_lanes(mask);
  return metal::simd_shuffle(v, ushort(from & 31), line);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned distance, MSL_LINE) {
  cuda_shim_all_lanes(mask);
  return metal::simd_shuffle_up(v, ushort(distance), line);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned distance, MSL_LINE) {
  cuda_shim_all_lanes(mask);
  return metal::simd_shuffle_down(v, ushort(distance), line);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T v, int lanes, MSL_LINE) {
  cuda_shim_all_lanes(mask);
  return metal::simd_shuffle_xor(v, ushort(lanes), line);
}

// Not fused by any compiler: a multiplication does not pass through the empty asm.
inline float __fadd_rn(float a, float b) {
  asm("" : "+x"(a));
  asm("" : "+x"(b));
  return a + b;
}

template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

// In place of MLX's own header: a shape or strides of an array, given by value there.
namespace cooperative_groups {}
namespace mlx::core::cu {
template <typename T>
struct CudaShimFact {
  const T* at;
  T operator[](int i) const { return at[i]; }
};
using Shape = CudaShimFact<int32_t>;
using Strides = CudaShimFact<int64_t>;
}  // namespace mlx::core::cu
