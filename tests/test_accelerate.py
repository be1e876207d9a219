"""accelerate: the sizes that it counts, and training with an Accelerator.

What it offloads is in test_transformers_memory.py, code written for bitsandbytes in test_compat.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import run_python
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"

import accelerate
import peft
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import compute_module_sizes, infer_auto_device_map

from polybit import PolybitConfig, QTensor, optim
from polybit.nn import quantize_

pytestmark = pytest.mark.usefixtures("one_thread")  # the models are tiny

TOKENS = torch.arange(96).view(8, 12) * 11 % 200
Llama = transformers.LlamaForCausalLM


@pytest.fixture(autouse=True)
def _no_state() -> Iterator[None]:
    """Accelerators of one process share theirs."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    path = tmp_path_factory.mktemp("dense")
    Llama(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("format", ("nf4", "int8"))
def test_sizes_and_maps_go_by_stored_bytes(folder: Path, format: str) -> None:
    """Module by module, and to the byte in a map of devices; what is told by special_dtypes stays as it is told."""
    model = quantize_(Llama.from_pretrained(folder), format)
    quantized = {name: p for name, p in model.named_parameters() if isinstance(p, QTensor)}
    stored = {
        name: p.stored_bytes if isinstance(p, QTensor) else p.nbytes
        for name, p in (*model.named_parameters(), *model.named_buffers())
    }
    sizes = compute_module_sizes(model)
    for name, _ in model.named_modules():
        inside = [size for key, size in stored.items() if not name or key.startswith(f"{name}.")]
        assert sizes.get(name, 0) == sum(inside), name
    assert len(quantized) == 14 and sizes[""] < 0.6 * compute_module_sizes(Llama.from_pretrained(folder))[""]

    split = {"no_split_module_classes": ["LlamaDecoderLayer"]}
    fits, short = ({"cpu": sizes[""] - missing, "disk": 1 << 30} for missing in (0, 1))
    assert set(infer_auto_device_map(model, max_memory=fits, **split).values()) == {"cpu"}
    assert set(infer_auto_device_map(model, max_memory=short, **split).values()) == {"cpu", "disk"}
    half = compute_module_sizes(model, dtype=torch.float16)
    assert half["model.layers"] < sizes["model.layers"]  # norms alone are halved
    assert half["model.layers.0.mlp"] == sizes["model.layers.0.mlp"]
    told = compute_module_sizes(model, special_dtypes=dict.fromkeys(quantized, torch.int8))
    assert told["model.layers.0.mlp.up_proj"] == 64 * 128
    buffers = compute_module_sizes(model, buffers_only=True)
    assert buffers[""] == sum(buffer.nbytes for buffer in model.buffers())


def adapted(folder: Path, format: str, where: str) -> Any:
    """A quantized model with something to train: adapters or its head."""
    model = Llama.from_pretrained(folder, quantization_config=PolybitConfig(format))
    if where == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lm_head" in name)
        return model
    torch.manual_seed(4)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def parts(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2, min_8bit_size=256)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def frozen(model: nn.Module) -> list[Tensor]:
    return [p.q.clone() for p in model.parameters() if isinstance(p, QTensor)]


@pytest.mark.parametrize("where", ("adapters", "head"))
@pytest.mark.parametrize("format", ("nf4", "int8"))
def test_training_with_an_accelerator(folder: Path, tmp_path: Path, format: str, where: str) -> None:
    """The losses of the loop without it: accumulated gradients, clipped, a scheduler; and from a saved state on."""
    model = adapted(folder, format, where)
    optimizer, scheduler = parts(model)
    want = []
    for step in range(6):
        for batch in TOKENS.split(4):
            loss = model(batch, labels=batch).loss
            (loss / 2).backward()
            want.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert step == 0 or want[-2:] != want[-4:-2]
    assert want[-2] < 0.98 * want[0]

    def prepared() -> tuple[accelerate.Accelerator, Any]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = adapted(folder, format, where)
        data = torch.utils.data.DataLoader(TOKENS, batch_size=4)
        return accelerator, accelerator.prepare(model, *parts(model), data)

    def train(accelerator: accelerate.Accelerator, made: Any, steps: int) -> list[float]:
        model, optimizer, scheduler, data = made
        losses = []
        for _ in range(steps):
            for batch in data:
                with accelerator.accumulate(model):
                    loss = model(batch, labels=batch).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
        return losses

    accelerator, made = prepared()
    codes = frozen(made[0])
    first = train(accelerator, made, 3)
    accelerator.save_state(tmp_path / "state")
    assert first + train(accelerator, made, 3) == want
    assert len(codes) == 14 and all(map(torch.equal, frozen(made[0]), codes))

    accelerator, made = prepared()
    train(accelerator, made, 1)
    accelerator.load_state(tmp_path / "state")
    assert train(accelerator, made, 3) == want[6:]
    assert all(map(torch.equal, frozen(made[0]), codes))
    model = accelerator.unwrap_model(made[0])
    accelerator.save_model(model, tmp_path / "model")
    again = adapted(folder, format, where)
    accelerate.load_checkpoint_in_model(again, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_with_polybit_imported_first() -> None:
    """Before accelerate, which every other test imports first."""
    code = """
import polybit
import accelerate, torch
from torch import nn
from polybit.nn import quantize_
model = quantize_(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), "nf4")
x = torch.randn(5, 64)
want = model(x)
accelerate.cpu_offload(model)
size = accelerate.utils.compute_module_sizes(model)["0"]
print(torch.equal(model(x), want), size == 64 * 4 + model[0].weight.stored_bytes)
"""
    assert run_python(code).stdout.strip() == "True True"
