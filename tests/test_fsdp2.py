"""FSDP2 and DDP with two gloo processes: adapters over quantized layers do what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import join, run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from polybit import distributed
from polybit.nn import Linear4bit, Linear8bit, LinearKbit
from polybit.qtensor import QTensor, quantize

RANKS = 2
FULL = StateDictOptions(full_state_dict=True)


class Adapted(nn.Module):
    """A frozen layer with a trainable low-rank update."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


def make_model(seed: int = 0) -> nn.Sequential:
    """Doubly quantized with two groups of scales, plain with rows that do not divide, 3 bits, int8."""
    torch.manual_seed(seed)
    return nn.Sequential(
        Adapted(Linear4bit(128, 96, block_size=32)),
        nn.ReLU(),
        Adapted(Linear4bit(96, 77, block_size=32, double_quant=False)),
        nn.Linear(77, 64),
        Adapted(LinearKbit(64, 33, format="nf3", bias=False)),
        nn.Linear(33, 64),
        Adapted(Linear8bit(64, 33)),
    )


def shard(model: nn.Sequential, **options: Any) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, Adapted):
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def inputs() -> Tensor:
    return torch.randn(RANKS, 5, 128, generator=torch.Generator().manual_seed(1))


def check_shards(model: nn.Sequential, rank: int) -> None:
    rows = {0: [48, 48], 2: [39, 38], 4: [17, 16], 6: [17, 16]}
    widths = {0: (64, (4,)), 2: (48, (3,)), 4: (24, (1,)), 6: (64, ())}
    for i, (row_bytes, blocks) in widths.items():
        weight = model[i].base.weight
        assert isinstance(weight, DTensor) and weight.shape[0] == sum(rows[i])
        local = weight.to_local()
        assert isinstance(local, QTensor)
        assert local.q.shape == (rows[i][rank], row_bytes) and local.absmax.shape == (rows[i][rank], *blocks)
        assert local.absmax.dtype == (torch.uint8 if local.double_quant else torch.float32)
    assert "format=nf4" in repr(model)


def check_training(rank: int, **options: Any) -> None:
    """Loss and gradients are those of one process; a second pass, and evaluation, give the same output."""
    reference, model, x = make_model(), shard(make_model(), **options), inputs()
    check_shards(model, rank)
    output = model(x[rank])
    assert torch.equal(output, reference(x[rank]))
    loss = output.square().mean()
    loss.backward()
    total = torch.stack([reference(part).square().mean() for part in x]).mean()
    total.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / RANKS, total.detach(), rtol=1e-6, atol=0.0)
    wanted = dict(reference.named_parameters())
    trained = 0
    for name, parameter in model.named_parameters():
        if "base" in name:
            assert parameter.grad is None
        elif "up" in name or "down" in name:
            torch.testing.assert_close(parameter.grad.full_tensor(), wanted[name].grad, rtol=1e-5, atol=1e-7)
            assert parameter.grad.to_local().abs().sum() > 0
            trained += 1
    assert trained == 8
    assert torch.equal(model(x[rank]), output)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x[rank]), output)
    assert torch.equal(model.train()(x[rank]), output)


def check_gather(rank: int) -> None:
    """The whole weight comes back, bytes and value; a doubly quantized shard alone says that it cannot be read."""
    reference, model = make_model(), shard(make_model())
    for i in (0, 2, 4, 6):
        whole, wanted = distributed.gather(model[i].base.weight), reference[i].base.weight
        assert whole.is_whole and whole.inner_tensors().keys() == wanted.inner_tensors().keys()
        assert all(torch.equal(inner, getattr(wanted, name)) for name, inner in whole.inner_tensors().items())
        local = model[i].base.weight.to_local()
        if local.double_quant:
            with pytest.raises(ValueError, match="does not know its place.*gather"):
                local.dequantize()
    assert distributed.gather(wanted) is wanted
    layer = model[0]
    assert isinstance(layer, FSDPModule)
    layer.unshard()
    assert torch.equal(layer.base.weight.dequantize(), reference[0].base.weight.dequantize())
    layer.reshard()


def check_policies(rank: int) -> None:
    """Offloading to the CPU keeps the outputs; mixed precision gives the layer's outputs in its dtype."""
    x = inputs()
    offloaded = shard(make_model(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    assert torch.equal(offloaded(x[rank]), make_model()(x[rank]))
    mixed = shard(make_model(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert torch.equal(mixed(x[rank]), make_model().bfloat16()(x[rank].bfloat16()))


def check_state_dicts(rank: int, folder: Path) -> None:
    model, x = shard(make_model()), inputs()
    output = model(x[rank])
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert bool(full) == (rank == 0)
    if rank == 0:
        torch.save(full, folder / "full.pt")
    sharded = get_model_state_dict(model)
    bytes_of_rows, scales = sharded["0.base.weight"], sharded["0.base.weight.absmax"]
    assert isinstance(bytes_of_rows, DTensor) and bytes_of_rows.shape == (96, 64)
    assert isinstance(scales, DTensor) and scales.shape == (96, 4) and type(scales.to_local()) is Tensor
    assert bytes_of_rows.to_local().data_ptr() == model[0].base.weight.to_local().q.data_ptr()
    dcp.save(sharded, checkpoint_id=folder / "dcp")

    # Loaded in place into a sharded model that has run already, so that its gathered weights must be refreshed.
    other = shard(make_model(seed=1))
    assert not torch.equal(other(x[rank]), output)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(other, state)
    assert torch.equal(other(x[rank]), output)

    # The state dict of one process, flat as bitsandbytes writes it; then into a model made on the meta device.
    one_process = make_model().state_dict()
    assert one_process["0.base.weight"].shape == (96 * 64, 1)
    layer, wanted = shard(make_model(seed=2))[2].base, make_model()[2].base
    layer.load_state_dict({**wanted.state_dict(), "bias": layer.bias}, strict=True)
    assert torch.equal(distributed.gather(layer.weight).dequantize(), wanted.weight.dequantize())
    flat = shard(make_model(seed=2))
    set_model_state_dict(flat, one_process, options=FULL)
    assert torch.equal(flat(x[rank]), output)
    with torch.device("meta"):
        empty = make_model()
    result = set_model_state_dict(shard(empty), torch.load(folder / "full.pt", weights_only=True), options=FULL)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(empty(x[rank]), output)
    check_shards(empty, rank)


def check_meta(rank: int, folder: Path) -> None:
    """A model that is sharded before it has memory, filled from a sharded checkpoint."""
    with torch.device("meta"):
        model = make_model()
    shard(model).to_empty(device="cpu")
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(model, state)
    assert torch.equal(model(inputs()[rank]), make_model()(inputs()[rank]))


def check_replicas(rank: int) -> None:
    """DistributedDataParallel copies the parameters of rank 0 to all, bytes and all; gradients are their mean."""
    reference, model, x = make_model(), make_model(), inputs()
    parallel = DistributedDataParallel(model)
    assert all(torch.equal(entry, reference.state_dict()[key]) for key, entry in model.state_dict().items())
    output = parallel(x[rank])
    assert torch.equal(output, reference(x[rank]))
    output.square().mean().backward()
    torch.stack([reference(part).square().mean() for part in x]).mean().backward()
    for (name, parameter), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (parameter.grad is None) == (wanted.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-5, atol=1e-7)


def check_collectives(rank: int) -> None:
    x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(4))
    for format in ("nf4", "nf3", "dynamic8", "int8"):
        weight, wanted = quantize(x[rank], format), quantize(x[1], format)
        dist.broadcast(weight, 1)
        assert all(torch.equal(inner, getattr(wanted, name)) for name, inner in weight.inner_tensors().items())
        with pytest.raises(NotImplementedError, match="use a collective on its inner_tensors"):
            dist.all_reduce(weight)


def check_unaligned(rank: int) -> None:
    with pytest.raises(ValueError, match="cut inside a block.*choose a block size that divides the row"):
        fully_shard(Linear4bit(96, 64), mesh=init_device_mesh("cpu", (RANKS,)))


def check_one_process(folder: Path) -> None:
    """What two processes wrote, read by one, sharded over itself."""
    model = shard(make_model(seed=3))
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(model, state)
    x = inputs()
    assert torch.equal(model(x[0]), make_model()(x[0]))


def checks(rank: int, size: int, folder: Path) -> None:
    if size == 1:
        check_one_process(folder)
        return
    for reshard in (True, False):
        check_training(rank, reshard_after_forward=reshard)
    check_gather(rank)
    check_policies(rank)
    check_state_dicts(rank, folder)
    check_meta(rank, folder)
    check_replicas(rank)
    check_collectives(rank)
    check_unaligned(rank)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote after their checks passed."""
    path = tmp_path_factory.mktemp("fsdp2")
    run_ranks(__file__, RANKS, path)
    return path


def test_two_processes_do_what_one_does(folder: Path) -> None:
    assert (folder / "full.pt").exists() and (folder / "dcp" / ".metadata").exists()


def test_the_gathered_state_dict_loads_strictly_into_one_process(folder: Path) -> None:
    state, fresh, original, x = torch.load(folder / "full.pt", weights_only=True), make_model(1), make_model(), inputs()
    assert state["0.base.weight"].shape == (96, 64) and all(type(value) is Tensor for value in state.values())
    assert state.keys() == original.state_dict().keys()
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh(x), original(x))
    again = fresh.state_dict()
    assert all(torch.equal(again[key], value) for key, value in original.state_dict().items())


def test_the_sharded_checkpoint_loads_into_one_process(folder: Path) -> None:
    dcp_to_torch_save(folder / "dcp", folder / "dcp.pt")
    fresh, x = make_model(1), inputs()
    fresh.load_state_dict(torch.load(folder / "dcp.pt", weights_only=True), strict=True)
    assert torch.equal(fresh(x), make_model()(x))
    run_ranks(__file__, 1, folder)


def test_entries_are_found_in_one_process() -> None:
    model = make_model()
    assert get_model_state_dict(model).keys() == model.state_dict().keys()
    assert isinstance(quantize(torch.ones(2, 64), "nf4").quant_state.bitsandbytes__nf4, QTensor)


if __name__ == "__main__":
    join(checks)
