// Newton's method on the boundaries of chunks (multiple shooting), one tile of S * 32 / CW chunks after the
// other. Threads: CW neighbouring channels x the tile's chunks of C steps. metal/README.md has the picture,
// the inputs, outputs and constants.

#include "standalone.h"

[[kernel]] void recurrence(const device InT* u [[buffer(0)]],
                           const constant int* u_shape [[buffer(1)]],
                           const constant int64_t* u_strides [[buffer(2)]],
                           const device float* params [[buffer(3)]],
                           const device float* initial [[buffer(4)]],
                           const constant float* tol [[buffer(5)]],
                           const constant int* max_iters [[buffer(6)]],
#if STATES
                           const constant int* every [[buffer(7)]],
#endif
#if MASKED
                           const device bool* mask [[buffer(8)]],
#endif
                           device OutT* hidden [[buffer(9)]],
                           device float* last [[buffer(10)]],
#if STATES
                           device float* states [[buffer(11)]],
#endif
#if INFO
                           device float* gap [[buffer(12)]],
                           device int* iterations_made [[buffer(13)]],
#endif
                           uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
                           uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
                           uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
  constexpr int ROWS = 32 / CW;     // chunks a simdgroup works on
  constexpr int CHUNKS = S * ROWS;  // chunks of a tile
  constexpr int TILE = CHUNKS * C;  // steps of a tile
  constexpr int SLOTS = Cell::SLOTS;
  constexpr int GATES = Cell::GATES;
  threadgroup float shared_jacobian[SLOTS * SLOTS * CHUNKS * CW];
  threadgroup float shared_end[SLOTS * CHUNKS * CW];
  threadgroup float shared_start[SLOTS * CHUNKS * CW];
  threadgroup float shared_carry[SLOTS * CW];
  threadgroup int shared_moved[S];

  const int lane = int(thread_index_in_simdgroup);
  const int group = int(simdgroup_index_in_threadgroup);
  const int chunk = group * ROWS + lane / CW;
  const int column = lane % CW;
  const int cell = chunk * CW + column;  // where this thread's numbers stand in threadgroup memory
  constexpr int CELLS = CHUNKS * CW;

  const int b = int(threadgroup_position_in_grid.y);
  const int T = int(u_shape[2]);
  const int W = int(u_shape[4]);
  const int D = int(u_shape[1]) * W;
  const int channel = int(threadgroup_position_in_grid.x) * CW + column;
  const bool writes = channel < D;
  const int d = writes ? channel : D - 1;  // threads past the last channel repeat it and write nothing

  float w[Cell::PARAMS];
  for (int p = 0; p < Cell::PARAMS; ++p) {
    w[p] = params[size_t(p) * D + d];
  }
  float carry[SLOTS];
  for (int s = 0; s < SLOTS; ++s) {
    carry[s] = initial[(size_t(b) * SLOTS + s) * D + d];
  }
  const int64_t base = b * u_strides[0] + (d / W) * u_strides[1] + (d % W) * u_strides[4];
  const int limit = min(int(max_iters[0]), CHUNKS - 1);
  float growth[SLOTS];  // the most that a difference of starts has grown so far, at least 1
  for (int s = 0; s < SLOTS; ++s) {
    growth[s] = 1.0f;
  }
#if STATES
  const int interval = every[0];
#endif
#if INFO
  int most_iterations = 0;
  float largest_gap = 0.0f;
#endif

  for (int t0 = 0; t0 < T; t0 += TILE) {
    const int begin = t0 + chunk * C;
    const int steps = max(0, min(C, T - begin));
    float x[C * GATES];
    bool keep[C];
    for (int i = 0; i < C; ++i) {
      keep[i] = i < steps;
#if MASKED
      keep[i] = keep[i] && mask[size_t(b) * T + (i < steps ? begin + i : 0)];
#endif
      for (int g = 0; g < GATES; ++g) {
        x[i * GATES + g] = i < steps ? float(u[base + (begin + i) * u_strides[2] + g * u_strides[3]]) : 0.0f;
      }
    }

    // The first chunk starts from what is carried; the others from the guess step(0, u) of the step before.
    float start[SLOTS];
    for (int s = 0; s < SLOTS; ++s) {
      start[s] = chunk == 0 ? carry[s] : 0.0f;
    }
    if (chunk > 0 && steps > 0) {
      float before[GATES];
      for (int g = 0; g < GATES; ++g) {
        before[g] = float(u[base + (begin - 1) * u_strides[2] + g * u_strides[3]]);
      }
      Cell::step(start, before, w);
    }

    const int filled = min(CHUNKS, (T - t0 + C - 1) / C);  // chunks of this tile that hold steps
    const int rounds = min(limit, filled - 1);
    int iterations = 0;
    while (iterations < rounds) {
      // Run the chunk from its start, with its Jacobian.
      pararnn::Dual<SLOTS> state[SLOTS];
      for (int s = 0; s < SLOTS; ++s) {
        state[s] = pararnn::constant_dual<SLOTS>(start[s]);
        state[s].d[s] = 1.0f;
      }
      for (int i = 0; i < C; ++i) {
        if (keep[i]) {
          Cell::step(state, x + i * GATES, w);
        }
      }
      for (int s = 0; s < SLOTS; ++s) {
        shared_end[s * CELLS + cell] = state[s].v;
        shared_start[s * CELLS + cell] = start[s];
        for (int j = 0; j < SLOTS; ++j) {
          shared_jacobian[(s * SLOTS + j) * CELLS + cell] = state[s].d[j];
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);

      // Each thread scans the chunks before its own: start'_{c+1} = end_c + P_c delta_c, delta = start' - start.
      float delta[SLOTS];
      float corrected[SLOTS];
      float factor[SLOTS];  // how far a difference of starts has grown when it arrives here, at least 1
      for (int s = 0; s < SLOTS; ++s) {
        delta[s] = 0.0f;
        corrected[s] = start[s];
        factor[s] = 1.0f;
      }
      for (int c = 0; c < chunk; ++c) {
        const int from = c * CW + column;
        float grown[SLOTS];
        for (int s = 0; s < SLOTS; ++s) {
          const float end = shared_end[s * CELLS + from];
          float correction = 0.0f;
          grown[s] = 0.0f;
          for (int j = 0; j < SLOTS; ++j) {
            const float slope = shared_jacobian[(s * SLOTS + j) * CELLS + from];
            correction += slope * delta[j];
            grown[s] += fabs(slope) * factor[j];
          }
          // what is not finite falls back to the plain sweep, which still makes one more start right
          corrected[s] = isfinite(correction) ? end + correction : end;
        }
        for (int s = 0; s < SLOTS; ++s) {
          delta[s] = corrected[s] - shared_start[s * CELLS + from + CW];
          factor[s] = max(1.0f, grown[s]);
        }
      }
      // Where differences grow, the rounding of a start grows with them: there a start has settled only when it
      // moves by so much less, which in chaotic channels is not at all.
      bool moved = false;
      for (int s = 0; s < SLOTS; ++s) {
        float grown = 0.0f;
        for (int j = 0; j < SLOTS; ++j) {
          grown += fabs(state[s].d[j]) * factor[j];
        }
        growth[s] = max(growth[s], grown);
        const float movement = fabs(corrected[s] - start[s]) * growth[s];
        const bool settled = corrected[s] == start[s] || movement <= tol[0] * max(1.0f, fabs(corrected[s])) ||
                             (isnan(corrected[s]) && isnan(start[s]));
        moved = moved || !settled;
        start[s] = corrected[s];
      }
      const bool any_moved = simd_any(moved && steps > 0);
      if (lane == 0) {
        shared_moved[group] = any_moved ? 1 : 0;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      iterations += 1;
      int still = 0;
      for (int g = 0; g < S; ++g) {
        still += shared_moved[g];
      }
      if (still == 0) {  // the same for every thread
        break;
      }
    }

    // Run the chunk once more, and write.
    pararnn::Dual<0> state[SLOTS];
    for (int s = 0; s < SLOTS; ++s) {
      state[s].v = start[s];
    }
    for (int i = 0; i < C; ++i) {
      if (keep[i]) {
        Cell::step(state, x + i * GATES, w);
      }
      const int t = begin + i;
      if (i < steps && writes) {
        hidden[(size_t(b) * T + t) * D + d] = static_cast<OutT>(keep[i] ? state[Cell::OUTPUT].v : 0.0f);
#if STATES
        if ((t + 1) % interval == 0) {
          for (int s = 0; s < SLOTS; ++s) {
            states[((size_t(b) * (T / interval) + t / interval) * SLOTS + s) * D + d] = state[s].v;
          }
        }
#endif
      }
    }
    // The tile's last step hands its state on; ends are compared with the starts that follow them.
    if (chunk == filled - 1) {
      for (int s = 0; s < SLOTS; ++s) {
        shared_carry[s * CW + column] = state[s].v;
      }
    }
#if INFO
    for (int s = 0; s < SLOTS; ++s) {
      shared_end[s * CELLS + cell] = state[s].v;
    }
#endif
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int s = 0; s < SLOTS; ++s) {
      carry[s] = shared_carry[s * CW + column];
    }
#if INFO
    most_iterations = max(most_iterations, iterations);
    if (chunk > 0 && steps > 0) {
      for (int s = 0; s < SLOTS; ++s) {
        largest_gap = max(largest_gap, fabs(shared_end[s * CELLS + cell - CW] - start[s]));
      }
    }
#endif
    threadgroup_barrier(mem_flags::mem_threadgroup);  // before the next tile writes what was just read
  }

  if (chunk == 0 && writes) {
    for (int s = 0; s < SLOTS; ++s) {
      last[(size_t(b) * SLOTS + s) * D + d] = carry[s];
    }
  }
#if INFO
  if (writes) {
    gap[(size_t(b) * CHUNKS + chunk) * D + d] = largest_gap;
    if (chunk == 0) {
      iterations_made[size_t(b) * D + d] = most_iterations;
    }
  }
#endif
}
