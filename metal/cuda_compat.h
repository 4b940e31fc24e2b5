// Metal's names in CUDA, so that a kernel's body compiles unchanged. MLX puts this before the kernel's own header
// and compiles with NVRTC, functions being for the device by default; METAL_COMPAT_DEVICE says so to nvcc.
// `device`, `constant` and `thread` are cut from the text beforehand: CUDA's headers use those words, so macros
// would break them. A simdgroup is a warp.

#ifdef __CUDACC_RTC__
#define METAL_COMPAT_DEVICE
#else
#define METAL_COMPAT_DEVICE __device__
#endif
#define METAL_FUNC METAL_COMPAT_DEVICE inline
#define threadgroup __shared__

// MLX gives NVRTC no -fmad=false: see dual.h.
#define FUSES 1

using uint = unsigned int;
using ushort = unsigned short;
using uchar = unsigned char;

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

// __syncthreads orders all of the block's memory, which is more than any of the flags asks for.
METAL_FUNC void threadgroup_barrier(mem_flags) { __syncthreads(); }
METAL_FUNC void simdgroup_barrier(mem_flags) { __syncwarp(); }

METAL_FUNC bool simd_any(bool v) { return __any_sync(0xffffffffu, v); }
METAL_FUNC bool simd_all(bool v) { return __all_sync(0xffffffffu, v); }

METAL_FUNC float simd_sum(float v) {
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
  return v;
}

template <typename T>
METAL_FUNC T simd_shuffle(T v, ushort lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}

template <typename T>
METAL_FUNC T simd_shuffle_up(T v, ushort distance) {
  return __shfl_up_sync(0xffffffffu, v, distance);
}

template <typename T>
METAL_FUNC T simd_shuffle_down(T v, ushort distance) {
  return __shfl_down_sync(0xffffffffu, v, distance);
}

template <typename T>
METAL_FUNC T simd_shuffle_xor(T v, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}

template <typename T>
METAL_FUNC T simd_broadcast(T v, ushort lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}

// The unqualified names (exp, fabs, min, isfinite, ...) are CUDA's own.
namespace metal {
namespace precise {
METAL_FUNC float exp(float x) { return expf(x); }
METAL_FUNC float exp2(float x) { return exp2f(x); }
METAL_FUNC float log(float x) { return logf(x); }
METAL_FUNC float tanh(float x) { return tanhf(x); }
METAL_FUNC float sin(float x) { return sinf(x); }
METAL_FUNC float cos(float x) { return cosf(x); }
METAL_FUNC float sqrt(float x) { return sqrtf(x); }
METAL_FUNC float fabs(float x) { return fabsf(x); }
METAL_FUNC float pow(float x, float y) { return powf(x, y); }
}  // namespace precise
using namespace precise;
METAL_FUNC float fma(float x, float y, float z) { return fmaf(x, y, z); }
METAL_FUNC float min(float x, float y) { return fminf(x, y); }
METAL_FUNC float max(float x, float y) { return fmaxf(x, y); }
METAL_FUNC bool isnan(float x) { return x != x; }
METAL_FUNC bool isfinite(float x) { return x - x == 0.0f; }
METAL_FUNC bool isinf(float x) { return fabsf(x) > 3.4028235e38f; }

template <typename T>
METAL_FUNC T select(T otherwise, T chosen, bool which) {
  return which ? chosen : otherwise;
}
}  // namespace metal

// Attributes of Metal's kernels. Threads count x first, then y, then z, as in Metal.
METAL_FUNC uint metal_compat_thread_index() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
METAL_FUNC dim3 metal_compat_position() {
  return dim3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y,
              blockIdx.z * blockDim.z + threadIdx.z);
}
#define thread_index_in_threadgroup (metal_compat_thread_index())
#define thread_index_in_simdgroup (metal_compat_thread_index() & 31u)
#define simdgroup_index_in_threadgroup (metal_compat_thread_index() >> 5)
#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define threads_per_threadgroup blockDim
#define threadgroups_per_grid gridDim
#define thread_position_in_grid (metal_compat_position())
#define threads_per_simdgroup 32u
