"""Adapters of PEFT, as it is, on quantized layers. Tiny random model; no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import transformers

import polybit
from polybit import PolybitConfig
from polybit.nn.module import QuantizedModule

WHERE = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
METHODS: dict[str, Any] = {
    "LoRA": lambda: peft.LoraConfig(r=4, **WHERE),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **WHERE),
    "OLoRA": lambda: peft.LoraConfig(r=4, init_lora_weights="olora", **WHERE),
    "PiSSA": lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", **WHERE),
    "LoHa": lambda: peft.LoHaConfig(r=4, **WHERE),
    "LoKr": lambda: peft.LoKrConfig(r=4, **WHERE),
    "AdaLora": lambda: peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, **WHERE),
    "IA3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **WHERE),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=16, **WHERE),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=8, **WHERE),
    "RandLora": lambda: peft.RandLoraConfig(r=4, **WHERE),
    "RoAd": lambda: peft.RoadConfig(**WHERE),
    "HRA": lambda: peft.HRAConfig(r=4, **WHERE),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=50, **WHERE),
    "MiSS": lambda: peft.MissConfig(r=4, **WHERE),
}
# A merged weight is quantized again: relative to the logits, about what quantizing the model costs.
ROUNDING = {"nf4": 0.25, "int8": 0.025}
TOKENS = torch.arange(18).view(2, 9) * 11 % 200


pytestmark = pytest.mark.usefixtures("one_thread")  # the models are tiny


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """As it was: BOFT tries to build an extension for CUDA, fails, and leaves CC and CXX behind."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    path = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(folder: Path, format: str) -> Any:
    options = {"quantization_config": PolybitConfig(format), "dtype": torch.float32}
    return transformers.LlamaForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(TOKENS).logits
    return found


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")  # IA3
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft")  # BOFT
@pytest.mark.parametrize("format", ROUNDING)
@pytest.mark.parametrize("method", METHODS)
def test_method(folder: Path, tmp_path: Path, method: str, format: str) -> None:
    """Forward, backward, save, reload, merge, unmerge, merge_and_unload."""
    torch.manual_seed(4)
    base = logits(load(folder, format))
    model = peft.get_peft_model(load(folder, format), METHODS[method]()).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter += torch.randn_like(parameter) * 0.02
    model(TOKENS, labels=TOKENS).loss.backward()
    assert trained and all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained.values())
    assert any(bool(parameter.grad.any()) for parameter in trained.values())

    adapted = logits(model)
    assert distance(adapted, base) > 1e-4
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(load(folder, format), tmp_path)
    again = distance(logits(reloaded), adapted)
    assert again <= (ROUNDING[format] if method in ("OLoRA", "PiSSA") else 1e-6), again

    model.merge_adapter()
    changes = [distance(logits(model), adapted)]
    model.unmerge_adapter()
    changes.append(distance(logits(model), adapted))
    merged = model.merge_and_unload()
    changes.append(distance(logits(merged), adapted))
    print(f"{method} {format}: merge {changes[0]:.4f}, unmerge {changes[1]:.4f}, merge_and_unload {changes[2]:.4f}")
    assert max(changes) < ROUNDING[format]
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in merged.modules())
    assert sum(isinstance(module, QuantizedModule) for module in merged.modules()) == 14


def test_training_beside_evaluation(folder: Path) -> None:
    """k-bit preparation and gradient checkpointing; the loss does not depend on evaluations in between."""
    losses: dict[bool, list[float]] = {}
    for evaluate in (False, True):
        torch.manual_seed(5)
        model = peft.prepare_model_for_kbit_training(load(folder, "nf4"), use_gradient_checkpointing=True)
        model.gradient_checkpointing_enable()
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, **WHERE))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        losses[evaluate] = []
        for _ in range(20):
            model.train()
            loss = model(TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[evaluate].append(loss.item())
            if evaluate:
                logits(model)
    assert losses[True] == losses[False]
    assert losses[True][-1] < 0.9 * losses[True][0]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated", "ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("optimizer", (polybit.optim.PagedAdamW8bit, polybit.optim.Lion8bit))
def test_trainer(folder: Path, tmp_path: Path, optimizer: type[torch.optim.Optimizer]) -> None:
    """With our optimizers: the same losses with and without evaluation, and after a resumed training."""
    data = [{"input_ids": row, "labels": row} for row in torch.arange(64 * 12).view(64, 12) * 7 % 200]
    losses = {}
    for strategy in ("no", "steps"):
        torch.manual_seed(6)
        model = peft.get_peft_model(load(folder, "nf4"), peft.LoraConfig(r=4, **WHERE))
        arguments = transformers.TrainingArguments(
            str(tmp_path / strategy), max_steps=8, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1,
            eval_strategy=strategy, eval_steps=3, save_steps=4, use_cpu=True, report_to=[], disable_tqdm=True, seed=1,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=data,
            eval_dataset=data[:8],
            optimizer_cls_and_kwargs=(optimizer, {"lr": 1e-2}),
        )
        trainer.train()
        losses[strategy] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.train(resume_from_checkpoint=str(tmp_path / strategy / "checkpoint-4"))
        losses[f"{strategy}, resumed"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses["no"]) == 8 and all(found == losses["no"] for found in losses.values()), losses
