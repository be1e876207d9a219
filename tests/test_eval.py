"""Models of transformers from quantized folders, and `polybit eval` on them. Tiny models, made here; no network."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

os.environ["HF_HUB_OFFLINE"] = "1"

import tokenizers
import transformers

import polybit
from polybit.cli import app
from polybit.integrations.evaluate import perplexity, tokenize
from polybit.integrations.models import load_model
from polybit.model_folder import FolderError, read_state_dict
from polybit.nn import Embedding4bit, Linear4bit, Linear8bit, LinearKbit
from polybit.quantize_folder import quantize_folder

TEXT = (Path(__file__).parent.parent / "examples" / "sentences.txt").read_text(encoding="utf-8")[:1500]


pytestmark = pytest.mark.usefixtures("one_thread")  # the models are tiny


def llama(tied: bool) -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip


def gpt2() -> transformers.PretrainedConfig:
    return transformers.GPT2Config(vocab_size=200, n_positions=64, n_embd=64, n_layer=2, n_head=4)


def mixtral() -> transformers.PretrainedConfig:
    return transformers.MixtralConfig(
        vocab_size=200, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip


CONFIGS = {"llama": lambda: llama(False), "llama tied": lambda: llama(True), "gpt2": gpt2}


def save(folder: Path, config: transformers.PretrainedConfig) -> Any:
    """A random causal model with a tokenizer trained on the text; returns the model."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that the predictions are not all alike
    model.save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return model


def save_tokenizer(folder: Path) -> None:
    """One of 200 words, trained on the text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=["[UNK]", "[PAD]"])
    tokenizer.train_from_iterator([TEXT], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)


def run(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_model_computes_what_a_converted_one_does(name: str, tmp_path: Path) -> None:
    """The way through a folder against nn.quantize_ on the model that transformers itself has read."""
    save(tmp_path / "model", CONFIGS[name]())
    want = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    index = torch.arange(40).reshape(2, 20) % 200
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "model")(index).logits, want(index).logits)
    for format in ("nf4", "int8", "lloyd3"):
        quantize_folder(tmp_path / "model", tmp_path / format, format)
        got = load_model(tmp_path / format)
        kinds = {type(module) for module in got.modules()}
        assert {"nf4": Linear4bit, "int8": Linear8bit, "lloyd3": LinearKbit}[format] in kinds
        converted = polybit.nn.quantize_(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), format)
        with torch.no_grad():
            assert torch.equal(got(index).logits, converted.eval()(index).logits)


def test_embeddings_tied_and_untied(tmp_path: Path) -> None:
    index = torch.arange(20).reshape(1, 20)
    for tied in (True, False):
        folder = tmp_path / f"tied {tied}"
        save(folder, llama(tied))
        assert ("lm_head.weight" in read_state_dict(folder)) is not tied
        out = tmp_path / f"out {tied}"
        assert run("quantize", folder, out, "--embeddings", "--override", "lm_head=nf4")[0] == (2 if tied else 0)
        if tied:  # there is no lm_head in the file; the embedding stands for both
            assert run("quantize", folder, out, "--embeddings")[0] == 0
        got = load_model(out)
        assert isinstance(got.model.embed_tokens, Embedding4bit)
        assert isinstance(got.lm_head, Linear4bit)
        assert (got.lm_head.weight is got.model.embed_tokens.weight) is tied
        converted = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        polybit.nn.quantize_(converted, "nf4", embeddings=True, skip=())
        with torch.no_grad():
            assert torch.equal(got(index).logits, converted(index).logits)


def test_overrides_and_thresholds_come_back(tmp_path: Path) -> None:
    save(tmp_path / "model", llama(False))
    code, _, error = run(
        "quantize", tmp_path / "model", tmp_path / "out", "--threshold", "5",
        "--override", "layers.0.*=nf4", "--override", "*.layers.0.*=int8,threshold=3", "--override", "down_proj=int8",
        "--override", "lm_head=lloyd2,block_size=32,double_quant=false", "--override", "q_proj=none",
    )  # fmt: skip
    assert code == 2
    assert "override of 'layers.0.*' matches no linear layer" in error
    code, _, error = run(
        "quantize", tmp_path / "model", tmp_path / "out", "--threshold", "5",
        "--override", "*.layers.0.*=int8,threshold=3", "--override", "down_proj=int8",
        "--override", "lm_head=lloyd2,block_size=32,double_quant=false", "--override", "q_proj=none",
    )  # fmt: skip
    assert code == 0, error
    model = load_model(tmp_path / "out")
    first, second = model.model.layers
    assert isinstance(first.self_attn.q_proj, Linear8bit)
    assert first.mlp.down_proj.threshold == 3
    assert second.mlp.down_proj.threshold == 5
    assert type(second.self_attn.q_proj) is torch.nn.Linear
    assert isinstance(second.self_attn.k_proj, Linear4bit)
    weight = model.lm_head.weight
    assert (weight.format_name, weight.block_size, weight.double_quant) == ("lloyd2", 32, False)


@pytest.mark.parametrize(
    "option, words",
    [
        ("nf4", "PATTERN=FORMAT"),
        ("*=nf5", "unknown format 'nf5'"),
        ("*=nf4,block_size=48", "power of two"),
        ("*=nf4,block_size=many", "block_size"),
        ("*=nf4,search=perhaps", "must be true or false"),
        ("*=nf4,bits=4", "option must be one of"),
    ],
)
def test_wrong_overrides(option: str, words: str, tmp_path: Path) -> None:
    save(tmp_path / "model", llama(False))
    code, _, error = run("quantize", tmp_path / "model", tmp_path / "out", "--override", option)
    assert code == 2
    assert words in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def independent(model: Any, tokens: torch.Tensor, window: int, stride: int) -> float:
    """Perplexity token by token, each from the window that predicts it first, in fp64."""
    losses = []
    for position in range(1, len(tokens)):
        begin = 0
        while begin + window <= position:
            begin += stride
        context = tokens[begin:position]
        with torch.no_grad():
            scores = model(context.unsqueeze(0)).logits[0, -1].double()
        losses.append(math.log(torch.exp(scores).sum().item()) - scores[tokens[position]].item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("window, stride", [(32, 16), (32, 31), (17, 3), (64, 32)])
def test_perplexity_against_an_independent_computation(window: int, stride: int, tmp_path: Path) -> None:
    model = save(tmp_path / "model", llama(False))
    tokens = tokenize(tmp_path / "model", TEXT)[:100]
    got = perplexity(model, tokens, window=window, stride=stride)
    assert got.tokens == 99
    want = independent(model, tokens, window, stride)
    assert abs(got.perplexity / want - 1) < 1e-5
    assert want > 50  # a random model knows nothing


def test_perplexity_of_short_texts_and_wrong_windows(tmp_path: Path) -> None:
    model = save(tmp_path / "model", llama(False))
    tokens = torch.tensor([5, 7])
    scores = torch.log_softmax(model(tokens[:1].unsqueeze(0)).logits[0, 0].double(), -1)
    assert perplexity(model, tokens).perplexity == pytest.approx(math.exp(-scores[7].item()), rel=1e-5)
    for options, words in (
        ({"window": 65}, "window must be 2...64"),
        ({"window": 1}, "window must be 2...64"),
        ({"window": 8, "stride": 8}, "stride must be 1...7"),
        ({"window": 8, "stride": 0}, "stride must be 1...7"),
    ):
        with pytest.raises(ValueError, match=words):
            perplexity(model, tokens, **options)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        perplexity(model, tokens[:1])


def test_eval_of_a_decoder(tmp_path: Path) -> None:
    model = save(tmp_path / "model", llama(True))
    tokens = tokenize(tmp_path / "model", TEXT)
    ratios = {}
    for format in ("int8", "int2"):
        quantize_folder(tmp_path / "model", tmp_path / format, format)
        text = tmp_path / "model" / "text.txt"
        options = ("--text", text, "--window", 32, "--stride", 24, "--json")
        code, out, error = run("eval", tmp_path / "model", tmp_path / format, *options)
        assert code == 0, error
        result = json.loads(out)
        assert result["kind"] == "decoder"
        assert result["tokens"] == len(tokens) - 1
        want = perplexity(model, tokens, window=32, stride=24).perplexity
        assert result["perplexity_original"] == pytest.approx(want, rel=1e-6)
        want = perplexity(load_model(tmp_path / format), tokens, window=32, stride=24).perplexity
        assert result["perplexity"] == pytest.approx(want, rel=1e-6)
        assert result["ratio"] == pytest.approx(result["perplexity"] / result["perplexity_original"])
        ratios[format] = result["ratio"]
    assert abs(ratios["int8"] - 1) < 0.005
    assert abs(ratios["int2"] - 1) > 0.02
    code, out, _ = run("eval", tmp_path / "model", tmp_path / "int8", "--text", text)
    assert code == 0
    assert out.startswith("perplexity ")


def test_eval_of_an_encoder(tmp_path: Path) -> None:
    """Cosines computed here, sentence by sentence and without padding."""
    source = tmp_path / "model"
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that a sentence is more than its layer norm's bias
    model.save_pretrained(source)
    save_tokenizer(source)
    lines = [line for line in TEXT.splitlines() if line.strip()][:12]
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(lines), encoding="utf-8")

    def embed(model: Any) -> torch.Tensor:
        with torch.no_grad():
            parts = [model(tokenize(source, line)[None]).last_hidden_state.double().mean((0, 1)) for line in lines]
        return torch.nn.functional.normalize(torch.stack(parts), dim=-1)

    means = {}
    for format in ("int8", "int2"):
        quantize_folder(source, tmp_path / format, format)
        code, out, error = run("eval", source, tmp_path / format, "--text", text, "--json")
        assert code == 0, error
        result = json.loads(out)
        assert (result["kind"], result["sentences"]) == ("encoder", len(lines))
        cosine = (embed(model) * embed(load_model(tmp_path / format))).sum(-1)
        assert result["cosine_mean"] == pytest.approx(float(cosine.mean()), abs=1e-5)
        assert result["cosine_worst"] == pytest.approx(float(cosine.min()), abs=1e-5)
        means[format] = result["cosine_mean"]
    assert means["int2"] < 0.99 < 0.999 < means["int8"] < 1
    code, _, error = run("eval", source, tmp_path / "int8", "--text", text, "--window", 8)
    assert code == 2 and "for decoders" in error
    text.write_text("one line", encoding="utf-8")
    code, _, error = run("eval", source, tmp_path / "int8", "--text", text)
    assert code == 2 and "at least 2 lines, got 1" in error


def test_eval_of_experts(tmp_path: Path) -> None:
    """Their stacks, against what transformers makes of the folders itself."""
    model = save(tmp_path / "model", mixtral())
    text, tokens = tmp_path / "model" / "text.txt", tokenize(tmp_path / "model", TEXT)
    for format in ("nf4", "int8"):
        code, _, error = run("quantize", tmp_path / "model", tmp_path / format, "--format", format)
        assert code == 0, error
        code, out, error = run("eval", tmp_path / "model", tmp_path / format, "--text", text, "--json")
        assert code == 0, error
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / format).eval()
        assert other.model.layers[0].mlp.experts.down_proj.format_name == format
        wanted = [perplexity(which, tokens).perplexity for which in (model, other)]
        result = json.loads(out)
        assert [result["perplexity_original"], result["perplexity"]] == pytest.approx(wanted, rel=1e-6)


def test_eval_of_an_encoder_decoder(tmp_path: Path) -> None:
    """Both sides read each line."""
    torch.manual_seed(5)
    config = transformers.T5Config(
        vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    lines = [line for line in TEXT.splitlines() if line.strip()][:8]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    assert run("quantize", tmp_path / "model", tmp_path / "out", "--format", "nf4")[0] == 0
    code, out, error = run("eval", tmp_path / "model", tmp_path / "out", "--text", tmp_path / "text.txt", "--json")
    assert code == 0, error

    other = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()

    def mean(which: Any, index: torch.Tensor) -> torch.Tensor:
        memory = which.get_encoder()(index).last_hidden_state
        return which.get_decoder()(index, encoder_hidden_states=memory).last_hidden_state.mean(1)

    cosines = []
    for line in lines:
        index = torch.tensor([tokenizer(line)["input_ids"]])
        with torch.no_grad():
            a, b = mean(model, index), mean(other, index)
        cosines.append(torch.nn.functional.cosine_similarity(a, b).item())
    assert json.loads(out)["cosine_mean"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    assert 0.9 < min(cosines) < 0.99999


def test_eval_of_wrong_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "model", llama(True))
    quantize_folder(tmp_path / "model", tmp_path / "out", "nf4")
    text = tmp_path / "model" / "text.txt"
    code, out, error = run("eval", tmp_path / "model", tmp_path / "out", "--text", text, "--stride", 99)
    assert (code, out) == (2, "")
    assert "stride must be" in error
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "latin.txt").write_bytes("Straße".encode("latin-1"))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for target, words, options in (
        ("absent", "absent: no such folder", ["--text", text]),
        ("out", "absent.txt: No such file", ["--text", tmp_path / "absent.txt"]),
        ("out", "latin.txt: no text in UTF-8", ["--text", tmp_path / "latin.txt"]),
        ("out", "device 'gpu' cannot be used here", ["--text", text, "--device", "gpu"]),
        ("out", "its name must end in one of .", ["--text", text, "--plot", tmp_path / "picture.xyz"]),
        ("bert", "their model types are bert and llama", ["--text", text]),
    ):
        code, out, error = run("eval", tmp_path / "model", tmp_path / target, *options)
        assert (code, out) == (2, "") and words in error, error
    (tmp_path / "model" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    code, out, error = run("eval", tmp_path / "model", tmp_path / "out", "--text", text)
    assert (code, out) == (2, "") and "model: its tokenizer cannot be loaded" in error, error
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    caplog.clear()
    with pytest.raises(FolderError, match="does not fit its model class"):
        load_model(tmp_path / "out")
    assert "nf4, block size 64, double_quant=True, shape [96, 64]" in caplog.text  # the report of transformers
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(FolderError, match="does not fit its model class"):
        load_model(tmp_path / "out")


def test_bodies_and_heads(tmp_path: Path) -> None:
    """An encoder saved for masked language modelling serves as encoder; GPT-2's own files lack their prefix."""
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    head = transformers.BertForMaskedLM(config).eval()
    head.save_pretrained(tmp_path / "bert")
    quantize_folder(tmp_path / "bert", tmp_path / "q", "int8")
    index = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        want = head.bert(index).last_hidden_state
        got = load_model(tmp_path / "bert")(index).last_hidden_state
        quantized = load_model(tmp_path / "q")(index).last_hidden_state
    assert torch.equal(got, want)
    assert 0 < (quantized - want).square().sum() / want.square().sum() < 1e-3

    model = transformers.GPT2LMHeadModel(gpt2()).eval()
    body = tmp_path / "gpt2"
    model.transformer.save_pretrained(body)
    saved = json.loads((body / "config.json").read_text())
    (body / "config.json").write_text(json.dumps(saved | {"architectures": ["GPT2LMHeadModel"]}))
    with torch.no_grad():
        assert torch.equal(load_model(body)(index).logits, model(index).logits)


def test_what_layers_compute_in_is_recorded(tmp_path: Path) -> None:
    save(tmp_path / "model", llama(True))
    code, _, error = run(
        "quantize", tmp_path / "model", tmp_path / "out", "--activations", "int8", "--compute-dtype", "bfloat16",
        "--override", "down_proj=nf4,compute_dtype=float32",
    )  # fmt: skip
    assert code == 0, error
    mlp = load_model(tmp_path / "out").model.layers[0].mlp
    found = [(layer.compute_dtype, layer.activations) for layer in (mlp.up_proj, mlp.down_proj)]
    assert found == [(torch.bfloat16, "int8"), (torch.float32, "int8")]
    code, _, error = run("quantize", tmp_path / "model", tmp_path / "other", "--compute-dtype", "float64")
    assert code == 2 and "compute_dtype must be float32, float16 or bfloat16, got 'float64'" in error


@pytest.mark.parametrize("kind", ("encoder", "decoder"))
def test_eval_plots(tmp_path: Path, kind: str) -> None:
    """A picture with something in it: two curves of a decoder, one of an encoder, and no picture without a model."""
    from PIL import Image

    save(tmp_path / "model", llama(True))
    if kind == "encoder":
        bert = transformers.BertConfig(
            vocab_size=200, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128
        )
        transformers.BertModel(bert).save_pretrained(tmp_path / "model")
    quantize_folder(tmp_path / "model", tmp_path / "out", "int2")
    picture = tmp_path / "eval.png"
    text = tmp_path / "model" / "text.txt"
    code, _, error = run("eval", tmp_path / "model", tmp_path / "out", "--text", text, "--plot", picture)
    assert code == 0, error
    colors = Image.open(picture).convert("RGB").getcolors(1 << 20)
    strong = {color for count, color in colors if count > 50 and max(color) - min(color) > 100}
    assert len(strong) == (2 if kind == "decoder" else 1), strong
    code, _, error = run(
        "eval", tmp_path / "model", tmp_path / "out", "--text", text, "--plot", tmp_path / "no" / "x.png"
    )
    assert code == 2, error
