"""quantize_ and make_empty_ on whole models: which module becomes which, with what settings, in what order."""

from __future__ import annotations

import gc
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from polybit.nn import (
    Embedding4bit,
    Embedding8bit,
    EmbeddingKbit,
    Linear4bit,
    Linear8bit,
    LinearKbit,
    Settings,
    StableEmbedding,
    empty_counterpart,
    make_empty_,
    quantize_,
)
from polybit.qtensor import QTensor, quantize

TOKENS = torch.tensor([[1, 0, 30], [7, 7, 12]])


class Conv1D(nn.Module):
    """The layer of GPT-2, as in transformers.pytorch_utils."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Decoder(nn.Module):
    """Every quantizable module: embeddings, Conv1D, Linear, and a head that may share the weight of the embedding."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(40, 64, padding_idx=0)
        self.h = nn.ModuleList(
            nn.ModuleDict({"attn": Conv1D(64, 64), "up": Conv1D(96, 64), "down": nn.Linear(96, 64, bias=False)})
            for _ in range(2)
        )
        self.ln = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 40, bias=False)
        if tie:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        for layer in self.h:
            x = x + layer["attn"](x)
            x = x + layer["down"](torch.relu(layer["up"](x)))
        y: Tensor = self.lm_head(self.ln(x))
        return y


def kinds(model: nn.Module) -> dict[str, str]:
    return {
        name: f"{type(m).__name__} {m.weight.format_name}" if isinstance(m.weight, QTensor) else type(m).__name__
        for name, m in model.named_modules()
        if isinstance(getattr(m, "weight", None), Tensor) and not isinstance(m, nn.LayerNorm)
    }


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# Which module becomes which


@pytest.mark.parametrize("format", ["nf4", "nf3", "int8"])
def test_conv1d_is_the_linear_layer_of_the_transposed_weight(format: str) -> None:
    torch.manual_seed(0)
    conv, x = Conv1D(33, 80), torch.randn(5, 80)
    layer = Linear8bit.from_conv1d(conv, threshold=0.0) if format == "int8" else LinearKbit.from_conv1d(conv, format)
    assert (layer.in_features, layer.out_features) == (80, 33) and layer.bias is conv.bias
    assert torch.equal(layer.weight.dequantize(), quantize(conv.weight.t().contiguous(), format).dequantize())
    wanted = x @ layer.weight.dequantize().t() + conv.bias
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=0.03 if format == "int8" else 1e-4)


def test_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D as Real

    torch.manual_seed(0)
    model, x = nn.Sequential(Real(33, 80)), torch.randn(5, 80)
    wanted = model(x)
    quantize_(model, "int8")
    assert type(model[0]) is Linear8bit
    assert ((model(x) - wanted).norm() / wanted.norm()).item() < 0.02


def test_what_is_no_conv1d_of_gpt2_is_left_alone() -> None:
    class Conv1D(nn.Conv1d):
        pass

    model = quantize_(
        nn.Sequential(Conv1D(4, 4, 1), nn.Conv1d(4, 4, 1), StableEmbedding(4, 64)), "nf4", embeddings=True
    )
    assert list(kinds(model).values()) == ["Conv1D", "Conv1d", "StableEmbedding"]
    with pytest.raises(TypeError, match="expected the Conv1D of GPT-2"):
        Linear4bit.from_conv1d(nn.Linear(4, 4))


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize(
    ("format", "linear", "embedding"),
    [
        ("nf4", Linear4bit, Embedding4bit),
        ("nf3", LinearKbit, EmbeddingKbit),
        ("int8", Linear8bit, Embedding8bit),
    ],
)
def test_every_kind(format: str, linear: type, embedding: type, embeddings: bool) -> None:
    model = Decoder().eval()
    wanted = model(TOKENS)
    quantize_(model, format, embeddings=embeddings)
    layers = {f"h.{i}.{name}": f"{linear.__name__} {format}" for i in (0, 1) for name in ("attn", "up", "down")}
    table = f"{embedding.__name__} {format}" if embeddings else "Embedding"
    assert kinds(model) == {"wte": table, **layers, "lm_head": "Linear"}
    assert not any(m.training for m in model.modules())
    assert model.wte.padding_idx == 0
    error = ((model(TOKENS) - wanted).norm() / wanted.norm()).item()
    assert 0 < error < {"nf4": 0.2, "nf3": 0.4, "int8": 0.02}[format]


# Overrides and skips


def test_overrides_by_pattern() -> None:
    model = quantize_(
        Decoder(),
        "nf4",
        double_quant=False,
        overrides={
            "h.0.attn": None,
            "h.1.down": False,
            "attn": "int8",
            "h.0.*": {"format": "nf2", "block_size": 32, "search": True},
            "up": {"double_quant": True},
            "lm_head": {"format": "int8", "threshold": 3.0},
            "w*": "nf3",
        },
    )
    assert kinds(model) == {
        "wte": "EmbeddingKbit nf3",
        "h.0.attn": "Conv1D",
        "h.0.up": "LinearKbit nf2",
        "h.0.down": "LinearKbit nf2",
        "h.1.attn": "Linear8bit int8",
        "h.1.up": "Linear4bit nf4",
        "h.1.down": "Linear",
        "lm_head": "Linear8bit int8",
    }
    up = model.h[0]["up"].weight
    assert (up.block_size, up.search, up.double_quant) == (32, True, False)
    assert model.h[1]["up"].weight.double_quant and not model.wte.weight.double_quant
    assert model.lm_head.threshold == 3.0 and model.h[1]["attn"].threshold == 6.0


def test_an_int8_override_does_not_inherit_the_search() -> None:
    model = quantize_(Decoder(), "nf4", search=True, overrides={"down": "int8"})
    assert model.h[0]["up"].weight.search and type(model.h[0]["down"]) is Linear8bit


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"overrides": {"h.*": "nf3", "atn": "nf3"}}, ValueError, r"overrides\['atn'\] matches no Linear, Conv1D or"),
        ({"overrides": {"ln": None}}, ValueError, r"overrides\['ln'\] matches no"),
        ({"overrides": {"up": "nf5"}}, ValueError, r"quantize_: overrides\['up'\]: unknown format 'nf5'"),
        ({"overrides": {"up": "dynamic8"}}, ValueError, r"overrides\['up'\]: dynamic8 has no linear layer"),
        ({"overrides": {"up": {"bits": 3}}}, ValueError, r"overrides\['up'\]: settings are format, .*, got 'bits'"),
        (
            {"overrides": {"up": {"block_size": 48}}},
            ValueError,
            r"overrides\['up'\]: block_size must be a power of two",
        ),
        ({"overrides": {"up": {"double_quant": 1}}}, TypeError, r"double_quant must be True or False, got 1"),
        ({"overrides": {"up": {"format": "int8", "search": True}}}, ValueError, "search is for k-bit"),
        ({"overrides": {"up": {"format": "int8", "threshold": -1}}}, ValueError, "threshold must be 0 or positive"),
        ({"overrides": {"up": True}}, TypeError, "must be a dict of settings, a format, None or False, got True"),
        ({"offload": True}, ValueError, "offload=True needs the device"),
        ({"embeddings": True, "skip": ["lm_head"]}, ValueError, "wte shares its weight with lm_head"),
        ({"skip": ["wte"]}, ValueError, "lm_head shares its weight with wte"),
        ({"skip": (), "overrides": {"wte": "int8"}}, ValueError, "wte and lm_head share one weight and must have the"),
    ],
)
def test_wrong_options_change_nothing(options: Any, error: type[Exception], message: str) -> None:
    model = Decoder(tie=True)
    before = list(model.modules())
    with pytest.raises(error, match=message):
        quantize_(model, "nf4", **options)
    assert list(model.modules()) == before


def test_what_cannot_be_quantized_is_found_before_anything_is_replaced() -> None:
    for broken, message in (
        (nn.Embedding(4, 64, max_norm=1.0), "quantize_: 2: a quantized table is frozen and has no max_norm"),
        (nn.Embedding(4, 64, sparse=True), "quantize_: 2: .* no sparse"),
    ):
        model = nn.Sequential(nn.Linear(64, 64), nn.Embedding(4, 64), broken)
        with pytest.raises(ValueError, match=message):
            quantize_(model, "nf4", embeddings=True)
        assert set(kinds(model).values()) == {"Linear", "Embedding"}
        quantize_(model, "nf4", embeddings=True, skip=["2"])
        assert list(kinds(model).values()) == ["Linear4bit nf4", "Embedding4bit nf4", "Embedding"]
    for module in (nn.Embedding(4, 64), Conv1D(4, 64)):
        with pytest.raises(ValueError, match="use from_linear, from_conv1d or from_embedding"):
            quantize_(module, "nf4")


# Ties


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("options", "quantized"),
    [({}, False), ({"embeddings": True}, True), ({"skip": ()}, True), ({"overrides": {"lm_head": "nf3"}}, True)],
)
def test_a_tied_pair_is_quantized_once_or_not_at_all(options: Any, quantized: bool, format: str) -> None:
    model = Decoder(tie=True)
    dense = model.wte.weight.detach().clone()
    quantize_(model, format, **options)
    assert model.wte.weight is model.lm_head.weight
    assert isinstance(model.wte.weight, QTensor) is quantized
    if quantized:
        wanted = quantize(dense, "nf3" if "overrides" in options else format)
        assert torch.equal(model.wte.weight.dequantize(), wanted.dequantize())
        state = {key: value.clone() for key, value in model.state_dict().items()}
        assert torch.equal(state["wte.weight"], state["lm_head.weight"])
        with torch.device("meta"):  # .to("meta") would untie the dense model
            fresh = quantize_(Decoder(tie=True), format, **options)
        fresh.load_state_dict(state, assign=True)
        assert fresh.wte.weight is fresh.lm_head.weight and torch.equal(fresh(TOKENS), model(TOKENS))


def test_a_head_of_any_name_that_an_embedding_shares_follows_the_embeddings() -> None:
    def make() -> nn.Module:
        model = nn.ModuleDict({"words": nn.Embedding(8, 64), "decoder": nn.Linear(64, 8), "other": nn.Linear(64, 8)})
        model["decoder"].weight = model["words"].weight
        return model

    assert list(kinds(quantize_(make(), "nf4")).values()) == ["Embedding", "Linear", "Linear4bit nf4"]
    both = quantize_(make(), "nf4", embeddings=True)
    assert list(kinds(both).values()) == ["Embedding4bit nf4", "Linear4bit nf4", "Linear4bit nf4"]
    assert both["words"].weight is both["decoder"].weight and both["decoder"].bias is not None


def test_a_head_that_shares_the_weight_of_another_kind_of_embedding() -> None:
    class Scaled(nn.Embedding):
        pass

    model = nn.ModuleDict({"words": Scaled(8, 64), "decoder": nn.Linear(64, 8), "other": nn.Linear(64, 8)})
    model["decoder"].weight = model["words"].weight
    with pytest.raises(ValueError, match="decoder shares its weight with words.weight, which .* has no quantized"):
        quantize_(model, "nf4", skip=())
    assert list(kinds(quantize_(model, "nf4", embeddings=True)).values()) == ["Scaled", "Linear", "Linear4bit nf4"]
    assert model["words"].weight is model["decoder"].weight


def test_two_linears_with_one_weight_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    quantize_(model, "nf4")
    assert model[0].weight is model[1].weight and model[0].bias is not model[1].bias


def test_a_weight_shared_with_something_else_cannot_be_quantized() -> None:
    model = nn.ModuleDict({"own": nn.Linear(64, 64), "bilinear": nn.Bilinear(4, 4, 4), "conv": Conv1D(64, 64)})
    model["bilinear"].extra = model["own"].weight
    with pytest.raises(ValueError, match="own shares its weight with bilinear.extra, which .* has no quantized"):
        quantize_(model, "nf4")
    del model["bilinear"].extra
    model["conv"].weight = model["own"].weight
    with pytest.raises(ValueError, match="own, conv share one weight, which only some of them use transposed"):
        quantize_(model, "nf4")


# Meta, and filling


MIXED: Any = {
    "embeddings": True,
    "overrides": {"attn": "int8", "h.0.up": {"format": "lloyd3", "block_size": 32}, "h.1.up": "fp4", "h.1.down": None},
}


@pytest.mark.parametrize("tie", [False, True])
def test_mixed_formats_round_trip_into_fresh_and_meta_models(tie: bool) -> None:
    model = quantize_(Decoder(tie), "nf4", **MIXED)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert all(type(value) is Tensor for value in state.values())
    fresh = Decoder(tie)
    nn.init.zeros_(fresh.lm_head.weight)
    quantize_(fresh, "nf4", **MIXED)
    assert not same(fresh, model)
    fresh.load_state_dict(state, strict=True)
    with torch.device("meta"):
        meta = Decoder(tie)
    quantize_(meta, "nf4", **MIXED)
    assert all(p.is_meta for p in meta.parameters()) and kinds(meta) == kinds(model)
    assert [p.shape for p in meta.parameters()] == [p.shape for p in model.parameters()]
    meta.load_state_dict(state, strict=True, assign=True)
    for loaded in (fresh, meta):
        assert same(loaded, model) and torch.equal(loaded(TOKENS), model(TOKENS))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"wte.weight\""):
        fresh.load_state_dict({key: value for key, value in state.items() if not key.startswith("wte")})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_make_empty_makes_what_quantize_makes(device: str) -> None:
    model = quantize_(Decoder(tie=True), "nf4", **MIXED)
    settings = {
        name: Settings.of(m.weight, threshold=getattr(m, "threshold", 6.0))
        for name, m in model.named_modules()
        if isinstance(getattr(m, "weight", None), QTensor) and name != "lm_head"
    }
    with torch.device(device):
        empty = make_empty_(Decoder(tie=True), settings)
    assert kinds(empty) == kinds(model) and str(empty) == str(model)
    assert empty.wte.weight is empty.lm_head.weight and empty.wte.weight.device.type == device
    empty.load_state_dict(model.state_dict(), assign=device == "meta")
    assert torch.equal(empty(TOKENS), model(TOKENS))


def test_make_empty_raises_for_what_it_cannot_replace() -> None:
    for name in ("ln", "wtf"):
        with pytest.raises(ValueError, match=f"no Linear, Conv1D or Embedding called {name}"):
            make_empty_(Decoder(), {"wte": Settings("nf4"), name: Settings("nf4")})
    with pytest.raises(ValueError, match="share one weight and must have the same settings"):
        make_empty_(Decoder(tie=True), {"wte": Settings("nf4"), "lm_head": Settings("nf3")})
    with pytest.raises(TypeError, match="LayerNorm has no quantized counterpart"):
        empty_counterpart(nn.LayerNorm(4), Settings("nf4"))


def test_empty_counterpart_has_the_codebook_and_the_shape() -> None:
    layer: Any = empty_counterpart(Conv1D(33, 80), Settings("nf3", block_size=32))
    assert (layer.in_features, layer.out_features, layer.weight.block_size) == (80, 33, 32)
    assert torch.equal(layer.weight.code, layer.weight.format.code)


# Order, memory, progress


class Moved(TorchDispatchMode):
    """Watches the dense matrices that are moved to a device: their shapes, and how many are alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.peak = 0
        self._seen: list[weakref.ref[Tensor]] = []

    def alive(self) -> int:
        return sum(reference() is not None for reference in self._seen)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            func is torch.ops.aten._to_copy.default
            and type(out) is Tensor
            and out.dim() == 2
            and out.is_floating_point()
        ):
            self.shapes.append(tuple(out.shape))
            self._seen.append(weakref.ref(out))
            self.peak = max(self.peak, self.alive())
        return out


# A move to "cpu:0" copies as a move to an accelerator does, and needs none.
@pytest.mark.parametrize(("device", "offload"), [("cpu:0", False), ("cpu:0", True), ("meta", False)])
def test_a_device_holds_one_dense_weight_at_a_time(device: str, offload: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64 + 16 * i) for i in range(4)), nn.LayerNorm(64))
    wanted = [quantize(m.weight, "nf4").dequantize() for m in list(model)[:4]]
    biases, dense = [m.bias for m in model], [weakref.ref(m.weight) for m in list(model)[:4]]
    done = []

    def progress(now: int, total: int, name: str) -> None:
        # No reference to a weight outlives its replacement, here or there, and the next ones were not touched.
        assert [reference() is None for reference in dense] == [i < now for i in range(4)]
        assert len(moved.shapes) == now and moved.alive() == 0
        done.append((now, total, name))

    gc.disable()  # nothing may wait for the collector of cycles
    try:
        with Moved() as moved:
            quantize_(model, "nf4", device=device, offload=offload, progress=progress)
    finally:
        gc.enable()
    assert done == [(i + 1, 4, str(i)) for i in range(4)]
    assert moved.shapes[:4] == [(64 + 16 * i, 64) for i in range(4)] and moved.peak == 1
    assert all(p.device.type == device.partition(":")[0] for p in model.parameters())
    if device != "meta":
        assert all(torch.equal(m.weight.dequantize(), w) for m, w in zip(model, wanted))
        assert all(torch.equal(m.bias, bias) for m, bias in zip(model, biases))
    if offload:
        assert all(m.bias is bias for m, bias in zip(model, biases))


def test_a_model_on_the_meta_device_cannot_be_moved() -> None:
    model = nn.Sequential(nn.Linear(64, 64, device="meta"))
    with pytest.raises(ValueError, match=r"0.weight is on the meta device and cannot be moved to cpu"):
        quantize_(model, "nf4", device="cpu")
    assert type(model[0]) is nn.Linear


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    quantize_(Decoder(), "nf4")
    assert capsys.readouterr() == ("", "")
    quantize_(Decoder(), "nf4", progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "h.1.down" in err and "100%" in err


def test_load_model_takes_every_kind_from_a_folder(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Model

    from polybit import PolybitConfig
    from polybit.integrations.models import load_model

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=8, n_embd=64, n_layer=1, n_head=2)
    model = GPT2Model(config).eval()
    overrides = {"c_fc": "int8", "wpe": "nf3"}
    quantize_(model, "nf4", embeddings=True, overrides=overrides)
    assert kinds(model) == {
        "wte": "Embedding4bit nf4",
        "wpe": "EmbeddingKbit nf3",
        "h.0.attn.c_attn": "Linear4bit nf4",
        "h.0.attn.c_proj": "Linear4bit nf4",
        "h.0.mlp.c_fc": "Linear8bit int8",
        "h.0.mlp.c_proj": "Linear4bit nf4",
    }
    recorded = PolybitConfig("nf4", embeddings=True, overrides=overrides).to_dict()
    entries = {**config.to_dict(), "architectures": ["GPT2Model"], "quantization_config": recorded}
    (tmp_path / "config.json").write_text(json.dumps(entries), encoding="utf-8")
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    loaded = load_model(tmp_path)
    assert kinds(loaded) == kinds(model) and same(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state)


def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    example, *_ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(example, names)
    assert float(capsys.readouterr().out.strip().removeprefix("tensor(").removesuffix(")")) < 0.01
    bits = 8 * names["q"].stored_bytes / names["w"].numel()
    assert f"{bits:.2f} bits a weight" in example
    assert kinds(names["model"]) == {"0": "Linear4bit nf4"}
