"""The optimizers on parameters that FSDP2 shards: steps, states, and checkpoints for other numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import join, run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from polybit import optim
from polybit.distributed import gather
from polybit.nn import Linear4bit
from polybit.optim import paging

FULL = StateDictOptions(full_state_dict=True)

# With every class whose state or step is made in its own way.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW8bit": {"lr": 0.01, "weight_decay": 0.1},
    "PagedAdamW8bit": {"lr": 0.01, "weight_decay": 0.1},
    "AdEMAMix8bit": {"lr": 0.01, "weight_decay": 0.1},
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "LAMB": {"lr": 0.01, "weight_decay": 0.1},
    "LAMB8bit": {"lr": 0.01, "weight_decay": 0.1, "skip_nonfinite": True},
    "LARS": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.02},
    "LARS8bit": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.02},
}
SAVED = [name for name in OPTIMIZERS if name not in ("LAMB", "LARS8bit")]  # whose other width is saved
SUMMED = ("LAMB", "LARS")  # over ranks, so that rounding differs


class Model(nn.Module):
    """A quantized layer with an adapter, and layers whose rows are uneven, no whole blocks, and fewer than ranks."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = Linear4bit(256, 256, bias=False).requires_grad_(False)
        self.down = nn.Linear(256, 16, bias=False)  # [16, 256]: 8 bits
        self.up = nn.Linear(16, 256, bias=False)  # [256, 16]: rows of 16, 32 bits when sharded
        self.tail = nn.Linear(256, 33)  # 17 and 16 rows
        self.last = nn.Linear(33, 1)  # one row: nothing on rank 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.tail(self.base(x) + self.up(self.down(x))))
        return y


def make(name: str, seed: int = 0, *, sharded: bool = False, **options: Any) -> tuple[Model, optim.Optimizer]:
    model = Model(seed)
    if sharded:
        fully_shard(model)
    # The frozen weight is in a group, too, as in `Optimizer(model.parameters())`.
    return model, getattr(optim, name)(model.parameters(), **{**OPTIMIZERS[name], **options})


def gradient(name: str, param: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + len(name) + param.numel())
    grad = torch.randn(param.shape, generator=generator) * 0.1
    if step == 1 and param.dim() == 2 and param.shape[0] > 1:
        grad[-1] *= 30  # a norm that one rank alone would get wrong
    return grad


def train(model: Model, optimizer: optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for name, param in model.named_parameters():
            if param.requires_grad:
                grad = gradient(name, param, step)
                distributed = isinstance(param, DTensor)
                param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if distributed else grad
        optimizer.step()


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def trained(model: Model) -> dict[str, Tensor]:
    return {key: whole(param.detach()) for key, param in model.named_parameters() if param.requires_grad}


def same(name: str, got: dict[str, Tensor], wanted: dict[str, Tensor], *, but: tuple[str, ...] = ()) -> None:
    """Bit for bit, unless norms were summed in another order. `but`: where widths of states differed on the way."""
    assert got.keys() == wanted.keys()
    for key, value in got.items():
        if key in but:
            continue
        if name.startswith(SUMMED):
            torch.testing.assert_close(value, wanted[key], rtol=2e-6, atol=2e-7, msg=f"{name} {key}")
        else:
            assert torch.equal(value, wanted[key]), (name, key, float((value - wanted[key]).abs().max()))


def reference(name: str, first: int, last: int) -> tuple[Model, optim.Optimizer]:
    """One process, whose states have the widths that they have in shards."""
    model, optimizer = make(name)
    optim.override(model.up.weight, optim_bits=32)
    train(model, optimizer, first, last)
    return model, optimizer


def check_steps(rank: int, size: int) -> None:
    for name in OPTIMIZERS:
        model, optimizer = make(name, sharded=True)
        train(model, optimizer, 0, 3)
        same(name, trained(model), trained(reference(name, 0, 3)[0]))
        check_states(name, model, optimizer, rank, size)


def check_states(name: str, model: Model, optimizer: optim.Optimizer, rank: int, size: int) -> None:
    """Sharded like the parameter, as many bytes as its part needs."""
    for key, param in model.named_parameters():
        if not param.requires_grad:
            assert param not in optimizer.state
            continue
        assert isinstance(param, DTensor)
        state, rows = optimizer.state[param], param.to_local().shape[0]
        eight = "8bit" in name and key in ("down.weight", "tail.weight")
        stacked = name.startswith("AdEMAMix")
        first = state["state1"]
        assert first.to_local().dtype == (torch.uint8 if eight else torch.float32), (name, key)
        assert first.shape == ((2, *param.shape) if stacked else param.shape)
        assert first.to_local().shape == ((2, *param.to_local().shape) if stacked else param.to_local().shape)
        if name.startswith("Paged") and first.to_local().numel() >= paging.PAGED_NUMEL:
            assert first.to_local().untyped_storage().filename
        if eight:
            assert state["absmax1"].to_local().shape == ((2, rows, 1) if stacked else (rows, 1))
            assert whole(state["absmax1"]).count_nonzero() == param.shape[0] * (2 if stacked else 1)
    if size == 2:
        assert model.last.weight.to_local().shape[0] == (1, 0)[rank]
        assert model.tail.weight.to_local().shape[0] == (17, 16)[rank]


def check_norm_of_a_part_is_not_enough(rank: int) -> None:
    """What check_steps would see if a rank took the norms of its own rows."""
    for name in ("LAMB", "LARS"):
        model, optimizer = make(name)
        rows = model.tail.weight[:17] if rank == 0 else model.tail.weight[17:]
        part = nn.Parameter(rows.detach().clone())
        alone = getattr(optim, name)([part], **OPTIMIZERS[name])
        for step in range(3):
            grad = gradient("tail.weight", model.tail.weight, step)
            part.grad = grad[:17] if rank == 0 else grad[17:]
            alone.step()
        train(model, optimizer, 0, 3)
        right = model.tail.weight[:17] if rank == 0 else model.tail.weight[17:]
        assert not torch.allclose(part, right, rtol=2e-5, atol=2e-6)


def check_scaler(rank: int) -> None:
    """An infinity in the rows of one rank: torch tells all of them, and none makes the step."""
    for bad in (False, True):
        (model, optimizer), (single, of_one) = make("AdamW8bit", sharded=True), make("AdamW8bit")
        optim.override(single.up.weight, optim_bits=32)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(1))
        for name, param in model.named_parameters():
            if param.requires_grad:
                param.grad = distribute_tensor(gradient(name, param, 0) * 4, param.device_mesh, param.placements)
        if bad and rank == 1:
            model.tail.weight.grad.to_local()[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (2.0 if bad else 4.0)
        if not bad:
            train(single, of_one, 0, 1)
        same("AdamW8bit", trained(model), trained(single))


def check_override() -> None:
    """By the parameter that there is after sharding; fully_shard forgets what was said of the one before."""
    model = Model()
    optim.override(model.down.weight, optim_bits=32)
    fully_shard(model)
    optim.override(model.tail.weight, optim_bits=32)
    optimizer = optim.AdamW8bit(model.parameters())
    train(model, optimizer, 0, 1)
    bits = {
        key: optimizer.state[param]["state1"].to_local().dtype
        for key, param in model.named_parameters()
        if param.requires_grad
    }
    assert bits["tail.weight"] == torch.float32 and bits["down.weight"] == torch.uint8


def save(name: str, folder: Path, size: int) -> None:
    model, optimizer = make(name, sharded=True)
    train(model, optimizer, 0, 3)
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder / f"{name}-{size}")
    weights, states = get_state_dict(model, optimizer, options=FULL)
    if model.last.weight.device_mesh.get_rank() == 0:
        torch.save({"model": weights, "optimizer": states}, folder / f"{name}-{size}.pt")


def load(name: str, folder: Path, size: int) -> None:
    """What `size` ranks saved, loaded here; then two more steps."""
    aim = reference(name, 0, 5)[0]
    wanted = trained(aim)
    model, optimizer = make(name, seed=1, sharded=True, lr=0.5)
    weights, states = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder / f"{name}-{size}")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    assert {group["lr"] for group in optimizer.param_groups} == {OPTIMIZERS[name]["lr"]}
    train(model, optimizer, 3, 5)
    same(name, trained(model), wanted)
    frozen = gather(model.base.weight).inner_tensors()
    assert all(torch.equal(inner, frozen[part]) for part, inner in aim.base.weight.inner_tensors().items())

    # The gathered file.
    saved = torch.load(folder / f"{name}-{size}.pt", weights_only=True)
    model, optimizer = make(name, seed=1, sharded=True)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=FULL)
    train(model, optimizer, 3, 5)
    same(name, trained(model), wanted)


def check_loading_the_state_of_one_process(name: str, rank: int) -> None:
    """Flat scales, and 8 bits where shards have 32: the value of each is the same."""
    single, of_one = make(name)
    train(single, of_one, 0, 3)
    model, optimizer = make(name, sharded=True)
    with torch.no_grad():
        for param, value in zip(model.parameters(), single.parameters(), strict=True):
            if param.requires_grad:
                param.copy_(distribute_tensor(value, param.device_mesh, param.placements))
    set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(single, of_one), options=FULL)
    check_states(name, model, optimizer, rank, 2)
    wide, wide_optimizer = make(name, optim_bits=32)  # the values of the states, whatever their widths
    wide_optimizer.load_state_dict(of_one.state_dict())
    for (key, param), plain in zip(model.named_parameters(), wide.parameters(), strict=True):
        if key == "up.weight":
            got, wanted = optimizer.state[param], wide_optimizer.state[plain]
            assert all(torch.equal(whole(got[entry]), x) for entry, x in wanted.items() if entry.startswith("state"))
    train(model, optimizer, 3, 5)
    train(single, of_one, 3, 5)
    same(name, trained(model), trained(single), but=("up.weight",))


def check_broadcast(name: str, rank: int, folder: Path) -> None:
    """The gathered states of the optimizer, read by one rank alone."""
    saved = torch.load(folder / f"{name}-2.pt", weights_only=True)
    model, optimizer = make(name, seed=1, sharded=True)
    set_model_state_dict(model, saved["model"], options=FULL)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"] if rank == 0 else {}, options=options)
    train(model, optimizer, 3, 5)
    same(name, trained(model), trained(reference(name, 0, 5)[0]))


def checks(rank: int, size: int, folder: Path) -> None:
    paging.PAGED_NUMEL = 1000  # small states, too
    if size == 1:
        for name in SAVED:
            load(name, folder, 2)
            save(name, folder, 1)
        return
    if not (folder / "AdamW-1").exists():
        check_steps(rank, size)
        check_norm_of_a_part_is_not_enough(rank)
        check_override()
        check_scaler(rank)
        for name in ("AdamW", "AdamW8bit", "AdEMAMix8bit", "LAMB8bit"):
            check_loading_the_state_of_one_process(name, rank)
        for name in SAVED:
            save(name, folder, 2)
        load("AdamW8bit", folder, 2)
        check_broadcast("AdamW8bit", rank, folder)
    else:
        for name in SAVED:
            load(name, folder, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes saved after their checks passed."""
    path = tmp_path_factory.mktemp("fsdp2_optim")
    run_ranks(__file__, 2, path)
    return path


def test_steps_of_two_ranks_are_those_of_one_process(folder: Path) -> None:
    assert all((folder / f"{name}-2" / ".metadata").exists() for name in SAVED)


def test_checkpoints_from_two_ranks_to_one_and_back(folder: Path) -> None:
    run_ranks(__file__, 1, folder)
    run_ranks(__file__, 2, folder)


@pytest.mark.parametrize("name", SAVED)
def test_one_process_without_ranks_loads_what_two_saved(folder: Path, name: str) -> None:
    dcp_to_torch_save(folder / f"{name}-2", folder / f"{name}-sharded.pt")
    for file in (f"{name}-2.pt", f"{name}-sharded.pt"):
        saved = torch.load(folder / file, weights_only=True)
        model, optimizer = make(name, seed=1)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        bits = 8 if "8bit" in name else 32  # also of up.weight, which has 32 in shards
        assert optimizer.state[model.up.weight]["state1"].dtype == (torch.uint8 if bits == 8 else torch.float32)
        train(model, optimizer, 3, 5)
        same(name, trained(model), trained(reference(name, 0, 5)[0]), but=("up.weight",) if bits == 8 else ())


if __name__ == "__main__":
    join(checks)
