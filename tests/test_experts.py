"""Experts that are 3-D parameters: the product with groups, models of transformers, adapters. Tiny random models."""

from __future__ import annotations

import json
import os
import shutil
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

os.environ["HF_HUB_OFFLINE"] = "1"

import accelerate
import peft
import transformers
from safetensors.torch import load_file, save_file

from polybit import PolybitConfig, QTensor, quantize
from polybit.cli import app
from polybit.functional import linear_grouped, linear_int8, linear_int8_grouped
from polybit.model_folder import FolderError
from polybit.nn import Linear8bit, dequantize_
from polybit.quantize_folder import quantize_folder

SIZES = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig(num_local_experts=4, **SIZES)),
    "qwen3": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig(num_experts=6, moe_intermediate_size=32, head_dim=16, **SIZES),
    ),
    # Beside the experts a layer whose name ends as that of a stack does; the first layer has no experts.
    "deepseek": (
        transformers.DeepseekV3ForCausalLM,
        transformers.DeepseekV3Config(
            n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, moe_intermediate_size=32, q_lora_rank=None,
            first_k_dense_replace=1, kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
            **SIZES | {"num_key_value_heads": 4},
        ),
    ),
    # Stacks [experts, in, out], gate and up interleaved, biases.
    "gpt_oss": (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig(num_local_experts=4, head_dim=16, layer_types=["full_attention"] * 2, **SIZES),
    ),
}  # fmt: skip
TOKENS = torch.arange(18).view(2, 9) * 11 % 200

pytestmark = pytest.mark.usefixtures("one_thread")  # the models are tiny


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Of each name the model and its folder."""
    found = {}
    for name, (model_class, config) in MODELS.items():
        torch.manual_seed(3)
        folder = tmp_path_factory.mktemp("dense") / name
        model = model_class(deepcopy(config)).eval()
        model.save_pretrained(folder)
        found[name] = model, folder
    return found


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    found: Tensor = model.eval()(tokens).logits
    return found


def load(model: nn.Module, folder: Path, **options: Any) -> Any:
    return type(model).from_pretrained(folder, **options)


def stacks(model: nn.Module) -> dict[str, QTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, QTensor) and p.dim() == 3}


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("format", ("nf4", "fp4", "lloyd3", "nf2"))
def test_product(format: str, transposed: bool) -> None:
    """Against the same with restored experts: empty groups, rows behind the last, blocks that straddle experts."""
    g = torch.Generator().manual_seed(1)
    weight = quantize(torch.randn(4, 24, 20, generator=g), format, block_size=32)
    restored = weight.dequantize() if transposed else weight.dequantize().transpose(1, 2)
    x = torch.randn(11, restored.shape[1], generator=g, requires_grad=True)
    ends = torch.tensor([3, 3, 8, 9], dtype=torch.int32)
    want = torch.zeros(11, restored.shape[2])
    for expert, (start, end) in enumerate(((0, 3), (3, 3), (3, 8), (8, 9))):
        want[start:end] = x[start:end] @ restored[expert]
    y = linear_grouped(x, weight, ends, transposed=transposed)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    dy = torch.randn(y.shape, generator=g)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, torch.autograd.grad(want, x, dy)[0], rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
    compiled = torch.compile(linear_grouped, fullgraph=True, backend="aot_eager")(
        x, weight, ends, transposed=transposed
    )
    assert torch.equal(compiled, y)
    assert torch.equal(torch.autograd.grad(compiled, x, dy)[0], dx)


@pytest.mark.parametrize("threshold", (0.0, 2.5))
def test_product_in_int8(threshold: float) -> None:
    """Against one product for each expert: empty groups, rows behind the last, outliers that one group alone has."""
    g = torch.Generator().manual_seed(1)
    weight = quantize(torch.randn(4, 24, 20, generator=g), "int8")
    x = torch.randn(11, 20, generator=g)
    x[4, 7] = 30.0
    x.requires_grad_()
    ends = torch.tensor([3, 3, 8, 9], dtype=torch.int32)
    parts = [linear_int8(x[a:b], weight[e], threshold=threshold) for e, a, b in ((0, 0, 3), (2, 3, 8), (3, 8, 9))]
    want = torch.cat([*parts, torch.zeros(2, 24)])
    y = linear_int8_grouped(x, weight, ends, threshold=threshold)
    assert torch.equal(y, want) and not torch.equal(y, linear_int8_grouped(x, weight, ends))
    exact = torch.cat([x[a:b] @ weight[e].dequantize().t() for e, a, b in ((0, 0, 3), (2, 3, 8), (3, 8, 9))])
    assert (y[:9] - exact).norm() < (0.01 if threshold else 0.05) * exact.norm()
    dy = torch.randn(y.shape, generator=g)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, torch.autograd.grad(want, x, dy)[0]) and bool((dx[9:] == 0).all())
    torch.compiler.reset()
    compiled = torch.compile(linear_int8_grouped, backend="aot_eager")(x, weight, ends, threshold=threshold)
    assert torch.equal(compiled, y)


def test_product_refuses() -> None:
    x, ends = torch.ones(3, 16), torch.tensor([1, 3], dtype=torch.int32)
    kbit, int8 = quantize(torch.ones(2, 8, 16), "nf4"), quantize(torch.ones(2, 8, 16), "int8")
    for function, weight, other in ((linear_grouped, kbit, int8), (linear_int8_grouped, int8, kbit)):
        assert function(x, weight, ends).shape == (3, 8)  # type: ignore[operator]
        for error, message, change in (
            (ValueError, f"must be {'k-bit' if other is int8 else 'int8'}, got {other.format_name}", {"weight": other}),
            (ValueError, "3 dimensions", {"weight": weight[0]}),
            (ValueError, r"x must be \[T, 16\]", {"x": torch.ones(3, 8)}),
            (TypeError, "x must be fp32", {"x": x.double()}),
            (TypeError, "group_end must be int32", {"group_end": ends.long()}),
            (ValueError, r"shape \[2\]", {"group_end": ends[:1]}),
            (ValueError, "x is on meta", {"x": x.to("meta")}),
        ):
            with pytest.raises(error, match=message):
                function(**{"x": x, "weight": weight, "group_end": ends} | change)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"x must be \[T, 8\]"):
        linear_grouped(x, kbit, ends, transposed=True)


@torch.no_grad()
@pytest.mark.parametrize("name", ("mixtral", "qwen3", "deepseek"))
def test_int8(dense: dict[str, tuple[Any, Path]], tmp_path: Path, name: str) -> None:
    """Each expert computes what a Linear8bit of its weights does with the tokens that chose it; saved and opened."""
    model, folder = dense[name]
    config = PolybitConfig("int8", threshold=2.0, overrides={"*.1.*.down_proj": {"threshold": 0.0}})
    quantized = load(model, folder, quantization_config=config)
    found = stacks(quantized)
    assert len(found) == (2 if name == "deepseek" else 4) and {w.format_name for w in found.values()} == {"int8"}
    for key, weight in found.items():
        assert weight.stored_bytes == weight.numel() + weight.numel() // weight.shape[2] * 4
        original = quantize(model.get_parameter(key), "int8")
        assert torch.equal(weight.q, original.q) and torch.equal(weight.absmax, original.absmax)
    print(f"{name}: {model.get_memory_footprint()} bytes dense, {quantized.get_memory_footprint()} in int8")

    module, plain = quantized.model.layers[1].mlp.experts, model.model.layers[1].mlp.experts
    assert module.thresholds == {"gate_up_proj": 2.0, "down_proj": 0.0}
    g = torch.Generator().manual_seed(2)
    x = torch.randn(5, 64, generator=g)
    chosen, shares = torch.tensor([[0, 2], [2, 1], [0, 2], [2, 0], [1, 2]]), torch.rand(5, 2, generator=g)
    want = torch.zeros(5, 64)
    for expert in range(3):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        layers = [nn.Linear(w.shape[2], w.shape[1], bias=False) for w in (plain.gate_up_proj, plain.down_proj)]
        for layer, w in zip(layers, (plain.gate_up_proj, plain.down_proj), strict=True):
            layer.weight.copy_(w[expert])
        up, down = (Linear8bit.from_linear(layer, threshold=t) for layer, t in zip(layers, (2.0, 0.0), strict=True))
        want.index_add_(0, token, down(plain._apply_gate(up(x[token]))) * shares[token, place].unsqueeze(-1))
    torch.testing.assert_close(module(x, chosen, shares), want, rtol=1e-5, atol=1e-7)
    before = module(x, chosen, shares)
    for stack in (module.gate_up_proj, module.down_proj):
        stack.absmax[3] = float("nan")
    assert torch.equal(module(x, chosen, shares), before)  # who has not been hit is not read

    quantized = load(model, folder, quantization_config=config)
    want, exact = logits(quantized), logits(model)
    assert 1e-4 < (want - exact).norm() / exact.norm() < 0.03
    for generation in ("first", "second"):
        quantized.save_pretrained(tmp_path / generation)
        quantized = load(model, tmp_path / generation)
        assert torch.equal(logits(quantized), want) and stacks(quantized).keys() == found.keys()
    first, second = ((tmp_path / which / "model.safetensors").read_bytes() for which in ("first", "second"))
    assert first == second
    half = load(model, tmp_path / "first", dtype=torch.bfloat16)
    assert {w.dtype for w in stacks(half).values()} == {torch.bfloat16} and logits(half).dtype == torch.bfloat16
    assert (logits(half).float() - want).norm() < 0.05 * want.norm()
    restored = quantized.dequantize()
    assert not stacks(restored) and {type(m) for m in restored.modules()} == {type(m) for m in model.modules()}
    assert (logits(restored) - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("name", MODELS)
def test_load_save_reload_dequantize(dense: dict[str, tuple[Any, Path]], tmp_path: Path, name: str) -> None:
    model, folder = dense[name]
    quantized = load(model, folder, quantization_config=PolybitConfig(double_quant=False))
    found = stacks(quantized)
    assert len(found) == (2 if name == "deepseek" else 4)
    for key, weight in found.items():
        original = quantize(model.get_parameter(key), "nf4", double_quant=False)
        assert torch.equal(weight.q, original.q) and torch.equal(weight.absmax, original.absmax)
        # Half a byte for each weight, four for each 64 of them, and the codebook.
        assert weight.stored_bytes == weight.numel() // 2 + weight.numel() // 64 * 4 + 16 * 4
    kept = sum(p.numel() * 4 for p in quantized.parameters() if not isinstance(p, QTensor))
    stored = sum(p.numel() * 9 // 16 + 64 for p in quantized.parameters() if isinstance(p, QTensor))
    buffers = sum(b.numel() * b.element_size() for b in quantized.buffers())
    print(f"{name}: {model.get_memory_footprint()} bytes dense, {quantized.get_memory_footprint()} quantized")
    assert quantized.get_memory_footprint() == kept + stored + buffers < model.get_memory_footprint() / 2

    want = logits(quantized)
    assert 0.01 < (want - logits(model)).norm() / logits(model).norm() < 0.3
    for generation in ("first", "second"):
        quantized.save_pretrained(tmp_path / generation, save_original_format=generation == "first")
        if name != "mixtral":  # whose layers have another name in a checkpoint
            assert set(found) <= load_file(tmp_path / generation / "model.safetensors").keys()
        quantized = load(model, tmp_path / generation)
        assert torch.equal(logits(quantized), want)
    quantized = load(model, tmp_path / "first")
    quantized.save_pretrained(tmp_path / "third")
    first, third = ((tmp_path / which / "model.safetensors").read_bytes() for which in ("first", "third"))
    assert first == third

    restored = quantized.dequantize()
    assert not stacks(restored) and {type(m) for m in restored.modules()} == {type(m) for m in model.modules()}
    assert all(parameter.requires_grad for parameter in restored.parameters())
    torch.testing.assert_close(logits(restored), want, rtol=1e-4, atol=1e-5)
    restored.save_pretrained(tmp_path / "restored")
    files = [load_file(path / "model.safetensors") for path in (folder, tmp_path / "restored")]
    assert files[0].keys() == files[1].keys()
    assert torch.equal(logits(load(model, tmp_path / "restored")), logits(restored))


@pytest.mark.parametrize("block_size", (64, 4096))
@pytest.mark.parametrize("format", ("nf4", "lloyd3"))
@pytest.mark.parametrize("name", MODELS)
def test_one_by_one_as_all_at_once(dense: dict[str, tuple[Any, Path]], name: str, format: str, block_size: int) -> None:
    """The parts of a stack that is merged of experts are those of the dense stack, also where blocks straddle experts.

    Qwen's experts have 4096 and 2048 weights. The scales of scales are taken over the whole stack.
    """
    model, folder = dense[name]
    config = PolybitConfig(format, block_size=block_size)
    loaded = load(model, folder, quantization_config=config, dtype=torch.bfloat16)
    for key, weight in stacks(loaded).items():
        want = quantize(model.get_parameter(key).bfloat16(), format, block_size=block_size)
        assert weight.inner_tensors().keys() == want.inner_tensors().keys() > {"nested_absmax"}
        for part, inner in want.inner_tensors().items():
            assert torch.equal(weight.inner_tensors()[part], inner), part
        assert weight.same_layout(want) and weight.form == want.form and weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ("mixtral", "qwen3"))
def test_experts_that_are_not_hit_are_not_read(dense: dict[str, tuple[Any, Path]], name: str) -> None:
    model, folder = dense[name]
    quantized = load(model, folder, quantization_config=PolybitConfig(double_quant=False))
    module = quantized.model.layers[0].mlp.experts
    x, weights = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)), torch.full((5, 2), 0.5)
    chosen = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [0, 2]])
    with torch.no_grad():
        want = module(x, chosen, weights)
        for stack in (module.gate_up_proj, module.down_proj):
            stack.absmax.view(module.num_experts, -1)[1] = float("nan")
        assert torch.equal(module(x, chosen, weights), want) and bool(want.isfinite().all())
        assert bool(module(x, chosen + 1, weights)[:, 0].isnan().all())


def test_generate_and_compile(dense: dict[str, tuple[Any, Path]]) -> None:
    """A long prefill and decoding one by one give the same; so do the compiled model and bf16 with its own weights."""
    for name in ("mixtral", "qwen3"):
        model, folder = dense[name]
        quantized = load(model, folder, quantization_config=PolybitConfig())
        options = {
            "max_new_tokens": 6,
            "do_sample": False,
            "attention_mask": torch.ones_like(TOKENS),
            "pad_token_id": 0,
        }
        quantized.generation_config.eos_token_id = None
        new = quantized.generate(TOKENS, **options)
        whole = logits(quantized, new[:, :-1]).argmax(-1)
        assert new.shape == (2, 15) and torch.equal(new[:, 9:], whole[:, 8:])
        torch.compiler.reset()
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        long = torch.arange(400).view(2, 200) * 7 % 200
        with torch.no_grad():
            torch.testing.assert_close(compiled(long, use_cache=False).logits, logits(quantized, long))
        half = load(model, folder, quantization_config=PolybitConfig(), dtype=torch.bfloat16)
        got, want = logits(half).float(), logits(deepcopy(half).dequantize()).float()
        assert half.dtype == torch.bfloat16 and (got - want).norm() < 0.03 * want.norm()


def test_which_stacks_are_quantized(dense: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    model, folder = dense["qwen3"]
    names = list(stacks(load(model, folder, quantization_config=PolybitConfig())))
    for i, (options, want) in enumerate(
        (
            ({"skip": ["experts"]}, {}),
            ({"skip": ["*.0.mlp.experts.*"]}, dict.fromkeys(names[2:], "nf4")),
            ({"overrides": {"*.experts": "nf3", "q_proj": None}}, dict.fromkeys(names, "nf3")),
            ({"overrides": {"experts": None}}, {}),
            (
                {"format": "int8", "overrides": {"gate_up_proj": "nf4", "down_proj": None}},
                dict.fromkeys(names[::2], "nf4"),
            ),
        )
    ):
        loaded = load(model, folder, quantization_config=PolybitConfig(**options))  # type: ignore[arg-type]
        assert {name: weight.format_name for name, weight in stacks(loaded).items()} == want
        loaded.save_pretrained(tmp_path / str(i))
        again = load(model, tmp_path / str(i))
        assert stacks(again).keys() == want.keys() and torch.equal(logits(again), logits(loaded))
    other, its = dense["gpt_oss"]
    with pytest.raises(ValueError, match=r"experts.gate_up_proj is a stack .* \[experts, in, out\], and int8.*skip="):
        load(other, its, quantization_config=PolybitConfig("int8"))
    with pytest.raises(ValueError, match="matches no Linear"):
        load(model, folder, quantization_config=PolybitConfig(overrides={"nothing": "nf3"}))


FOLDERS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "int8": {"format": "int8", "threshold": 2.0},
    "straddling": {"format": "nf3", "block_size": 4096},
    "some": {"overrides": {"*.1.mlp.experts.down_proj": None, "*.mlp.experts": {"format": "nf2", "block_size": 32}}},
    "none": {"skip": ("experts", "lm_head")},
}


@pytest.mark.parametrize(
    ("name", "how"),
    [*product(("mixtral", "qwen3"), FOLDERS), *product(("deepseek", "gpt_oss"), ("nf4", "some"))],
)
def test_folders(dense: dict[str, tuple[Any, Path]], tmp_path: Path, name: str, how: str) -> None:
    """polybit quantize, of shards that take experts apart: the model that from_pretrained makes, entry by entry."""
    model, options = dense[name][0], FOLDERS[how]
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    summary = quantize_folder(tmp_path / "shards", tmp_path / "folder", **options)
    want = load(model, tmp_path / "shards", quantization_config=PolybitConfig(**options))
    opened = load(model, tmp_path / "folder")
    assert torch.equal(logits(opened), logits(want)) and bool(stacks(opened)) == (how != "none")
    found, wanted = opened.state_dict(), want.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(value, wanted[key]) for key, value in found.items())

    files = list((tmp_path / "folder").glob("*.safetensors"))
    written = {key: path.name for path in files for key in load_file(path)}
    assert json.loads((tmp_path / "folder" / "model.safetensors.index.json").read_text())["weight_map"] == written
    assert summary.bytes_after == sum(value.nbytes for path in files for value in load_file(path).values())
    opened.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(model, tmp_path / "saved")), logits(want))
    if how in ("nf4", "int8"):  # by another way the same names; of dense stacks a saved model has the whole
        assert written.keys() == load_file(tmp_path / "saved" / "model.safetensors").keys()
        assert summary.bytes_before > 2 * summary.bytes_after


@pytest.mark.parametrize("name", ("mixtral", "qwen3"))
def test_the_command(dense: dict[str, tuple[Any, Path]], tmp_path: Path, name: str) -> None:
    """polybit quantize FOLDER TARGET --format nf4."""
    model, folder = dense[name]
    done = CliRunner().invoke(app, ["quantize", str(folder), str(tmp_path / "out"), "--format", "nf4"])
    assert done.exit_code == 0 and "tensors in nf4, " in done.output, done.output
    opened = load(model, tmp_path / "out")
    assert len(stacks(opened)) == 4
    assert torch.equal(logits(opened), logits(load(model, folder, quantization_config=PolybitConfig("nf4"))))


def test_folders_that_are_refused(dense: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    _, folder = dense["qwen3"]
    with pytest.raises(ValueError, match="override of '.*7.*' matches no linear layer"):
        quantize_folder(folder, tmp_path / "out", overrides={"*.7.*": "nf3"})
    with pytest.raises(FolderError, match=r"experts.down_proj is stored \[experts, in, out\].*skip it"):
        quantize_folder(dense["gpt_oss"][1], tmp_path / "out", "int8")
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(FolderError, match=r"layers.1.mlp.experts.gate_up_proj cannot be made: parts .* are missing"):
        quantize_folder(damaged, tmp_path / "out")
    unknown = json.loads((folder / "config.json").read_text()) | {"model_type": "unheard"}
    (damaged / "config.json").write_text(json.dumps(unknown))
    assert quantize_folder(damaged, tmp_path / "by names").quantized == 2 * (4 + 1 + 6 * 3) - 1
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("format", ("nf4", "int8"))
def test_on_a_disk(dense: dict[str, tuple[Any, Path]], tmp_path: Path, format: str) -> None:
    model, folder = dense["mixtral"]
    want = load(model, folder, quantization_config=PolybitConfig(format))
    device_map = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    device_map["model.layers.1"] = "disk"
    options: Any = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    away = load(model, folder, quantization_config=PolybitConfig(format), **options)
    assert away.get_parameter("model.layers.1.mlp.experts.down_proj").is_meta
    assert torch.equal(logits(away), logits(want))
    away.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(model, tmp_path / "saved")), logits(want))


@pytest.mark.parametrize("format", ("nf4", "int8"))
def test_offloaded_when_they_are_loaded(dense: dict[str, tuple[Any, Path]], tmp_path: Path, format: str) -> None:
    model, folder = dense["mixtral"]
    for away in (accelerate.cpu_offload, lambda model: accelerate.disk_offload(model, tmp_path)):
        quantized = load(model, folder, quantization_config=PolybitConfig(format))
        want = logits(quantized)
        away(quantized)
        assert len(stacks(quantized)) == 4 and all(weight.is_meta for weight in stacks(quantized).values())
        assert torch.equal(logits(quantized), want)
        accelerate.hooks.remove_hook_from_submodules(quantized)
        assert torch.equal(logits(quantized), want) and not any(w.is_meta for w in stacks(quantized).values())


def test_module_functions(dense: dict[str, tuple[Any, Path]]) -> None:
    """A state dict, copies, moves and casts, as of any quantized module."""
    model, folder = dense["mixtral"]
    quantized = load(model, folder, quantization_config=PolybitConfig())
    want, state = logits(quantized), quantized.state_dict()
    copy = deepcopy(quantized)
    with torch.no_grad():
        for weight in stacks(copy).values():
            weight.q.zero_()
    assert not torch.equal(logits(copy), want)
    copy.load_state_dict(state)
    assert torch.equal(logits(copy), want)
    copy.to("meta").load_state_dict(state, assign=True)
    assert stacks(copy).keys() == stacks(quantized).keys() and not any(w.is_meta for w in stacks(copy).values())
    assert {w.dtype for w in stacks(copy.to(torch.float16)).values()} == {torch.float16}
    damaged = {key: value for key, value in state.items() if not key.endswith("down_proj.absmax")}
    with pytest.raises(ValueError, match=r"experts.down_proj.absmax"):
        quantized.load_state_dict(damaged)
    torch.testing.assert_close(logits(dequantize_(quantized)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("where", ("attention", "experts"))
@pytest.mark.parametrize(("name", "format"), (("mixtral", "nf4"), ("mixtral", "int8"), ("gpt_oss", "nf4")))
def test_lora(dense: dict[str, tuple[Any, Path]], tmp_path: Path, name: str, format: str, where: str) -> None:
    """Trains beside frozen quantized experts, or on them; saved, opened and merged."""
    model, folder = dense[name]
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    if where == "experts":
        options = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    torch.manual_seed(4)
    base = load(model, folder, quantization_config=PolybitConfig(format))
    before = {name: weight.q.clone() for name, weight in stacks(base).items()}
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, **options)).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    after = {name.replace("base_layer.", ""): weight.q for name, weight in stacks(base).items()}
    assert after.keys() == before.keys() and all(torch.equal(q, after[name]) for name, q in before.items())
    want = logits(adapted)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(model, folder, quantization_config=PolybitConfig(format)), tmp_path)
    assert torch.equal(logits(again), want)
    merged = adapted.merge_and_unload()
    assert stacks(merged).keys() == before.keys()
    assert (logits(merged) - want).norm() < 0.25 * want.norm()
