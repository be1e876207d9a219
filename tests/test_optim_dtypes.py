"""Optimizers on fp32, bf16 and fp16: mixed dtypes, stochastic rounding, gradient scaling, non-finite gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optimizers import RULES, assert_same, assign_grad, make, parameter, set_grad, tensors, train
from torch import Tensor, nn

from polybit import optim

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("of_param", FLOATS)
@pytest.mark.parametrize("of_grad", FLOATS)
def test_one_step_is_the_fp32_step_rounded_once(name: str, of_param: torch.dtype, of_grad: torch.dtype) -> None:
    param = parameter(70, 100, dtype=of_param)
    wide = nn.Parameter(param.detach().float())
    set_grad(param, 1, dtype=of_grad)
    assert param.grad is not None and param.grad.dtype == of_grad
    wide.grad = param.grad.float()
    for optimizer in (make(name, [param], **RULES[name]), make(name, [wide], **RULES[name])):
        optimizer.step()
    assert torch.equal(param.detach(), wide.detach().to(of_param))


def test_a_group_of_mixed_dtypes() -> None:
    params = [parameter(64, 64, seed=i, dtype=dtype) for i, dtype in enumerate(FLOATS)]
    alone = [nn.Parameter(param.detach().clone()) for param in params]
    together = optim.AdamW8bit(params)
    for step in range(3):
        for i, (param, copy) in enumerate(zip(params, alone)):
            set_grad(param, 10 * step + i)
            set_grad(copy, 10 * step + i)
        together.step()
    for i, (param, copy) in enumerate(zip(params, alone)):
        single = optim.AdamW8bit([copy])
        for step in range(3):
            set_grad(copy, 10 * step + i)
            single.step()
        assert torch.equal(param, copy) and param.dtype == FLOATS[i]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes_raise_and_nothing_moves(dtype: torch.dtype) -> None:
    params = [parameter(5), nn.Parameter(torch.ones(5, dtype=dtype))]
    params[0].grad, params[1].grad = torch.ones(5), torch.ones(5, dtype=dtype)
    before = params[0].detach().clone()
    optimizer = optim.Adam(params)
    with pytest.raises(TypeError, match="Adam: a parameter must be fp32, fp16 or bf16"):
        optimizer.step()
    assert torch.equal(params[0], before) and not optimizer.state


# --- stochastic rounding


def rounded(value: float, count: int, seed: int = 0, steps: int = 1) -> Tensor:
    """`value` in fp32, `count` times, as one step of SGD from 0 rounds it to bf16."""
    param = nn.Parameter(torch.zeros(count, dtype=torch.bfloat16))
    optimizer = optim.SGD([param], lr=1.0, stochastic_rounding=True, seed=seed)
    assign_grad(param, torch.full((count,), -value))
    for _ in range(steps):
        with torch.no_grad():
            param.zero_()
        optimizer.step()
    return param.detach().double()


@pytest.mark.parametrize("value", [1 + 2.0**-9, 1 + 2.0**-14, 3 + 5.0 * 2.0**-9, -0.7, 1e-20, 1 - 2.0**-20])
def test_stochastic_rounding_is_unbiased(value: float) -> None:
    """Of N values a binomial number is rounded up: the mean is within 5 standard deviations, sqrt(f (1 - f) / N) ulp.

    f itself is a multiple of 2^-16, because fp32 has 16 bits more than bf16: nothing is cut off.
    """
    count = 1 << 18
    exact = float(torch.tensor(value))
    got = rounded(value, count)
    bits = torch.tensor(value).view(torch.int32) & ~0xFFFF
    near, far = (float((bits + more).view(torch.float32)) for more in (0, 0x10000))
    assert set(got.tolist()) <= {near, far}
    f = (exact - near) / (far - near)
    deviation = abs(far - near) * math.sqrt(f * (1 - f) / count)
    print(f"f = {f:.6f}: the mean is {(float(got.mean()) - exact) / deviation if deviation else 0:.2f} deviations off")
    assert abs(float(got.mean()) - exact) <= 5 * deviation


def test_stochastic_rounding_is_seeded_and_its_bits_are_independent() -> None:
    """As many equal choices between seeds, steps and parameters as by chance: within 5 standard deviations of half."""
    count, value = 1 << 16, 1 + 2.0**-8  # half way
    first = rounded(value, count)
    assert torch.equal(first, rounded(value, count))
    others = [rounded(value, count, seed=1), rounded(value, count, seed=2**20), rounded(value, count, steps=2)]
    params = [nn.Parameter(torch.zeros(count, dtype=torch.bfloat16)) for _ in range(2)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "lr": 0.5}]
    optimizer = optim.SGD(groups, lr=1.0, stochastic_rounding=True)
    for param, factor in zip(params, (1, 2)):
        assign_grad(param, torch.full((count,), -value * factor))
    optimizer.step()
    others += [params[1].detach().double(), torch.roll(first, 1)]
    for k, other in enumerate(others):
        same = int((first == other).sum())
        assert abs(same - count / 2) <= 5 * math.sqrt(count) / 2, f"pair {k}: {same} of {count} are equal"


def test_stochastic_rounding_keeps_small_steps_that_nearest_loses() -> None:
    """1,000 steps of 2^-12 on 1.0, whose bf16 neighbour is 2^-7 away; the sum of variances bounds the mean."""
    count, steps, size = 4096, 1000, 2.0**-12
    ends = {}
    for stochastic in (False, True):
        param = nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
        optimizer = optim.SGD([param], lr=size, stochastic_rounding=stochastic)
        assign_grad(param, torch.full((count,), -1.0))
        for _ in range(steps):
            optimizer.step()
        ends[stochastic] = float(param.detach().double().mean())
    f = size / 2.0**-7
    deviation = 2.0**-7 * math.sqrt(steps * f * (1 - f) / count)
    assert ends[False] == 1.0
    assert abs(ends[True] - (1 + steps * size)) <= 5 * deviation


def test_stochastic_rounding_of_training_resumes_to_the_bit() -> None:
    def start() -> tuple[nn.Parameter, optim.Optimizer]:
        param = parameter(64, 64, dtype=torch.bfloat16)
        return param, optim.AdamW8bit([param], stochastic_rounding=True, seed=7)

    whole, first, second = start(), start(), start()
    train(whole[1], 0, 6)
    train(first[1], 0, 3)
    second[1].load_state_dict(first[1].state_dict())
    with torch.no_grad():
        second[0].copy_(first[0])
    train(second[1], 3, 6)
    assert_same(tensors(second[1]), tensors(whole[1]))


# --- scaling, maximize, lr, non-finite


@pytest.mark.parametrize("name", ["AdamW8bit", "SGD", "LAMB"])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(name: str, unscale: bool) -> None:
    """With a scale that is a power of two every step is the unscaled one; at infinity it is left out."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    params = [parameter(64, 80), parameter(64, 80)]
    scaled, plain = (make(name, [param]) for param in params)
    for step in range(6):
        for param, optimizer in zip(params, (scaled, plain)):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            loss = (param * torch.randn(64, 80, generator=generator)).sum()
            (scaler.scale(loss) if optimizer is scaled else loss).backward()
        assert params[0].grad is not None
        if step == 3:
            params[0].grad[5, 5] = math.inf
            before = tensors(scaled)
        if unscale:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        if step == 3:
            assert_same(tensors(scaled), before)
            assert scaled.state[params[0]]["step"] == 3 and scaler.get_scale() == 512.0
        else:
            plain.step()
    assert scaled.state[params[0]]["step"] == 5
    assert_same(tensors(scaled), tensors(plain))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion8bit", "SGD", "LAMB8bit"])
def test_nonfinite_gradients(name: str, bad: float) -> None:
    """skip_nonfinite: these elements stay as they are, the others go on. Without: they are not finite afterwards."""
    options = {"lr": 1e-3, "weight_decay": 0.0}
    params = [parameter(64, 80), parameter(64, 80)]
    where = torch.zeros(64, 80, dtype=torch.bool)
    where[3, ::7] = True
    for param, skip in zip(params, (False, True)):
        optimizer = make(name, [param], skip_nonfinite=skip, **options)
        train(optimizer, 0, 2)
        before = param.detach().clone()
        set_grad(param, 5)
        assert param.grad is not None
        param.grad[where] = bad
        optimizer.step()
        if skip:
            assert torch.equal(param[where], before[where]) and not torch.equal(param[~where], before[~where])
            assert param.isfinite().all() and (param != before)[~where].float().mean() > 0.99
            assert all(x.isfinite().all() for x in optimizer.state[param].values() if torch.is_tensor(x))
        elif "Lion" not in name or math.isnan(bad):  # Lion's step has the sign of an infinity
            assert not param[where].isfinite().any()


@pytest.mark.parametrize("name", RULES)
def test_maximize_is_the_step_with_the_other_sign_of_the_gradient(name: str) -> None:
    params = [parameter(70, 80), parameter(70, 80)]
    up, down = make(name, params[:1], maximize=True), make(name, params[1:])
    for step in range(3):
        for param in params:
            set_grad(param, step)
        assert params[1].grad is not None
        params[1].grad.neg_()
        up.step()
        down.step()
    assert_same(tensors(up), tensors(down))


@pytest.mark.parametrize("name", RULES)
def test_lr_as_tensor(name: str) -> None:
    params = [parameter(70, 80), parameter(70, 80)]
    lr = torch.tensor(0.01, dtype=torch.float64)
    by_tensor, by_number = make(name, params[:1], lr=lr), make(name, params[1:], lr=0.01)
    for step, rate in enumerate((0.01, 0.02, 0.0)):
        by_tensor.param_groups[0]["lr"].fill_(rate)
        by_number.param_groups[0]["lr"] = rate
        for optimizer in (by_tensor, by_number):
            train(optimizer, step, step + 1)
    assert_same(tensors(by_tensor), tensors(by_number))
    with pytest.raises(ValueError, match=f"{name}: lr must be 0 or more"):
        make(name, [parameter(3)], lr=torch.tensor(-1.0))
    saved: dict[str, Any] = by_tensor.state_dict()
    assert float(saved["param_groups"][0]["lr"]) == 0.0
