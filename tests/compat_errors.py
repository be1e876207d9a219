"""Mistakes, and calls that warn, in code written for bitsandbytes: what each raises, warns and logs.

python compat_errors.py polybit|bitsandbytes: prints {case: outcome} as JSON, which test_compat_errors.py compares.
There is a case for each `raise`, `warnings.warn` and `logger.warning` of bitsandbytes 0.50.2 that names which are
offered here reach on a CPU.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

if sys.argv[1] == "polybit":
    import polybit.compat

    polybit.compat.install()
import bitsandbytes as bnb
from bitsandbytes import functional as F
from bitsandbytes.nn import parametrize

CASES: dict[str, Callable[[], Any]] = {}
INT8 = torch.randint(-127, 128, (4, 64), dtype=torch.int8)
BYTES = torch.zeros(64, dtype=torch.uint8)


def weight(*shape: int) -> nn.Parameter:
    param = nn.Parameter(torch.randn(*(shape or (64, 80))))
    param.grad = torch.randn_like(param)
    return param


def state(**changes: Any) -> Any:
    """The state of a nf4 weight [32, 64], with some attributes changed."""
    found = F.quantize_4bit(torch.randn(32, 64), quant_type="nf4", compress_statistics=changes.pop("nested", False))[1]
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def nested_of_128() -> Any:
    found = state(nested=True)
    found.state2 = F.quantize_blockwise(torch.rand(32), blocksize=128)[1]
    found.absmax = torch.zeros(32, dtype=torch.uint8)
    return found


def packed(**changes: Any) -> dict[str, Any]:
    return {**state().as_dict(packed=True), **changes}


def unpacked(**changes: Any) -> dict[str, Any]:
    return {**state().as_dict(), **changes}


def without(entries: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if name != key}


# ---- functional

CASES |= {
    "fp8 map, bits do not add up": lambda: F.create_fp8_map(True, 4, 2),
    "fp8 map of 4 bits": lambda: F.create_fp8_map(True, 2, 1, 4),
    "dynamic map of 4 bits": lambda: F.create_dynamic_map(True, 3, 4),
    "linear map of 4 bits": lambda: F.create_linear_map(True, 4),
    "linear map without zero": lambda: F.create_linear_map(add_zero=False),
    "type, unknown": lambda: F.get_4bit_type("nf5", device="cpu"),
    "type af4": lambda: F.get_4bit_type("af4", device="cpu"),
    "type af4, blocksize 128": lambda: F.get_4bit_type("af4", device="cpu", blocksize=128),
    "type int4": lambda: F.get_4bit_type("int4", device="cpu"),
    "type without a device": lambda: F.get_4bit_type("nf4"),
    "state, unknown attribute": lambda: state().nothing,
    "state, other key": lambda: state().bitsandbytes__fp4,
    "state, own key": lambda: state().bitsandbytes__nf4,
    "state, list": lambda: state()[6],
    "state from nothing": lambda: F.QuantState.from_dict({}, "cpu"),
    "state from two": lambda: F.QuantState.from_dict(packed(**{"quant_state.bitsandbytes__fp4": BYTES}), "cpu"),
    "state from another key": lambda: F.QuantState.from_dict(
        without(packed(**{"quant_state.bitsandbytes__nf5": BYTES}), "quant_state.bitsandbytes__nf4"), "cpu"
    ),
    "state, unknown entry": lambda: F.QuantState.from_dict(unpacked(more=1), "cpu"),
    "state without scales": lambda: F.QuantState.from_dict(without(unpacked(), "absmax"), "cpu"),
    "state without blocksize": lambda: F.QuantState.from_dict(without(unpacked(), "blocksize"), "cpu"),
    "state, unknown dtype": lambda: F.QuantState.from_dict(unpacked(dtype="float33"), "cpu"),
    "quantize_4bit, blocksize 100": lambda: F.quantize_4bit(torch.randn(64, 64), blocksize=100),
    "quantize_4bit, blocksize 16": lambda: F.quantize_4bit(torch.randn(64, 64), blocksize=16),
    "quantize_4bit, int4": lambda: F.quantize_4bit(torch.randn(64, 64), quant_type="int4"),
    "quantize_4bit of float64": lambda: F.quantize_4bit(torch.randn(64, 64).double()),
    "quantize_4bit of int32": lambda: F.quantize_4bit(torch.ones(64, 64, dtype=torch.int32)),
    "quantize_4bit, out of another size": lambda: F.quantize_4bit(torch.randn(64, 64), out=BYTES),
    "quantize_nf4 of int32": lambda: F.quantize_nf4(torch.ones(64, 64, dtype=torch.int32)),
    "quantize_fp4, blocksize 100": lambda: F.quantize_fp4(torch.randn(64, 64), blocksize=100),
    "quantize_4bit, odd and viewed as bf16": lambda: F.quantize_4bit(torch.randn(33, 2), quant_storage=torch.bfloat16),
    "dequantize_4bit without a state": lambda: F.dequantize_4bit(BYTES),
    "dequantize_4bit, scales but no out": lambda: F.dequantize_4bit(BYTES, absmax=torch.ones(2)),
    "dequantize_4bit, blocksize 100": lambda: F.dequantize_4bit(BYTES, state(blocksize=100)),
    "dequantize_4bit, int4": lambda: F.dequantize_4bit(BYTES, state(quant_type="int4")),
    "dequantize_4bit to float64": lambda: F.dequantize_4bit(BYTES.repeat(16), state(dtype=torch.float64)),
    "dequantize_nf4 without a state": lambda: F.dequantize_nf4(BYTES),
    "dequantize_fp4 without a state": lambda: F.dequantize_fp4(BYTES),
    "quantize_blockwise, blocksize 0": lambda: F.quantize_blockwise(torch.randn(64), blocksize=0),
    "quantize_blockwise, blocksize -64": lambda: F.quantize_blockwise(torch.randn(64), blocksize=-64),
    "quantize_blockwise, blocksize 100": lambda: F.quantize_blockwise(torch.randn(64), blocksize=100),
    "quantize_blockwise, blocksize 8192": lambda: F.quantize_blockwise(torch.randn(64), blocksize=8192),
    "quantize_blockwise of int32": lambda: F.quantize_blockwise(torch.ones(64, dtype=torch.int32)),
    "quantize_blockwise of float64": lambda: F.quantize_blockwise(torch.ones(64).double()),
    "quantize_blockwise, out of another size": lambda: F.quantize_blockwise(torch.randn(32), out=BYTES),
    "dequantize_blockwise without a state": lambda: F.dequantize_blockwise(BYTES),
    "dequantize_blockwise of floats": lambda: F.dequantize_blockwise(torch.ones(64), absmax=torch.ones(1)),
    "dequantize_blockwise, blocksize 0": lambda: F.dequantize_blockwise(BYTES, absmax=torch.ones(1), blocksize=0),
    "dequantize_blockwise into out": lambda: F.dequantize_blockwise(BYTES, absmax=torch.ones(1), out=torch.ones(64)),
    "gemv_4bit without a state": lambda: F.gemv_4bit(torch.randn(1, 64), BYTES),
    "int8_double_quant": lambda: F.int8_double_quant(torch.randn(4, 64).half()),
    "int8_linear_matmul, other width": lambda: F.int8_linear_matmul(INT8, INT8[:, :32].contiguous()),
    "int8_linear_matmul of floats": lambda: F.int8_linear_matmul(INT8.float(), INT8.float()),
    "int8_linear_matmul, out of floats": lambda: F.int8_linear_matmul(INT8, INT8, out=torch.zeros(4, 4)),
    "int8_mm_dequant of floats": lambda: F.int8_mm_dequant(torch.ones(4, 4), torch.ones(4), torch.ones(4)),
    "int8_mm_dequant, fp16 rows": lambda: F.int8_mm_dequant(
        torch.ones(4, 4, dtype=torch.int32), torch.ones(4).half(), torch.ones(4)
    ),
    "int8_mm_dequant, fp16 columns": lambda: F.int8_mm_dequant(
        torch.ones(4, 4, dtype=torch.int32), torch.ones(4), torch.ones(4).half()
    ),
    "int8_mm_dequant, too few rows": lambda: F.int8_mm_dequant(
        torch.ones(4, 4, dtype=torch.int32), torch.ones(3), torch.ones(4)
    ),
    "int8_vectorwise_quant of int32": lambda: F.int8_vectorwise_quant(torch.ones(4, 64, dtype=torch.int32)),
    "int8_vectorwise_dequant, too few scales": lambda: F.int8_vectorwise_dequant(INT8, torch.ones(3)),
}
for place in ("row_stats", "col_stats", "out_col", "out_row"):
    CASES[f"int8_double_quant, {place}"] = lambda place=place: F.int8_double_quant(  # type: ignore[misc]
        torch.randn(4, 64).half(), **{place: torch.ones(4)}
    )


def update(bits: int, **changes: Any) -> None:
    n = 512
    p, g = torch.randn(n), torch.randn(n)
    options: dict[str, Any] = {"optimizer_name": "adam", "beta1": 0.9, "eps": 1e-8, "step": 1, "lr": 0.1, **changes}
    if bits == 32:
        options = {"state1": torch.zeros(n), "state2": torch.zeros(n), **options}
        F.optimizer_update_32bit(g=g, p=p, **options)
        return
    states = {key: torch.zeros(n, dtype=torch.uint8) for key in ("state1", "state2")}
    maps = {"qmap1": F.create_dynamic_map(), "qmap2": F.create_dynamic_map(False)}
    scales = {"absmax1": torch.ones(2), "absmax2": torch.ones(2)}
    rest = {"beta2": 0.99, "beta3": 0.0, "alpha": 0.0}
    F.optimizer_update_8bit_blockwise(g=g, p=p, **{**states, **maps, **scales, **rest, **options})


for bits in (32, 8):
    CASES |= {
        f"update of {bits} bits": lambda bits=bits: update(bits),  # type: ignore[misc]
        f"update of {bits} bits, unknown": lambda bits=bits: update(bits, optimizer_name="adan"),  # type: ignore[misc]
        f"update of {bits} bits, skip_zeros": lambda bits=bits: update(bits, skip_zeros=True),  # type: ignore[misc]
    }


# ---- products


def product(**changes: Any) -> Tensor:
    codes, found = F.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
    options = {"A": torch.randn(3, 64), "B": codes, "quant_state": found, **changes}
    y: Tensor = bnb.matmul_4bit(**options)
    return y


def deprecated(name: str) -> Any:
    return getattr(bnb.MatmulLtState(), name)


def trained_in_evaluation() -> None:
    layer = bnb.nn.Linear8bitLt(64, 32).eval()
    layer(torch.randn(2, 64)).sum().backward()


CASES |= {
    "matmul_4bit without a state": lambda: product(quant_state=None),
    "matmul_4bit, 3 dimensions": lambda: product(quant_state=state(shape=torch.Size((2, 16, 64)))),
    "matmul_4bit, transposed": lambda: product(A=torch.randn(3, 32)),
    "matmul_4bit, other width": lambda: product(A=torch.randn(3, 48)),
    "matmul_4bit, nothing": lambda: product(A=torch.randn(0, 64)),
    "matmul_4bit, nothing, with a gradient": lambda: product(A=torch.randn(0, 64, requires_grad=True)),
    "matmul_4bit, nested by 128": lambda: product(quant_state=nested_of_128()),
    "matmul_4bit, nested by 128, with a gradient": lambda: product(
        A=torch.randn(3, 64, requires_grad=True), quant_state=nested_of_128()
    ),
    "matmul, nothing": lambda: bnb.matmul(torch.randn(0, 64), torch.randn(32, 64)),
    "matmul, other width": lambda: bnb.matmul(torch.randn(3, 48), torch.randn(32, 64)),
    "state of a product, unknown": lambda: deprecated("nothing"),
    "trained 8-bit layer in evaluation": trained_in_evaluation,
}
for field in ("CxB", "CxBt", "formatB", "_tile_indices"):
    CASES[f"state of a product, {field}"] = lambda field=field: deprecated(field)  # type: ignore[misc]


# ---- layers


def of_a_weight(name: str, layer: Any) -> Any:
    return getattr(layer.weight, name)


PLACES = ["absmax", "code", "quant_map", "offset", "state2"]
PLACES += [f"nested_{name}" for name in ("absmax", "blocksize", "quant_map", "dtype", "offset")]
for place in PLACES:
    CASES |= {
        f"dense weight, {place}": lambda place=place: of_a_weight(place, bnb.nn.LinearNF4(64, 32)),  # type: ignore[misc]
        f"weight not nested, {place}": lambda place=place: of_a_weight(  # type: ignore[misc]
            place, bnb.nn.LinearNF4(64, 32, compress_statistics=False).to("cpu")
        ),
        f"weight, {place}": lambda place=place: of_a_weight(  # type: ignore[misc]
            place, bnb.nn.LinearNF4(64, 32).to("cpu")
        ),
    }


def formatted(layout: Any) -> None:
    entries = {"weight": INT8, "weight_format": layout}
    bnb.nn.modules.maybe_rearrange_weight(entries, "", {}, True, [], [], [])


def reload(make: Callable[[], Any], into: Callable[[], Any] | None = None) -> None:
    saved = make().to("cpu").state_dict()
    (into or make)().load_state_dict(saved)


def half_into(layer: Any) -> None:
    layer.to("cpu").train()(torch.randn(2, 64).half())


def outliers_of(module: nn.Module) -> None:
    from bitsandbytes.utils import outlier_hook

    outlier_hook(module, (torch.randn(2, 64),))


class Quantized(bnb.nn.OutlierAwareLinear):  # type: ignore[misc]
    def quantize_weight(self, w: Tensor, outlier_idx: Tensor | None) -> Tensor:
        return w


CASES |= {
    "Linear4bit, not quantized": lambda: bnb.nn.LinearNF4(64, 32)(torch.randn(2, 64)),
    "Embedding4bit, not quantized": lambda: bnb.nn.EmbeddingNF4(20, 64)(torch.arange(4)),
    "Embedding8bit, not quantized": lambda: bnb.nn.Embedding8bit(20, 64)(torch.arange(4)),
    "Linear8bitLt, not quantized": lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)(torch.randn(2, 64)),
    "Linear4bit, fp16 input": lambda: half_into(bnb.nn.LinearNF4(64, 32)),
    "Linear4bit, fp16 input and compute dtype": lambda: half_into(
        bnb.nn.LinearNF4(64, 32, compute_dtype=torch.float16)
    ),
    "Linear4bit, int4": lambda: bnb.nn.Linear4bit(64, 32, quant_type="int4").to("cpu"),
    "Linear4bit, other width": lambda: bnb.nn.LinearNF4(64, 32).to("cpu").train()(torch.randn(2, 48)),
    "Linear8bitLt, evaluation of fp32": lambda: (
        bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu").eval()(torch.randn(2, 64))
    ),
    "Linear8bitLt, other width": lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")(
        torch.randn(2, 48)
    ),
    "Embedding4bit, width 40": lambda: bnb.nn.EmbeddingNF4(20, 40),
    "Embedding4bit, width 64": lambda: bnb.nn.EmbeddingNF4(20, 64),
    "Embedding4bit, saved": lambda: bnb.nn.EmbeddingNF4(20, 64).to("cpu").state_dict(),
    "Embedding8bit, saved": lambda: bnb.nn.Embedding8bit(20, 64).to("cpu").state_dict(),
    "Linear4bit, loaded": lambda: reload(lambda: bnb.nn.LinearNF4(64, 32)),
    "Linear4bit, loaded into another size": lambda: reload(
        lambda: bnb.nn.LinearNF4(64, 32), lambda: bnb.nn.LinearNF4(64, 48).to("cpu")
    ),
    "Linear4bit, a dense state dict": lambda: bnb.nn.LinearNF4(64, 32).load_state_dict(nn.Linear(64, 32).state_dict()),
    "Linear8bitLt, loaded": lambda: reload(lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)),
    "Linear8bitLt, loaded into a quantized one": lambda: reload(
        lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
        lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu"),
    ),
    "Linear8bitLt, loaded into another size": lambda: reload(
        lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
        lambda: bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu"),
    ),
    "weight_format row": lambda: formatted("row"),
    "weight_format 0": lambda: formatted(torch.tensor(0)),
    "weight_format col32": lambda: formatted("col32"),
    "weight_format 2": lambda: formatted(2),
    "weight_format 9": lambda: formatted(torch.tensor(9)),
    "OutlierAwareLinear": lambda: bnb.nn.OutlierAwareLinear(64, 32)(torch.randn(2, 64)),
    "OutlierAwareLinear, weight alone": lambda: Quantized(64, 32)(torch.randn(2, 64)),
    "OutlierTracer()": lambda: bnb.utils.OutlierTracer(),
    "OutlierTracer, not initialized": lambda: bnb.utils.OutlierTracer.get_instance().get_outliers(weight()),
    "outlier_hook of an embedding": lambda: outliers_of(nn.Embedding(4, 4)),
    "random outliers without a number": lambda: bnb.utils.find_outlier_dims(weight(), rdm=True),
    "more outliers than columns": lambda: bnb.utils.find_outlier_dims(weight(), topk=100),
    "execute_and_return of nothing": lambda: bnb.utils.execute_and_return("no-such-program-here"),
    "unpack_tensor_to_dict of no JSON": lambda: bnb.utils.unpack_tensor_to_dict(BYTES),
    "replace_parameter_4bit, no such": lambda: parametrize.replace_parameter_4bit(nn.Linear(4, 4), "other"),
    "replace_parameter_4bit, no parameter": lambda: parametrize.replace_parameter_4bit(nn.Linear(4, 4), "in_features"),
    "replace_parameter_4bit, int4": lambda: parametrize.replace_parameter_4bit(
        nn.Linear(64, 4), "weight", quant_type="int4"
    ),
    "replace_parameter_4bit_prequantized, no such": lambda: parametrize.replace_parameter_4bit_prequantized(
        nn.Linear(4, 4), "other", {}, "cpu"
    ),
    "replace_parameter_4bit_prequantized, no parameter": lambda: parametrize.replace_parameter_4bit_prequantized(
        nn.Linear(4, 4), "in_features", {}, "cpu"
    ),
    "replace_parameter_4bit_prequantized from nothing": lambda: parametrize.replace_parameter_4bit_prequantized(
        nn.Linear(4, 4), "weight", {}, "cpu"
    ),
    "from_prequantized from nothing": lambda: bnb.nn.Params4bit.from_prequantized(BYTES, {}, device="cpu"),
}


# ---- optimizers

optim = bnb.optim
manager = optim.GlobalOptimManager
OPTIMIZERS = [
    name
    for name in sorted(vars(optim))
    if isinstance(getattr(optim, name), type) and issubclass(getattr(optim, name), torch.optim.Optimizer)
    if name not in ("PytorchLARS", "Optimizer8bit", "Optimizer1State", "Optimizer2State")
]
NEEDED = {"SGD": {"lr": 0.1, "momentum": 0.9}, "LARS": {"lr": 0.1, "momentum": 0.9}}


def make(name: str, **options: Any) -> Any:
    family = name.removesuffix("8bit").removesuffix("32bit")
    return getattr(optim, name)([weight()], **{**NEEDED.get(family, {}), **options})


def loaded(params: list[nn.Parameter], more: list[dict[str, Any]]) -> None:
    optimizer = optim.AdamW8bit([weight()])
    optimizer.step()
    other = optim.AdamW8bit([*params])
    for group in more:
        other.add_param_group(group)
    other.load_state_dict(optimizer.state_dict())


WRONG: dict[str, Any] = {
    "lr": -1.0,
    "eps": -1.0,
    "weight_decay": -1.0,
    "betas": (1.0, 0.9),
    "momentum": 0.0,
    "alpha": 0.0,
    "amsgrad": True,
    "centered": True,
    "optim_bits": 8,
    "lr_decay": 0.1,
    "initial_accumulator_value": 0.1,
    "max_unorm": 0.5,
    "nesterov": True,
    "dampening": 0.1,
    "bias_correction": False,
    "adam_w_mode": False,
    "is_paged": True,
}


def steps(name: str, option: str | None = None) -> Callable[[], None]:
    return lambda: make(name, **({option: WRONG[option]} if option else {})).step()


for name in OPTIMIZERS:
    CASES[name] = steps(name)
    taken = inspect.signature(getattr(optim, name)).parameters
    for option in WRONG:
        if option in taken and not (option == "alpha" and "AdEMAMix" in name):  # a weight of gradients there
            CASES[f"{name}, {option}={WRONG[option]}"] = steps(name, option)


def override_of(name: str) -> None:
    manager.get_instance().register_module_override(nn.Linear(64, 80, bias=False), name, {"lr": 0.1})
    try:
        optim.AdamW([weight()]).step()
    finally:
        manager.get_instance().initialize()


CASES |= {
    "optimizer of nothing": lambda: optim.AdamW8bit([]),
    "optimizer of a tensor": lambda: optim.AdamW8bit(weight()),
    "optimizer of numbers": lambda: optim.AdamW8bit([1.0]),
    "optim_bits 4": lambda: optim.AdamW([weight()], optim_bits=4).step(),
    "betas as text": lambda: optim.AdamW([weight()], betas="(0.9, 0.99)").step(),
    "betas, second 1": lambda: optim.AdamW([weight()], betas=(0.9, 1.0)),
    "betas, negative": lambda: optim.Lion([weight()], betas=(-0.1, 0.9)),
    "skip_zeros": lambda: optim.optimizer.Optimizer2State("adam", [weight()], skip_zeros=True).step(),
    "unknown name": lambda: optim.optimizer.Optimizer2State("adan", [weight()]).step(),
    "base class": lambda: optim.optimizer.Optimizer8bit([weight()], {"lr": 0.1}).step(),
    "loading fewer groups": lambda: loaded([weight()], [{"params": [weight()]}]),
    "loading a group of another size": lambda: loaded([weight(), weight()], []),
    "loading onto another device": lambda: optim.AdamW8bit([weight()]).load_state_dict(
        optim.AdamW8bit([weight()]).state_dict(), move_to_device=False
    ),
    "GlobalOptimManager()": lambda: manager(),
    "override_config, both ways": lambda: manager.get_instance().override_config(
        weight(), "lr", 0.1, key_value_dict={"lr": 0.1}
    ),
    "override_config": lambda: manager.get_instance().override_config(weight(), "lr", 0.1),
    "register_module_override, no such": lambda: override_of("other"),
    "register_module_override, None": lambda: override_of("bias"),
    "register_parameters of nothing": lambda: manager.get_instance().register_parameters([]),
}


class Logged(logging.Handler):
    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.levelno >= logging.WARNING


def run(case: Callable[[], Any]) -> str:
    """The type of the exception, the categories of warnings, "log" if a warning was logged; "" for none of these."""
    torch.manual_seed(0)
    handler, found = Logged(), []
    logging.getLogger().addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            case()
        except Exception as problem:
            found.append(type(problem).__name__)
    logging.getLogger().removeHandler(handler)
    found += sorted({entry.category.__name__ for entry in caught})
    return " ".join(found + ["log"] * (handler.count > 0))


print(json.dumps({name: run(case) for name, case in CASES.items()}))
