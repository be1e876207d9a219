// optimizer_32bit and optimizer_8bit (docs/numerics.md, "Optimizers"). A thread owns 8 neighbouring elements, a group
// 2048. Every rule is a kernel; the dtypes of parameter and gradient are known when it runs.
#ifndef PB_KERNELS_OPTIM_H
#define PB_KERNELS_OPTIM_H

#include "block.h"
#include "code256.h"
#include "list.h"
#include "../math/optim.h"

namespace pb {

enum : u32 { optim_group = 256, optim_chunk = 8 * optim_group, state_block = 256, states_max = 3 };
enum : u32 { optim_stochastic = 1, optim_skip_nonfinite = 2 };

// The pointers of a tensor. What needs norms has at most two states.
enum : u32 { at_param, at_grad, at_state, at_absmax = at_state + states_max, at_end = at_absmax + states_max };
enum : u32 { at_partial = at_state + 2 };

typedef Chunk<at_end> OptimChunk;
struct StateCodes {
  PB_GLOBAL const float *of[states_max];
};
struct OptimArgs {
  List<at_end> list;
  PB_GLOBAL const float *hyper;
  StateCodes code;                 // 8 bits: 256 values for each state
  PB_GLOBAL const float *squares;  // what needs norms: two sums for each tensor of the caller's list
  i64 options, seed;
};

struct States {
  F8 of[states_max];
};
PB_FN Moments<float> moments_of(States s, u32 k) { return Moments<float>{s.of[0].v[k], s.of[1].v[k], s.of[2].v[k]}; }

PB_FN bool has_state(u32 rule, u32 k) { return k < optim_states(rule); }

// States in fp32.
struct States32 {
  typedef NoLocal Local;

  template <u32 RULE>
  PB_FN States load(Wave, PB_LOCAL Local *, StateCodes, OptimChunk c, i64 first) {
    States s = {};
    PB_UNROLL
    for (u32 k = 0; k < states_max; k++)
      if (has_state(RULE, k))
        s.of[k] = load_part((PB_GLOBAL const float *)c.p[at_state + k], first, c.n, pointer_aligned(c, at_state + k));
    return s;
  }

  template <u32 RULE>
  PB_FN void store(Wave, PB_LOCAL Local *, OptimChunk c, i64 first, States s) {
    PB_UNROLL
    for (u32 k = 0; k < states_max; k++)
      if (has_state(RULE, k))
        store_part((PB_GLOBAL float *)c.p[at_state + k], first, c.n, pointer_aligned(c, at_state + k), s.of[k]);
  }
};

// States as codes, with a scale for every 256 elements, which 32 threads share.
struct States8 {
  struct Local {
    BlockLocal block;
    Code256 code[states_max];
  };

  template <u32 RULE>
  PB_FN States load(Wave w, PB_LOCAL Local *local, StateCodes code, OptimChunk c, i64 first) {
    U2 q[states_max] = {};
    float scale[states_max] = {};
    PB_UNROLL
    for (u32 k = 0; k < states_max; k++) {
      if (!has_state(RULE, k)) continue;
      q[k] = load_codes8(c.p[at_state + k], first, c.n, pointer_aligned(c, at_state + k));
      if (first < c.n) scale[k] = ((PB_GLOBAL const float *)c.p[at_absmax + k])[first / state_block];
      load_code256(w, &local->code[k], code.of[k], optim_is_second_moment(RULE, k));
    }
    w.barrier();
    States s = {};
    PB_UNROLL
    for (u32 k = 0; k < states_max; k++) {
      if (!has_state(RULE, k)) continue;
      s.of[k] = values8(local->code[k].value, q[k], scale[k]);
      PB_UNROLL
      for (u32 j = 0; j < 8; j++)
        if (first + j >= c.n) s.of[k].v[j] = 0.0f;
    }
    return s;
  }

  template <u32 RULE>
  PB_FN void store(Wave w, PB_LOCAL Local *local, OptimChunk c, i64 first, States s) {
    PB_UNROLL
    for (u32 k = 0; k < states_max; k++) {
      if (!has_state(RULE, k)) continue;
      const u32 bits = block_reduce<Max>(w, &local->block, magnitude_bits8(s.of[k]), state_block / 8);
      const U2 q = code256_of8(&local->code[k], s.of[k], inverse_absmax(bits));
      store_codes8(c.p[at_state + k], first, c.n, pointer_aligned(c, at_state + k), q);
      if (first < c.n && first % state_block == 0)
        ((PB_GLOBAL float *)c.p[at_absmax + k])[first / state_block] = stored_absmax(bits);
    }
  }
};

PB_FN Hyper<float> load_hyper(PB_GLOBAL const float *p) {
  static_assert(hyper_count == 17, "a number for every field");
  return Hyper<float>{p[0], p[1],  p[2],  p[3],  p[4],  p[5],  p[6],  p[7], p[8],
                      p[9], p[10], p[11], p[12], p[13], p[14], p[15], p[16]};
}

// What a thread works on. Behind the end everything is 0.
struct OptimPart {
  OptimChunk c;
  i64 first;
  F8 param, grad;
  Hyper<float> h;
  bool coupled, skip_nonfinite;
};
PB_FN OptimPart load_optim_part(Wave w, OptimChunk c, PB_GLOBAL const float *hyper, u32 options) {
  OptimPart part;
  part.c = c;
  part.first = part.c.index * optim_chunk + 8 * w.tid();
  part.param = load_part_as(part.c.p[at_param], chunk_dtype(part.c, at_param), part.first, part.c.n,
                            pointer_aligned(part.c, at_param));
  part.grad = load_part_as(part.c.p[at_grad], chunk_dtype(part.c, at_grad), part.first, part.c.n,
                           pointer_aligned(part.c, at_grad));
  part.h = load_hyper(hyper);
  part.coupled = part.h.coupled_decay != 0.0f;
  part.skip_nonfinite = (options & optim_skip_nonfinite) != 0;
  return part;
}

// Element k of the eight is left as it is.
PB_FN bool left_out(OptimPart part, u32 k) {
  const bool finite = (as_u32(part.grad.v[k]) & 0x7f800000u) != 0x7f800000u;
  return part.first + k >= part.c.n || (part.skip_nonfinite && !finite);
}

// New parameters are rounded to their dtype once: bf16 stochastically if that is asked for.
PB_FN void store_param(OptimChunk c, i64 first, F8 x, u32 options, u32 seed) {
  const u32 dtype = chunk_dtype(c, at_param);
  if (dtype == dtype_bf16 && (options & optim_stochastic)) {
    PB_UNROLL
    for (u32 k = 0; k < 8; k++)  // what is a bf16 already is rounded no further
      x.v[k] = bf16_to_float(float_to_bf16_stochastic(x.v[k], random_bits(seed, u32(c.place), first + k)));
  }
  store_part_as(c.p[at_param], dtype, first, c.n, pointer_aligned(c, at_param), x);
}

template <u32 RULE, class S>
struct OptimStep {
  enum : u32 { group_max = optim_group };
  typedef OptimArgs Args;
  typedef typename S::Local Local;

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    OptimPart part = load_optim_part(w, chunk_of(&a.list, w.group()), a.hyper, u32(a.options));
    States s = S::template load<RULE>(w, local, a.code, part.c, part.first);
    Hyper<float> h = part.h;
    if (optim_has_trust(RULE)) {
      PB_GLOBAL const float *squares = a.squares + 2 * part.c.place;
      h.trust = optim_trust(RULE, sqrt_rn(squares[0]), sqrt_rn(squares[1]), h.trust, h.decay);
    }

    F8 param = part.param;
    PB_UNROLL
    for (u32 k = 0; k < 8; k++) {
      if (left_out(part, k)) continue;
      const float g = optim_gradient(param.v[k], part.grad.v[k], h, part.coupled);
      const Stepped<float> next = optim_step<RULE>(param.v[k], g, moments_of(s, k), h);
      param.v[k] = next.param;
      s.of[0].v[k] = next.state.a;
      s.of[1].v[k] = next.state.b;
      s.of[2].v[k] = next.state.c;
    }
    store_param(part.c, part.first, param, u32(a.options), u32(a.seed));
    S::template store<RULE>(w, local, part.c, part.first, s);
  }
};

// Before the step of what needs norms: the sums of the squares of a chunk's parameters, and of their directions.
template <u32 RULE, class S>
struct OptimNorms {
  enum : u32 { group_max = optim_group };
  typedef OptimArgs Args;
  struct Local {
    BlockLocal block;
    typename S::Local states;
  };

  PB_FN void run(Wave w, PB_LOCAL Local *local, Args a) {
    const OptimPart part = load_optim_part(w, chunk_of(&a.list, w.group()), a.hyper, u32(a.options));
    States s = {};
    if (RULE == rule_lamb) s = S::template load<RULE>(w, &local->states, a.code, part.c, part.first);
    F8 of_param, of_direction;
    PB_UNROLL
    for (u32 k = 0; k < 8; k++) {
      const float p = part.param.v[k];
      float d = optim_gradient(p, part.grad.v[k], part.h, part.coupled);
      if (RULE == rule_lamb) d = lamb_direction(p, adam_moments(d, moments_of(s, k), part.h), part.h);
      of_param.v[k] = p * p;
      of_direction.v[k] = left_out(part, k) ? 0.0f : d * d;
    }
    const float param = block_sum(w, &local->block, sum8(of_param), optim_group);
    const float direction = block_sum(w, &local->block, sum8(of_direction), optim_group);
    if (w.tid() == 0) {
      PB_GLOBAL float *partial = (PB_GLOBAL float *)part.c.p[at_partial];
      partial[part.c.index] = param;
      partial[part.c.index + (part.c.n + optim_chunk - 1) / optim_chunk] = direction;
    }
  }
};

}  // namespace pb
#endif
