"""Models of transformers from a folder, quantized by polybit or not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from polybit.model_folder import FolderError, read_config

# What checkpoints hold that the models of today make themselves.
_OUTDATED = re.compile(r"(^|\.)position_ids$|rotary_emb\.inv_freq$")


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a language model that predicts the next token."""
    names = config.get("architectures") or []
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def make_model(raw: Mapping[str, Any]) -> Any:
    """A new model as a config.json says, without quantization. Raises ValueError if transformers does not know it."""
    import transformers  # an optional dependency

    # _from_config makes the model in the dtype that the configuration names, which the constructor does not.
    config, cls = transformers.AutoConfig.for_model(**raw), _class_of(raw)
    return cls._from_config(config) if cls else transformers.AutoModel.from_config(config)


def load_model(folder: Path) -> nn.Module:
    """The model of a folder in eval mode: a causal language model with its head, of any other model the body.

    Layers that the folder holds in quantized form become quantized layers. Nothing is fetched from the network.
    Raises FolderError if weights are missing, damaged or do not fit the model.
    """
    import transformers  # an optional dependency

    raw = read_config(folder)
    cls = _class_of(raw) or transformers.AutoModel
    try:
        model, report = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (RuntimeError, ValueError, OSError) as problem:
        raise FolderError(f"{folder}: does not fit its model class: {problem}") from None
    missing = sorted(report["missing_keys"])
    unexpected = sorted(name for name in report["unexpected_keys"] if not _OUTDATED.search(name))
    if missing or unexpected:
        raise FolderError(f"{folder}: does not fit its model class: missing {missing[:3]}, unexpected {unexpected[:3]}")
    whole: nn.Module = model if is_causal(raw) else model.base_model
    return whole.eval()


def _class_of(raw: Mapping[str, Any]) -> Any:
    """The class that a config.json names, or None if transformers has none of that name."""
    import transformers

    return next((cls for name in raw.get("architectures") or [] if (cls := getattr(transformers, name, None))), None)
