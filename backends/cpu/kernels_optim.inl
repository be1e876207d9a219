// Every optimizer, 32 and 8 bits, over lists of parameters in one pass (docs/numerics.md, "Optimizers").
#include "math/optim.h"
#include "vec.h"

namespace {

typedef pb::Hyper<Vec> Hyper;
typedef pb::Moments<Vec> Moments;

constexpr int64_t state_block = 256;              // elements that share a scale of an 8-bit state
constexpr int64_t optim_chunk = 4 * state_block;  // elements that a thread takes at a time
// Elements that are asked for ahead of the step: memory would idle while a block's 8-bit states are encoded.
constexpr int64_t prefetch_ahead = 2 * state_block;
enum { option_stochastic = 1, option_skip_nonfinite = 2 };

inline Hyper broadcast(const float *values) {
  Hyper h;
  for (unsigned i = 0; i < pb::hyper_count; i++) ((Vec *)&h)[i] = {simd::set1(values[i])};
  return h;
}
static_assert(sizeof(Hyper) == pb::hyper_count * sizeof(Vec), "a field for every number");

// The states of one parameter from some element on: fp32, or codes with a scale per block.
struct States {
  float *values[3];
  uint8_t *codes[3];
  float *absmax[3];
};

struct Call {
  Hyper hyper;
  bool coupled, skip_nonfinite;
  const float *code[3];   // 8 bits: the value of each code
  simd::Table256 first;   // the same of the first state
  const Code256 *encode;  // and the way back
};

inline Vec load_vec(const float *p, int n) { return {n == simd::W ? simd::load(p) : simd::load_n(p, n)}; }
inline void store_vec(float *p, Vec a, int n) {
  if (n == simd::W)
    simd::store(p, a.v);
  else
    simd::store_n(p, a.v, n);
}

// Up to W elements of an 8-bit state, all of one block.
inline Vec load_8bit(const uint8_t *codes, const float *code, float absmax, int n) {
  const simd::F values = n == simd::W ? simd::gather_u8(code, codes) : simd::gather(code, simd::load_u8_n(codes, n));
  return {simd::mul(values, simd::set1(absmax))};
}

inline simd::M is_finite(Vec a) { return simd::gt(simd::set1(__builtin_inff()), simd::abs_(a.v)); }

// One step of n elements. load(k, i, lanes) is state k of the elements from i on, load4(k, i, values) that of 4 * W;
// store(k, i, lanes, value) takes its next value.
template <pb::u32 RULE, class Load, class Load4, class Store>
inline void step_block(const Call &call, float *p, const float *g, int64_t n, const Load &load, const Load4 &load4,
                       const Store &store) {
  constexpr int states = (int)pb::optim_states(RULE);
  const bool coupled = call.coupled, skip_nonfinite = call.skip_nonfinite;  // copies, that no store can change
  const auto step = [&](int64_t i, int lanes, const Moments &m) {
    __builtin_prefetch(p + i + prefetch_ahead, 1);
    __builtin_prefetch(g + i + prefetch_ahead, 0);
    const Vec param = load_vec(p + i, lanes), grad = load_vec(g + i, lanes);
    auto next = pb::optim_step<RULE>(param, pb::optim_gradient(param, grad, call.hyper, coupled), m, call.hyper);
    if (skip_nonfinite) {
      const simd::M finite = is_finite(grad);
      next.param = select(finite, next.param, param);
      next.state = {select(finite, next.state.a, m.a), select(finite, next.state.b, m.b),
                    select(finite, next.state.c, m.c)};
    }
    store_vec(p + i, next.param, lanes);
    if (states > 0) store(0, i, lanes, next.state.a);
    if (states > 1) store(1, i, lanes, next.state.b);
    if (states > 2) store(2, i, lanes, next.state.c);
  };
  int64_t i = 0;
  for (; i + 4 * simd::W <= n; i += 4 * simd::W) {
    simd::F v[3][4];
    for (int k = 0; k < 3; k++) {
      if (k < states)
        load4(k, i, v[k]);
      else
        for (int j = 0; j < 4; j++) v[k][j] = simd::zero();
    }
    for (int j = 0; j < 4; j++) step(i + j * simd::W, simd::W, {{v[0][j]}, {v[1][j]}, {v[2][j]}});
  }
  const auto state = [&](int k, int lanes) { return k < states ? load(k, i, lanes) : Vec{simd::zero()}; };
  for (; i < n; i += simd::W) {
    const int lanes = (int)min64(n - i, simd::W);
    step(i, lanes, {state(0, lanes), state(1, lanes), state(2, lanes)});
  }
}

template <pb::u32 RULE>
void step_32bit(const Call &call, float *p, const float *g, int64_t n, const States &s) {
  step_block<RULE>(
      call, p, g, n, [&](int k, int64_t i, int lanes) { return load_vec(s.values[k] + i, lanes); },
      [&](int k, int64_t i, simd::F(&v)[4]) {
        for (int j = 0; j < 4; j++) v[j] = simd::load(s.values[k] + i + j * simd::W);
      },
      [&](int k, int64_t i, int lanes, Vec value) { store_vec(s.values[k] + i, value, lanes); });
}

// n is a whole number of blocks, unless the parameter ends, and at most a chunk.
template <pb::u32 RULE>
void step_8bit(const Call &call, float *p, const float *g, int64_t n, const States &s) {
  constexpr int states = (int)pb::optim_states(RULE);
  float buffer[3][state_block];
  const float *code[3] = {call.code[0], call.code[1], call.code[2]};
  for (int64_t b = 0; b * state_block < n; b++) {
    const int64_t begin = b * state_block, count = min64(state_block, n - begin);
    uint8_t *codes[3];
    float absmax[3];
    for (int k = 0; k < states; k++) {
      codes[k] = s.codes[k] + begin;
      absmax[k] = s.absmax[k][b];
    }
    step_block<RULE>(
        call, p + begin, g + begin, count,
        [&](int k, int64_t i, int lanes) { return load_8bit(codes[k] + i, code[k], absmax[k], lanes); },
        [&](int k, int64_t i, simd::F(&v)[4]) {
          // Gathers and the look-up in registers keep different units of the processor busy: each gets its states.
          if (k == 0)
            simd::lookup256(call.first, codes[k] + i, v);
          else
            for (int j = 0; j < 4; j++) v[j] = simd::gather_u8(code[k], codes[k] + i + j * simd::W);
          for (int j = 0; j < 4; j++) v[j] = simd::mul(v[j], simd::set1(absmax[k]));
        },
        [&](int k, int64_t i, int lanes, Vec value) { store_vec(buffer[k] + i, value, lanes); });
    // Every absmax first, so that they are found side by side: codes have to wait for theirs.
    uint32_t bits[3];
    float inverse[3];
    for (int k = 0; k < states; k++) {
      bits[k] = absmax_bits(buffer[k], count);
      inverse[k] = pb::inverse_absmax(bits[k]);
      s.absmax[k][b] = pb::stored_absmax(bits[k]);
    }
    for (int k = 0; k < states; k++)
      call.encode[k].quantize(buffer[k], simd::set1(inverse[k]), bits[k] < 0x7f800000u, count, codes[k]);
  }
}

typedef void (*Step)(const Call &, float *, const float *, int64_t, const States &);

template <bool EIGHT, pb::u32 RULE>
inline Step find_step(pb::u32 rule) {
  if constexpr (RULE + 1 < pb::rule_count) {
    if (rule != RULE) return find_step<EIGHT, RULE + 1>(rule);
  }
  return EIGHT ? step_8bit<RULE> : step_32bit<RULE>;
}

// What both ops have in common, whatever their states.
struct OptimCall {
  const pb_tensor_list *params, *grads, *state[3], *absmax[3];
  const DLTensor *code[3], *hyper;
  pb::u32 rule, options, seed;
};

inline bool is_float32(const DLTensor *t) { return t->dtype.code == kDLFloat && t->dtype.bits == 32; }

inline Vec load_as_float32(const DLTensor *t, int64_t i, int lanes) {
  if (is_float32(t)) return load_vec(data<float>(t) + i, lanes);
  const uint16_t *p = data<uint16_t>(t) + i;
  return {t->dtype.code == kDLBfloat ? BFloat16::load_n(p, lanes) : Float16::load_n(p, lanes)};
}

// Elements i ... i + n of a tensor as fp32: in place, or converted into buffer.
inline float *read_float32(const DLTensor *t, int64_t i, int64_t n, float *buffer) {
  if (is_float32(t)) return data<float>(t) + i;
  const uint16_t *p = data<uint16_t>(t) + i;
  t->dtype.code == kDLBfloat ? as_float32(BFloat16(), p, n, buffer) : as_float32(Float16(), p, n, buffer);
  return buffer;
}

// The way back; fp32 was changed in place.
inline void write_param(const OptimCall &a, int64_t index, int64_t i, int64_t n, const float *values) {
  const DLTensor *t = a.params->tensors[index];
  if (is_float32(t)) return;
  uint16_t *p = data<uint16_t>(t) + i;
  if (t->dtype.code != kDLBfloat) return from_float32(Float16(), p, values, n);
  if (!(a.options & option_stochastic)) return from_float32(BFloat16(), p, values, n);
  for (int64_t k = 0; k < n; k++)
    p[k] = pb::float_to_bf16_stochastic(values[k], pb::random_bits(a.seed, (pb::u32)index, i + k));
}

inline States states_at(const OptimCall &a, int64_t index, int64_t i) {
  States s = {};
  for (unsigned k = 0; k < pb::optim_states(a.rule); k++) {
    if (a.code[0]) {
      s.codes[k] = data<uint8_t>(a.state[k]->tensors[index]) + i;
      s.absmax[k] = data<float>(a.absmax[k]->tensors[index]) + i / state_block;
    } else {
      s.values[k] = data<float>(a.state[k]->tensors[index]) + i;
    }
  }
  return s;
}

// State k of up to W elements from i on, all of one block.
inline Vec load_state(const OptimCall &a, int64_t index, unsigned k, int64_t i, int lanes) {
  const States s = states_at(a, index, i);
  if (!a.code[0]) return load_vec(s.values[k], lanes);
  return load_8bit(s.codes[k], data<const float>(a.code[k]), *s.absmax[k], lanes);
}

// LAMB and LARS: the factor of a parameter's step.
inline float trust_ratio(pb_context *ctx, const OptimCall &a, const Call &call, int64_t index) {
  const DLTensor *param = a.params->tensors[index], *grad = a.grads->tensors[index];
  const int64_t n = numel(param);
  float squares[2];  // of the parameter and of the direction, in one pass over memory
  const auto leaf = [&](int64_t i, int lanes, simd::F(&values)[2]) {
    const Vec p = load_as_float32(param, i, lanes), raw = load_as_float32(grad, i, lanes);
    Vec g = pb::optim_gradient(p, raw, call.hyper, call.coupled);
    if (a.rule == pb::rule_lamb) {
      const Moments m = {load_state(a, index, 0, i, lanes), load_state(a, index, 1, i, lanes), {simd::zero()}};
      g = pb::lamb_direction(p, pb::adam_moments(g, m, call.hyper), call.hyper);
    }
    if (call.skip_nonfinite) g = select(is_finite(raw), g, {simd::zero()});
    values[0] = (p * p).v;
    values[1] = (g * g).v;
    if (lanes < simd::W) {  // the others need not be 0
      float those[simd::W];
      simd::store(those, values[1]);
      values[1] = simd::load_n(those, lanes);
    }
  };
  tree_sums<2>(ctx, n, leaf, squares);
  const pb::Hyper<float> h = *data<const pb::Hyper<float>>(a.hyper);
  return pb::optim_trust(a.rule, __builtin_sqrtf(squares[0]), __builtin_sqrtf(squares[1]), h.trust, h.decay);
}

pb_status optimize(pb_context *ctx, const OptimCall &a, const Code256 *encode) {
  const int64_t count = a.params->count;
  int64_t *first = 0;  // the first chunk of each parameter
  float *trust = 0;
  if (!take_scratch(ctx, [&](Scratch &s) {
        first = s.take<int64_t>(count + 1);
        trust = s.take<float>(count);
      }))
    return PB_SCRATCH;
  const bool coupled = data<const pb::Hyper<float>>(a.hyper)->coupled_decay != 0.0f;
  Call call = {
      broadcast(data<const float>(a.hyper)), coupled, (a.options & option_skip_nonfinite) != 0, {}, {}, encode};
  for (int k = 0; k < 3; k++)
    if (a.code[k]) call.code[k] = data<const float>(a.code[k]);
  if (a.code[0]) call.first = simd::table256(call.code[0]);
  first[0] = 0;
  for (int64_t t = 0; t < count; t++) {
    first[t + 1] = first[t] + ceil_div(numel(a.params->tensors[t]), optim_chunk);
    if (pb::optim_has_trust(a.rule)) trust[t] = trust_ratio(ctx, a, call, t);
  }
  const Step step = encode ? find_step<true, 0>(a.rule) : find_step<false, 0>(a.rule);
  parallel(ctx, first[count], grain_of(optim_chunk), [&](int64_t begin, int64_t end) {
    int64_t t = 0;
    while (first[t + 1] <= begin) t++;
    Call own = call;
    float param[optim_chunk], grad[optim_chunk];
    for (int64_t c = begin; c < end; c++) {
      while (first[t + 1] <= c) t++;
      const int64_t i = (c - first[t]) * optim_chunk, n = min64(optim_chunk, numel(a.params->tensors[t]) - i);
      if (pb::optim_has_trust(a.rule)) own.hyper.trust = {simd::set1(trust[t])};
      float *p = read_float32(a.params->tensors[t], i, n, param);
      step(own, p, read_float32(a.grads->tensors[t], i, n, grad), n, states_at(a, t, i));
      write_param(a, t, i, n, p);
    }
  });
  return PB_OK;
}

pb_status optimizer_32bit(pb_context *ctx, const pb_optimizer_32bit_args *a) {
  return optimize(ctx,
                  {a->params,
                   a->grads,
                   {a->state1, a->state2, a->state3},
                   {},
                   {},
                   a->hyper,
                   (pb::u32)a->rule,
                   (pb::u32)a->options,
                   (pb::u32)a->seed},
                  0);
}

pb_status optimizer_8bit(pb_context *ctx, const pb_optimizer_8bit_args *a) {
  const DLTensor *code[3] = {a->code1, a->code2 ? a->code2 : a->code1, a->code3 ? a->code3 : a->code1};
  int64_t total = 0;
  for (int64_t t = 0; t < a->params->count; t++) total += numel(a->params->tensors[t]);
  const auto encode = [&](unsigned k) {
    const bool is_there = k < pb::optim_states((pb::u32)a->rule);
    return Code256(data<const float>(code[k]), is_there ? total : 0, pb::optim_is_second_moment((pb::u32)a->rule, k));
  };
  const Code256 encoders[3] = {encode(0), encode(1), encode(2)};
  return optimize(ctx,
                  {a->params,
                   a->grads,
                   {a->state1, a->state2, a->state3},
                   {a->absmax1, a->absmax2, a->absmax3},
                   {code[0], code[1], code[2]},
                   a->hyper,
                   (pb::u32)a->rule,
                   (pb::u32)a->options,
                   (pb::u32)a->seed},
                  encoders);
}

}  // namespace
