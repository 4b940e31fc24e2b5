// One step of the cell, for decoding. If GATED, RMSNorm of its output times silu(gate) follows; then one
// threadgroup works on a whole sequence, since the norm asks every channel.
// Inputs, outputs and constants: metal/README.md.

#include "standalone.h"

[[kernel]] void decode(const device OutT* u [[buffer(0)]],
                       const constant int* u_shape [[buffer(1)]],
                       const constant int64_t* u_strides [[buffer(2)]],
                       const device OutT* bias [[buffer(3)]],
                       const constant int64_t* bias_strides [[buffer(4)]],
                       const device float* params [[buffer(5)]],
                       const constant int64_t* params_strides [[buffer(6)]],
                       const device float* initial [[buffer(7)]],
                       const constant int64_t* initial_strides [[buffer(8)]],
#if GATED
                       const device OutT* gate [[buffer(9)]],
                       const constant int64_t* gate_strides [[buffer(10)]],
                       const device OutT* weight [[buffer(11)]],
                       const constant int64_t* weight_strides [[buffer(12)]],
                       const constant float* eps [[buffer(13)]],
#endif
                       device OutT* y [[buffer(14)]],
                       device float* last [[buffer(15)]],
                       uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
                       uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
                       uint3 thread_position_in_grid [[thread_position_in_grid]],
                       uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]],
                       uint3 threadgroups_per_grid [[threadgroups_per_grid]],
                       uint3 threads_per_threadgroup [[threads_per_threadgroup]]) {
  const int first = int(thread_position_in_grid.x);
  const int threads = int(threads_per_threadgroup.x * threadgroups_per_grid.x);  // of a sequence
  const int b = int(threadgroup_position_in_grid.y);
  const int W = int(u_shape[4]);
  const int D = int(u_shape[1]) * W;
#if GATED
  threadgroup float shared_squares[32];
  float squares = 0.0f;
#endif
  for (int d = first; d < D; d += threads) {
    const int head = d / W;
    const int column = d % W;
    float w[Cell::PARAMS];
    for (int p = 0; p < Cell::PARAMS; ++p) {
      w[p] = float(params[p * params_strides[0] + d * params_strides[1]]);
    }
    pararnn::Dual<0> state[Cell::SLOTS];
    for (int s = 0; s < Cell::SLOTS; ++s) {
      state[s].v = float(initial[b * initial_strides[0] + s * initial_strides[1] + d * initial_strides[2]]);
    }
    const int64_t base = b * u_strides[0] + head * u_strides[1] + column * u_strides[4];
    float x[Cell::GATES];
    for (int g = 0; g < Cell::GATES; ++g) {
      x[g] = float(u[base + g * u_strides[3]]) +
             float(bias[head * bias_strides[0] + (int64_t(g) * W + column) * bias_strides[1]]);
    }
    Cell::step(state, x, w);
    for (int s = 0; s < Cell::SLOTS; ++s) {
      last[(size_t(b) * Cell::SLOTS + s) * D + d] = state[s].v;
    }
#if GATED
    squares += state[Cell::OUTPUT].v * state[Cell::OUTPUT].v;
#else
    y[size_t(b) * D + d] = static_cast<OutT>(state[Cell::OUTPUT].v);
#endif
  }

#if GATED
  squares = simd_sum(squares);
  if (thread_index_in_simdgroup == 0) {
    shared_squares[simdgroup_index_in_threadgroup] = squares;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0.0f;
  for (int g = 0; g < threads / 32; ++g) {
    total += shared_squares[g];
  }
  const float scale = 1.0f / metal::precise::sqrt(total / float(D) + eps[0]);
  for (int d = first; d < D; d += threads) {
    // each thread reads back what it wrote itself: nothing to keep in registers, whatever D is
    const float h = last[(size_t(b) * Cell::SLOTS + Cell::OUTPUT) * D + d];
    const float open = pararnn::Silu::value(float(gate[b * gate_strides[0] + d * gate_strides[2]]));
    y[size_t(b) * D + d] = static_cast<OutT>(h * scale * float(weight[d * weight_strides[0]]) * open);
  }
#endif
}
