// The residual sum, added + x, and the norm of it that comes next: RMSNorm, or LayerNorm if CENTERED. If SCALED, x is
// multiplied by a number first. One threadgroup works on a row, since the norm asks every channel.
// Inputs, outputs and constants: metal/README.md.

#include "standalone.h"

[[kernel]] void norm(const device OutT* x [[buffer(0)]],
                     const constant int* x_shape [[buffer(1)]],
                     const constant int64_t* x_strides [[buffer(2)]],
                     const device OutT* added [[buffer(3)]],
                     const constant int64_t* added_strides [[buffer(4)]],
                     const device OutT* weight [[buffer(5)]],
                     const constant int64_t* weight_strides [[buffer(6)]],
                     const constant float* eps [[buffer(7)]],
#if CENTERED
                     const device OutT* bias [[buffer(8)]],
                     const constant int64_t* bias_strides [[buffer(9)]],
#endif
#if SCALED
                     const constant OutT* scale [[buffer(10)]],
#endif
                     device OutT* total [[buffer(11)]],
                     device OutT* y [[buffer(12)]],
                     uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
                     uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
                     uint3 thread_position_in_grid [[thread_position_in_grid]],
                     uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]],
                     uint3 threads_per_threadgroup [[threads_per_threadgroup]]) {
  const int first = int(thread_position_in_grid.x);
  const int threads = int(threads_per_threadgroup.x);
  const int t = int(threadgroup_position_in_grid.y);
  const int b = int(threadgroup_position_in_grid.z);
  const int D = int(x_shape[2]);
  const size_t row = (size_t(b) * x_shape[1] + t) * D;
  const int64_t x_row = b * x_strides[0] + t * x_strides[1];
  const int64_t added_row = b * added_strides[0] + t * added_strides[1];
  threadgroup float shared_squares[32];
  float squares = 0.0f;
#if CENTERED
  threadgroup float shared_sums[32];
  float sum = 0.0f;
#endif
  for (int d = first; d < D; d += threads) {
    float kept = float(x[x_row + d * x_strides[2]]);
#if SCALED
    kept = float(static_cast<OutT>(kept * float(scale[0])));  // rounded as an array of its own would be
#endif
    const OutT value = static_cast<OutT>(float(added[added_row + d * added_strides[2]]) + kept);
    total[row + d] = value;
#if CENTERED
    sum += float(value);
#else
    squares += float(value) * float(value);
#endif
  }

#if CENTERED
  sum = simd_sum(sum);
  if (thread_index_in_simdgroup == 0) {
    shared_sums[simdgroup_index_in_threadgroup] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float mean = 0.0f;
  for (int g = 0; g < threads / 32; ++g) {
    mean += shared_sums[g];
  }
  mean = mean / float(D);
  // each thread reads back what it wrote itself: nothing to keep in registers, whatever D is
  for (int d = first; d < D; d += threads) {
    const float away = float(total[row + d]) - mean;
    squares += away * away;
  }
#endif
  squares = simd_sum(squares);
  if (thread_index_in_simdgroup == 0) {
    shared_squares[simdgroup_index_in_threadgroup] = squares;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float mean_square = 0.0f;
  for (int g = 0; g < threads / 32; ++g) {
    mean_square += shared_squares[g];
  }
  mean_square = mean_square / float(D);
  const float factor = 1.0f / metal::precise::sqrt(mean_square + eps[0]);
  for (int d = first; d < D; d += threads) {
#if CENTERED
    const float shift = float(bias[d * bias_strides[0]]);
    const float away = float(total[row + d]) - mean;
#else
    const float shift = 0.0f;
    const float away = float(total[row + d]);
#endif
    y[row + d] = static_cast<OutT>(away * factor * float(weight[d * weight_strides[0]]) + shift);
  }
}
