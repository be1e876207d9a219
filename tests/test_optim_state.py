"""8-bit states: zero, small second moments, widths, overrides, and state dicts of bitsandbytes in both directions."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import bitsandbytes
import pytest
import torch
from optimizers import RULES, Calls, assert_same, make, parameter, set_grad, tensors, train
from torch import Tensor, nn

import polybit
from polybit import optim
from polybit.spec import codebooks
from polybit.spec import optim as spec

SIGNED, UNSIGNED = (codebooks.dynamic(signed=signed).code for signed in (True, False))


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
    assert bad >= 5 * good and good < 0.5


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


# --- bitsandbytes


# (class, options, tolerated error of 10 more steps as a part of their way). Their map for 8-bit states of RMSprop and
# Adagrad is the signed one; ours is loaded by value, so that steps agree to the precision of 8 bits only.
PEERS: list[tuple[str, dict[str, Any], float]] = [
    ("Adam8bit", {}, 5e-3),
    ("AdamW", {}, 1e-5),
    ("AdamW8bit", {}, 5e-3),
    ("Lion8bit", {}, 2e-2),  # a sign here and there
    ("SGD8bit", {"lr": 1e-2, "momentum": 0.9}, 5e-3),
    ("AdEMAMix", {}, 1e-5),
    ("AdEMAMix8bit", {}, 5e-3),
    ("PagedAdamW8bit", {}, 5e-3),
    ("RMSprop8bit", {}, 3e-2),
    ("Adagrad8bit", {}, 3e-2),
]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(("name", "options", "tolerance"), PEERS, ids=[name for name, *_ in PEERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dicts_of_bitsandbytes_go_both_ways(
    name: str, options: dict[str, Any], tolerance: float, dtype: torch.dtype
) -> None:
    """Five steps there; then ours goes on from theirs, and theirs from ours: the same parameters."""
    theirs = getattr(bitsandbytes.optim, name)([parameter(60, 103, dtype=dtype), parameter(9)], **options)
    train(theirs, 0, 5)

    def go_on(make_one: Any, saved: dict[str, Any]) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        params = [nn.Parameter(param.detach().clone()) for param in theirs.param_groups[0]["params"]]
        optimizer = make_one(params, **options)
        optimizer.load_state_dict(saved)
        return optimizer, params

    ours, our_params = go_on(getattr(optim, name), theirs.state_dict())
    for param, peer in zip(our_params, theirs.param_groups[0]["params"]):
        state, source = ours.state[param], theirs.state[peer]
        assert state["step"] == 5
        for key in [key for key in source if key.startswith(("state", "absmax"))]:
            assert state[key].dtype == source[key].dtype and state[key].shape == source[key].shape
            if not name.startswith(("RMSprop", "Adagrad")):
                assert torch.equal(state[key], source[key]), key
    for key in ("lr", "weight_decay"):
        assert ours.param_groups[0][key] == theirs.param_groups[0][key]
    back, back_params = go_on(getattr(bitsandbytes.optim, name), copy.deepcopy(ours.state_dict()))

    start = [param.detach().float().clone() for param in our_params]
    for optimizer in (theirs, ours, back):
        train(optimizer, 5, 15)
    for k, (want, *got) in enumerate(zip(theirs.param_groups[0]["params"], our_params, back_params)):
        way = (want.detach().float() - start[k]).norm()
        limit = tolerance + 0.1 * (dtype == torch.bfloat16)  # an ulp of bf16 is a good part of the way
        errors = [float((x.detach().float() - want.detach().float()).norm() / way) for x in got]
        print(
            f"{name}: after 10 more steps ours is off by {errors[0]:.1e} of their way, theirs from ours {errors[1]:.1e}"
        )
        assert errors[0] <= limit and errors[1] <= limit


@pytest.mark.parametrize("name", ["LAMB", "LARS"])
def test_states_of_rules_that_differ_load_from_bitsandbytes(name: str) -> None:
    """Their LAMB and LARS only clip the update; what they keep is the same."""
    options = {"lr": 1e-2, "momentum": 0.9} if name == "LARS" else {}
    param = parameter(60, 100)
    theirs = getattr(bitsandbytes.optim, name)([param], **options)
    train(theirs, 0, 3)
    ours = getattr(optim, name)([param])
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state[param]["state1"], theirs.state[param]["state1"])
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    train(ours, 3, 4)


def test_our_saved_file_is_read_by_bitsandbytes(tmp_path: Any) -> None:
    """Through torch.save, with weights_only, and with groups of different options."""
    first, second = parameter(64, 80), parameter(70)
    groups = [{"params": [first], "weight_decay": 0.0}, {"params": [second], "lr": 1e-2}]
    ours = optim.PagedAdamW8bit(groups, lr=1e-3)
    train(ours, 0, 3)
    torch.save(ours.state_dict(), tmp_path / "optimizer.pt")
    copies = [nn.Parameter(param.detach().clone()) for param in (first, second)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = bitsandbytes.optim.AdamW8bit([{"params": [param]} for param in copies])
        theirs.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(theirs, 3, 4)
    train(ours, 3, 4)
    assert [group["lr"] for group in theirs.param_groups] == [1e-3, 1e-2]
    for ours_now, theirs_now in zip((first, second), copies):
        torch.testing.assert_close(ours_now, theirs_now, rtol=0, atol=1e-7)
