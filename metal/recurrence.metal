// Newton's method on the boundaries of chunks (multiple shooting), one tile of S * 32 / CW chunks after the
// other. Threads: CW neighbouring channels x the tile's chunks of C steps. metal/README.md has the picture,
// the inputs, outputs and constants.

#include "standalone.h"

[[kernel]] void recurrence(const device InT* u [[buffer(0)]],
                           const constant int* u_shape [[buffer(1)]],
                           const constant int64_t* u_strides [[buffer(2)]],
                           const device InT* bias [[buffer(3)]],
                           const device float* params [[buffer(4)]],
                           const device float* initial [[buffer(5)]],
                           const constant float* tol [[buffer(6)]],
                           const constant int* max_iters [[buffer(7)]],
#if STATES
                           const constant int* every [[buffer(8)]],
#endif
#if MASKED
                           const device bool* mask [[buffer(9)]],
#endif
                           device OutT* hidden [[buffer(10)]],
                           device float* last [[buffer(11)]],
#if STATES
                           device float* states [[buffer(12)]],
#endif
#if INFO
                           device float* gap [[buffer(13)]],
                           device int* iterations_made [[buffer(14)]],
#endif
                           uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
                           uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
                           uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
  constexpr int ROWS = 32 / CW;     // chunks a simdgroup works on
  constexpr int CHUNKS = S * ROWS;  // chunks of a tile
  constexpr int TILE = CHUNKS * C;  // steps of a tile
  constexpr int SLOTS = Cell::SLOTS;
  constexpr int GATES = Cell::GATES;
  // Hidden of 16 bits may come from starts that are right to the tolerance; all else comes from corrected ones.
  constexpr bool ROUNDED = sizeof(OutT) == 2 && STATES == 0;
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
  const int64_t step_stride = u_strides[2];
  const int64_t gate_stride = u_strides[3];
  float shift[GATES];
  for (int g = 0; g < GATES; ++g) {
    shift[g] = float(bias[(size_t(d / W) * GATES + g) * W + d % W]);
  }
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
    const int first = min(begin, T - 1);  // what a chunk without steps reads, and does not use
#if MASKED
    uint kept = 0u;  // a bit for each step
    for (int i = 0; i < steps; ++i) {
      kept |= mask[size_t(b) * T + begin + i] ? 1u << i : 0u;
    }
#endif

    // The first chunk starts from what is carried; the others from the guess step(0, u) of the step before.
    float start[SLOTS];
    for (int s = 0; s < SLOTS; ++s) {
      start[s] = chunk == 0 ? carry[s] : 0.0f;
    }
    if (chunk > 0 && steps > 0) {
      float before[GATES];
      for (int g = 0; g < GATES; ++g) {
        before[g] = float(u[base + (begin - 1) * step_stride + g * gate_stride]) + shift[g];
      }
      Cell::step(start, before, w);
    }

    const int filled = min(CHUNKS, (T - t0 + C - 1) / C);  // chunks of this tile that hold steps
    int rounds = min(limit, filled - 1);
    int iterations = 0;
    pararnn::Dual<SLOTS> state[SLOTS];
    float change[SLOTS];  // what is left of the correction when the starts have settled
    for (int s = 0; s < SLOTS; ++s) {
      change[s] = 0.0f;
    }
    while (true) {
      // Run the chunk from its start, with its Jacobian, and write in the pass that may be the last.
      const bool stores = writes && (iterations == rounds || (ROUNDED && iterations > 0));
      float reach[SLOTS];  // the most that a difference of the start makes of an output on the way
      for (int s = 0; s < SLOTS; ++s) {
        state[s] = pararnn::constant_dual<SLOTS>(start[s]);
        state[s].d[s] = 1.0f;
        reach[s] = 0.0f;
      }
      auto next = &u[base + first * step_stride];
      InT ahead[GATES];  // the next step's, on their way while a step is made
      for (int g = 0; g < GATES; ++g) {
        ahead[g] = next[g * gate_stride];
      }
      auto out = &hidden[(size_t(b) * T + first) * D + d];
#if STATES
      int until = interval - begin % interval;  // steps to the next state that is returned
      size_t row = size_t(b) * (T / interval) + begin / interval;
#endif
#pragma unroll 1
      for (int i = 0; i < steps; ++i) {
        float x[GATES];
        for (int g = 0; g < GATES; ++g) {
          x[g] = float(ahead[g]) + shift[g];
        }
        next += i + 1 < steps ? step_stride : 0;
        for (int g = 0; g < GATES; ++g) {
          ahead[g] = next[g * gate_stride];
        }
#if MASKED
        const bool keep = (kept >> i & 1u) != 0u;
#else
        const bool keep = true;
#endif
        if (keep) {
          Cell::step(state, x, w);
        }
        for (int s = 0; s < SLOTS; ++s) {
          reach[s] = max(reach[s], fabs(state[Cell::OUTPUT].d[s]));
        }
        if (stores) {
          out[0] = static_cast<OutT>(keep ? state[Cell::OUTPUT].v : 0.0f);
        }
        out += D;
#if STATES
        until -= 1;
        if (until == 0) {
          for (int s = 0; s < SLOTS && stores; ++s) {
            states[(row * SLOTS + s) * D + d] = state[s].v;
          }
          row += 1;
          until = interval;
        }
#endif
      }
      if (iterations == rounds) {  // the same for every thread
        break;
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
        const float movement = fabs(corrected[s] - start[s]) * (ROUNDED ? max(growth[s], reach[s]) : growth[s]);
        const bool settled = corrected[s] == start[s] || movement <= tol[0] * max(1.0f, fabs(corrected[s])) ||
                             (isnan(corrected[s]) && isnan(start[s]));
        moved = moved || !settled;
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
      // Where the starts have settled, what this pass wrote from them may stand. All threads agree on that.
      if (still == 0 && ROUNDED && iterations > 1) {
        for (int s = 0; s < SLOTS; ++s) {
          change[s] = corrected[s] - start[s];
        }
        break;
      }
      for (int s = 0; s < SLOTS; ++s) {
        start[s] = corrected[s];
      }
      rounds = still == 0 ? iterations : rounds;  // one more pass, from the corrected starts, is the last
    }

    // The tile's last step hands its state on, corrected; ends are compared with the starts that follow them.
    if (chunk == filled - 1) {
      for (int s = 0; s < SLOTS; ++s) {
        float correction = 0.0f;
        for (int j = 0; j < SLOTS; ++j) {
          correction += state[s].d[j] * change[j];
        }
        shared_carry[s * CW + column] = isfinite(correction) ? state[s].v + correction : state[s].v;
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
