// The gradient of the recurrence, backwards in time: lambda_t = g_t + J_{t+1}^T lambda_{t+1}. Tiles of S * 32 / CW
// chunks are walked from the last to the first. A chunk computes its states again from the state at its start, and
// on the way what it makes of any lambda that arrives at its end; a scan over the chunks says which one does.
// metal/README.md has the algorithm, the inputs, outputs and constants.

#include "standalone.h"

[[kernel]] void adjoint(const device InT* u [[buffer(0)]],
                        const constant int* u_shape [[buffer(1)]],
                        const constant int64_t* u_strides [[buffer(2)]],
                        const device InT* bias [[buffer(3)]],
                        const device float* params [[buffer(4)]],
                        const device float* initial [[buffer(5)]],
                        const device float* boundaries [[buffer(6)]],
                        const device InT* d_hidden [[buffer(7)]],
                        const constant int64_t* d_hidden_strides [[buffer(8)]],
                        const device float* d_last [[buffer(9)]],
#if STATES
                        const device float* d_states [[buffer(10)]],
                        const constant int* every [[buffer(11)]],
#endif
#if MASKED
                        const device bool* mask [[buffer(12)]],
#endif
                        device InT* d_u [[buffer(13)]],
                        device float* d_bias [[buffer(14)]],
                        device float* d_params [[buffer(15)]],
                        device float* d_initial [[buffer(16)]],
                        uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
                        uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
                        uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
  constexpr int ROWS = 32 / CW;     // chunks a simdgroup works on
  constexpr int CHUNKS = S * ROWS;  // chunks of a tile
  constexpr int TILE = CHUNKS * C;  // steps of a tile
  constexpr int SLOTS = Cell::SLOTS;
  constexpr int GATES = Cell::GATES;
  constexpr int PARAMS = Cell::PARAMS;
  constexpr int INPUTS = pararnn::INPUTS;  // state, gates and params: the directions of a step's derivatives
  threadgroup float shared_jacobian[SLOTS * SLOTS * CHUNKS * CW];
  threadgroup float shared_own[SLOTS * CHUNKS * CW];
  threadgroup float shared_carry[SLOTS * CW];

  const int lane = int(thread_index_in_simdgroup);
  const int chunk = int(simdgroup_index_in_threadgroup) * ROWS + lane / CW;
  const int column = lane % CW;
  const int cell = chunk * CW + column;  // where this thread's numbers stand in threadgroup memory
  constexpr int CELLS = CHUNKS * CW;

  const int b = int(threadgroup_position_in_grid.y);
  const int B = int(u_shape[0]);
  const int T = int(u_shape[2]);
  const int W = int(u_shape[4]);
  const int D = int(u_shape[1]) * W;
  const int channel = int(threadgroup_position_in_grid.x) * CW + column;
  const bool writes = channel < D;
  const int d = writes ? channel : D - 1;  // threads past the last channel repeat it and write nothing
  const int64_t base = b * u_strides[0] + (d / W) * u_strides[1] + (d % W) * u_strides[4];
  const int64_t step_stride = u_strides[2];
  const int64_t gate_stride = u_strides[3];
  float shift[GATES];
  float shift_sums[GATES];
  for (int g = 0; g < GATES; ++g) {
    shift[g] = float(bias[(size_t(d / W) * GATES + g) * W + d % W]);
    shift_sums[g] = 0.0f;
  }
  const int64_t hidden_base = b * d_hidden_strides[0] + d * d_hidden_strides[2];
#if STATES
  const int interval = every[0];
#endif

  float w[PARAMS];
  tangents::Real weights[PARAMS];
  float sums[PARAMS];
  for (int p = 0; p < PARAMS; ++p) {
    w[p] = params[size_t(p) * D + d];
    weights[p] = pararnn::constant_dual<INPUTS>(w[p]);
    weights[p].d[SLOTS + GATES + p] = 1.0f;
    sums[p] = 0.0f;
  }
  float carry[SLOTS];  // the gradient of the state at the tile's end, from all that comes after
  for (int s = 0; s < SLOTS; ++s) {
    carry[s] = d_last[(size_t(b) * SLOTS + s) * D + d];
  }

  for (int t0 = (T - 1) / TILE * TILE; t0 >= 0; t0 -= TILE) {
    const int begin = t0 + chunk * C;
    const int steps = max(0, min(C, T - begin));
    bool keep[C];
    for (int i = 0; i < C; ++i) {
      keep[i] = i < steps;
#if MASKED
      keep[i] = keep[i] && mask[size_t(b) * T + (i < steps ? begin + i : 0)];
#endif
    }

    // Forwards: the states, and on dual numbers the Jacobian P_t of each by the chunk's start. Of a lambda that
    // arrives at the chunk's end its start gets P^T lambda + own, with own = sum over t of P_t^T g_t.
    pararnn::Dual<SLOTS> state[SLOTS];
    float own[SLOTS];
    for (int s = 0; s < SLOTS; ++s) {
      float start = 0.0f;
      if (begin == 0) {
        start = initial[(size_t(b) * SLOTS + s) * D + d];
      } else if (steps > 0) {
        start = boundaries[((size_t(b) * (T / C) + begin / C - 1) * SLOTS + s) * D + d];
      }
      state[s] = pararnn::constant_dual<SLOTS>(start);
      state[s].d[s] = 1.0f;
      own[s] = 0.0f;
    }
    float before[C * SLOTS];
    for (int i = 0; i < C; ++i) {
      const int t = begin + i;
      for (int s = 0; s < SLOTS; ++s) {
        before[i * SLOTS + s] = state[s].v;
      }
      if (keep[i]) {
        float x[GATES];
        for (int g = 0; g < GATES; ++g) {
          x[g] = float(u[base + t * step_stride + g * gate_stride]) + shift[g];
        }
        Cell::step(state, x, w);
        const float arriving = float(d_hidden[hidden_base + t * d_hidden_strides[1]]);
        for (int j = 0; j < SLOTS; ++j) {
          own[j] += state[Cell::OUTPUT].d[j] * arriving;
        }
      }
#if STATES
      if (i < steps && (t + 1) % interval == 0) {
        for (int s = 0; s < SLOTS; ++s) {
          const float arriving = d_states[((size_t(b) * (T / interval) + t / interval) * SLOTS + s) * D + d];
          for (int j = 0; j < SLOTS; ++j) {
            own[j] += state[s].d[j] * arriving;
          }
        }
      }
#endif
    }
    for (int j = 0; j < SLOTS; ++j) {
      shared_own[j * CELLS + cell] = own[j];
      for (int s = 0; s < SLOTS; ++s) {
        shared_jacobian[(j * SLOTS + s) * CELLS + cell] = state[s].d[j];  // transposed
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Each thread scans the chunks after its own, from the last.
    float lambda[SLOTS];
    for (int s = 0; s < SLOTS; ++s) {
      lambda[s] = carry[s];
    }
    for (int c = CHUNKS - 1; c > chunk; --c) {
      const int from = c * CW + column;
      float earlier[SLOTS];
      for (int j = 0; j < SLOTS; ++j) {
        earlier[j] = shared_own[j * CELLS + from];
        for (int s = 0; s < SLOTS; ++s) {
          earlier[j] += shared_jacobian[(j * SLOTS + s) * CELLS + from] * lambda[s];
        }
      }
      for (int s = 0; s < SLOTS; ++s) {
        lambda[s] = earlier[s];
      }
    }

    // Backwards: every step once more, on dual numbers with a direction for each input of a step.
    for (int i = C - 1; i >= 0; --i) {
      const int t = begin + i;
      float gates[GATES];
      for (int g = 0; g < GATES; ++g) {
        gates[g] = 0.0f;
      }
#if STATES
      if (i < steps && (t + 1) % interval == 0) {
        for (int s = 0; s < SLOTS; ++s) {
          lambda[s] += d_states[((size_t(b) * (T / interval) + t / interval) * SLOTS + s) * D + d];
        }
      }
#endif
      if (keep[i]) {
        lambda[Cell::OUTPUT] += float(d_hidden[hidden_base + t * d_hidden_strides[1]]);
        tangents::Real now[SLOTS];
        for (int s = 0; s < SLOTS; ++s) {
          now[s] = pararnn::constant_dual<INPUTS>(before[i * SLOTS + s]);
          now[s].d[s] = 1.0f;
        }
        tangents::Real x[GATES];
        for (int g = 0; g < GATES; ++g) {
          const float given = float(u[base + t * step_stride + g * gate_stride]) + shift[g];
          x[g] = pararnn::constant_dual<INPUTS>(given);
          x[g].d[SLOTS + g] = 1.0f;
        }
        TangentCell::step(now, x, weights);
        float gradient[INPUTS];
        for (int k = 0; k < INPUTS; ++k) {
          gradient[k] = 0.0f;
          for (int s = 0; s < SLOTS; ++s) {
            gradient[k] += lambda[s] * now[s].d[k];
          }
        }
        for (int s = 0; s < SLOTS; ++s) {
          lambda[s] = gradient[s];
        }
        for (int g = 0; g < GATES; ++g) {
          gates[g] = gradient[SLOTS + g];
          shift_sums[g] += gates[g];
        }
        for (int p = 0; p < PARAMS; ++p) {
          sums[p] += gradient[SLOTS + GATES + p];
        }
      }
      if (i < steps && writes) {
        for (int g = 0; g < GATES; ++g) {
          d_u[(((size_t(d / W) * B + b) * T + t) * GATES + g) * W + d % W] = static_cast<InT>(gates[g]);
        }
      }
    }
    // What the first chunk's start gets goes on to the tile before.
    if (chunk == 0) {
      for (int s = 0; s < SLOTS; ++s) {
        shared_carry[s * CW + column] = lambda[s];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int s = 0; s < SLOTS; ++s) {
      carry[s] = shared_carry[s * CW + column];
    }
  }

  if (writes) {
    for (int p = 0; p < PARAMS; ++p) {
      d_params[((size_t(b) * CHUNKS + chunk) * PARAMS + p) * D + d] = sums[p];
    }
    for (int g = 0; g < GATES; ++g) {
      d_bias[((size_t(b) * CHUNKS + chunk) * GATES) * D + (size_t(d / W) * GATES + g) * W + d % W] = shift_sums[g];
    }
    if (chunk == 0) {
      for (int s = 0; s < SLOTS; ++s) {
        d_initial[(size_t(b) * SLOTS + s) * D + d] = carry[s];
      }
    }
  }
}
