// The recurrence straight through time, one thread a channel: the baseline, and the exact answer.
// Inputs, outputs and constants: metal/README.md.

#include "standalone.h"

[[kernel]] void sequential(const device InT* u [[buffer(0)]],
                           const constant int* u_shape [[buffer(1)]],
                           const constant int64_t* u_strides [[buffer(2)]],
                           const device float* params [[buffer(3)]],
                           const device float* initial [[buffer(4)]],
#if STATES
                           const constant int* every [[buffer(5)]],
#endif
#if MASKED
                           const device bool* mask [[buffer(6)]],
#endif
                           device OutT* hidden [[buffer(7)]],
                           device float* last [[buffer(8)]],
#if STATES
                           device float* states [[buffer(9)]],
#endif
                           uint3 thread_position_in_grid [[thread_position_in_grid]]) {
  const int d = int(thread_position_in_grid.x);
  const int b = int(thread_position_in_grid.y);
  const int T = int(u_shape[2]);
  const int W = int(u_shape[4]);
  const int D = int(u_shape[1]) * W;
  if (d >= D) {
    return;
  }
#if STATES
  const int interval = every[0];
#endif
  float w[Cell::PARAMS];
  for (int p = 0; p < Cell::PARAMS; ++p) {
    w[p] = params[size_t(p) * D + d];
  }
  pararnn::Dual<0> state[Cell::SLOTS];
  for (int s = 0; s < Cell::SLOTS; ++s) {
    state[s].v = initial[(size_t(b) * Cell::SLOTS + s) * D + d];
  }
  const int64_t base = b * u_strides[0] + (d / W) * u_strides[1] + (d % W) * u_strides[4];
  for (int t = 0; t < T; ++t) {
#if MASKED
    const bool keep = mask[size_t(b) * T + t];
#else
    const bool keep = true;
#endif
    if (keep) {
      float x[Cell::GATES];
      for (int g = 0; g < Cell::GATES; ++g) {
        x[g] = float(u[base + t * u_strides[2] + g * u_strides[3]]);
      }
      Cell::step(state, x, w);
    }
    hidden[(size_t(b) * T + t) * D + d] = static_cast<OutT>(keep ? state[Cell::OUTPUT].v : 0.0f);
#if STATES
    if ((t + 1) % interval == 0) {
      for (int s = 0; s < Cell::SLOTS; ++s) {
        states[((size_t(b) * (T / interval) + t / interval) * Cell::SLOTS + s) * D + d] = state[s].v;
      }
    }
#endif
  }
  for (int s = 0; s < Cell::SLOTS; ++s) {
    last[(size_t(b) * Cell::SLOTS + s) * D + d] = state[s].v;
  }
}
