"""State dicts of bitsandbytes' optimizers: theirs load here, ours load there, and both go on alike."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import pytest
import torch
from optimizers import parameter, train
from torch import nn

from polybit import optim

if os.environ.get("CI") == "true":
    import bitsandbytes
else:
    bitsandbytes = pytest.importorskip("bitsandbytes")

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
