"""from_pretrained with a PolybitConfig, and what such models do in transformers. Tiny random models; no network."""

from __future__ import annotations

import json
import os
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import run_python
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"

import tokenizers
import transformers
from safetensors.torch import load_file

from polybit import PolybitConfig
from polybit.nn import Embedding4bit, EmbeddingKbit, Linear4bit, Linear8bit, LinearKbit, quantize_
from polybit.nn.module import QuantizedModule
from polybit.quantize_folder import quantize_folder

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, Any] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(vocab_size=200, num_key_value_heads=2, **SIZES)),
    "qwen3 tied": (
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config(vocab_size=200, head_dim=16, num_key_value_heads=2, tie_word_embeddings=True, **SIZES),
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=200, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
    ),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(vocab_size=200, **SIZES)),
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(
            vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
    ),
}
TOKENS = torch.arange(18).view(2, 9) * 11 % 200


pytestmark = pytest.mark.usefixtures("one_thread")  # the models are tiny


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Of each name the model and its folder."""
    found = {}
    for name, (model_class, config) in MODELS.items():
        torch.manual_seed(3)
        folder = tmp_path_factory.mktemp("dense") / "model"
        model = model_class(deepcopy(config)).eval()
        model.save_pretrained(folder, max_shard_size="150KB" if name == "llama" else "50GB")
        found[name] = model, folder
    return found


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    extra = {"decoder_input_ids": TOKENS} if isinstance(model, transformers.T5ForConditionalGeneration) else {}
    found: Tensor = model(TOKENS, **extra).logits
    return found


def load(model: nn.Module, folder: Path, **options: Any) -> Any:
    return type(model).from_pretrained(folder, **options)


def layers(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, QuantizedModule)}


CONFIGS = {
    "nf4": {},
    "int8": {"format": "int8", "threshold": 4.0},
    "nf3 and all embeddings": {"format": "nf3", "skip": (), "embeddings": True, "double_quant": False},
    "a quantized head": {"block_size": 32, "skip": (), "overrides": {"*.1.*": {"format": "int8"}}},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_load_save_reload_dequantize(
    dense: dict[str, tuple[Any, Path]], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    model, folder = dense[name]
    quantized = load(model, folder, quantization_config=PolybitConfig(**options))
    want = quantize_(deepcopy(model), **{"format": "nf4", **options})
    assert layers(quantized) == layers(want) != {}
    assert torch.equal(logits(quantized), logits(want))
    for generation in ("first", "second"):
        quantized.save_pretrained(tmp_path / generation)
        quantized = load(model, tmp_path / generation)
        assert torch.equal(logits(quantized), logits(want))
        assert layers(quantized) == layers(want)
    files = [load_file(tmp_path / generation / "model.safetensors") for generation in ("first", "second")]
    assert files[0].keys() == files[1].keys() and all(
        torch.equal(value, files[1][key]) for key, value in files[0].items()
    )
    restored = quantized.dequantize()
    assert layers(restored) == {}
    assert {n: type(m) for n, m in restored.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    assert all(parameter.requires_grad for parameter in restored.parameters())
    if options.get("format", "nf4") != "int8" and "overrides" not in options:  # those quantize activations, too
        torch.testing.assert_close(logits(restored), logits(want), rtol=1e-4, atol=1e-5)
    restored.save_pretrained(tmp_path / "restored")
    assert torch.equal(logits(load(model, tmp_path / "restored")), logits(restored))


def test_what_becomes_of_the_layers(dense: dict[str, tuple[Any, Path]]) -> None:
    model, folder = dense["llama"]
    overrides = {"*.k_proj": "nf3", "*.1.mlp.*": {"format": "int8", "threshold": 2.5}, "*.v_proj": None}
    config = PolybitConfig(block_size=32, overrides=overrides)
    loaded = load(model, folder, quantization_config=config)
    first, second = loaded.model.layers
    assert type(first.self_attn.q_proj) is Linear4bit and first.self_attn.q_proj.weight.block_size == 32
    assert type(first.self_attn.k_proj) is LinearKbit and first.self_attn.k_proj.weight.format_name == "nf3"
    assert type(first.self_attn.v_proj) is nn.Linear and type(loaded.lm_head) is nn.Linear
    assert type(second.mlp.up_proj) is Linear8bit and second.mlp.up_proj.threshold == 2.5
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert loaded.is_quantized and loaded.hf_quantizer.is_compileable and loaded.hf_quantizer.is_trainable
    assert loaded.config.quantization_config.to_dict() == PolybitConfig(**config.to_dict()).to_dict()


def test_a_tied_head_stays_tied(dense: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    model, folder = dense["qwen3 tied"]
    plain = load(model, folder, quantization_config=PolybitConfig())
    assert plain.lm_head.weight is plain.model.embed_tokens.weight and type(plain.lm_head) is nn.Linear
    for options, table in (({"skip": ()}, Embedding4bit), ({"overrides": {"lm_head": "nf3"}}, EmbeddingKbit)):
        loaded = load(model, folder, quantization_config=PolybitConfig(**options))  # type: ignore[arg-type]
        assert type(loaded.model.embed_tokens) is table and loaded.lm_head.weight is loaded.model.embed_tokens.weight
        loaded.save_pretrained(tmp_path / table.__name__)
        assert not any("lm_head" in key for key in load_file(tmp_path / table.__name__ / "model.safetensors"))
        again = load(model, tmp_path / table.__name__)
        assert again.lm_head.weight is again.model.embed_tokens.weight and torch.equal(logits(again), logits(loaded))


def test_weights_are_read_in_the_dtype_asked_for(dense: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    model, folder = dense["llama"]
    loaded = load(model, folder, quantization_config=PolybitConfig(), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    want = quantize_(load(model, folder, dtype=torch.bfloat16), "nf4")
    assert torch.equal(logits(loaded), logits(want))
    loaded.save_pretrained(tmp_path)
    assert torch.equal(logits(load(model, tmp_path)), logits(want))
    as_float = load(model, tmp_path, dtype=torch.float32)
    assert as_float.model.layers[0].mlp.up_proj.weight.dtype == as_float.dtype == torch.float32


@pytest.mark.parametrize("name", ("llama", "gpt2", "t5"))
def test_generate(dense: dict[str, tuple[Any, Path]], name: str) -> None:
    """The same tokens with a dynamic and a static cache."""
    model, folder = dense[name]
    loaded = load(model, folder, quantization_config=PolybitConfig())
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKENS), "pad_token_id": 0}
    eager = loaded.generate(TOKENS, **options)
    assert eager.shape[1] >= 2
    if name != "t5":
        assert torch.equal(loaded.generate(TOKENS, cache_implementation="static", **options), eager)


def test_compiled_in_one_graph(dense: dict[str, tuple[Any, Path]]) -> None:
    model, folder = dense["llama"]
    loaded = load(model, folder, quantization_config=PolybitConfig())
    want = logits(loaded)
    torch.compiler.reset()
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, want)


def test_pipeline(dense: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    model, folder = dense["llama"]
    words = {f"w{k}": k for k in range(200)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0")
    load(model, folder, quantization_config=PolybitConfig()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = transformers.pipeline("text-generation", str(tmp_path))
    assert isinstance(generate.model.model.layers[0].mlp.up_proj, Linear4bit)
    (answer,) = generate("w5 w6 w7", max_new_tokens=3, do_sample=False)
    assert len(re.findall(r"w\d+", answer["generated_text"])) == 6


FOLDERS: dict[str, dict[str, Any]] = {
    "default": {"overrides": {"*.0.*": {"format": "int8", "compute_dtype": "bfloat16"}}},
    "embeddings": {"embeddings": True, "activations": "int8"},
    "a head that is not skipped": {"skip": ("q_proj", "query", "q", "c_attn")},
}


@pytest.mark.parametrize("options", FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_polybit_quantize(
    dense: dict[str, tuple[Any, Path]], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """Shard by shard, by the command line's function: the same model, but for heads that are tied to an embedding.

    Its file has no entry for those, so that they follow the embedding whatever is skipped.
    """
    model, folder = dense[name]
    quantize_folder(folder, tmp_path / "out", "nf4", **options)
    if "skip" in options:
        tied = [key.removesuffix(".weight") for key in model.all_tied_weights_keys]
        options = options | {"skip": [*options["skip"], *tied]}
    loaded = load(model, tmp_path / "out")
    want = load(model, folder, quantization_config=PolybitConfig(**options))
    assert layers(loaded) == layers(want) != {} and torch.equal(logits(loaded), logits(want))


ORDERS = {
    "polybit first": ("import polybit", "import transformers"),
    "transformers first": ("import transformers", "import polybit"),
    "its models first": ("import transformers, transformers.quantizers.auto", "import polybit"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_one_import_that_opens_a_checkpoint(dense: dict[str, tuple[Any, Path]], tmp_path: Path, order: str) -> None:
    first, second = ORDERS[order]
    model, folder = dense["llama"]
    load(model, folder, quantization_config=PolybitConfig()).save_pretrained(tmp_path)
    code = f"""
import sys
{first}
print("transformers" in sys.modules, "polybit.integrations.transformers" in sys.modules)
{second}
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
    said = run_python(code, HF_HUB_OFFLINE="1").stdout.split("\n")
    assert said[:2] == [f"{'transformers' in first} False", "Linear4bit"], said


def test_the_oldest_transformers() -> None:
    from polybit.integrations import TRANSFORMERS

    wanted = ".".join(map(str, TRANSFORMERS))
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'eval = ["transformers>={wanted}"]' in project
    code = """
import transformers
transformers.__version__ = "5.19.1"
import polybit, transformers.quantizers.auto
print("polybit" in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING)
"""
    done = run_python(code)
    assert done.stdout.strip() == "False"
    assert f"PolybitConfig needs transformers {wanted} or newer, found 5.19.1" in done.stderr


@pytest.mark.parametrize("kind", ("nf4 double", "fp4", "nf4 in bf16", "int8"))
@pytest.mark.parametrize("name", ("llama", "gpt2"))
def test_checkpoints_of_bitsandbytes(dense: dict[str, tuple[Any, Path]], tmp_path: Path, name: str, kind: str) -> None:
    """Saved by transformers with the real bitsandbytes; read and saved again: the same bytes, the same config."""
    options = {
        "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "fp4": {"load_in_4bit": True},
        "nf4 in bf16": {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16
        },
        "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    }[kind]  # fmt: skip
    model, folder = dense[name]
    theirs = load(model, folder, quantization_config=transformers.BitsAndBytesConfig(**options), dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")  # before it runs: that changes its weights on some CPUs
    ours = load(model, tmp_path / "theirs", quantization_config=PolybitConfig())
    assert set(layers(ours).values()) == {Linear8bit if kind == "int8" else Linear4bit}
    # bitsandbytes rounds activations to fp16 before it quantizes them, and rounds weights to bf16 before the product.
    bound = {"int8": 0.03, "nf4 in bf16": 0.01}.get(kind, 1e-5)
    computed_in = {m.compute_dtype for m in ours.modules() if isinstance(m, (Linear4bit, Linear8bit))}
    assert computed_in == {torch.bfloat16 if kind == "nf4 in bf16" else torch.float32}
    fresh = load(model, folder, quantization_config=transformers.BitsAndBytesConfig(**options), dtype=torch.float32)
    want = fresh(TOKENS).logits.detach()  # with gradients, so that it computes in fp32
    assert (logits(ours) - want).norm() < bound * want.norm()
    ours.save_pretrained(tmp_path / "ours")
    mine, other = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    recorded = [
        json.loads((tmp_path / who / "config.json").read_text())["quantization_config"] for who in ("ours", "theirs")
    ]
    assert recorded[0] == recorded[1] and recorded[0]["quant_method"] == "bitsandbytes"


def test_device_map(dense: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    model, folder = dense["llama"]
    want = logits(load(model, folder, quantization_config=PolybitConfig()))
    for device_map in ("auto", {"": "cpu"}):
        loaded = load(model, folder, quantization_config=PolybitConfig(), device_map=device_map)
        assert torch.equal(logits(loaded), want)
        loaded.save_pretrained(tmp_path)
        assert torch.equal(logits(load(model, tmp_path, device_map=device_map)), want)


def test_what_does_not_fit_is_said(
    dense: dict[str, tuple[Any, Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers.utils.logging.enable_propagation()
    model, folder = dense["llama"]
    with pytest.raises(ValueError, match="unknown format 'nf5'"):
        PolybitConfig("nf5")
    with pytest.raises(ValueError, match="block_size must be a power of two"):
        PolybitConfig(block_size=48)
    with pytest.raises(TypeError, match="skip must be several patterns"):
        PolybitConfig(skip="lm_head")
    with pytest.raises(TypeError, match="bits"):
        PolybitConfig(bits=4)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="matches no Linear"):
        load(model, folder, quantization_config=PolybitConfig(overrides={"nothing": "nf3"}))
    load(model, folder, quantization_config=PolybitConfig()).save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        (
            {"block_size": 128},
            "block size 64, double_quant=True, shape [64, 64]; the model, by its config.json, nf4, block size 128",
        ),
        ({"skip": ["up_proj"]}, "leaves it alone"),
    ):
        changed = {**text, "quantization_config": {**text["quantization_config"], **change}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(RuntimeError, match="issues during automatic conversion"):
            load(model, tmp_path)
        assert message in caplog.text
        caplog.clear()
    transformers.utils.logging.disable_propagation()
