"""What layers compute in: compute_dtype, and activations in int8; from the function to config.json."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers

from polybit import PolybitConfig, QTensor, functional, quantize
from polybit.formats import list_formats
from polybit.nn import Linear4bit, Linear8bit, LinearKbit, Settings, dequantize_, quantize_

pytestmark = pytest.mark.usefixtures("one_thread")

KBIT = [name for name in list_formats() if name not in ("int8", "dynamic8")]
BF16 = torch.bfloat16


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def by_hand(x: Tensor, weight: QTensor) -> Tensor:
    """The product in fp64: of the rows of x and of the codebook, both rounded to 127 steps. No double quantization."""
    assert weight.code is not None
    largest = weight.code.abs().max()
    rounded = (weight.code * (127 / largest)).round().double() * (largest.double() / 127)
    scale = weight.absmax.double().view(len(weight), -1, 1)
    values = weight.dequantize().double().view(*scale.shape[:2], weight.block_size) / scale
    w = (rounded[(values.unsqueeze(-1) - weight.code).abs().argmin(-1)] * scale).view(weight.shape)
    x_step = x.double().abs().amax(-1, keepdim=True) / 127
    return ((x.double() / x_step).round() * x_step) @ w.t()


@pytest.mark.parametrize("format", KBIT)
def test_the_product_with_int8_activations(format: str) -> None:
    weight = quantize(noise(24, 128), format, block_size=32, double_quant=False)
    x, bias = noise(5, 128, seed=1), noise(24, seed=2)
    got = functional.linear(x, weight, bias, activations="int8")
    torch.testing.assert_close(got.double(), by_hand(x, weight) + bias.double(), rtol=1e-5, atol=1e-4)
    exact = functional.linear(x, weight, bias)
    assert 1e-4 < distance(got, exact) < 0.012
    for dtype, unit in ((torch.float16, 2.0**-10), (BF16, 2.0**-7)):
        low = functional.linear(x.to(dtype), weight, bias, activations="int8")
        assert low.dtype == dtype and distance(low, exact) < 0.012 + 2 * unit


def test_gradients_pass_the_rounding() -> None:
    weight = quantize(noise(24, 128), "nf4")
    dense = weight.dequantize()
    x, bias = noise(2, 3, 128, seed=1).requires_grad_(), noise(24, seed=2).requires_grad_()
    dy = noise(2, 3, 24, seed=3)
    functional.linear(x, weight, bias, activations="int8").backward(dy)
    torch.testing.assert_close(x.grad, dy @ dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, dy.sum((0, 1)))

    def twice(product: Any) -> Tensor:
        (dx,) = torch.autograd.grad(product(x).square().sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), x)
        return ddx

    got = twice(lambda x: functional.linear(x, weight, activations="int8"))
    assert distance(got, twice(lambda x: F.linear(x, dense))) < 0.02
    each = torch.func.vmap(lambda row: functional.linear(row, weight, activations="int8"))(x.detach()[0])
    assert torch.equal(each, functional.linear(x.detach()[0], weight, activations="int8"))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # dynamo does it
def test_a_layer_of_each_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    options: list[dict[str, Any]] = [{"activations": "int8"}, {"compute_dtype": BF16}]
    for layer in (
        *(Linear4bit.from_linear(nn.Linear(64, 32), **o) for o in options),
        Linear8bit.from_linear(nn.Linear(64, 32), threshold=0.0, compute_dtype=BF16),
    ):
        x = noise(4, 64).requires_grad_()
        want = layer(x)
        (want_dx,) = torch.autograd.grad(want.sum(), x)
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        (dx,) = torch.autograd.grad(got.sum(), x)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(dx, want_dx)


@pytest.mark.parametrize("kind", (LinearKbit, Linear8bit))
def test_the_dtype_that_a_layer_computes_in(kind: Any) -> None:
    dense = nn.Linear(128, 24)
    plain, layer = kind.from_linear(dense), kind.from_linear(dense, compute_dtype=BF16)
    x = noise(5, 128)
    want = plain(x.to(BF16)).float()
    assert torch.equal(layer(x), want) and 1e-4 < distance(want, plain(x)) < 0.02
    assert layer(x.double()).dtype == torch.float64 and torch.equal(layer(x.double()), want.double())
    assert layer(x.half()).dtype == torch.float16
    assert torch.equal(
        kind.from_linear(dense, compute_dtype=torch.float32)(x.to(BF16)), plain(x.to(BF16).float()).to(BF16)
    )
    with torch.autocast("cpu", torch.float16):  # decides instead
        assert torch.equal(layer(x), plain(x)) and layer(x).dtype == torch.float16
    assert (plain.compute_dtype, layer.compute_dtype) == (torch.float32, BF16)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), want)
    layer.compute_dtype = None
    assert torch.equal(layer(x), plain(x))
    assert "compute_dtype=torch.bfloat16" in repr(kind(8, 8, compute_dtype=BF16)) and "compute" not in repr(plain)


def test_quantize_and_its_overrides() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))

    found = quantize_(
        model(), "nf4", compute_dtype="bfloat16", activations="int8", embeddings=True,
        overrides={"2": {"compute_dtype": None, "activations": None}, "3": {"format": "int8", "threshold": 0.0}},
    )  # fmt: skip
    layers = [(layer.compute_dtype, layer.activations) for layer in found[1:]]
    assert layers == [(BF16, "int8"), (torch.float32, None), (BF16, "int8")]
    x = noise(4, 64)
    want = functional.linear(x.to(BF16), found[1].weight, found[1].bias, activations="int8")
    assert torch.equal(found[1](x), want.float())
    assert torch.equal(found[2](x), functional.linear(x, found[2].weight, found[2].bias))
    index = torch.arange(10)
    assert torch.equal(found[0](index), quantize_(model(), "nf4", embeddings=True)[0](index))
    assert type(dequantize_(found)[1]) is nn.Linear
    assert Settings("nf4", compute_dtype=BF16) == Settings("nf4", compute_dtype="torch.bfloat16")


def test_what_no_layer_can_do_is_refused() -> None:
    for bad in ("float64", "bf16", torch.int8, torch.float64, 16):
        with pytest.raises(ValueError, match="compute_dtype must be float32, float16 or bfloat16, got"):
            PolybitConfig(compute_dtype=bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="compute_dtype must be"):
            LinearKbit(8, 8, compute_dtype=bad)  # type: ignore[arg-type]
    for bad in ("int4", "fp8", True):
        with pytest.raises(ValueError, match='activations must be None or "int8", got'):
            quantize_(nn.Sequential(nn.Linear(8, 8)), "nf4", activations=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activations are quantized for k-bit weights, got dynamic8"):
        functional.linear(noise(2, 64), quantize(noise(8, 64), "dynamic8"), activations="int8")
    with pytest.raises(ValueError, match=r"overrides\['0'\]: compute_dtype must be"):
        PolybitConfig(overrides={"0": {"compute_dtype": "int8"}})


@torch.no_grad()
def test_config_json_keeps_them(tmp_path: Path) -> None:
    """Saved, reloaded and saved again; the entries of the checkpoint are those without."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    Llama = transformers.LlamaForCausalLM
    Llama(transformers.LlamaConfig(vocab_size=200, **sizes)).save_pretrained(tmp_path / "dense")
    options: dict[str, Any] = {"compute_dtype": BF16, "overrides": {"*.1.*": {"activations": "int8"}}}
    tokens = torch.arange(18).view(2, 9) * 11 % 200
    first = Llama.from_pretrained(tmp_path / "dense", quantization_config=PolybitConfig(**options))
    plain = Llama.from_pretrained(tmp_path / "dense", quantization_config=PolybitConfig())
    want = quantize_(Llama.from_pretrained(tmp_path / "dense"), "nf4", **options)(tokens).logits
    assert 1e-3 < distance(want, plain(tokens).logits) < 0.1
    first.save_pretrained(tmp_path / "first")
    again = Llama.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "again")
    for model in (first, again, Llama.from_pretrained(tmp_path / "again")):
        assert torch.equal(model(tokens).logits, want)
        up = [layer.mlp.up_proj for layer in model.model.layers]
        assert [(layer.compute_dtype, layer.activations) for layer in up] == [(BF16, None), (BF16, "int8")]
    recorded = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert (recorded["compute_dtype"], recorded["activations"]) == ("bfloat16", None)
    assert recorded["overrides"]["*.1.*"]["activations"] == "int8"
    plain.save_pretrained(tmp_path / "plain")
    with_and_without = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "plain")]
    assert with_and_without[0] == with_and_without[1]
