"""State dicts: the layout, round trips, and damaged entries."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polybit import checkpoint
from polybit.formats import list_formats
from polybit.nn import Linear4bit, Linear8bit, LinearKbit
from polybit.qtensor import QTensor, quantize

KBIT = [name for name in list_formats() if name not in ("int8", "dynamic8")]
State = dict[str, Tensor]


def make(format: str, double_quant: bool = True, device: str | None = None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if format == "int8":
        return Linear8bit(80, 33, device=device)
    return LinearKbit(80, 33, format=format, double_quant=double_quant, device=device)


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def snapshot(module: nn.Module) -> State:
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", [*KBIT, "int8"])
def test_round_trip(format: str, double_quant: bool, tmp_path: Path) -> None:
    module = make(format, double_quant)
    state = module.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert equal(dict(state), loaded)

    fresh = make(format, double_quant, seed=1)
    assert not equal(dict(fresh.state_dict()), dict(state))
    fresh.load_state_dict(loaded, strict=True)
    assert equal(dict(fresh.state_dict()), dict(state))

    meta = make(format, double_quant, device="meta")
    meta.load_state_dict(loaded, strict=True, assign=True)
    assert equal(dict(meta.state_dict()), dict(state))
    x = torch.randn(4, 80)
    assert torch.equal(meta(x), module(x)) and torch.equal(fresh(x), module(x))
    assert not meta.weight.requires_grad


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_layout_is_that_of_bitsandbytes(format: str, double_quant: bool) -> None:
    module = Linear4bit(63, 33, bias=False, format=format, double_quant=double_quant)
    state = {"layer." + key: value for key, value in module.state_dict().items()}
    nested = ["nested_absmax", "nested_quant_map"] if double_quant else []
    names = ["absmax", "quant_map", *nested, f"quant_state.bitsandbytes__{format}"]
    assert set(state) == {"layer.weight"} | {f"layer.weight.{name}" for name in names}
    assert state["layer.weight"].shape == ((63 * 33 + 1) // 2, 1) and state["layer.weight"].dtype == torch.uint8
    assert state["layer.weight.absmax"].dtype == (torch.uint8 if double_quant else torch.float32)
    text = bytes(state[f"layer.weight.quant_state.bitsandbytes__{format}"].tolist()).decode()
    wanted = f'{{"quant_type": "{format}", "blocksize": 64, "dtype": "float32", "shape": [33, 63]'
    if double_quant:
        offset = module.weight.nested_offset.item()
        wanted += f', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {offset!r}'
    assert text == wanted + "}"


def test_int8_layout() -> None:
    state = Linear8bit(64, 32).state_dict()
    assert set(state) == {"weight", "SCB", "weight_format", "bias"}
    assert state["weight"].dtype == torch.int8 and state["weight"].shape == (32, 64)
    assert state["SCB"].dtype == torch.float32 and state["SCB"].shape == (32,)
    assert state["weight_format"].dtype == torch.uint8 and state["weight_format"].dim() == 0


@pytest.mark.parametrize("format", list_formats())
def test_checkpoint_functions_round_trip(format: str) -> None:
    for shape in ((33, 80), (3, 16, 64), (128,)):
        q = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16(), format)
        again = checkpoint.from_tensors(checkpoint.to_tensors(q, "a.b"), "a.b", dtype=torch.bfloat16)
        assert isinstance(again, QTensor) and again.same_layout(q)
        assert torch.equal(again.dequantize(), q.dequantize())


def test_is_quantized_knows_which_parameter_it_is() -> None:
    for format in ("nf4", "int8"):
        tensors = {**checkpoint.to_tensors(quantize(torch.randn(8, 64), format), "a.weight"), "a.bias": torch.zeros(8)}
        assert checkpoint.is_quantized(tensors, "a.weight") and not checkpoint.is_quantized(tensors, "a.bias")
        assert set(checkpoint.owned_keys(tensors, "a.weight")) == set(tensors) - {"a.bias"}


def test_other_storage_dtype_is_the_same_bytes() -> None:
    q = quantize(torch.randn(16, 64), "nf4")
    tensors = checkpoint.to_tensors(q, "weight")
    tensors["weight"] = tensors["weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    assert torch.equal(checkpoint.from_tensors(tensors, "weight").q, q.q)


def test_state_dict_shares_storage_and_torch_save_takes_it() -> None:
    module = make("nf4")
    state = module.state_dict()
    assert state["weight"].data_ptr() == module.weight.q.data_ptr()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert equal(torch.load(buffer, weights_only=True), dict(state))


def test_inside_a_model_strict_keys_are_reported() -> None:
    model = nn.Sequential(make("nf4"), nn.ReLU(), nn.Linear(33, 4))
    state = model.state_dict()
    extra = {**state, "0.other": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"0.other\""):
        model.load_state_dict(extra)
    without = {key: value for key, value in state.items() if not key.startswith("0.weight")}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0.weight\""):
        model.load_state_dict(without)
    assert model.load_state_dict(without, strict=False).missing_keys == [key for key in state if key not in without]


def _blob(change: Callable[[dict[str, object]], object]) -> Callable[[State], None]:
    def damage(state: State) -> None:
        key = next(key for key in state if ".quant_state." in key)
        content = json.loads(bytes(state[key].tolist()))
        content = change(content) or content
        state[key] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    return damage


def _rename(old: str, new: str) -> Callable[[State], None]:
    return lambda state: state.update({new: state.pop(old)})


def _edit(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], None]:
    return lambda state: state.update({key: change(state[key])})


STATE_KEY = "weight.quant_state.bitsandbytes__nf4"
DAMAGE: dict[str, tuple[Callable[[State], object], str]] = {
    "codes missing": (lambda s: s.pop("weight"), "weight is missing"),
    "absmax missing": (lambda s: s.pop("weight.absmax"), "absmax is missing"),
    "codebook missing": (lambda s: s.pop("weight.quant_map"), "quant_map is missing"),
    "nested missing": (lambda s: s.pop("weight.nested_absmax"), "nested_absmax is missing"),
    "nested codebook missing": (lambda s: s.pop("weight.nested_quant_map"), "nested_quant_map is missing"),
    "state missing": (lambda s: s.pop(STATE_KEY), "quant_state.* is missing"),
    "codes short": (_edit("weight", lambda t: t[:-1]), "must hold 1320 bytes, got 1319"),
    "codes long": (_edit("weight", lambda t: torch.cat([t, t[:1]])), "must hold 1320 bytes, got 1321"),
    "absmax short": (_edit("weight.absmax", lambda t: t[:-1]), r"absmax must be torch.uint8 \[42\]"),
    "absmax dtype": (_edit("weight.absmax", lambda t: t.float()), r"absmax must be torch.uint8 \[42\]"),
    "codebook short": (_edit("weight.quant_map", lambda t: t[:8]), r"quant_map must be torch.float32 \[16\]"),
    "codebook changed": (_edit("weight.quant_map", lambda t: t * 1.5), "not the codebook of nf4"),
    "codebook nan": (_edit("weight.quant_map", lambda t: t * float("nan")), "not the codebook of nf4"),
    "json cut": (_edit(STATE_KEY, lambda t: t[:-5]), "is not JSON"),
    "json not text": (_edit(STATE_KEY, lambda t: t * 0 + 255), "is not JSON"),
    "json dtype": (_edit(STATE_KEY, lambda t: t.float()), "must be uint8"),
    "json list": (_blob(lambda c: [1]), "must hold a JSON object"),
    "shape wrong": (_blob(lambda c: c.update(shape=[33, 90])), "must hold 1485 bytes"),
    "shape turned": (_blob(lambda c: c.update(shape=[80, 33])), r"has shape \[80, 33\], wanted \[33, 80\]"),
    "shape negative": (_blob(lambda c: c.update(shape=[-33, -80])), "list of sizes"),
    "shape text": (_blob(lambda c: c.update(shape="33x80")), "list of sizes"),
    "block 0": (_blob(lambda c: c.update(blocksize=0)), "power of two"),
    "block 48": (_blob(lambda c: c.update(blocksize=48)), "power of two"),
    "block text": (_blob(lambda c: c.update(blocksize="64")), "must be an int"),
    "block missing": (_blob(lambda c: c.__delitem__("blocksize")), "must be an int"),
    "dtype unknown": (_blob(lambda c: c.update(dtype="int8")), "dtype must be one of"),
    "type unlike key": (_blob(lambda c: c.update(quant_type="fp4")), "the key says 'nf4'"),
    "offset text": (_blob(lambda c: c.update(nested_offset="0")), "nested_offset must be a number"),
    "nested block": (_blob(lambda c: c.update(nested_blocksize=64)), "nested_blocksize must be 256"),
    "unknown format": (_rename(STATE_KEY, "weight.quant_state.polybit__nf5"), "unknown format 'nf5'"),
    "wrong owner": (_rename(STATE_KEY, "weight.quant_state.polybit__nf4"), "not a key that"),
    "surplus": (lambda s: s.update({"weight.zero_point": torch.zeros(1)}), "unexpected entry weight.zero_point"),
    "other format": (lambda s: (s.clear(), s.update(make("fp4").state_dict())), "is fp4.*the module is nf4"),
    "other nesting": (lambda s: (s.clear(), s.update(make("nf4", False).state_dict())), "double_quant=False"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_entries_raise_and_change_nothing(case: str, assign: bool) -> None:
    module = make("nf4")
    before, weight = snapshot(module), module.weight
    state = snapshot(make("nf4", seed=1))
    damage, message = DAMAGE[case]
    damage(state)
    with pytest.raises(ValueError, match=message):
        module.load_state_dict(state, assign=assign)
    assert module.weight is weight and equal(before, dict(module.state_dict()))


DAMAGE_INT8: dict[str, tuple[Callable[[State], object], str]] = {
    "codes missing": (lambda s: s.pop("weight"), "weight is missing"),
    "scales missing": (lambda s: s.pop("SCB"), "quant_state.* is missing"),
    "scales short": (_edit("SCB", lambda t: t[:-1]), r"SCB must be torch.float32 \[33\]"),
    "scales dtype": (_edit("SCB", lambda t: t.half()), r"SCB must be torch.float32 \[33\]"),
    "codes dtype": (_edit("weight", lambda t: t.float()), "must be int8"),
    "layout": (_edit("weight_format", lambda t: t + 1), "weight_format must be 0"),
    "shape": (lambda s: s.update(weight=s["weight"][:, :-1].contiguous()), r"has shape \[33, 79\]"),
}


@pytest.mark.parametrize("case", DAMAGE_INT8)
def test_damaged_int8_entries(case: str) -> None:
    module = make("int8")
    before = snapshot(module)
    state = snapshot(make("int8", seed=1))
    damage, message = DAMAGE_INT8[case]
    damage(state)
    with pytest.raises(ValueError, match=message):
        module.load_state_dict(state)
    assert equal(before, dict(module.state_dict()))


def test_bad_bias_changes_nothing() -> None:
    module = make("nf4")
    before = snapshot(module)
    state = snapshot(make("nf4", seed=1))
    state["bias"] = torch.zeros(34)
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        module.load_state_dict(state)
    assert equal(before, dict(module.state_dict()))
