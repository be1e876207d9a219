# ruff: noqa: E402
"""Programs written for bitsandbytes, run by test_compat.py in processes of their own, with polybit or the real one.

python compat_flows.py polybit|bitsandbytes FLOW FOLDER: writes the tensors that FLOW names to FOLDER/<who>.pt. With
polybit, the real package cannot be found, and the program proves that first.
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"


class Block:
    """Finds nothing of bitsandbytes where it is installed."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
        return None


def block_and_install() -> None:
    sys.meta_path.insert(0, Block())  # type: ignore[arg-type]
    try:
        import bitsandbytes  # noqa: F401
    except ModuleNotFoundError as problem:
        if "blocked" not in str(problem):
            raise
    else:
        raise AssertionError("the real bitsandbytes is not blocked")
    import polybit.compat

    polybit.compat.install()
    import bitsandbytes as ours

    from polybit.compat import bitsandbytes as same

    assert ours is same and ours.__file__ == str(Path(polybit.compat.__file__).parent / "bitsandbytes" / "__init__.py")
    assert isinstance(ours.__spec__, importlib.machinery.ModuleSpec)


WHO, FLOW, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
if WHO == "polybit":
    block_and_install()

import tokenizers
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

torch.set_num_threads(1)
TOKENS = torch.arange(18).view(2, 9) * 11 % 200
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 6.0},
    "int8 plain": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
out: dict[str, Any] = {}


def models() -> dict[str, Any]:
    torch.manual_seed(3)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=200, **SIZES))
    config = transformers.GPT2Config(vocab_size=200, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return {"llama": llama.eval(), "gpt2": transformers.GPT2LMHeadModel(config).eval()}


def load(folder: Path, kind: str, **options: Any) -> Any:
    config = transformers.BitsAndBytesConfig(**CONFIGS[kind])
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def compared(model: Any) -> Tensor:
    """Logits, of the real one in training: the same in dequantized weights, where evaluation is in bf16."""
    if WHO == "bitsandbytes":
        model.train()
        model.config.use_cache = False
        for module in model.modules():
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
    return logits(model)


def word_tokenizer(**special: str) -> Any:
    words = tokenizers.models.WordLevel({f"w{k}": k for k in range(200)}, unk_token="w0")
    raw = tokenizers.Tokenizer(words)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", **special)


def pretrained() -> None:
    """from_pretrained, forward, generate, save, reload, pipeline, dequantize."""
    for name, model in models().items():
        model.save_pretrained(FOLDER / name)
        out[f"{name} dense"] = logits(model)
        for kind in CONFIGS:
            quantized = load(FOLDER / name, kind)
            key = f"{name} {kind}"
            saved = FOLDER / WHO / key
            quantized.save_pretrained(saved)  # before a forward pass: there the real one changes its weights
            out[key] = compared(quantized)
            if WHO == "bitsandbytes":
                continue
            other = transformers.AutoModelForCausalLM.from_pretrained(saved)
            assert torch.equal(logits(other), out[key]), key
            eaten = quantized.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert eaten.shape == (2, 13)
            pipe = transformers.pipeline("text-generation", model=quantized, tokenizer=word_tokenizer())
            (said,) = pipe("w3 w14 w25", max_new_tokens=4, do_sample=False)
            assert len(re.findall(r"w\d+", said["generated_text"])) == 7, said
            again = load(FOLDER / name, kind)
            restored = again.dequantize()
            assert not any("bit" in type(module).__name__ for module in restored.modules())
            torch.testing.assert_close(logits(restored), out[key], rtol=0.05, atol=0.01)
            # What the real one has written, opened here.
            theirs = FOLDER / "bitsandbytes" / key
            if theirs.exists():
                opened = transformers.AutoModelForCausalLM.from_pretrained(theirs)
                out[f"{key} theirs"] = logits(opened)
                with safe_open(theirs / "model.safetensors", "pt") as file:
                    written = {name: file.get_tensor(name) for name in list(file.keys())}
                held = opened.state_dict()
                for entry, value in written.items():
                    assert held[entry].dtype == value.dtype and torch.equal(held[entry], value), (key, entry)


def opened() -> None:
    """What the other one has saved."""
    for folder in sorted((FOLDER / {"polybit": "bitsandbytes", "bitsandbytes": "polybit"}[WHO]).iterdir()):
        out[folder.name] = compared(transformers.AutoModelForCausalLM.from_pretrained(folder))


def sft() -> None:
    """TRL's SFTTrainer, with LoRA on 4 and 8 bits and a paged optimizer by name."""
    import datasets
    import peft
    import trl

    torch.manual_seed(3)
    config = transformers.LlamaConfig(vocab_size=200, **SIZES, initializer_range=0.2)
    transformers.LlamaForCausalLM(config).save_pretrained(FOLDER / "llama")
    texts = [" ".join(f"w{(row + k) % 8 + 5}" for k in range(12)) for row in range(32)]
    # With a fingerprint, because the pins of datasets, dill and pyarrow cannot hash a table: they fail to pickle it.
    data = datasets.Dataset(datasets.table.InMemoryTable.from_pydict({"text": texts}), fingerprint="texts")
    for kind in ("nf4 double", "int8"):
        arguments = trl.SFTConfig(
            str(FOLDER / kind), max_steps=20, per_device_train_batch_size=8, learning_rate=2e-2, logging_steps=1,
            save_strategy="no", use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, seed=1,
            dataset_text_field="text", optim="paged_adamw_8bit",
        )  # fmt: skip
        run = trl.SFTTrainer(
            load(FOLDER / "llama", kind, dtype=torch.float32),
            args=arguments,
            train_dataset=data,
            processing_class=word_tokenizer(eos_token="w1"),
            peft_config=peft.LoraConfig(r=4, target_modules="all-linear"),
        )
        run.train()
        assert "bitsandbytes" in str(type(run.optimizer.optimizer))
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert len(losses) == 20 and losses[-1] < 0.8 * losses[0], losses
        out[kind] = torch.tensor(losses)


def round_input(module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Round the values of an input to what fp16 holds, as the real int8 layers do; gradients pass as they are."""
    x = inputs[0]
    return (x + (x.detach().half().float() - x.detach()),)


def requantize(model: Any) -> None:
    """Round the dense weights that PEFT has merged into as an int8 layer would."""
    from bitsandbytes import functional

    for name, param in model.named_parameters():
        if re.search(r"[qv]_proj(\.base_layer)?\.weight$", name):
            q, scales, _ = functional.int8_vectorwise_quant(param.data.half())
            param.data.copy_(functional.int8_vectorwise_dequant(q, scales))


def adapters() -> None:
    """Methods of PEFT: two steps, save, reload, merge, unmerge, merge_and_unload; what each stage gives."""
    import peft

    # In fp16, because the real int8 layers cast weights to that.
    models()["llama"].half().float().save_pretrained(FOLDER / "llama")
    common: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    first: dict[str, Any] = {**common, "target_modules": ["q_proj"]}
    methods: dict[str, Any] = {
        "lora": peft.LoraConfig(r=4, **common),
        "dora": peft.LoraConfig(r=4, use_dora=True, **common),
        "olora": peft.LoraConfig(r=4, init_lora_weights="olora", **common),
        "adalora": peft.AdaLoraConfig(total_step=10, **common),
        "ia3": peft.IA3Config(feedforward_modules=[], **common),
        "vera": peft.VeraConfig(r=4, **first),
        "oft": peft.OFTConfig(oft_block_size=4, **common),
        "randlora": peft.RandLoraConfig(r=8, **first),
        "road": peft.RoadConfig(**common),
        "boft": peft.BOFTConfig(boft_block_size=4, **common),
        "miss": peft.MissConfig(r=4, **common),
        "loha": peft.LoHaConfig(r=4, **common),
        "lokr": peft.LoKrConfig(r=4, **common),
        "fourierft": peft.FourierFTConfig(n_frequency=50, **common),
        "hra": peft.HRAConfig(r=4, **common),
        "pissa": peft.LoraConfig(r=4, init_lora_weights="pissa", **common),
    }
    for kind in ("nf4", "int8"):
        for name, config in methods.items():
            key = f"{kind} {name}"
            if key == "int8 hra":
                continue  # PEFT rotates the codes
            # DoRA asks for scales that the real layer has moved elsewhere; dense weights say what is right.
            dense = WHO == "bitsandbytes" and key == "int8 dora"
            try:
                adapter(key, config, dense)
            except (AttributeError, NotImplementedError, RuntimeError, TypeError) as problem:
                out[f"{key} raises"] = type(problem).__name__


def prepared(kind: str) -> Any:
    """A quantized model, ready for adapters."""
    import peft

    model = peft.prepare_model_for_kbit_training(load(FOLDER / "llama", kind), use_gradient_checkpointing=False)
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.register_forward_pre_hook(round_input)
    return model


def adapter(key: str, config: Any, dense: bool) -> None:
    """One method, on dense layers with the dequantized weights if `dense`; out: "<key> <stage>"."""
    import peft

    kind = key.partition(" ")[0]

    def stage(name: str) -> Tensor:
        if dense:
            requantize(model)
        out[f"{key} {name}"] = logits(model)
        return logits(model)

    base = load(FOLDER / "llama", kind).dequantize() if dense else prepared(kind)
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(base, config)
    # On a CPU the real Linear4bit repacks its weight in evaluation, and the real Linear8bitLt does not quantize
    # activations in training.
    model.train(WHO == "polybit" or kind == "nf4")
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for param in trained.values():
        # Most start at the identity. RandLora's random bases make its changes thirty times as large.
        param.data.add_(torch.randn_like(param), alpha=0.001 if "randlora" in key else 0.02)
    start = [param.detach().clone() for param in trained.values()]
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    losses = []
    for step in range(2):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        if step == 0:
            out[f"{key} gradient"] = torch.cat([param.grad.flatten() for param in trained.values()])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    out[f"{key} losses"] = torch.stack(losses)
    out[f"{key} change"] = torch.cat([(p.detach() - old).flatten() for p, old in zip(trained.values(), start)])
    model.train(WHO == "bitsandbytes" and kind == "nf4")
    want = stage("trained")
    if WHO == "polybit" and not key.endswith("olora"):  # that has changed its base
        model.save_pretrained(FOLDER / key)
        again = peft.PeftModel.from_pretrained(prepared(kind), FOLDER / key).eval()
        torch.testing.assert_close(logits(again), want, msg=lambda text: f"{key}: {text}")
    model.merge_adapter()
    stage("merged")
    model.unmerge_adapter()
    unmerged = stage("unmerged")
    model = model.merge_and_unload()
    for found in (unmerged, stage("unloaded")):
        assert (found - want).norm() < 0.25 * want.norm(), key


def compiled(backend: str = "aot_eager") -> None:
    """torch.compile of a model, and of one with adapters in training: what eager gives, graphs and breaks."""
    import peft

    models()["llama"].save_pretrained(FOLDER / "llama")
    counters = torch._dynamo.utils.counters
    for kind in ("nf4 double", "int8", "int8 plain"):
        torch._dynamo.reset()
        counters.clear()
        model = prepared(kind).eval()
        model.config.use_cache = False
        for call, name in ((model, "eager"), (torch.compile(model, backend=backend), "compiled")):
            out[f"{kind} logits {name}"] = logits(call)
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        adapted: Any = peft.get_peft_model(model, config).train()
        for call, name in ((adapted, "eager"), (torch.compile(adapted, backend=backend), "compiled")):
            loss = call(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            out[f"{kind} loss {name}"] = loss.detach()
            grads = [param.grad.flatten() for param in adapted.parameters() if param.requires_grad]
            out[f"{kind} gradient {name}"] = torch.cat(grads)
            adapted.zero_grad()
        out[f"{kind} breaks"] = torch.tensor(sum(counters["graph_break"].values()))
        out[f"{kind} graphs"] = torch.tensor(counters["stats"]["unique_graphs"])


def compiled_by_inductor() -> None:
    compiled("inductor")


def trainer() -> None:
    """Optimizers of Trainer by name; what they have learned."""
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    names = [
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_8bit",
        "rmsprop_bnb_8bit",
        "ademamix_8bit",
    ]
    for name in names:
        model = models()["llama"]
        start = model.lm_head.weight.detach().clone()
        arguments = transformers.TrainingArguments(
            output_dir=str(FOLDER / name), optim=name, max_steps=3, learning_rate=1e-3, report_to=[], use_cpu=True,
            per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        run = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        out[f"{name} loss"] = torch.tensor(run.train().training_loss)
        out[name] = model.lm_head.weight.detach() - start
        assert "bitsandbytes" in str(type(run.optimizer.optimizer))


def accelerated() -> None:
    """accelerate's loader, then an 8-bit optimizer on the head of what it made, both prepared by an Accelerator."""
    import accelerate
    import bitsandbytes

    model = models()["llama"]
    weights = FOLDER / WHO / "weights"
    weights.mkdir(parents=True)
    torch.save(model.state_dict(), weights / "pytorch_model.bin")
    for kind, options in {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "fp32"},
        "fp4": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "fp32"},
        "int8": {"load_in_8bit": True},
    }.items():
        with accelerate.init_empty_weights():
            empty = type(model)(model.config)
        config = accelerate.utils.BnbQuantizationConfig(torch_dtype="fp32", **options)
        # accelerate wants a GPU: it refuses a CPU that it knows as one.
        quantized = accelerate.utils.load_and_quantize_model(empty, config, weights, {"": torch.device("cpu")})
        layers = bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt
        assert isinstance(quantized.model.layers[1].mlp.up_proj, layers)
        out[kind] = compared(quantized)
        accelerator = accelerate.Accelerator(cpu=True)
        quantized.lm_head.requires_grad_(True)
        optimizer = bitsandbytes.optim.AdamW8bit(quantized.lm_head.parameters(), lr=1e-2)
        prepared, optimizer = accelerator.prepare(quantized, optimizer)
        losses = []
        for _ in range(4):
            loss = prepared(TOKENS, labels=TOKENS).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        assert losses[-1] < 0.8 * losses[0]
        out[f"{kind} losses"] = torch.stack(losses)


FLOWS = (pretrained, opened, adapters, compiled, compiled_by_inductor, trainer, sft, accelerated)
{flow.__name__: flow for flow in FLOWS}[FLOW]()
torch.save(out, FOLDER / f"{WHO}.pt")
