"""The quantized embeddings, ties between modules, and StableEmbedding."""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from polybit.formats import list_formats
from polybit.nn import Embedding4bit, Embedding8bit, EmbeddingKbit, Linear4bit, Linear8bit, StableEmbedding
from polybit.nn.module import QuantizedModule
from polybit.qtensor import quantize

KBIT = [name for name in list_formats() if name not in ("int8", "dynamic8")]
INDEX = torch.tensor([[0, 36, 5], [7, 7, 1]])


def dense(rows: int = 37, columns: int = 80, seed: int = 0, **options: Any) -> nn.Embedding:
    torch.manual_seed(seed)
    return nn.Embedding(rows, columns, **options)


def table(format: str, double_quant: bool = True, **options: Any) -> QuantizedModule:
    if format == "int8":
        return Embedding8bit.from_embedding(dense(**options))
    return EmbeddingKbit.from_embedding(dense(**options), format, double_quant=double_quant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", [*KBIT, "int8"])
def test_a_lookup_is_the_row_of_the_restored_table(format: str, dtype: torch.dtype) -> None:
    for columns in (64, 80, 33):  # rows that end with a block, inside one, inside a byte
        module = table(format, columns=columns, dtype=dtype)
        restored = module.weight.dequantize()
        for index in (INDEX, INDEX.int(), torch.tensor(3), torch.empty(0, 2, dtype=torch.int64)):
            y = module(index)
            assert y.dtype == dtype and torch.equal(y, restored[index.long()])


@pytest.mark.parametrize(("format", "limit"), [("nf4", 0.11), ("nf3", 0.22), ("int8", 0.01)])
def test_a_lookup_is_near_the_dense_one(format: str, limit: float) -> None:
    plain, module = dense(), table(format)
    error = ((module(INDEX) - plain(INDEX)).norm() / plain(INDEX).norm()).item()
    assert 0 < error < limit


def test_a_lookup_does_not_restore_the_table() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.elements = max(self.elements, out.numel() if isinstance(out, Tensor) else 0)
            return out

    for format in ("nf4", "nf3", "int8"):
        module = table(format, rows=1000)
        with Largest() as largest:
            module(torch.tensor([3, 999]))
        assert largest.elements == 2 * 80


def test_new_tables_have_what_was_asked_for() -> None:
    module = Embedding4bit(10, 64, 3, format="fp4", block_size=32, double_quant=False, dtype=torch.bfloat16)
    weight = module.weight
    assert (weight.format_name, weight.block_size, weight.double_quant) == ("fp4", 32, False)
    assert weight.shape == (10, 64) and module(INDEX % 10).dtype == torch.bfloat16
    assert EmbeddingKbit(10, 64, format="lloyd2").weight.search
    assert not [p for p in module.parameters() if p.requires_grad]
    meta = Embedding8bit(10, 64, device="meta")
    assert meta.weight.q.is_meta and meta(INDEX.to("meta")).shape == (2, 3, 64)
    torch.manual_seed(0)
    new = EmbeddingKbit(37, 80)
    assert torch.equal(new.weight.dequantize(), table("nf4").weight.dequantize())


def test_repr() -> None:
    assert repr(Embedding8bit(10, 64, 3)) == "Embedding8bit(10, 64, padding_idx=3)"
    wanted = "Embedding4bit(10, 64, padding_idx=9, format=nf4, block_size=64, double_quant=True)"
    assert repr(Embedding4bit(10, 64, -1)) == wanted
    assert repr(EmbeddingKbit(10, 64, format="nf3")).startswith("EmbeddingKbit(10, 64, format=nf3,")


@pytest.mark.parametrize("format", [name for name in (*KBIT, "int8") if not name.startswith("lloyd")])
@pytest.mark.parametrize("padding_idx", [0, 5, -1])
def test_the_padding_row_starts_as_zeros(format: str, padding_idx: int) -> None:
    for columns in (64, 80):
        new: QuantizedModule
        if format == "int8":
            new = Embedding8bit(37, columns, padding_idx)
        else:
            new = EmbeddingKbit(37, columns, padding_idx, format=format)
        zero = torch.tensor(padding_idx % 37)
        assert new.padding_idx == padding_idx % 37
        assert not new(zero).any() and new((zero + 1) % 37).any()


def test_a_given_padding_row_is_kept_as_it_is() -> None:
    plain = dense(padding_idx=2)
    with torch.no_grad():
        plain.weight[2] = 1.5
    module = Embedding8bit.from_embedding(plain)
    assert module.padding_idx == 2
    torch.testing.assert_close(module(torch.tensor(2)), torch.full((80,), 1.5))


@pytest.mark.parametrize("format", ["nf4", "nf3", "int8"])
def test_an_index_out_of_range_raises(format: str) -> None:
    module = table(format)
    for index in (37, -1, 2**40):
        with pytest.raises(IndexError, match=f"index {index} .*37 rows"):
            module(torch.tensor([0, index]))


def test_bad_arguments() -> None:
    for options in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        name = next(iter(options))
        for make in (Embedding8bit.from_embedding, Embedding4bit.from_embedding):
            with pytest.raises(ValueError, match=f"a quantized table is frozen and has no {name}"):
                make(dense(**options))
    with pytest.raises(ValueError, match="not a k-bit format; use Embedding8bit"):
        EmbeddingKbit(10, 64, format="int8")
    with pytest.raises(ValueError, match="embedding_dim must be positive, got 0"):
        Embedding8bit(10, 0)
    with pytest.raises(ValueError, match=r"padding_idx must be in \[-10, 10\), got 10"):
        Embedding4bit(10, 64, 10)
    with pytest.raises(ValueError, match="block_size must be a power of two"):
        Embedding4bit(10, 64, block_size=48)
    with pytest.raises(TypeError, match="weight must be a QTensor, got Parameter"):
        Embedding4bit.from_weight(dense().weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight must be int8, got nf4"):
        Embedding8bit.from_weight(quantize(dense().weight, "nf4"))
    with pytest.raises(ValueError, match=r"weight must have 2 dimensions, got \[4, 4, 64\]"):
        Embedding4bit.from_weight(quantize(torch.zeros(4, 4, 64), "nf4"))
    with pytest.raises(TypeError, match="index must be int64 or int32, got torch.float32"):
        table("nf4")(torch.zeros(3))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", [*KBIT, "int8"])
def test_state_dict_round_trip(format: str, double_quant: bool, tmp_path: Path) -> None:
    module, fresh = table(format, double_quant), table(format, double_quant, seed=1)
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, tmp_path / "x.safetensors")
    state = load_file(tmp_path / "x.safetensors")
    wanted = module(INDEX)
    assert not torch.equal(fresh(INDEX), wanted)
    fresh.load_state_dict(state, strict=True)
    meta = table(format, double_quant, device="meta")
    meta.load_state_dict(state, strict=True, assign=True)
    for other in (fresh, meta, copy.deepcopy(module)):
        assert torch.equal(other(INDEX), wanted)
        again = other.state_dict()
        assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


def test_a_cast_changes_the_dtype_of_the_rows_alone() -> None:
    for format in ("nf4", "int8"):
        module = table(format)
        before = copy.deepcopy(module.weight.inner_tensors())
        assert module.bfloat16()(INDEX).dtype == torch.bfloat16
        assert all(torch.equal(before[name], now) for name, now in module.weight.inner_tensors().items())


def test_compile() -> None:
    for format in ("nf4", "int8"):
        module = table(format)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(INDEX), module(INDEX))


# Ties


def tied(format: str = "nf4", device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    weight = quantize(torch.randn(37, 80), format)
    embedding: QuantizedModule
    head: QuantizedModule
    if format == "int8":
        embedding = Embedding8bit.from_weight(weight)
        head = Linear8bit.from_weight(embedding.weight)
    else:
        embedding = Embedding4bit.from_weight(weight)
        head = Linear4bit.from_weight(embedding.weight)
    return nn.ModuleDict({"embedding": embedding, "norm": nn.LayerNorm(80), "head": head}).to(device)


def is_tied(model: Any) -> bool:
    return model["embedding"].weight is model["head"].weight


def reload(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m.half(), id="half"),
        pytest.param(lambda m: m.to(torch.bfloat16).float(), id="to"),
        pytest.param(lambda m: m.share_memory(), id="share_memory"),
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(reload, id="pickle"),
    ],
)
def test_a_tie_survives(change: Callable[[nn.Module], nn.Module], format: str) -> None:
    model = tied(format)
    restored = model["embedding"].weight.dequantize()
    changed = change(model)
    assert is_tied(changed) and len(list(changed.parameters())) == 3
    assert torch.equal(changed["head"].weight.float().dequantize(), restored)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_tie_survives_loading(format: str) -> None:
    model, wanted = tied(format), tied(format)["embedding"].weight.dequantize()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert {"embedding.weight", "head.weight"} <= state.keys()

    fresh = copy.deepcopy(model)
    fresh["head"].weight.zero_()
    fresh.load_state_dict(state)
    meta = tied(format, "meta")
    meta.load_state_dict(state, assign=True)
    empty = tied(format, "meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    for loaded in (fresh, meta, empty):
        assert is_tied(loaded)
        assert torch.equal(loaded["head"].weight.dequantize(), wanted)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_safetensors_saves_a_tied_pair_once(format: str, tmp_path: Path) -> None:
    model, fresh = tied(format), tied(format)
    save_model(model, str(tmp_path / "x.safetensors"))
    saved = load_file(tmp_path / "x.safetensors")
    assert len({key.partition(".")[0] for key in saved}) == 2 and len(saved) == (6 + 2 if format == "nf4" else 3 + 2)
    with torch.no_grad():
        fresh["head"].weight.zero_()
    assert load_model(fresh, tmp_path / "x.safetensors") == (set(), [])
    assert is_tied(fresh) and torch.equal(fresh["head"].weight.dequantize(), model["head"].weight.dequantize())


def test_different_entries_untie_rather_than_lose_one() -> None:
    model = tied(device="meta")
    state = tied().state_dict()
    other = Linear4bit(80, 37, bias=False)
    state.update({f"head.{key}": value for key, value in other.state_dict().items()})
    model.load_state_dict(state, assign=True)
    assert torch.equal(model["head"].weight.dequantize(), other.weight.dequantize())
    assert torch.equal(model["embedding"].weight.dequantize(), tied()["embedding"].weight.dequantize())


def test_moving_one_of_two_leaves_the_other() -> None:
    model = tied()
    model["embedding"].half()
    assert model["head"].weight.dtype == torch.float32
    model["head"].bfloat16()
    assert (model["embedding"].weight.dtype, model["head"].weight.dtype) == (torch.float16, torch.bfloat16)


def test_loading_into_a_meta_module_without_assign_warns() -> None:
    with pytest.warns(UserWarning, match="for weight: copied to the meta device, a no-op"):
        table("nf4", device="meta").load_state_dict(table("nf4").state_dict())


# StableEmbedding


def test_stable_embedding_starts_xavier_uniform() -> None:
    torch.manual_seed(0)
    module = StableEmbedding(300, 64, padding_idx=4)
    limit = (6 / (300 + 64)) ** 0.5
    assert not module.weight[4].any()
    rest = torch.cat([module.weight[:4], module.weight[5:]])
    assert 0.99 * limit < rest.abs().max() <= limit
    assert rest.std().item() == pytest.approx(limit / 3**0.5, rel=0.02)
    assert set(module.state_dict()) == {"weight", "norm.weight", "norm.bias"}
    assert isinstance(module, nn.Embedding) and all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_stable_embedding_is_normalised_in_full_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = StableEmbedding(37, 80, dtype=dtype)
    with torch.no_grad():
        module.norm.weight.uniform_(0.5, 2)
        module.norm.bias.normal_()
    rows = module.weight[INDEX].double()
    normal = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    y = module(INDEX)
    assert y.dtype == dtype
    wanted = (normal * module.norm.weight + module.norm.bias).to(dtype)
    torch.testing.assert_close(y, wanted, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-5)
    assert module.half()(INDEX).dtype == torch.float16


def test_stable_embedding_equals_that_of_bitsandbytes(in_ci: bool) -> None:
    bnb = importlib.import_module("bitsandbytes") if in_ci else pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    theirs = bnb.nn.StableEmbedding(37, 80, 3)
    torch.manual_seed(0)
    ours = StableEmbedding(37, 80, 3)
    assert torch.equal(ours.weight, theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(INDEX), theirs(INDEX))
    ours(INDEX).square().sum().backward()
    theirs(INDEX).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.norm.weight.grad, theirs.norm.weight.grad)
