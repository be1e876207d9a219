"""How much memory models of a PolybitConfig take, as others count it and at the peak; layers that are offloaded."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from tools import run_python
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers
import transformers.integrations.accelerate
from transformers.modeling_utils import get_total_byte_count

from polybit import PolybitConfig, QTensor
from polybit.nn import quantize_

pytestmark = pytest.mark.usefixtures("one_thread")  # the models are tiny

TOKENS = torch.arange(18).view(2, 9) * 11 % 200
Llama = transformers.LlamaForCausalLM
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "int8": {"format": "int8"},
    "nf3 and all": {"format": "nf3", "skip": (), "embeddings": True, "double_quant": False},
}


@pytest.fixture(scope="module", params=(False, True), ids=("", "tied"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=request.param,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("dense")
    Llama(config).save_pretrained(path)
    return path


def load(folder: Path, options: dict[str, Any], **more: Any) -> Any:
    return Llama.from_pretrained(folder, quantization_config=PolybitConfig(**options), **more)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def real_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers, counted by what is in them."""
    parts = [p.inner_tensors().values() if isinstance(p, QTensor) else [p] for p in model.parameters()]
    return sum(t.untyped_storage().nbytes() for tensors in [*parts, model.buffers()] for t in tensors)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_sizes_are_those_of_the_stored_bytes(folder: Path, options: dict[str, Any]) -> None:
    model = load(folder, options)
    want = real_bytes(quantize_(Llama.from_pretrained(folder), **{"format": "nf4", **options}))
    assert model.get_memory_footprint() == want < 0.8 * Llama.from_pretrained(folder).get_memory_footprint()
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert model.get_memory_footprint(return_buffers=False) == want - buffers > 0

    sizes, leaves = transformers.integrations.accelerate.compute_module_sizes(model, model.hf_quantizer)
    assert sizes[""] == pytest.approx(want, abs=1e-6)
    up = model.model.layers[0].mlp.up_proj
    assert leaves["model.layers.0.mlp.up_proj"] == pytest.approx(up.weight.stored_bytes, abs=1e-6)
    # What is reserved on a GPU in advance: of everything that from_pretrained expects, buffers aside.
    everything = {name: torch.device("cpu") for name, _ in model.named_parameters()}
    assert get_total_byte_count(model, everything, model.hf_quantizer)[torch.device("cpu")] == pytest.approx(
        want - buffers, abs=1e-6
    )
    assert model.dequantize().get_memory_footprint() > 1.2 * want


def test_what_is_reserved_on_an_accelerator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """from_pretrained asks for every name that it expects, on the way to a GPU."""
    asked = {}

    def warmup(model: Any, device_map: dict[str, Any], quantizer: Any) -> None:
        asked.update(get_total_byte_count(model, dict.fromkeys(device_map, torch.device("cuda")), quantizer))

    monkeypatch.setattr("transformers.modeling_utils.caching_allocator_warmup", warmup)
    model = load(folder, {}, device_map="cpu")
    want = model.get_memory_footprint(return_buffers=False)
    assert asked == {torch.device("cuda"): pytest.approx(want, abs=1e-6)}


@pytest.mark.parametrize(("format", "dtype"), (("nf4", accelerate.utils.CustomDtype.INT4), ("int8", torch.int8)))
def test_maps_of_devices(folder: Path, format: str, dtype: Any) -> None:
    """transformers fills a device to the byte; what accelerate is told of dtypes counts codes alone."""
    model = load(folder, {"format": format})
    infer = functools.partial(
        transformers.integrations.accelerate.infer_auto_device_map,
        model,
        no_split_module_classes=["LlamaDecoderLayer"],
        hf_quantizer=model.hf_quantizer,
    )
    size = model.get_memory_footprint()
    assert set(infer(max_memory={"cpu": size, "disk": 1 << 30}).values()) == {"cpu"}
    assert set(infer(max_memory={"cpu": size - 1, "disk": 1 << 30}).values()) == {"cpu", "disk"}

    layer = sum(p.stored_bytes if isinstance(p, QTensor) else p.nbytes for p in model.model.layers[0].parameters())
    special = {name: dtype for name, p in model.named_parameters() if isinstance(p, QTensor)}
    guess = accelerate.utils.compute_module_sizes(model, special_dtypes=special)["model.layers.0"]
    assert 0.7 * layer < guess < layer  # the tables of such small weights are a large part


MAPS = {
    "some": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"},
    "all": {"model.embed_tokens": "disk", "model.layers": "disk"},
}
REST = {"model.norm": "cpu", "model.rotary_emb": "cpu"}


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", MAPS)
def test_layers_on_a_disk(folder: Path, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """From a dense and from a quantized checkpoint: the same numbers, pass after pass, and the same when saved."""
    plain = load(folder, options)
    want = logits(plain)
    plain.save_pretrained(tmp_path / "quantized")
    device_map = MAPS[name] | REST | {"lm_head": MAPS[name]["model.embed_tokens"]}
    dense = {"quantization_config": PolybitConfig(**options)}
    for source, config in ((folder, dense), (tmp_path / "quantized", {})):
        model = Llama.from_pretrained(source, device_map=device_map, offload_folder=tmp_path / "offload", **config)
        assert all(parameter.is_meta for parameter in model.model.layers[1].parameters())
        assert model.model.embed_tokens.weight.is_meta == (name == "all")
        for _ in range(2):
            assert torch.equal(logits(model), want)
        if not model.config.tie_word_embeddings:  # accelerate's hooks take tied weights apart
            assert model.get_memory_footprint() == plain.get_memory_footprint()
        with pytest.raises(ValueError, match="layers are offloaded"):
            model.dequantize()
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(Llama.from_pretrained(tmp_path / "saved")), want)
    written = sum(path.stat().st_size for path in (tmp_path / "offload").iterdir())
    assert written > sum(p.stored_bytes for p in plain.model.layers[1].parameters() if isinstance(p, QTensor))


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_layers_on_the_cpu_beside_another_device(
    folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other device is the CPU under a name that accelerate does not know as that, so that its hooks run."""
    want = logits(load(folder, options))
    dispatch = transformers.integrations.accelerate.dispatch_model
    device = torch.device("cpu")
    elsewhere = functools.wraps(dispatch)(functools.partial(dispatch, main_device=device))
    monkeypatch.setattr(transformers.integrations.accelerate, "dispatch_model", elsewhere)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": device, "lm_head": "cpu"}
    model = load(folder, options, device_map=device_map | REST)
    assert all(parameter.is_meta for parameter in model.model.layers[0].parameters())
    assert not any(parameter.is_meta for parameter in model.model.layers[1].parameters())
    for _ in range(2):
        assert torch.equal(logits(model), want)


def offload(how: str, model: nn.Module, folder: Path) -> None:
    """As users of accelerate do it with a model that is loaded. The second device of "beside" is the CPU, too."""
    beside = {"model.layers.0": "cpu", "model.layers.1": torch.device("cpu")}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    match how:
        case "cpu":
            accelerate.cpu_offload(model, "cpu")
        case "whole layers":
            accelerate.cpu_offload(model, "cpu", preload_module_classes=["LlamaDecoderLayer"])
        case "disk":
            accelerate.disk_offload(model, folder, "cpu")
        case "some on a disk":
            accelerate.dispatch_model(model, rest | beside | {"model.layers.1": "disk"}, offload_dir=folder)
        case "beside":
            accelerate.dispatch_model(model, rest | beside, main_device=torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("how", ("cpu", "whole layers", "disk", "some on a disk", "beside"))
def test_offloaded_when_it_is_loaded(folder: Path, tmp_path: Path, how: str, options: dict[str, Any]) -> None:
    """The same numbers, pass after pass, and when it is saved; what takes the hooks away gives the model back."""
    model = load(folder, options)
    want, quantized = logits(model), [name for name, p in model.named_parameters() if isinstance(p, QTensor)]
    entries = {key: value.clone() for key, value in model.state_dict().items()}
    offload(how, model, tmp_path / "offload")
    away = [name for name in quantized if model.get_parameter(name).is_meta]
    second = [name for name in quantized if "layers.1." in name]
    assert len(second) == 7
    assert away == {"some on a disk": second, "beside": [q for q in quantized if q not in second]}.get(how, quantized)
    for _ in range(2):
        assert torch.equal(logits(model), want)
        assert all(model.get_parameter(name).is_meta for name in away)
    with pytest.raises(ValueError, match="layers are offloaded"):
        model.dequantize()
    # transformers saves what has a map of devices, and no tied weights that hooks took apart, of dense models, too.
    if how == "some on a disk" or (how == "beside" and not model.config.tie_word_embeddings):
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(Llama.from_pretrained(tmp_path / "saved")), want)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model), want)
    assert all(torch.equal(value, entries[key]) for key, value in model.state_dict().items())


def test_a_module_that_is_offloaded(tmp_path: Path) -> None:
    """Of torch alone, with a weight that two layers share; and moved as a whole."""
    torch.manual_seed(3)
    model = quantize_(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8)), "nf4")
    model[2].weight = model[0].weight
    x = torch.randn(5, 64)
    want = model(x)
    accelerate.disk_offload(model, tmp_path, "cpu")
    assert model[0].weight.is_meta and torch.equal(model(x), want)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(x), want)
    model, hook = accelerate.cpu_offload_with_hook(model, "cpu")
    assert torch.equal(model(x), want)
    hook.offload()
    assert torch.equal(model(x), want)


PEAK = """
import json, re, threading, time
import torch, transformers
from pathlib import Path
from polybit import PolybitConfig, QTensor, quantize
from polybit.quantize_folder import quantize_folder
from transformers import AutoModelForCausalLM as Model

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def peak_of(work):
    peaks, done, before = [0], False, anonymous()
    def watch():
        while not done:
            peaks.append(anonymous() - before)
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    result = work()
    done = True
    thread.join()
    return max(peaks), result

quantize(torch.randn(64, 64), "nf4")  # loads what is loaded once
dense = sum(p.nbytes for p in Model.from_pretrained(folder).parameters())
control, copies = peak_of(lambda: [p.clone() for p in Model.from_pretrained(folder).parameters()])
del copies
peak, model = peak_of(lambda: Model.from_pretrained(folder, quantization_config=PolybitConfig()))
model.save_pretrained(out, max_shard_size="10MB")
again, model = peak_of(lambda: Model.from_pretrained(out))
stored = model.get_memory_footprint()
del model
by_file, summary = peak_of(lambda: quantize_folder(Path(folder), Path(out + " by file")))
print(json.dumps({"dense": dense, "copies": control, "stored": stored, "from dense": peak, "from quantized": again,
    "by file": by_file}))
"""


def saved(model_class: Any, config: Any, folder: Path) -> None:
    """A model of that class with other values in each row, in shards of 50 MB."""
    with torch.device("meta"):
        model = model_class(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.shape[-1]))
    model.save_pretrained(folder, max_shard_size="50MB")


def peaks(tmp_path: Path, **environment: str) -> dict[str, int]:
    """Bytes, by what was done with the folder "dense"; printed in MiB."""
    paths = f"folder, out = {str(tmp_path / 'dense')!r}, {str(tmp_path / 'out')!r}\n"
    said = run_python(paths + PEAK, HF_HUB_OFFLINE="1", **environment).stdout
    found: dict[str, int] = json.loads(said.splitlines()[-1])
    print({name: f"{size / 2**20:.1f} MiB" for name, size in found.items()})
    return found


MARGIN = 24 << 20


def test_the_peak_of_from_pretrained(tmp_path: Path) -> None:
    """300 MB in eight shards. Memory of the process alone: mapped pages of the files are given back when needed."""
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=8
    )
    saved(Llama, config, tmp_path / "dense")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) == 8
    found, largest = peaks(tmp_path), 1024 * 2816 * 4
    assert found["dense"] > 300 << 20 and found["copies"] > found["dense"] - MARGIN  # it sees what it should
    assert found["from dense"] < found["stored"] + largest + MARGIN
    assert found["from quantized"] < found["stored"] + MARGIN


def test_the_peak_of_experts(tmp_path: Path) -> None:
    """Stacks of 96 and 48 MiB are merged of 24 experts each, of which memory never holds many in dense form.

    With the threshold the allocator returns what is freed at once, as it does anyway for experts above 32 MiB.
    """
    config = transformers.MixtralConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=24,
    )  # fmt: skip
    saved(transformers.MixtralForCausalLM, config, tmp_path / "dense")
    found, stack = peaks(tmp_path, MALLOC_MMAP_THRESHOLD_="65536"), 24 * 2 * 1024 * 512 * 4
    print(f"above the stored bytes: {(found['from dense'] - found['stored']) / stack:.2f} stacks of {stack >> 20} MiB")
    assert found["dense"] > 2.9 * stack and found["copies"] > found["dense"] - MARGIN
    assert found["from dense"] < found["stored"] + stack / 4
    assert found["from quantized"] < found["stored"] + MARGIN
    assert found["by file"] < stack / 2  # the stored bytes of a stack are 0.14
