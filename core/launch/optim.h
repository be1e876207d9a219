// Launchers of optimizer_32bit and optimizer_8bit.
#ifndef PB_LAUNCH_OPTIM_H
#define PB_LAUNCH_OPTIM_H

#include <type_traits>

#include "multi.h"
#include "../kernels/optim.h"

namespace pb {
namespace launch {

// What both ops have in common.
struct OptimCall {
  const pb_tensor_list *params, *grads, *state[states_max], *absmax[states_max];
  OptimArgs args;
};

inline i64 optim_chunks(const OptimCall &call, i64 place) {
  return ceil_div(numel(call.params->tensors[place]), optim_chunk);
}

// K over every tensor; partial: of each chunk, two floats of scratch, or null.
template <class Device, class K>
pb_status launch_optim(pb_context *ctx, const OptimCall &call, float *partial) {
  return launch_list<Device, K>(ctx, call.params->count, call.args, [&](ListEntry<at_end> entry) {
    const i64 place = entry.place(), chunks = optim_chunks(call, place);
    entry.elements(numel(call.params->tensors[place]));
    entry.tensor(at_param, call.params->tensors[place]);
    entry.tensor(at_grad, call.grads->tensors[place]);
    for (u32 k = 0; k < states_max; k++) {
      if (call.state[k]->count) entry.tensor(at_state + k, call.state[k]->tensors[place]);
      if (call.absmax[k] && call.absmax[k]->count) entry.tensor(at_absmax + k, call.absmax[k]->tensors[place]);
    }
    if (partial) {
      entry.pointer(at_partial, partial, dtype_fp32);
      partial += 2 * chunks;
    }
    return chunks;
  });
}

// What needs norms: sums of squares by chunk, of those the sums by tensor, then the step. The others: the step.
template <class Device, u32 RULE, class S>
pb_status optim_rule(pb_context *ctx, OptimCall call) {
  typedef std::conditional_t<optim_states(RULE) == 0, States32, S> OfStep;
  if constexpr (optim_has_trust(RULE)) {
    typedef std::conditional_t<RULE == rule_lamb, S, States32> OfNorms;  // LARS: of the gradient alone
    const i64 count = call.params->count;
    i64 chunks = 0;
    for (i64 place = 0; place < count; place++) chunks += optim_chunks(call, place);
    Scratch scratch(ctx);
    float *partial = scratch.take<float>(2 * chunks), *squares = scratch.take<float>(2 * count), *next = partial;
    const auto summed = [&](i64 i) {
      if (i == 0) next = partial;
      const Summed sum = {next, dtype_fp32, optim_chunks(call, i / 2)};
      next += sum.n;
      return sum;
    };
    float *rest = scratch.take<float>(tree_sums_scratch(2 * count, summed));
    PB_TRY(scratch.status());
    PB_TRY((launch_optim<Device, OptimNorms<RULE, OfNorms>>(ctx, call, partial)));
    PB_TRY(tree_sums<Device>(ctx, 2 * count, summed, false, squares, rest));
    call.args.squares = squares;
  }
  return launch_optim<Device, OptimStep<RULE, OfStep>>(ctx, call, nullptr);
}

template <class Device, class S, u32 RULE = 0>
pb_status optimize(pb_context *ctx, const OptimCall &call, u32 rule) {
  if constexpr (RULE + 1 < rule_count) {
    if (rule != RULE) return optimize<Device, S, RULE + 1>(ctx, call, rule);
  }
  return optim_rule<Device, RULE, S>(ctx, call);
}

template <class Args>
OptimCall optim_call(const Args *a) {
  OptimCall call = {};
  call.params = a->params;
  call.grads = a->grads;
  call.state[0] = a->state1;
  call.state[1] = a->state2;
  call.state[2] = a->state3;
  call.args.hyper = data<const float>(a->hyper);
  call.args.options = a->options;
  call.args.seed = a->seed;
  return call;
}

template <class Device>
pb_status optimizer_32bit(pb_context *ctx, const pb_optimizer_32bit_args *a) {
  return optimize<Device, States32>(ctx, optim_call(a), static_cast<u32>(a->rule));
}

template <class Device>
pb_status optimizer_8bit(pb_context *ctx, const pb_optimizer_8bit_args *a) {
  OptimCall call = optim_call(a);
  call.absmax[0] = a->absmax1;
  call.absmax[1] = a->absmax2;
  call.absmax[2] = a->absmax3;
  call.args.code.of[0] = data<const float>(a->code1);
  call.args.code.of[1] = data<const float>(a->code2 ? a->code2 : a->code1);
  call.args.code.of[2] = data<const float>(a->code3 ? a->code3 : a->code1);
  return optimize<Device, States8>(ctx, call, static_cast<u32>(a->rule));
}

}  // namespace launch
}  // namespace pb
#endif
