// The recurrence straight through time, one thread a channel: the baseline, and the exact answer.
// Inputs, outputs and constants: metal/README.md.

#include "standalone.h"

[[kernel]] void sequential(const device InT* u [[buffer(0)]],
                           const constant int* u_shape [[buffer(1)]],
                           const constant int64_t* u_strides [[buffer(2)]],
                           const device InT* bias [[buffer(3)]],
                           const device float* params [[buffer(4)]],
                           const device float* initial [[buffer(5)]],
#if STATES
                           const constant int* every [[buffer(6)]],
#endif
#if MASKED
                           const device bool* mask [[buffer(7)]],
#endif
                           device OutT* hidden [[buffer(8)]],
                           device float* last [[buffer(9)]],
#if STATES
                           device float* states [[buffer(10)]],
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
  float w[Cell::PARAMS];
  for (int p = 0; p < Cell::PARAMS; ++p) {
    w[p] = params[size_t(p) * D + d];
  }
  pararnn::Dual<0> state[Cell::SLOTS];
  for (int s = 0; s < Cell::SLOTS; ++s) {
    state[s].v = initial[(size_t(b) * Cell::SLOTS + s) * D + d];
  }

  // The gates of the next RING steps are in registers or under way: a step waits neither for its own loads nor for
  // the store before it. Past the last step the last one is read again.
  const int64_t step_stride = u_strides[2];
  const int64_t gate_stride = u_strides[3];
  const int64_t base = b * u_strides[0] + (d / W) * u_strides[1] + (d % W) * u_strides[4];
  float shift[Cell::GATES];
  for (int g = 0; g < Cell::GATES; ++g) {
    shift[g] = float(bias[(size_t(d / W) * Cell::GATES + g) * W + d % W]);
  }
  auto next = &u[base];  // in constant memory where u has fewer than 8 elements, so it has no type here
  int read = 0;          // the step that it points to
  InT ring[RING * Cell::GATES];
#if MASKED
  bool kept[RING];
#endif
#pragma unroll
  for (int i = 0; i < RING; ++i) {
    for (int g = 0; g < Cell::GATES; ++g) {
      ring[i * Cell::GATES + g] = next[g * gate_stride];
    }
#if MASKED
    kept[i] = mask[size_t(b) * T + read];
#endif
    next += read < T - 1 ? step_stride : 0;
    read += read < T - 1 ? 1 : 0;
  }

  auto out = &hidden[size_t(b) * T * D + d];
#if STATES
  const int interval = every[0];
  int until = interval;  // steps to the next state that is returned
  size_t kept_states = size_t(b) * (T / interval);
#endif
  for (int t0 = 0; t0 < T; t0 += RING) {
#pragma unroll
    for (int i = 0; i < RING; ++i) {
      if (t0 + i >= T) {
        break;
      }
      float x[Cell::GATES];
      for (int g = 0; g < Cell::GATES; ++g) {
        x[g] = float(ring[i * Cell::GATES + g]) + shift[g];
        ring[i * Cell::GATES + g] = next[g * gate_stride];
      }
#if MASKED
      const bool keep = kept[i];
      kept[i] = mask[size_t(b) * T + read];
#else
      const bool keep = true;
#endif
      next += read < T - 1 ? step_stride : 0;
      read += read < T - 1 ? 1 : 0;
      if (keep) {
        Cell::step(state, x, w);
      }
      out[0] = static_cast<OutT>(keep ? state[Cell::OUTPUT].v : 0.0f);
      out += D;
#if STATES
      until -= 1;
      if (until == 0) {
        for (int s = 0; s < Cell::SLOTS; ++s) {
          states[(kept_states * Cell::SLOTS + s) * D + d] = state[s].v;
        }
        kept_states += 1;
        until = interval;
      }
#endif
    }
  }
  for (int s = 0; s < Cell::SLOTS; ++s) {
    last[(size_t(b) * Cell::SLOTS + s) * D + d] = state[s].v;
  }
}
