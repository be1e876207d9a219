"""8-bit states: zero, small second moments, overrides, and state dicts across widths."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import RULES, Calls, assert_same, make, parameter, set_grad, tensors, train
from torch import Tensor, nn

import polybit
from polybit import optim
from polybit.spec import codebooks
from polybit.spec import optim as spec

DOCS = Path(__file__).parent.parent / "docs" / "optim.md"
UNSIGNED = codebooks.dynamic(signed=False).code


def restored(state: dict[str, Any], k: int) -> Tensor:
    """The values of state<k> of an 8-bit state."""
    blocks = state[f"absmax{k}"].repeat_interleave(256)[: state[f"state{k}"].numel()]
    return state[f"qmap{k}"][state[f"state{k}"].long().view(-1)] * blocks


@pytest.mark.parametrize("name", RULES)
def test_zero_stays_zero(name: str) -> None:
    """Elements whose gradient is always 0 beside others that move: states and parameter exactly 0."""
    param = nn.Parameter(torch.zeros(16, 512))
    optimizer = make(name + "8bit", [param])
    dead = torch.zeros(16, 512, dtype=torch.bool)
    dead[:, ::3] = True
    for step in range(5):
        set_grad(param, step)
        assert param.grad is not None
        param.grad[dead] = 0.0
        optimizer.step()
    assert not param[dead].any() and param[~dead].all()
    state = optimizer.state[param]
    for k in (1, 2):
        if f"state{k}" in state and not state[f"absmax{k}"].dim() > 1:
            assert state[f"absmax{k}"].all() and not restored(state, k)[dead.view(-1)].any()


@pytest.mark.parametrize(
    ("name", "k"), [("Adam", 2), ("AdamW", 2), ("AdEMAMix", 2), ("LAMB", 2), ("RMSprop", 1), ("Adagrad", 1)]
)
def test_a_second_moment_that_is_not_zero_never_becomes_zero(name: str, k: int) -> None:
    """Gradients from 1e-15 to 1 in each block: squares far below the smallest code, and above the smallest normal."""
    param = parameter(4096)
    optimizer = make(name + "8bit", [param])
    for step in range(3):
        set_grad(param, step)
        assert param.grad is not None
        param.grad = param.grad.sign() * torch.logspace(-15, 0, 256).repeat(16)
        optimizer.step()
    state = optimizer.state[param]
    assert torch.equal(state[f"qmap{k}"], UNSIGNED)
    assert (restored(state, k) > 0).all()
    exact = param.grad.square() if param.grad is not None else None
    plain = spec.quantize_state(exact, UNSIGNED, False)[0]  # type: ignore[arg-type]
    assert (plain == 0).float().mean() > 0.5, "the nearest code of these would be zero"


def wide_steps(bits: int, steps: int = 20) -> Tensor:
    """Adam from 0 under noise whose size goes from 1e-4 to 1 inside every block of 256."""
    param = nn.Parameter(torch.zeros(2048))
    optimizer = optim.Adam([param], optim_bits=bits, min_8bit_size=0)
    for step in range(steps):
        set_grad(param, step, torch.logspace(-4, 0, 256).repeat(8))
        optimizer.step()
    return param.detach().clone()


def test_the_remedy_for_small_second_moments_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative error of the way that 20 steps went, against 32 bits: with the remedy, and with the nearest code."""
    exact, with_remedy = wide_steps(32), wide_steps(8)
    quantize_state = spec.quantize_state
    with Calls(by_spec=True):
        assert torch.equal(wide_steps(8), with_remedy)
    monkeypatch.setattr(spec, "quantize_state", lambda x, code, _: quantize_state(x, code, False))
    with Calls(by_spec=True):
        without = wide_steps(8)
    good, bad = (float((x - exact).norm() / exact.norm()) for x in (with_remedy, without))
    farthest = [float((x - exact).abs().max()) / 1e-3 for x in (with_remedy, without)]
    print(f"relative error with the remedy {good:.3f}, without {bad:.1f}: {bad / good:.0f} times")
    print(f"farthest element, in learning rates: with {farthest[0]:.1f}, without {farthest[1]:.0f}")
    assert bad >= 5 * good
    table = re.findall(r"\| ([\d.]+) \| ([\d.]+) learning rates", DOCS.read_text(encoding="utf-8"))
    assert table == [(f"{good:.3f}", f"{farthest[0]:.1f}"), (f"{bad:.1f}", f"{farthest[1]:.0f}")]


def test_small_parameters_have_32_bit_states() -> None:
    sizes = {4095: torch.float32, 4096: torch.uint8, 4097: torch.uint8}
    params = {size: parameter(size) for size in sizes}
    optimizer = optim.AdamW8bit(params.values())
    train(optimizer, 0, 1)
    for size, dtype in sizes.items():
        state = optimizer.state[params[size]]
        assert state["state1"].dtype == state["state2"].dtype == dtype
        if dtype == torch.uint8:
            assert state["absmax1"].shape == (-(-size // 256),) and state["qmap2"].shape == (256,)
    for size, least in ((300, 300), (300, 301)):
        param = parameter(size)
        optimizer = optim.AdamW8bit([{"params": [param], "min_8bit_size": least}])
        train(optimizer, 0, 1)
        assert optimizer.state[param]["state1"].dtype == (torch.uint8 if least <= size else torch.float32)


def dtypes(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, torch.dtype]:
    return {name: optimizer.state[param]["state1"].dtype for name, param in module.named_parameters()}


def test_override_of_a_parameter_and_of_a_module() -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    optim.override(model[0], optim_bits=32)
    optim.override(model[2].weight, min_8bit_size=10_000)
    optimizer = optim.AdamW8bit(model.parameters())
    train(optimizer, 0, 1)
    assert {name for name, dtype in dtypes(optimizer, model).items() if dtype == torch.uint8} == {"1.weight"}
    optim.override(model[2].weight, min_8bit_size=0)  # the state that is there stays
    train(optimizer, 1, 2)
    assert dtypes(optimizer, model)["2.weight"] == torch.float32
    wider = optim.AdamW(model.parameters())
    optim.override(model[1].bias, optim_bits=8, min_8bit_size=0)  # it goes the other way, too
    train(wider, 0, 1)
    assert {name for name, dtype in dtypes(wider, model).items() if dtype == torch.uint8} == {"1.bias"}


def test_the_table_of_stable_embedding_is_in_32_bits_and_that_of_a_copy_too() -> None:
    first = polybit.nn.StableEmbedding(100, 64)
    for module in (first, copy.deepcopy(first), pickle.loads(pickle.dumps(first)), first.bfloat16()):
        optimizer = optim.AdamW8bit([*module.parameters(), parameter(4096)])
        train(optimizer, 0, 1)
        assert dtypes(optimizer, module)["weight"] == torch.float32
        assert optimizer.state[optimizer.param_groups[0]["params"][-1]]["state1"].dtype == torch.uint8


def test_wrong_overrides_raise() -> None:
    param = parameter(5)
    with pytest.raises(TypeError, match="override: unknown setting 'lr'; known: optim_bits"):
        optim.override(param, lr=1.0)
    with pytest.raises(TypeError, match="override: target must be a parameter or a module, got str"):
        optim.override("embedding", optim_bits=32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="override: optim_bits must be 8 or 32, got 4"):
        optim.override(param, optim_bits=4)
    with pytest.raises(ValueError, match="override: min_8bit_size must be an integer of 0 or more, got -1"):
        optim.override(param, min_8bit_size=-1)


# --- across widths


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("permuted", [False, True])
def test_a_state_dict_loads_in_the_other_width(name: str, permuted: bool) -> None:
    """32 to 8 bits: the codes that quantizing gives; 8 to 32: the values that dequantizing gives."""
    param = parameter(12, 8, 9, 9)
    if permuted:
        param = nn.Parameter(param.detach().contiguous(memory_format=torch.channels_last))
    wide, narrow = make(name, [param]), make(name + "8bit", [param])
    train(wide, 0, 3)
    saved = copy.deepcopy(wide.state_dict())
    narrow.load_state_dict(saved)
    again = make(name, [param])
    again.load_state_dict(narrow.state_dict())
    state, exact, back = (optimizer.state[param] for optimizer in (narrow, wide, again))
    assert state["step"] == back["step"] == 3
    count = 0
    for key in [key for key in exact if key.startswith("state")]:
        k = key[-1]
        second = torch.equal(state[f"qmap{k}"], UNSIGNED)
        for i in range(2 if exact[key].dim() == 5 else 1):
            x, q, absmax, y = exact[key], state[key], state[f"absmax{k}"], back[key]
            if x.dim() == 5:
                x, q, absmax, y = x[i], q[i], absmax[i], y[i]
            if permuted:
                x, q, y = (each.permute(0, 2, 3, 1) for each in (x, q, y))
            codes, scales = spec.quantize_state(x.reshape(-1), state[f"qmap{k}"], second)
            assert torch.equal(q.reshape(-1), codes) and torch.equal(absmax, scales)
            values = state[f"qmap{k}"][codes.long()] * scales.repeat_interleave(256)[: codes.numel()]
            assert torch.equal(y.reshape(-1), values)
            count += 1
    assert count == {"AdEMAMix": 3, "Adam": 2, "AdamW": 2, "LAMB": 2}.get(name, 1)
    for optimizer in (narrow, again):
        train(optimizer, 3, 4)
    assert param.isfinite().all()


def test_state_dicts_that_do_not_fit_raise_and_change_nothing() -> None:
    params = [parameter(64, 80), parameter(5)]
    optimizer = optim.AdamW8bit(params)
    train(optimizer, 0, 2)
    before, saved = tensors(optimizer), copy.deepcopy(optimizer.state_dict())

    def refused(change: Any, match: str) -> None:
        damaged = copy.deepcopy(saved)
        change(damaged)
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(damaged)
        assert_same(tensors(optimizer), before)
        assert optimizer.param_groups[0]["lr"] == 1e-3

    refused(lambda d: d["param_groups"][0]["params"].pop(), "other numbers of parameters")
    refused(lambda d: d["param_groups"].append(d["param_groups"][0]), "other numbers of parameters")
    refused(lambda d: d["state"][1].pop("state2"), "state2 is missing")
    refused(lambda d: d["state"][1].pop("step"), "step is missing")
    refused(lambda d: d["state"][0].pop("absmax1"), "absmax1 is missing")
    refused(lambda d: d["state"][0].update(state1=torch.zeros(64, 79, dtype=torch.uint8)), "a state is")
    refused(lambda d: d["state"][0].update(absmax1=torch.zeros(19)), "19 scales for a state of 5120")
    refused(lambda d: d["param_groups"][0].update(lr=-1.0), "lr must be 0 or more")
    refused(lambda d: d["param_groups"][0].update(betas=(0.9, 1.0)), "betas must be")
    theirs = torch.optim.AdamW([parameter(64, 80), parameter(5)])
    train(theirs, 0, 1)
    with pytest.raises(ValueError, match="state1 is missing"):
        optimizer.load_state_dict(theirs.state_dict())
    assert_same(tensors(optimizer), before)
