"""The quantized linear layers and quantize_."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from polybit.nn import (
    Embedding4bit,
    Embedding8bit,
    EmbeddingKbit,
    Linear4bit,
    Linear8bit,
    Linear8bitTraining,
    LinearKbit,
    StableEmbedding,
    quantize_,
)
from polybit.qtensor import QTensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.ModuleList([nn.Linear(64, 96), nn.Linear(96, 64, bias=False)])
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lm_head(self.norm(self.block[1](torch.relu(self.block[0](x)))))
        return y


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4", "nf3", "int2"])
def test_kbit_layer_is_the_dense_layer_of_its_weight(format: str, double_quant: bool) -> None:
    dense = nn.Linear(80, 33)
    layer = LinearKbit.from_linear(dense, format, double_quant=double_quant)
    x = randn(2, 7, 80)
    wanted = nn.functional.linear(x, layer.weight.dequantize(), dense.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    assert layer.bias is dense.bias


def test_double_quantization_keeps_the_scales() -> None:
    dense = nn.Linear(512, 512)
    plain = LinearKbit.from_linear(dense, double_quant=False).weight
    nested = LinearKbit.from_linear(dense, double_quant=True).weight
    assert torch.equal(plain.q, nested.q) and nested.absmax.dtype == torch.uint8
    torch.testing.assert_close(nested.dequantize(), plain.dequantize(), rtol=0.02, atol=1e-4)
    assert nested.stored_bytes < plain.stored_bytes


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_8bit_layer_is_near_the_dense_one(threshold: float) -> None:
    dense = nn.Linear(128, 32)
    layer = Linear8bit.from_linear(dense, threshold=threshold)
    x = randn(9, 128)
    x[:, 5] *= 20
    error = (layer(x) - dense(x)).norm() / dense(x).norm()
    assert error < (0.03 if threshold == 0 else 0.012)


def test_outliers_are_what_the_threshold_saves() -> None:
    dense = nn.Linear(128, 32, bias=False)
    x = randn(9, 128)
    x[:, 5] *= 100
    plain, mixed = (
        (Linear8bit.from_linear(dense, threshold=threshold)(x) - dense(x)).norm() for threshold in (0.0, 6.0)
    )
    assert mixed < plain / 5


def test_new_layers_have_the_sizes_asked_for() -> None:
    layer = Linear4bit(64, 32, format="fp4", block_size=128, double_quant=False, dtype=torch.bfloat16)
    assert (layer.weight.format_name, layer.weight.block_size, layer.weight.dtype) == ("fp4", 128, torch.bfloat16)
    assert layer(randn(3, 64).bfloat16()).dtype == torch.bfloat16
    assert Linear8bit(64, 32, bias=False).bias is None
    assert LinearKbit(64, 32, format="lloyd2").weight.search
    meta = Linear4bit(64, 32, device="meta")
    assert meta.weight.q.is_meta and meta(torch.empty(3, 64, device="meta")).shape == (3, 32)


def test_the_weight_is_frozen() -> None:
    for layer in (Linear4bit(64, 32), Linear8bit(64, 32)):
        assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
def test_a_cast_of_the_module_touches_no_stored_byte(cast: torch.dtype) -> None:
    layer = nn.Sequential(Linear4bit(64, 32), Linear8bit(32, 16))
    before = [copy.deepcopy(m.weight.inner_tensors()) for m in layer]
    layer.to(cast)
    for module, inner in zip(layer, before, strict=True):
        assert module.weight.dtype == cast and module.bias.dtype == cast
        assert all(torch.equal(inner[name], now) for name, now in module.weight.inner_tensors().items())
    assert layer(randn(3, 64).to(cast)).dtype == cast


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear4bit": lambda: Linear4bit(96, 40),
    "Linear4bit plain scales": lambda: Linear4bit(96, 40, double_quant=False),
    "LinearKbit nf3": lambda: LinearKbit(96, 40, format="nf3"),
    "LinearKbit lloyd2": lambda: LinearKbit(96, 40, format="lloyd2", block_size=32),
    "Linear8bit": lambda: Linear8bit(96, 40),
    "Linear8bit without outliers": lambda: Linear8bit(96, 40, threshold=0.0),
    "Linear8bitTraining": lambda: Linear8bitTraining(96, 40),
    "Embedding4bit": lambda: Embedding4bit(50, 96),
    "EmbeddingKbit nf2": lambda: EmbeddingKbit(50, 96, format="nf2"),
    "Embedding8bit": lambda: Embedding8bit(50, 96),
    "StableEmbedding": lambda: StableEmbedding(50, 96),
    "mixed": lambda: nn.Sequential(Embedding8bit(50, 96), Linear4bit(96, 64), Linear8bit(64, 40)),
}


def digest(module: nn.Module) -> str:
    """sha256 over everything that is stored: names, shapes and bytes of the inner tensors and of the rest."""
    total = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        parts = tensor.inner_tensors() if isinstance(tensor, QTensor) else {"": tensor.detach()}
        for part, inner in parts.items():
            total.update(f"{name} {part} {inner.dtype} {list(inner.shape)}".encode())
            total.update(inner.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_1000_forwards_from_4_threads_change_no_stored_byte(name: str, train: bool) -> None:
    torch.manual_seed(0)
    module = LAYERS[name]().train(train)
    x = randn(5, 96) * 4 if name.startswith("Linear") else torch.randint(0, 50, (3, 5))
    before, state = digest(module), {key: value.clone() for key, value in module.state_dict().items()}
    with torch.no_grad():
        wanted = module(x)
    start = threading.Barrier(4)

    def forwards() -> int:
        start.wait()
        with torch.set_grad_enabled(train):  # each thread has its own switch
            return sum(torch.equal(module(x), wanted) for _ in range(250))

    with ThreadPoolExecutor(4) as pool:
        equal = [future.result() for future in [pool.submit(forwards) for _ in range(4)]]
    assert equal == [250, 250, 250, 250]
    assert digest(module) == before
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())


def test_the_digest_sees_every_stored_tensor() -> None:
    module = Linear4bit(96, 40)
    for inner in module.weight.inner_tensors().values():
        before = digest(module)
        inner.reshape(-1).view(torch.uint8)[0] ^= 1
        assert digest(module) != before


def test_autocast_runs_in_its_dtype() -> None:
    for layer in (Linear4bit(64, 32), Linear8bit(64, 32)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(randn(3, 64))
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(randn(3, 64)), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("format", "kind"), [("nf4", Linear4bit), ("nf3", LinearKbit), ("int8", Linear8bit)])
def test_quantize_replaces_linears(format: str, kind: type[nn.Module]) -> None:
    model, x = Model().eval(), randn(5, 64)
    wanted = model(x)
    assert quantize_(model, format) is model
    assert [type(m) for m in model.block] == [kind, kind]
    assert type(model.lm_head) is nn.Linear and not model.block[0].training
    assert (model(x) - wanted).norm() / wanted.norm() < (0.02 if format == "int8" else 0.4)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), []),
        (("lm_head",), ["lm_head"]),
        (("block.1",), ["block.1"]),
        (("block.*",), ["block.0", "block.1"]),
        (("1", "lm_*"), ["block.1", "lm_head"]),
    ],
)
def test_skip(skip: tuple[str, ...], left: list[str]) -> None:
    model = quantize_(Model(), "nf4", skip=skip)
    assert [name for name, m in model.named_modules() if type(m) is nn.Linear] == left


def test_shared_modules_stay_shared() -> None:
    shared = nn.Linear(64, 64)
    model = quantize_(nn.Sequential(shared, nn.Linear(64, 64), shared), "nf4")
    assert model[0] is model[2] and isinstance(model[0], Linear4bit)


def test_subclasses_of_linear_are_left_alone() -> None:
    model = quantize_(nn.Sequential(nn.TransformerEncoderLayer(64, 4, batch_first=True)), "nf4")
    assert type(model[0].self_attn.out_proj) is not Linear4bit
    assert type(model[0].linear1) is Linear4bit


def test_quantize_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = quantize_(Model(), "nf4")
    assert isinstance(model.block[0].weight, QTensor) and model.block[0].weight.q.is_meta


def test_compile_of_a_model() -> None:
    for format in ("nf4", "int8"):
        model, x = quantize_(Model(), format).eval(), randn(5, 64)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("how", ["compiled", "exported"])
def test_a_compiled_or_exported_layer_can_still_be_cast_and_moved(how: str) -> None:
    layer, x = Linear4bit(64, 32), randn(5, 64)
    wanted, before = layer(x), layer.weight.dequantize()
    if how == "compiled":
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), wanted)
    else:
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), wanted)
    assert torch.equal(layer.half().float().weight.dequantize(), before)
    assert list(dict(layer.named_parameters())) == ["weight", "bias"]
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(layer.weight.dequantize(), before)
    assert layer.to("meta").weight.q.is_meta


def test_share_memory() -> None:
    layer, x = Linear4bit(64, 32), randn(5, 64)
    wanted = layer(x)
    assert not layer.weight.is_shared()
    assert layer.share_memory().weight.is_shared()
    assert torch.equal(layer(x), wanted)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.15's own opcheck
@pytest.mark.parametrize("op", ["matmul_kbit", "linear_int8"])
def test_opcheck_with_gradients(op: str) -> None:
    x, bias = randn(3, 64).requires_grad_(), randn(8).requires_grad_()
    if op == "matmul_kbit":
        weight = Linear4bit(64, 8).weight
        args = (x, *weight.operands(), bias, None, 8, 64, 4, 0, 0)
    else:
        weight = Linear8bit(64, 8).weight
        args = (x, weight.q, weight.absmax, bias, 6.0, 0)
    result = torch.library.opcheck(getattr(torch.ops.polybit, op).default, args)
    assert set(result.values()) == {"SUCCESS"} and len(result) == 4


def test_training_under_compile() -> None:
    model, x = quantize_(Model(), "nf4"), randn(5, 64).requires_grad_()
    model(x).square().sum().backward()
    wanted = x.grad
    x.grad = None
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    torch.testing.assert_close(x.grad, wanted)
