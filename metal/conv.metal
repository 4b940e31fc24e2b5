// Causal depthwise convolution over [window, x] with K taps, SiLU, and the window that comes next.
// One thread: STEPS steps of one channel. Inputs, outputs and constants: metal/README.md.

#include "standalone.h"

[[kernel]] void conv(const device OutT* x [[buffer(0)]],
                     const constant int* x_shape [[buffer(1)]],
                     const constant int64_t* x_strides [[buffer(2)]],
                     const device OutT* window [[buffer(3)]],
                     const constant int64_t* window_strides [[buffer(4)]],
                     const device OutT* weight [[buffer(5)]],
                     const constant int64_t* weight_strides [[buffer(6)]],
                     const device OutT* bias [[buffer(7)]],
                     const constant int64_t* bias_strides [[buffer(8)]],
                     device OutT* y [[buffer(9)]],
                     device OutT* new_window [[buffer(10)]],
                     uint3 thread_position_in_grid [[thread_position_in_grid]]) {
  const int d = int(thread_position_in_grid.x);
  const int begin = int(thread_position_in_grid.y) * STEPS;
  const int b = int(thread_position_in_grid.z);
  const int T = int(x_shape[1]);
  const int D = int(x_shape[2]);
  if (d >= D) {
    return;
  }
  const int64_t row = b * x_strides[0] + d * x_strides[2];
  const int64_t window_row = b * window_strides[0] + d * window_strides[2];
  float w[K];
  float tap[K];  // the inputs under the filter, the current one last
  for (int k = 0; k < K; ++k) {
    w[k] = float(weight[d * weight_strides[0] + k * weight_strides[1]]);
  }
  for (int k = 0; k < K - 1; ++k) {
    const int t = begin + k - (K - 1);
    tap[k] =
        t < 0 ? float(window[window_row + (t + K - 1) * window_strides[1]]) : float(x[row + t * x_strides[1]]);
  }
  const int end = min(begin + STEPS, T);
  for (int t = begin; t < end; ++t) {
    tap[K - 1] = float(x[row + t * x_strides[1]]);
    float sum = float(bias[d * bias_strides[0]]);
    for (int k = 0; k < K; ++k) {
      sum += w[k] * tap[k];
    }
    y[(size_t(b) * T + t) * D + d] = static_cast<OutT>(pararnn::Silu::value(sum));
    for (int k = 0; k < K - 1; ++k) {
      tap[k] = tap[k + 1];
    }
  }
  if (end == T) {
    for (int k = 0; k < K - 1; ++k) {
      new_window[(size_t(b) * (K - 1) + k) * D + d] = static_cast<OutT>(tap[k]);
    }
  }
}
