// The update rules of the optimizers (docs/numerics.md, "Optimizers"): values in, values out. F is float, or a struct
// of several lanes with + - * and the functions sqrt_rn, div_rn, sign_of and not_negative.
#ifndef PB_MATH_OPTIM_H
#define PB_MATH_OPTIM_H

#include "base.h"

namespace pb {

PB_FN float sign_of(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x; }  // a NaN stays
PB_FN float not_negative(float x) { return x < 0.0f ? 0.0f : x; }

// The numbers of core/ops.def's `rule`; behind each its states, in order.
enum Rule : u32 {
  rule_sgd,                        // none
  rule_momentum,                   // momentum
  rule_adam,                       // first moment, second moment
  rule_ademamix,                   // fast first moment, slow first moment, second moment
  rule_lion,                       // momentum
  rule_rmsprop,                    // second moment
  rule_rmsprop_centered,           // second moment, first moment
  rule_rmsprop_momentum,           // second moment, momentum
  rule_rmsprop_centered_momentum,  // second moment, first moment, momentum
  rule_adagrad,                    // sum of squares
  rule_lamb,                       // first moment, second moment
  rule_lars,                       // momentum
  rule_count,
};

PB_CONSTEXPR u32 optim_states(u32 rule) {
  if (rule == rule_sgd) return 0;
  if (rule == rule_ademamix || rule == rule_rmsprop_centered_momentum) return 3;
  const bool two =
      rule == rule_adam || rule == rule_lamb || rule == rule_rmsprop_centered || rule == rule_rmsprop_momentum;
  return two ? 2 : 1;
}

// Whether a state is a second moment: it is never negative, and in 8 bits never rounds to zero.
PB_CONSTEXPR bool optim_is_second_moment(u32 rule, u32 state) {
  if (rule == rule_adam || rule == rule_lamb) return state == 1;
  if (rule == rule_ademamix) return state == 2;
  return state == 0 && (rule == rule_adagrad || (rule >= rule_rmsprop && rule <= rule_rmsprop_centered_momentum));
}

// Whether the step of an element needs the norms of its whole tensor.
PB_CONSTEXPR bool optim_has_trust(u32 rule) { return rule == rule_lamb || rule == rule_lars; }

// The factor of the step from the norms of the parameter and of the direction (LAMB) or the gradient (LARS).
PB_FN float optim_trust(u32 rule, float of_param, float of_direction, float coefficient, float decay) {
  if (!(of_param > 0.0f && of_direction > 0.0f)) return 1.0f;
  if (rule == rule_lamb) return div_rn(of_param, of_direction);
  return div_rn(coefficient * of_param, of_direction + decay * of_param);
}

// What core/ops.def's `hyper` holds, in this order; computed once a step by the caller.
template <class F>
struct Hyper {
  F grad_scale;     // the gradient is multiplied by it first; negative to maximize
  F coupled_decay;  // weight decay that is added to the gradient
  F keep;           // 1 - lr * weight decay, where the parameter itself decays
  F lr;             // of Adam: lr / (1 - beta1^t)
  F beta1, rest1;   // of momentum: the momentum, and 1 - dampening (1 in the first step)
  F beta2, rest2;   // rest: 1 - beta
  F rest3;
  F alpha;        // AdEMAMix's weight of the slow moment
  F correction1;  // 1 / (1 - beta1^t)
  F correction2;  // 1 / sqrt(1 - beta2^t)
  F eps;
  F look_grad;  // of momentum: the step is look_grad * gradient + look_state * momentum
  F look_state;
  F decay;  // weight decay inside the direction (LAMB, LARS)
  F trust;  // LARS: its coefficient. For the element, what optim_trust returned
};
enum : u32 { hyper_count = 17 };

template <class F>
struct Moments {
  F a, b, c;
};

template <class F>
struct Stepped {
  F param;
  Moments<F> state;
};

template <class F>
PB_FN F optim_gradient(F param, F grad, Hyper<F> h, bool coupled) {
  const F g = grad * h.grad_scale;
  return coupled ? g + h.coupled_decay * param : g;
}

template <class F>
PB_FN Moments<F> adam_moments(F g, Moments<F> s, Hyper<F> h) {
  s.a = s.a + (g - s.a) * h.rest1;
  s.b = s.b * h.beta2 + (g * g) * h.rest2;
  return s;
}

// What LAMB takes the norm of; `s` holds the new moments.
template <class F>
PB_FN F lamb_direction(F param, Moments<F> s, Hyper<F> h) {
  return div_rn(s.a * h.correction1, sqrt_rn(s.b) * h.correction2 + h.eps) + h.decay * param;
}

// One step of one element. g is what optim_gradient returned.
template <u32 RULE, class F>
PB_FN Stepped<F> optim_step(F p, F g, Moments<F> s, Hyper<F> h) {
  if (RULE == rule_sgd) {
    p = p * h.keep - h.lr * g;
  } else if (RULE == rule_momentum) {
    s.a = s.a * h.beta1 + g * h.rest1;
    p = p * h.keep - h.lr * (h.look_grad * g + h.look_state * s.a);
  } else if (RULE == rule_adam) {
    s = adam_moments(g, s, h);
    p = p * h.keep - div_rn(h.lr * s.a, sqrt_rn(s.b) * h.correction2 + h.eps);
  } else if (RULE == rule_ademamix) {
    s.a = s.a + (g - s.a) * h.rest1;
    s.b = s.b + (g - s.b) * h.rest3;
    s.c = s.c * h.beta2 + (g * g) * h.rest2;
    p = p * h.keep - div_rn(h.lr * (s.a * h.correction1 + h.alpha * s.b), sqrt_rn(s.c) * h.correction2 + h.eps);
  } else if (RULE == rule_lion) {
    p = p * h.keep - h.lr * sign_of(s.a * h.beta1 + g * h.rest1);
    s.a = s.a * h.beta2 + g * h.rest2;
  } else if (RULE == rule_rmsprop || RULE == rule_rmsprop_momentum) {
    s.a = s.a * h.beta2 + (g * g) * h.rest2;
    const F root = sqrt_rn(s.a) + h.eps;
    if (RULE == rule_rmsprop_momentum) {
      s.b = s.b * h.beta1 + div_rn(g, root);
      p = p * h.keep - h.lr * s.b;
    } else {
      p = p * h.keep - div_rn(h.lr * g, root);
    }
  } else if (RULE == rule_rmsprop_centered || RULE == rule_rmsprop_centered_momentum) {
    s.a = s.a * h.beta2 + (g * g) * h.rest2;
    s.b = s.b + (g - s.b) * h.rest2;
    const F root = sqrt_rn(not_negative(s.a - s.b * s.b)) + h.eps;  // rounded states can make it negative
    if (RULE == rule_rmsprop_centered_momentum) {
      s.c = s.c * h.beta1 + div_rn(g, root);
      p = p * h.keep - h.lr * s.c;
    } else {
      p = p * h.keep - div_rn(h.lr * g, root);
    }
  } else if (RULE == rule_adagrad) {
    s.a = s.a + g * g;
    p = p * h.keep - div_rn(h.lr * g, sqrt_rn(s.a) + h.eps);
  } else if (RULE == rule_lamb) {
    s = adam_moments(g, s, h);
    p = p - (h.lr * h.trust) * lamb_direction(p, s, h);
  } else if (RULE == rule_lars) {
    s.a = s.a * h.beta1 + (h.lr * h.trust) * (g + h.decay * p);
    p = p - s.a;
  }
  Stepped<F> result;
  result.param = p;
  result.state = s;
  return result;
}

// 32 random bits of element i: a counter through a bijective mixer ("lowbias32", C. Wellons, 2018), keyed by the seed.
PB_FN u32 random_bits(u32 seed, u32 stream, i64 i) {
  u32 x = u32(i) ^ ((stream + u32(i >> 32)) * 0x9e3779b9u) ^ seed;
  for (u32 round = 0; round < 2; round++) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    x += seed;
  }
  return x;
}

// x to bf16, up with the probability of what is cut off. Infinity stays, a NaN stays a NaN.
PB_FN u16 float_to_bf16_stochastic(float x, u32 random) {
  const u32 b = as_u32(x);
  if ((b & 0x7f800000u) == 0x7f800000u) return u16((b >> 16) | ((b & 0x7fffffu) ? 0x40u : 0u));
  return u16((b + (random >> 16)) >> 16);
}

}  // namespace pb
#endif
