"""On a GPU that torch calls "cuda", NVIDIA's or AMD's: conformance, streams, graphs, devices. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import polybit
from polybit import optim
from polybit.nn import Linear4bit
from polybit.spec import OPS, codebooks
from polybit.testing import check

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BACKEND = "hip" if torch.version.hip else "cuda"


@pytest.mark.parametrize("op", OPS)
def test_samples(op: str) -> None:
    result = check(op, BACKEND, "cuda")
    assert (result.kind, result.unsupported) == ("native", 0)
    result.raise_failures()


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """NF4 in blocks of 64."""
    book = (part.to(x.device) for part in codebooks.kbit()["nf4"])
    q, absmax = torch.ops.polybit.quantize_kbit(x, *book, 64, 4, 0)
    assert x.is_cpu or polybit.backends.last_backend() == BACKEND
    return q, absmax


def assert_as_on_the_cpu(x: Tensor, got: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(got, quantized(x.cpu())):
        assert torch.equal(one.cpu(), other)


def test_work_is_ordered_by_the_stream_that_torch_has_current() -> None:
    x = torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
        x.normal_()  # comes late: a kernel on another stream would still see zeros
        got = quantized(x)
    stream.synchronize()
    assert_as_on_the_cpu(x, got)


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        run()  # what is made at the first call is made before
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_in_a_graph(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Linear4bit.from_linear(torch.nn.Linear(256, 384).to("cuda", dtype))
    x = torch.randn(rows, 256, device="cuda", dtype=dtype)
    with torch.no_grad():
        graph, out = captured(lambda: layer(x))
        x.normal_()
        graph.replay()
        assert torch.equal(out, layer(x))


def test_an_optimizer_in_a_graph_of_its_own_op() -> None:
    param, grad = torch.randn(5000, device="cuda"), torch.randn(5000, device="cuda")
    state = torch.zeros_like(param)
    hyper = torch.zeros(17, device="cuda")
    hyper[0], hyper[3], hyper[4] = 1.0, 0.1, 0.9

    def step() -> Tensor:
        torch.ops.polybit.optimizer_32bit([param], [grad], [state], [], [], hyper, 4, 0, 0)
        return param

    before = param.clone()
    graph, _ = captured(step)
    assert not torch.equal(before, param)
    before.copy_(param)
    graph.replay()
    assert not torch.equal(before, param)


def test_tensors_of_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(10_000, device="cuda:1")
    assert torch.cuda.current_device() == 0
    got = quantized(x)
    assert got[0].device == x.device and torch.cuda.current_device() == 0
    assert_as_on_the_cpu(x, got)


def test_a_row_outside_the_table_is_nan() -> None:
    q, absmax, _ = torch.ops.polybit.quantize_int8(torch.randn(10, 64, device="cuda"), 0.0)
    index = torch.tensor([3, -1, 10], device="cuda")
    rows = torch.ops.polybit.gather_int8(index, q, absmax, torch.float32)
    assert rows.isnan().all(1).tolist() == [False, True, True]


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW", "LAMB8bit"])
def test_paged_states_are_pinned_and_do_not_change_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polybit.optim.windows.WINDOW_BYTES", 400_000)
    pairs = []
    for cls in (getattr(optim, name), getattr(optim, f"Paged{name}")):
        params = [torch.nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(n)).cuda()) for n in SIZES]
        optimizer = cls(params, lr=1e-2)
        for _ in range(3):
            for i, param in enumerate(params):
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(i)).cuda()
            optimizer.step()
        pairs.append((params, optimizer))
    assert all(torch.equal(one, other) for one, other in zip(pairs[0][0], pairs[1][0]))
    states = [state["state1"] for state in pairs[1][1].state.values() if state["state1"].numel() >= 100_000]
    assert states and all(state.is_pinned() for state in states)


SIZES = (300_000, 1000, 150_000, 500_000)


def test_a_linear_layer_trains_like_on_the_cpu() -> None:
    """LoRA's backward through a 4-bit weight, on both devices."""
    torch.manual_seed(0)
    layer = Linear4bit.from_linear(torch.nn.Linear(256, 128))
    x = torch.randn(40, 256, requires_grad=True)
    layer(x).square().sum().backward()
    there = x.detach().cuda().requires_grad_()
    layer.cuda()(there).square().sum().backward()
    assert x.grad is not None and there.grad is not None
    torch.testing.assert_close(there.grad.cpu(), x.grad, rtol=1e-4, atol=1e-4)
