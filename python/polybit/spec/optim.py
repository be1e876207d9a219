"""Optimizers: one step of every rule over lists of parameters, with states in fp32 or in 8 bits by blocks of 256.

Sources: Adam (Kingma & Ba 2015), AdamW (Loshchilov & Hutter 2019), AdEMAMix (Pagliardini et al. 2024), Lion (Chen et
al. 2023), RMSprop (Hinton 2012; centered: Graves 2013), Adagrad (Duchi et al. 2011), LAMB (You et al. 2020), LARS (You
et al. 2017), momentum as torch.optim.SGD; 8-bit states: Dettmers et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import blockwise, codebooks
from .base import FLOATS, Op, Sample, block_count, check_tensor, fail, fail_type, tree_sum

STATE_BLOCK = 256
STOCHASTIC, SKIP_NONFINITE = 1, 2


class Hyper(NamedTuple):
    """The numbers of one step, in the order of the op's `hyper` (fp32 [17]); docs/numerics.md says what each is."""

    grad_scale: float = 1.0
    coupled_decay: float = 0.0
    keep: float = 1.0
    lr: float = 0.0
    beta1: float = 0.0
    rest1: float = 1.0
    beta2: float = 0.0
    rest2: float = 1.0
    rest3: float = 1.0
    alpha: float = 0.0
    correction1: float = 1.0
    correction2: float = 1.0
    eps: float = 0.0
    look_grad: float = 0.0
    look_state: float = 1.0
    decay: float = 0.0
    trust: float = 1.0


Parts = tuple[Tensor, ...]


class Values(NamedTuple):
    """Hyper as fp32 scalars."""

    grad_scale: Tensor
    coupled_decay: Tensor
    keep: Tensor
    lr: Tensor
    beta1: Tensor
    rest1: Tensor
    beta2: Tensor
    rest2: Tensor
    rest3: Tensor
    alpha: Tensor
    correction1: Tensor
    correction2: Tensor
    eps: Tensor
    look_grad: Tensor
    look_state: Tensor
    decay: Tensor
    trust: Tensor


def root(x: Tensor) -> Tensor:
    """The square root, correctly rounded, which torch's fp32 one is not everywhere: by way of fp64."""
    return x.double().sqrt().float()


def sgd(p: Tensor, g: Tensor, h: Values) -> Parts:
    """The new parameter and, behind it, the new states: so for every rule below."""
    return (p * h.keep - h.lr * g,)


def momentum(p: Tensor, g: Tensor, h: Values, velocity: Tensor) -> Parts:
    velocity = velocity * h.beta1 + g * h.rest1
    return p * h.keep - h.lr * (h.look_grad * g + h.look_state * velocity), velocity


def moments(g: Tensor, h: Values, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return first + (g - first) * h.rest1, second * h.beta2 + (g * g) * h.rest2


def adam(p: Tensor, g: Tensor, h: Values, first: Tensor, second: Tensor) -> Parts:
    first, second = moments(g, h, first, second)
    step = (h.lr * first) / (root(second) * h.correction2 + h.eps)
    return p * h.keep - step, first, second


def ademamix(p: Tensor, g: Tensor, h: Values, fast: Tensor, slow: Tensor, second: Tensor) -> Parts:
    fast, second = moments(g, h, fast, second)
    slow = slow + (g - slow) * h.rest3
    step = (h.lr * (fast * h.correction1 + h.alpha * slow)) / (root(second) * h.correction2 + h.eps)
    return p * h.keep - step, fast, slow, second


def lion(p: Tensor, g: Tensor, h: Values, velocity: Tensor) -> Parts:
    u = velocity * h.beta1 + g * h.rest1
    sign = torch.where(u > 0, 1.0, torch.where(u < 0, -1.0, u))  # a NaN stays
    return p * h.keep - h.lr * sign, velocity * h.beta2 + g * h.rest2


def rmsprop(p: Tensor, g: Tensor, h: Values, second: Tensor) -> Parts:
    second = second * h.beta2 + (g * g) * h.rest2
    return p * h.keep - (h.lr * g) / (root(second) + h.eps), second


def rmsprop_momentum(p: Tensor, g: Tensor, h: Values, second: Tensor, velocity: Tensor) -> Parts:
    second = second * h.beta2 + (g * g) * h.rest2
    velocity = velocity * h.beta1 + g / (root(second) + h.eps)
    return p * h.keep - h.lr * velocity, second, velocity


def centered_root(g: Tensor, h: Values, second: Tensor, first: Tensor) -> Parts:
    second = second * h.beta2 + (g * g) * h.rest2
    first = first + (g - first) * h.rest2
    variance = second - first * first
    return root(torch.where(variance < 0, 0.0, variance)) + h.eps, second, first


def rmsprop_centered(p: Tensor, g: Tensor, h: Values, second: Tensor, first: Tensor) -> Parts:
    scale, second, first = centered_root(g, h, second, first)
    return p * h.keep - (h.lr * g) / scale, second, first


def rmsprop_centered_momentum(
    p: Tensor, g: Tensor, h: Values, second: Tensor, first: Tensor, velocity: Tensor
) -> Parts:
    scale, second, first = centered_root(g, h, second, first)
    velocity = velocity * h.beta1 + g / scale
    return p * h.keep - h.lr * velocity, second, first, velocity


def adagrad(p: Tensor, g: Tensor, h: Values, total: Tensor) -> Parts:
    total = total + g * g
    return p * h.keep - (h.lr * g) / (root(total) + h.eps), total


def lamb_direction(p: Tensor, h: Values, first: Tensor, second: Tensor) -> Tensor:
    return (first * h.correction1) / (root(second) * h.correction2 + h.eps) + h.decay * p


def lamb(p: Tensor, g: Tensor, h: Values, first: Tensor, second: Tensor) -> Parts:
    first, second = moments(g, h, first, second)
    return p - (h.lr * h.trust) * lamb_direction(p, h, first, second), first, second


def lars(p: Tensor, g: Tensor, h: Values, velocity: Tensor) -> Parts:
    velocity = velocity * h.beta1 + (h.lr * h.trust) * (g + h.decay * p)
    return p - velocity, velocity


@dataclass(frozen=True)
class Rule:
    """An update rule: its step, how many states it has, and which of them is a second moment (None: no one)."""

    step: Callable[..., Parts]
    states: int
    second_moment: int | None = None


# By the op's `rule`.
RULES: dict[str, Rule] = {
    "sgd": Rule(sgd, 0),
    "momentum": Rule(momentum, 1),
    "adam": Rule(adam, 2, 1),
    "ademamix": Rule(ademamix, 3, 2),
    "lion": Rule(lion, 1),
    "rmsprop": Rule(rmsprop, 1, 0),
    "rmsprop_centered": Rule(rmsprop_centered, 2, 0),
    "rmsprop_momentum": Rule(rmsprop_momentum, 2, 0),
    "rmsprop_centered_momentum": Rule(rmsprop_centered_momentum, 3, 0),
    "adagrad": Rule(adagrad, 1, 0),
    "lamb": Rule(lamb, 2, 1),
    "lars": Rule(lars, 1),
}
NUMBERS = {name: number for number, name in enumerate(RULES)}


def norm(x: Tensor) -> Tensor:
    return root(tree_sum((x * x).reshape(-1)))


def normed(name: str, p: Tensor, g: Tensor, h: Values, finite: Tensor | None, states: Parts) -> tuple[Tensor, Tensor]:
    """What LAMB and LARS take the norms of: the parameter, and the direction (LAMB) or the gradient (LARS)."""
    direction = lamb_direction(p, h, *moments(g, h, *states)) if name == "lamb" else g
    return p, direction if finite is None else torch.where(finite, direction, 0.0)


def trust_ratio(name: str, of_param: Tensor, of_direction: Tensor, h: Values) -> Tensor:
    """LAMB: |p| / |direction|; LARS: coefficient |p| / (|g| + decay |p|); 1 where a norm is 0."""
    ratio = of_param / of_direction if name == "lamb" else (h.trust * of_param) / (of_direction + h.decay * of_param)
    return torch.where((of_param > 0) & (of_direction > 0), ratio, 1.0)


def random_bits(seed: int, stream: int, count: int, device: torch.device) -> Tensor:
    """32 bits in int64 [count]: a counter through a bijective mixer (lowbias32, C. Wellons 2018), keyed by the seed."""
    mask = 0xFFFFFFFF
    i = torch.arange(count, dtype=torch.int64, device=device)
    x = (i & mask) ^ (((stream + (i >> 32)) * 0x9E3779B9) & mask) ^ (seed & mask)
    for _ in range(2):
        x = x ^ (x >> 16)
        x = multiply32(x, 0x7FEB352D)
        x = x ^ (x >> 15)
        x = multiply32(x, 0x846CA68B)
        x = x ^ (x >> 16)
        x = (x + seed) & mask
    return x


def multiply32(x: Tensor, factor: int) -> Tensor:
    """x * factor modulo 2^32, in halves that int64 holds."""
    low, high = x & 0xFFFF, x >> 16
    return (low * factor + (((high * factor) & 0xFFFF) << 16)) & 0xFFFFFFFF


def to_bf16_stochastic(x: Tensor, random: Tensor) -> Tensor:
    """fp32 to bf16, up with the probability of what is cut off; infinity and NaN as ever."""
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    bits = torch.where(x.isfinite(), bits + (random >> 16), bits) >> 16
    rounded = torch.where(bits >= 0x8000, bits - 0x10000, bits).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), torch.full_like(rounded, float("nan")), rounded)


def round_param(x: Tensor, like: Tensor, options: int, seed: int, index: int) -> Tensor:
    """The new value of a parameter in its own dtype."""
    if like.dtype == torch.bfloat16 and options & STOCHASTIC:
        random = random_bits(seed, index, x.numel(), x.device).view(x.shape)
        return to_bf16_stochastic(x, random)
    return x.to(like.dtype)


def step_one(
    name: str, param: Tensor, grad: Tensor, states: Parts, hyper: Tensor, options: int, seed: int, index: int
) -> Parts:
    """(new parameter, new states in fp32) of one parameter."""
    rule, h = RULES[name], Values(*hyper.unbind())
    p, raw = param.float(), grad.float()
    g = raw * h.grad_scale
    if bool(h.coupled_decay != 0):
        g = g + h.coupled_decay * p
    finite = raw.isfinite() if options & SKIP_NONFINITE else None
    if name in ("lamb", "lars"):
        norms = [norm(x) for x in normed(name, p, g, h, finite, states)]
        h = h._replace(trust=trust_ratio(name, norms[0], norms[1], h))
    new = rule.step(p, g, h, *states)
    if finite is not None:
        new = tuple(torch.where(finite, after, before) for after, before in zip(new, (p, *states)))
    return round_param(new[0], param, options, seed, index), *new[1:]


def check_lists(op: str, params: list[Tensor], grads: list[Tensor], hyper: Tensor, rule: int, options: int) -> str:
    """Dtypes, sizes and numbers that both ops share; the name of the rule."""
    if not 0 <= rule < len(RULES):
        raise fail(op, "rule", f"0...{len(RULES) - 1}", rule)
    if not 0 <= options <= STOCHASTIC | SKIP_NONFINITE:
        raise fail(op, "options", "0...3", options)
    check_tensor(op, "hyper", hyper, torch.float32, len(Hyper._fields))
    if len(grads) != len(params):
        raise fail(op, "grads", f"a list of {len(params)}", len(grads))
    for param, grad in zip(params, grads):
        for argument, x in (("params", param), ("grads", grad)):
            if x.dtype not in FLOATS:
                raise fail_type(op, argument, "float32, float16 or bfloat16", x.dtype)
        if grad.shape != param.shape:
            raise fail(op, "grads", f"of the parameter's shape {list(param.shape)}", list(grad.shape))
    return list(RULES)[rule]


def check_states(
    op: str, name: str, params: list[Tensor], states: tuple[list[Tensor], ...], dtype: torch.dtype
) -> None:
    """As many lists as the rule has states, the others empty; each state as large as its parameter."""
    for i, state in enumerate(states):
        wanted = len(params) if i < RULES[name].states else 0
        if len(state) != wanted:
            raise fail(op, f"state{i + 1}", f"a list of {wanted} for {name}", len(state))
        for param, x in zip(params, state):
            check_tensor(op, f"state{i + 1}", x, dtype, param.numel())


def alloc_32bit(
    params: list[Tensor], grads: list[Tensor], state1: list[Tensor], state2: list[Tensor], state3: list[Tensor],
    hyper: Tensor, rule: int, options: int, seed: int,
) -> Parts:  # fmt: skip
    """Changes params and states; returns nothing."""
    op = "optimizer_32bit"
    name = check_lists(op, params, grads, hyper, rule, options)
    check_states(op, name, params, (state1, state2, state3), torch.float32)
    return ()


def reference_32bit(
    params: list[Tensor], grads: list[Tensor], state1: list[Tensor], state2: list[Tensor], state3: list[Tensor],
    hyper: Tensor, rule: int, options: int, seed: int,
) -> Parts:  # fmt: skip
    """step_one of every parameter, in place."""
    name = list(RULES)[rule]
    lists = (state1, state2, state3)[: RULES[name].states]
    for i, (param, grad) in enumerate(zip(params, grads)):
        states = [each[i] for each in lists]
        shaped = tuple(state.view(param.shape) for state in states)
        new, *after = step_one(name, param, grad, shaped, hyper, options, seed, i)
        param.copy_(new)
        for state, value in zip(states, after):
            state.copy_(value.view(state.shape))
    return ()


def alloc_8bit(
    params: list[Tensor], grads: list[Tensor], state1: list[Tensor], state2: list[Tensor], state3: list[Tensor],
    absmax1: list[Tensor], absmax2: list[Tensor], absmax3: list[Tensor], code1: Tensor, code2: Tensor | None,
    code3: Tensor | None, hyper: Tensor, rule: int, options: int, seed: int,
) -> Parts:  # fmt: skip
    """Changes params, states (uint8) and absmax (fp32, one per 256); returns nothing."""
    op = "optimizer_8bit"
    name = check_lists(op, params, grads, hyper, rule, options)
    check_states(op, name, params, (state1, state2, state3), torch.uint8)
    for i, (absmax, code) in enumerate(zip((absmax1, absmax2, absmax3), (code1, code2, code3))):
        used = i < RULES[name].states
        if len(absmax) != (len(params) if used else 0):
            raise fail(op, f"absmax{i + 1}", f"a list of {len(params) if used else 0} for {name}", len(absmax))
        for param, x in zip(params, absmax):
            check_tensor(op, f"absmax{i + 1}", x, torch.float32, block_count(param.numel(), STATE_BLOCK))
        if code is not None:
            check_tensor(op, f"code{i + 1}", code, torch.float32, 256)
        elif used:
            raise fail(op, f"code{i + 1}", f"given for {name}", None)
    return ()


def quantize_state(x: Tensor, code: Tensor, second_moment: bool) -> Parts:
    """(codes, absmax) as quantize_blockwise, but no positive second moment becomes the code of zero.

    With the nearest code it would, beside larger ones in its block, and the step would be divided by eps alone.
    """
    thresholds = blockwise.midpoints(code)
    if second_moment:
        thresholds = torch.where(code[:-1] == 0, 0.0, thresholds)
    return blockwise.quantize_values(x, thresholds, STATE_BLOCK)


def reference_8bit(
    params: list[Tensor], grads: list[Tensor], state1: list[Tensor], state2: list[Tensor], state3: list[Tensor],
    absmax1: list[Tensor], absmax2: list[Tensor], absmax3: list[Tensor], code1: Tensor, code2: Tensor | None,
    code3: Tensor | None, hyper: Tensor, rule: int, options: int, seed: int,
) -> Parts:  # fmt: skip
    """Restore the states, step_one, quantize the states again."""
    name = list(RULES)[rule]
    count = RULES[name].states
    codes3 = (code1, code1 if code2 is None else code2, code1 if code3 is None else code3)
    lists = list(zip((state1, state2, state3), (absmax1, absmax2, absmax3), codes3))[:count]
    for i, (param, grad) in enumerate(zip(params, grads)):
        states = tuple(
            blockwise.dequantize_values(q[i].view(param.shape), absmax[i].view(-1), code, STATE_BLOCK)
            for q, absmax, code in lists
        )
        new, *after = step_one(name, param, grad, states, hyper, options, seed, i)
        param.copy_(new)
        for k, (value, (q, absmax, code)) in enumerate(zip(after, lists)):
            codes, scales = quantize_state(value, code, RULES[name].second_moment == k)
            q[i].copy_(codes.view(q[i].shape))
            absmax[i].copy_(scales.view(absmax[i].shape))
    return ()


def settings(name: str, step: int, **changes: float) -> Hyper:
    """The numbers of a usual step of a rule, with all of its terms switched on."""
    beta1, beta2, beta3, lr, decay = 0.9, 0.95, 0.999, 0.01, 0.1
    h = Hyper(
        grad_scale=0.5, keep=1 - lr * decay, lr=lr, beta1=beta1, rest1=1 - beta1, beta2=beta2, rest2=1 - beta2,
        rest3=1 - beta3, alpha=5.0, correction1=1 / (1 - beta1**step), correction2=(1 - beta2**step) ** -0.5, eps=1e-8,
    )  # fmt: skip
    if name == "momentum":
        h = h._replace(rest1=0.7, look_grad=1.0, look_state=beta1)
    if name in ("lamb", "lars"):
        h = h._replace(keep=1.0, decay=decay, trust=0.02)
    return h._replace(**changes)


SIZES = ((3, 5), (256,), (1,), (0,), (1003,), (33, 64), (2049,))


def cases(device: torch.device | str) -> Iterator[tuple[str, str, list[Tensor], list[Tensor], Hyper, int]]:
    """(id, rule, params, grads, hyper, options): every rule and pair of dtypes, options, special values."""
    for i, name in enumerate(RULES):
        for j in range(3):
            of_param, of_grad = FLOATS[(i + j) % 3], FLOATS[(i + 2 * j) % 3]
            params = [blockwise.noise(shape, k, of_param).to(device) for k, shape in enumerate(SIZES)]
            grads = [blockwise.noise(shape, k + 50, of_grad, 3.0).to(device) for k, shape in enumerate(SIZES)]
            hyper = settings(name, j + 1, coupled_decay=0.01 * (j == 1), grad_scale=(0.5, -1.0, 1.0)[j])
            dtypes = f"{of_param}-{of_grad}".replace("torch.", "")
            yield f"{name}-{dtypes}", name, params, grads, hyper, (STOCHASTIC, SKIP_NONFINITE, 0)[j]
        param, grad = blockwise.noise(700, i), blockwise.noise(700, i + 9)
        grad[3], grad[300], grad[301] = float("nan"), float("inf"), -float("inf")
        grad[400:] *= torch.logspace(-30, 0, 300)
        for options in (0, SKIP_NONFINITE):
            tensors = [param.clone().to(device)], [grad.to(device)]
            yield f"{name}-special-options={options}", name, *tensors, settings(name, 2), options
        zeros = [torch.zeros(300, device=device)], [torch.zeros(300, device=device)]
        yield f"{name}-zeros", name, *zeros, settings(name, 3), 0
    for name in ("adam", "lion", "lamb", "lars"):  # so many that a backend may prepare tables, or sum in parts
        grad = blockwise.noise(20_000, 11)
        grad *= torch.logspace(-12, 0, 256).repeat(79)[:20_000]
        grad[::7] = 0.0
        yield f"{name}-many", name, [blockwise.noise(20_000, 10).to(device)], [grad.to(device)], settings(name, 2), 0
    bf16 = [blockwise.noise((70, 100), 7, torch.bfloat16).to(device), torch.tensor([float("nan"), 3e38], device=device)]
    grads = [blockwise.noise((70, 100), 8).to(device), torch.tensor([0.0, -1e38], device=device)]
    bf16[1] = bf16[1].to(torch.bfloat16)
    grads[0][3, 5] = float("nan")
    yield "stochastic", "sgd", bf16, grads, Hyper(lr=0.001), STOCHASTIC
    yield "empty-list", "adam", [], [], settings("adam", 1), 0
    # More tensors than the arguments of one launch hold.
    params = [blockwise.noise(i * 7 % 50, i, FLOATS[i % 3]).to(device) for i in range(95)]
    grads = [blockwise.noise(i * 7 % 50, i + 200, FLOATS[i % 2]).to(device) for i in range(95)]
    # Without eps: what a kernel computes behind the end of a tensor is 0 / 0.
    yield "lamb-95-tensors", "lamb", params, grads, settings("lamb", 2)._replace(eps=0.0), STOCHASTIC


def states_of(name: str, params: list[Tensor], seed: int) -> list[list[Tensor]]:
    """Three lists of fp32 states as they could be after some steps; those that the rule does not have are empty."""
    lists: list[list[Tensor]] = [[], [], []]
    for k in range(RULES[name].states):
        for i, param in enumerate(params):
            x = blockwise.noise(tuple(param.shape), seed + 10 * k + i)
            lists[k].append((x.square() if RULES[name].second_moment == k else x).to(param.device))
    return lists


def samples_32bit(device: torch.device | str) -> Iterator[Sample]:
    """cases, with states of earlier steps."""
    for i, (case, name, params, grads, hyper, options) in enumerate(cases(device)):
        numbers = torch.tensor(hyper, dtype=torch.float32, device=device)
        yield Sample(case, (params, grads, *states_of(name, params, i), numbers, NUMBERS[name], options, 12345 + i))


def samples_8bit(device: torch.device | str) -> Iterator[Sample]:
    """cases of rules with states, in their usual maps."""
    signed, unsigned = (codebooks.dynamic(signed=s)[0].to(device) for s in (True, False))
    for i, (case, name, params, grads, hyper, options) in enumerate(cases(device)):
        if not RULES[name].states:
            continue
        states = states_of(name, params, i)
        numbers = torch.tensor(hyper, dtype=torch.float32, device=device)
        usual = [unsigned if RULES[name].second_moment == k else signed for k in range(3)]
        yield sample_8bit(case, name, params, grads, states, usual, (numbers, NUMBERS[name], options, 12345 + i))
        if case == "adam-many":  # with the signed map a second moment can be negative
            states[1][0][::5] *= -1.0
            params = [x.clone() for x in params]
            label = "adam-many-special-signed"
            yield sample_8bit(label, name, params, grads, states, [signed] * 3, (numbers, NUMBERS[name], options, i))


def sample_8bit(
    case: str, name: str, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], codes: list[Tensor],
    rest: tuple[Tensor, int, int, int],
) -> Sample:  # fmt: skip
    """With the states quantized by their codes."""
    q, absmax = list[list[Tensor]](), list[list[Tensor]]()
    for k, values in enumerate(states):
        pairs = [quantize_state(x, codes[k], RULES[name].second_moment == k) for x in values]
        q.append([pair[0] for pair in pairs])
        absmax.append([pair[1] for pair in pairs])
    return Sample(case, (params, grads, *q, *absmax, *codes, *rest))


OPS = (
    Op("optimizer_32bit", alloc_32bit, reference_32bit, samples_32bit),
    Op("optimizer_8bit", alloc_8bit, reference_8bit, samples_8bit),
)
