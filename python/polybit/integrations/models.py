"""Models of transformers from a folder, quantized by polybit or not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from polybit import checkpoint
from polybit.model_folder import FolderError, read_config, read_state_dict
from polybit.nn import Settings, make_empty_
from polybit.nn.convert import matches

# What checkpoints hold that the models of today make themselves.
_OUTDATED = (r"(^|\.)position_ids$", r"rotary_emb\.inv_freq$")


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a language model that predicts the next token."""
    names = config.get("architectures") or []
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def make_model(raw: Mapping[str, Any]) -> Any:
    """A new model as a config.json says, without quantization. Raises ValueError if transformers does not know it."""
    import transformers  # an optional dependency

    config = transformers.AutoConfig.for_model(**raw)
    known = [cls for name in raw.get("architectures") or [] if (cls := getattr(transformers, name, None))]
    # _from_config makes the model in the dtype that the configuration names, which the constructor does not.
    return known[0]._from_config(config) if known else transformers.AutoModel.from_config(config)


def load_model(folder: Path) -> nn.Module:
    """The model of a folder in eval mode: a causal language model with its head, of any other model the body.

    Layers that the folder holds in quantized form become quantized layers. Nothing is fetched from the network.
    Raises FolderError if weights are missing or do not fit the model, ValueError if a quantized entry is damaged.
    """
    raw = read_config(folder)
    recorded = raw.pop("quantization_config", None) or {}
    model = make_model(raw)
    tensors = _rename(model, read_state_dict(folder))
    settings = {}
    for key in tensors:
        name = key.removesuffix(".weight")
        if name != key and checkpoint.is_quantized(tensors, key):
            weight = checkpoint.from_tensors(tensors, key)
            settings[name] = Settings.of(weight, **_behaviour(recorded, name))
    try:
        make_empty_(model, settings)
    except ValueError as problem:
        raise FolderError(f"{folder}: does not fit its model class: {problem}") from None
    missing, unexpected = _load(model, tensors, folder)
    if missing or unexpected:
        raise FolderError(f"{folder}: does not fit its model class: missing {missing[:3]}, unexpected {unexpected[:3]}")
    whole: nn.Module = model if is_causal(raw) else model.base_model
    return whole.eval()


def _behaviour(recorded: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings that the tensors do not record."""
    overrides = (recorded.get("overrides") or {}).items()
    override = next((settings for pattern, settings in overrides if matches(name, pattern)), None)
    wanted = {**recorded, **(override or {})}
    return {key: wanted[key] for key in ("threshold", "compute_dtype", "activations") if key in wanted}


def _rename(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of `model`: those of GPT-2, for one, were saved from the body, without its name."""
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model or any(name.startswith(prefix) for name in tensors):
        return tensors
    heads = {name.partition(".")[0] for name in model.state_dict()}
    return {name if name.partition(".")[0] in heads else prefix + name: tensor for name, tensor in tensors.items()}


def _load(model: Any, tensors: dict[str, Tensor], folder: Path) -> tuple[list[str], list[str]]:
    """Fill the model; the names that are missing (but for tied ones) and those that nothing asks for."""
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as problem:  # torch's report of wrong shapes
        raise FolderError(f"{folder}: does not fit its model class: {problem}") from None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in parameters.items() if name in tensors}
    for name, parameter in parameters.items():
        if name not in tensors and id(parameter) in loaded:
            tied = checkpoint.owned_keys(dict.fromkeys(missing), name)
            missing = [key for key in missing if key not in tied]
    outdated = re.compile("|".join([*_OUTDATED, *(model._keys_to_ignore_on_load_unexpected or ())]))
    return missing, [name for name in unexpected if not outdated.search(name)]
