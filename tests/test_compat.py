"""Code written for bitsandbytes on polybit.compat: in processes where the real package cannot be found, and against it.

The programs are in compat_flows.py. Where results must differ, the reason is beside the limit.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import parameter, train
from tools import HERE, PACKAGE, run_python

if os.environ.get("CI") != "true":
    pytest.importorskip("bitsandbytes")


def run_flow(who: str, flow: str, folder: Path) -> dict[str, torch.Tensor]:
    """What a program of compat_flows.py has found."""
    done = subprocess.run(
        [sys.executable, str(HERE / "compat_flows.py"), who, flow, str(folder)],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, torch.Tensor] = torch.load(folder / f"{who}.pt")
    return found


def check_error(what: str, x: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    """Relative; docs/bitsandbytes.md has what this prints (pytest -rP)."""
    error = float((x.double() - want.double()).norm() / want.double().norm())
    print(f"{what}: {error:.1e}")
    assert error < limit, what


def test_from_pretrained_gives_what_bitsandbytes_gives(tmp_path: Path) -> None:
    """Llama and GPT-2 in 4 and 8 bits, and the real one's checkpoints opened here, entry by entry the same."""
    theirs, ours = run_flow("bitsandbytes", "pretrained", tmp_path), run_flow("polybit", "pretrained", tmp_path)
    opened = run_flow("bitsandbytes", "opened", tmp_path)
    assert len(ours) == 2 * (1 + 2 * 5) and len(opened) == 10
    for key, value in opened.items():  # ours by the real one
        check_error(f"{key} opened there", value, ours[key], 0.02 if "int8" in key else 1e-5)
    for key, value in ours.items():
        # int8: in training on a CPU theirs does not quantize activations, which is what is compared with.
        # double: the mean of the scales is summed in another order; one more or less in the code of a scale.
        limit = 0.02 if "int8" in key else 1e-3 if key.endswith("double") else 1e-5
        check_error(key, value, theirs[key.removesuffix(" theirs")], limit)


# What PEFT does not do on layers of bitsandbytes, the real or ours.
REFUSED = {
    "adalora": {"nf4": "NotImplementedError", "int8": "NotImplementedError"},  # no merge
    "ia3": {"nf4": "NotImplementedError", "int8": "NotImplementedError"},  # no merge
    "loha": {"nf4": "RuntimeError", "int8": "RuntimeError"},  # takes codes for weights: in the forward pass or a merge
    "lokr": {"nf4": "RuntimeError", "int8": "RuntimeError"},  # the same
    "fourierft": {"nf4": "RuntimeError", "int8": "RuntimeError"},  # the same, in a merge
    "hra": {"nf4": "RuntimeError"},  # the same
    "pissa": {"nf4": "TypeError", "int8": "TypeError"},  # starts from dense weights
}
STAGES = ("merged", "unmerged", "unloaded")


def test_adapters_of_peft_give_what_bitsandbytes_gives(tmp_path: Path) -> None:
    """Gradients, losses, changes after two steps, logits then and after merges; what is saved loads."""
    theirs, ours = run_flow("bitsandbytes", "adapters", tmp_path), run_flow("polybit", "adapters", tmp_path)
    raised = {key: ours.pop(key) for key in list(ours) if key.endswith(" raises")}
    want = {f"{kind} {name} raises": error for name, kinds in REFUSED.items() for kind, error in kinds.items()}
    assert raised == want
    # A merge of RandLora gives Params4bit new values with the attributes of the old weight; theirs takes them for
    # codes. test_new_values_with_the_attributes_of_an_old_weight has ours.
    want["nf4 randlora raises"] = "RuntimeError"
    assert {key: theirs.pop(key) for key in list(theirs) if key.endswith(" raises")} == want
    assert ours.keys() - theirs.keys() == {f"nf4 randlora {stage}" for stage in STAGES}
    assert theirs.keys() <= ours.keys() and len(theirs) == 155
    for key, value in theirs.items():
        kind, _, stage = key.split()
        limits = {
            # Rounding of fp32. A change is a difference of parameters near 1. A weight that a merge has put between
            # two codes may fall to either.
            "nf4": {"change": 1e-4, **dict.fromkeys(STAGES, 1e-2)}.get(stage, 2e-6),
            # Products are rounded in another order, and then codes of activations differ by one; a code is 1/127.
            # Theirs casts weights to fp16, which matters after a merge.
            "int8": {"losses": 5e-4, "gradient": 0.01, "change": 0.01}.get(stage, 0.02),
        }
        check_error(key, ours[key], value, limits[kind])


@pytest.mark.parametrize("flow", ["compiled", pytest.param("compiled_by_inductor", marks=pytest.mark.slow)])
def test_compiled_models_give_what_eager_gives(flow: str, tmp_path: Path) -> None:
    """A Llama of from_pretrained, then with LoRA in training: one graph each, no break, as with native layers."""
    found = run_flow("polybit", flow, tmp_path)
    assert len(found) == 3 * (2 * 3 + 2)
    for kind in ("nf4 double", "int8", "int8 plain"):
        assert int(found[f"{kind} breaks"]) == 0 and int(found[f"{kind} graphs"]) == 2, kind
        for what in ("logits", "loss", "gradient"):
            # inductor rounds fp32 in another order; int8 codes of activations may then differ by one.
            limit = 1e-6 if flow == "compiled" else 0.02 if "int8" in kind else 1e-5
            check_error(f"{kind} {what}", found[f"{kind} {what} compiled"], found[f"{kind} {what} eager"], limit)


def test_load_and_quantize_model_gives_what_bitsandbytes_gives(tmp_path: Path) -> None:
    """4 and 8 bits, by accelerate's own loader; then AdamW8bit on the head, prepared by an Accelerator."""
    theirs, ours = (run_flow(who, "accelerated", tmp_path) for who in ("bitsandbytes", "polybit"))
    assert len(ours) == 6 and ours.keys() == theirs.keys()
    for key, value in ours.items():
        check_error(key, value, theirs[key], 0.02 if "int8" in key else 1e-3 if "losses" in key else 1e-5)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="constraints.txt has no TRL for this Python")
def test_sft_trainer_of_trl(tmp_path: Path) -> None:
    assert len(run_flow("polybit", "sft", tmp_path)) == 2


def test_optimizers_of_trainer(tmp_path: Path) -> None:
    """Six by name: what three steps have changed, against the real ones."""
    theirs, ours = run_flow("bitsandbytes", "trainer", tmp_path), run_flow("polybit", "trainer", tmp_path)
    assert ours.keys() == theirs.keys() and len(ours) == 12
    for key, value in ours.items():
        # 8 bits: theirs takes not always the nearest code (docs/bitsandbytes.md).
        limit = 0.05 if "8bit" in key else 1e-5
        check_error(key, value, theirs[key], limit)


def test_nothing_happens_before_install() -> None:
    run_python(
        "import sys, polybit\n"
        "assert 'polybit.compat' not in sys.modules\n"
        "assert not any('compat' in type(f).__module__ for f in sys.meta_path)\n"
        "import polybit.compat.bitsandbytes as bnb\n"
        "assert 'bitsandbytes' not in sys.modules and bnb.nn.Linear4bit(64, 8).to('cpu').weight.shape == (256, 1)\n"
    )


def test_install_wins_answers_and_is_lazy() -> None:
    """Also over an installed one; the metadata; a second call; caches that were filled before."""
    run_python(
        "import sys, importlib.metadata as m, importlib.util\n"
        "import polybit.compat\n"
        "polybit.compat.install(); polybit.compat.install()\n"
        "assert sum(type(f).__name__ == 'Finder' for f in sys.meta_path) == 1\n"
        "assert m.version('bitsandbytes') == '0.50.2' and m.metadata('bitsandbytes')['Name'] == 'bitsandbytes'\n"
        "assert importlib.util.find_spec('bitsandbytes') and 'bitsandbytes' not in sys.modules\n"
        "import bitsandbytes.optim.adam, bitsandbytes.nn.modules as a, polybit.compat.bitsandbytes.nn.modules as b\n"
        "assert a is b and bitsandbytes.nn.Params4bit is b.Params4bit\n"
        "assert 'bitsandbytes' in bitsandbytes.optim.AdamW8bit.__module__\n"
        "try:\n import bitsandbytes.cextension\n"
        "except ModuleNotFoundError: pass\n"
        "else: raise AssertionError\n"
    )


def test_install_refuses_behind_the_real_one() -> None:
    done = run_python("import bitsandbytes, polybit.compat\npolybit.compat.install()", check=False)
    assert (
        done.returncode == 1 and "RuntimeError: polybit.compat.install: bitsandbytes has been imported" in done.stderr
    )


def test_run_replaces_it_for_scripts_modules_and_their_children(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    child = "import bitsandbytes, sys; print(bitsandbytes.__name__, sys.argv[1:])"
    script.write_text(
        f"import subprocess, sys, bitsandbytes\nprint(bitsandbytes.__name__, sys.argv[1:], __name__, flush=True)\n"
        f"subprocess.run([sys.executable, '-c', {child!r}, 'b'], check=True)\n"
    )
    want = "polybit.compat.bitsandbytes ['a'] __main__\npolybit.compat.bitsandbytes ['b']\n"
    for arguments in ([str(script), "a"], ["-m", "script", "a"]):
        done = subprocess.run(
            [sys.executable, "-m", "polybit.run", *arguments],
            env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.stdout == want, done.stderr
    nothing = run_python(
        "import runpy, sys\nsys.argv = ['x']\nrunpy.run_module('polybit.run', run_name='__main__')", check=False
    )
    assert nothing.returncode == 2 and "usage: python -m polybit.run" in nothing.stderr
    for argument, words in (("absent.py", "absent.py: no such file"), ("-m absent", "no module named absent")):
        code = f"from polybit.run import main\nmain({argument.split()!r})"
        absent = run_python(code, check=False)
        assert (absent.returncode, absent.stderr) == (2, f"python -m polybit.run: {words}\n")


# What is not offered, and why. docs/bitsandbytes.md says the same.
RAW = "raw library"
MISSING = {
    "functional.CUBLAS_Context": RAW,
    "functional.is_on_gpu": RAW,
    "functional.has_avx512bf16": RAW,
    "autograd._functions.GlobalOutlierPooler": "nothing has used it",
    "autograd._functions.MatMul4Bit": "matmul_4bit is differentiable itself",
    "autograd._functions.MatMul8bitFp": "matmul is differentiable itself",
    "autograd._functions.MatMul8bitLt": "matmul is differentiable itself",
}

DUMP = """
import importlib, inspect, json, sys
package = sys.argv[1]
modules = '''. functional nn nn.modules nn.parametrize optim optim.optimizer optim.adam optim.adamw optim.adagrad
optim.ademamix optim.lamb optim.lars optim.lion optim.rmsprop optim.sgd utils autograd._functions'''.split()
found = {}
def signature(value):
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return None
    return [[p.name, str(p.kind), None if p.default is p.empty else str(p.default)] for p in parameters]
for name in modules:
    prefix = '' if name == '.' else name + '.'
    module = importlib.import_module(package + (f'.{name}' if prefix else ''))
    for key, value in vars(module).items():
        known = inspect.isclass(value) or inspect.isfunction(value)
        if key.startswith('_') or not known or not value.__module__.startswith(package):
            continue
        if value.__module__ != module.__name__ and name not in ('.', 'nn', 'optim'):
            continue
        found[prefix + key] = signature(value)
        if inspect.isclass(value) and value.__module__ == module.__name__:
            for member in dir(value):
                if not member.startswith('_') and callable(getattr(value, member, None)):
                    found[f'{prefix}{key}.{member}'] = signature(getattr(value, member))
print(json.dumps(found))
"""


def dump(package: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_python(f"import sys\nsys.argv = ['x', {package!r}]\n{DUMP}").stdout)
    return found


def test_every_public_name_has_its_signature() -> None:
    """All that the real package defines: names, order, kinds and defaults of parameters."""
    theirs, ours = dump("bitsandbytes"), dump("polybit.compat.bitsandbytes")
    assert len(theirs) > 150
    owners = tuple(f"{name}." for name in MISSING)
    missing = {name for name in theirs.keys() - ours.keys() if not name.startswith(owners)}
    assert missing == set(MISSING), missing ^ set(MISSING)
    different = {name: (ours[name], want) for name, want in theirs.items() if name in ours and ours[name] != want}
    assert different == {}


def test_what_unsloth_asks_before_it_does_without_a_library() -> None:
    """It takes get_ptr as given, and looks for the rest."""
    from polybit.compat.bitsandbytes import functional

    x = torch.zeros(4)[1:]
    pointer = functional.get_ptr(x)
    assert pointer is not None and pointer.value == x.data_ptr() and functional.get_ptr(None) is None
    assert not hasattr(functional, "lib")


@pytest.mark.filterwarnings("ignore:.* is deprecated; use int8_linear_matmul:FutureWarning")
def test_deprecated_products_are_those_of_torch() -> None:
    """The real ones want a GPU."""
    from polybit.compat.bitsandbytes import functional

    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)

    for batch_a, batch_b in (((), ()), ((3,), ()), ((3,), (3,))):
        for turned_a, turned_b in itertools.product((False, True), repeat=2):
            a = codes(*batch_a, *((7, 5) if turned_a else (5, 7)))
            b = codes(*batch_b, *((4, 7) if turned_b else (7, 4)))
            want = (a.mT if turned_a else a).int() @ (b.mT if turned_b else b).int()
            out = torch.zeros_like(want)
            assert torch.equal(functional.igemm(a, b, None, turned_a, turned_b), want)
            assert functional.igemm(a, b, out, turned_a, turned_b) is out and torch.equal(out, want)
            assert tuple(functional.check_matmul(a, b, None, turned_a, turned_b)) == want.shape
            if batch_b:
                assert torch.equal(functional.batched_igemm(a, b, None, turned_a, turned_b), want)
    a, b, out = codes(3, 6, 5), codes(3, 6, 4), torch.zeros(5, 4, dtype=torch.int32)
    functional.igemm(a, b, out)
    assert torch.equal(out, torch.einsum("bsi,bso->io", a.int(), b.int()).int())
    with pytest.raises(ValueError, match="do not fit"):
        functional.igemm(a, b)
    with pytest.raises(ValueError, match="out must have shape"):
        functional.igemm(codes(5, 7), codes(7, 4), out[:, :3])
    with pytest.raises(TypeError, match="int8"):
        functional.igemm(a.int(), b.int())
    for call, arguments in (
        (functional.check_matmul, (a[0].t(), b[0], None, False, False)),
        (functional.igemm, (a[0].t(), b[0])),
        (functional.batched_igemm, (a.mT, b)),
    ):
        with pytest.warns(FutureWarning, match="is deprecated"):
            call(*arguments)  # type: ignore[operator]


def test_maps_and_memory_by_hand() -> None:
    """create_normal_map wants scipy there, paged memory a GPU; AF4 has its 16 values."""
    import bitsandbytes as theirs

    from polybit.compat.bitsandbytes import functional

    values = functional.create_normal_map()
    assert values.shape == (256,) and torch.count_nonzero(values) == 15 and (values.diff() >= 0).all()
    kept = torch.cat([values[values < 0], values[:1] * 0, values[values > 0]])
    torch.testing.assert_close(kept, functional.get_4bit_type("nf4"), rtol=0, atol=2e-6)
    even = functional.create_normal_map(use_extra_value=False)
    assert torch.count_nonzero(even) == 14 and torch.equal(even.flip(0), -even)
    af4 = functional.get_4bit_type("af4", device="cpu")
    assert torch.equal(af4, theirs.functional.get_4bit_type("af4", device="cpu"))

    paged = functional.get_paged(3, 4, dtype=torch.uint8)
    assert paged.shape == (3, 4) and paged.is_paged and paged.page_deviceid == 0  # type: ignore[attr-defined]
    functional.fill(paged, 7)
    assert (paged == 7).all()
    functional.elementwise_func("arange", paged, None, 0)
    functional.elementwise_func("_mul", paged, paged.clone(), 0)
    assert paged.flatten().tolist() == [i * i for i in range(12)]
    manager = functional.GlobalPageManager.get_instance()
    manager.paged_tensors.append(paged)
    manager.prefetch_all()
    manager.initialize()
    with pytest.raises(ValueError, match="get_paged"):
        functional.prefetch_tensor(torch.zeros(3))


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW", "Lion8bit", "SGD8bit", "AdEMAMix8bit"])
def test_states_of_optimizers_go_both_ways(name: str) -> None:
    """Theirs, loaded and saved here, has the same entries, bytes and options, and loads there again."""
    import bitsandbytes as theirs

    import polybit.compat.bitsandbytes as ours

    options: dict[str, Any] = {"lr": 1e-3, **({"momentum": 0.9} if name == "SGD8bit" else {})}
    first = parameter(60, 103)
    there = getattr(theirs.optim, name)([first], **options)
    train(there, 0, 5)
    saved = there.state_dict()
    second = torch.nn.Parameter(first.detach().clone())
    here = getattr(ours.optim, name)([second], **options)
    here.load_state_dict(saved)
    again = here.state_dict()
    state, want = again["state"][0], saved["state"][0]
    assert state.keys() == want.keys() and state["step"] == want["step"] == 5
    wrapped = "__bnb_optimizer_quant_state__"
    assert state[wrapped].keys() == want[wrapped].keys()
    for key, value in want[wrapped].items():
        assert state[wrapped][key].dtype == value.dtype and torch.equal(state[wrapped][key], value), key
    assert set(saved["param_groups"][0]) <= set(again["param_groups"][0])
    for key, value in saved["param_groups"][0].items():
        assert again["param_groups"][0][key] == value, key
    back = getattr(theirs.optim, name)([torch.nn.Parameter(first.detach().clone())], **options)
    back.load_state_dict(again)
    train(back, 5, 6)
    train(here, 5, 6)
    train(there, 5, 6)
    torch.testing.assert_close(back.param_groups[0]["params"][0], first, rtol=0, atol=0)
    torch.testing.assert_close(second, first, rtol=0, atol=1e-3 * (0.2 if "8bit" in name else 1e-3))


def test_options_of_single_parameters() -> None:
    import polybit.compat.bitsandbytes as bnb

    table, weight = bnb.nn.StableEmbedding(100, 64), parameter(64, 80)
    slow = parameter(64, 80)
    optimizer = bnb.optim.Adam8bit([table.weight, weight, slow], lr=1e-2)
    bnb.optim.GlobalOptimManager.get_instance().override_config(slow, "lr", 0.0)
    before = slow.detach().clone()
    for param in (table.weight, weight, slow):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[table.weight]["state1"].dtype == torch.float32
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    assert torch.equal(slow, before) and len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="optim_bits must keep its default 32"):
        bnb.optim.Adam8bit([weight], optim_bits=8)
    with pytest.raises(NotImplementedError, match="max_unorm"):
        bnb.optim.LAMB([weight], max_unorm=0.5)


def test_layers_load_what_they_save() -> None:
    """Where the real ones raise or go wrong: into a fresh layer, on the meta device, embeddings, odd widths."""
    import polybit.compat.bitsandbytes as bnb

    torch.manual_seed(0)
    makers: list[Any] = [
        lambda: bnb.nn.LinearNF4(96, 10),
        lambda: bnb.nn.LinearFP4(33, 7, compress_statistics=False),
        lambda: bnb.nn.Linear4bit(64, 8, quant_storage=torch.bfloat16),
        lambda: bnb.nn.Linear8bitLt(48, 10, has_fp16_weights=False, threshold=6.0),
        lambda: bnb.nn.EmbeddingNF4(20, 40),
        lambda: bnb.nn.Embedding8bit(20, 40),
    ]
    for make in makers:
        layer, fresh = make().to("cpu"), make()
        with torch.device("meta"):
            empty = make()
        x = torch.arange(20) if isinstance(layer, torch.nn.Embedding) else torch.randn(3, layer.in_features)
        want = layer(x)
        fresh.load_state_dict(layer.state_dict())
        empty.load_state_dict(layer.state_dict(), assign=True)
        assert torch.equal(fresh(x), want) and torch.equal(empty(x), want) and torch.equal(layer.eval()(x), want)
        saved, again = layer.state_dict(), fresh.state_dict()
        assert saved.keys() == again.keys() and all(torch.equal(value, again[key]) for key, value in saved.items())


def test_new_values_with_the_attributes_of_an_old_weight() -> None:
    """As RandLora merges: they are quantized, as the real quantize_4bit does it."""
    import bitsandbytes.functional as theirs

    import polybit.compat.bitsandbytes as bnb

    torch.manual_seed(0)
    layer = bnb.nn.LinearNF4(64, 32, bias=False, compress_statistics=False).to("cpu")
    values, x = torch.randn(32, 64), torch.randn(3, 64)
    layer.weight = bnb.nn.Params4bit(values, requires_grad=False, **layer.weight.__dict__).to("cpu")
    want, state = theirs.quantize_4bit(values, quant_type="nf4")
    assert torch.equal(layer.weight, want) and torch.equal(layer.quant_state.absmax, state.absmax)
    check_error("product", layer(x), x @ theirs.dequantize_4bit(want, state).t(), 1e-6)


def test_ops_have_the_schemas_of_bitsandbytes() -> None:
    code = (
        "import torch\n{}\n"
        "print(sorted(str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith('bitsandbytes::')))\n"
    )
    real = run_python(code.format("import bitsandbytes")).stdout
    ours = run_python(code.format("import polybit.compat; polybit.compat.install(); import bitsandbytes")).stdout
    want = ast.literal_eval(real)
    assert len(want) == 19 and ast.literal_eval(ours) == want


START = """
import sys
import torch
if sys.argv[1] == "polybit":
    import polybit.compat
    polybit.compat.install()
import bitsandbytes.functional as F
torch.manual_seed(0)
"""
UPDATES = """
maps = F.create_dynamic_map(), F.create_dynamic_map(signed=False)
found = {"signed": maps[0], "unsigned": maps[1], "linear": F.create_linear_map(), "fp8": F.create_fp8_map()}
found["linear unsigned"] = F.create_linear_map(signed=False)
n = 1000
for name, two in dict(adam=1, ademamix=1, lion=0, momentum=0, rmsprop=0, adagrad=0).items():
    for bits in (32, 8):
        if name == "ademamix" and bits == 8:
            continue
        p, g = torch.randn(n), torch.randn(n)
        first = torch.rand((2, n) if name == "ademamix" else n) + 0.5
        states = [first, torch.rand(n) + 0.5 if two else None]
        numbers = dict(beta1=0.9, beta2=0.99 if two or name == "lion" else 0.0, eps=1e-8, step=3, lr=1e-2)
        if bits == 32:
            more = dict(beta3=0.999, alpha=2.0) if name == "ademamix" else {}
            F.optimizer_update_32bit(
                name, g, p, states[0], state2=states[1], weight_decay=0.1, gnorm_scale=0.5, **numbers, **more
            )
            found[f"{name} 32 state"] = states[0]
        else:
            parts = [
                (torch.randint(140, 256, (n,), dtype=torch.uint8), m.clone(), torch.rand(4) + 0.5) if s is not None
                else (None, None, None) for s, m in zip(states, maps)
            ]
            (s1, q1, a1), (s2, q2, a2) = parts
            torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
                name, g, p, s1, s2, numbers["beta1"], numbers["beta2"], 0.0, 0.0, 1e-8, 3, 1e-2, q1, q2, a1, a2, 0.1,
                0.5, False,
            )
            found[f"{name} 8 state"] = q1[s1.long()] * a1.repeat_interleave(256)[:n]
        found[f"{name} {bits}"] = p
"""
SAVE = "torch.save({key: value.detach() for key, value in found.items()}, sys.argv[2])"


def both(program: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a program finds with the real one, and with ours."""
    for who in ("bitsandbytes", "polybit"):
        done = subprocess.run(
            [sys.executable, "-c", START + program + SAVE, who, str(folder / who)],
            env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = (torch.load(folder / who) for who in ("bitsandbytes", "polybit"))
    assert theirs.keys() == ours.keys()
    return theirs, ours


def test_updates_of_single_parameters(tmp_path: Path) -> None:
    """By functions and ops, beside the real ones; and the maps of 8 bits."""
    theirs, ours = both(UPDATES, tmp_path)
    assert len(ours) == 5 + 2 * 11
    for key, value in ours.items():
        # A code more or less: the real one does not take the nearest on a CPU.
        limit = 0.01 if "8 state" in key else 1e-6
        check_error(key, value, theirs[key], limit)


VALUES = """
import bitsandbytes as bnb
from bitsandbytes.nn.parametrize import replace_parameter_4bit
ops, found = torch.ops.bitsandbytes, {}
x, w, bias = torch.randn(3, 128), torch.randn(64, 128), torch.randn(64)
for kind in ("nf4", "fp4"):
    q, absmax = ops.quantize_4bit(w, 64, kind, torch.uint8)
    code = F.get_4bit_type(kind, device="cpu")
    found[f"{kind} absmax"] = absmax
    found[f"{kind} dequantize"] = ops.dequantize_4bit(q, absmax, 64, kind, [64, 128], torch.float32)
    found[f"{kind} gemm"] = ops.gemm_4bit(x, q, [64, 128], absmax, 64, kind, bias)
    if sys.argv[1] == "polybit":  # on a CPU with AVX512-BF16 the real one wants codes in another order
        product = x[:1] @ found[f"{kind} dequantize"].t()
        torch.testing.assert_close(ops.gemv_4bit(x[:1], q, [64, 128], absmax, code, 64), product)
map8 = F.create_dynamic_map()
codes = torch.randint(0, 256, (64, 128), dtype=torch.uint8)
found["dequantize 8"] = ops.dequantize_blockwise(codes, torch.rand(32) + 0.5, map8, 256, torch.float32)
q, absmax = ops.quantize_blockwise(w, map8, 256)
found["quantize 8"] = map8[q.long()] * absmax.repeat_interleave(256).view(64, 128)
half = x.half()
half[1, 5] = half[2, 7] = 9.0
for threshold in (0.0, 6.0):
    q, stats, columns = ops.int8_vectorwise_quant(half.clone(), threshold)
    found[f"rows {threshold}"], found[f"rows {threshold} stats"] = q, stats
    if columns is not None:
        found["columns"] = columns
cw, sw, _ = ops.int8_vectorwise_quant(w.half(), 0.0)
ca, sa, columns = ops.int8_vectorwise_quant(half.clone(), 6.0)
found["values"] = ops.int8_vectorwise_dequant(cw, sw)
found["product"] = ops.int8_linear_matmul(ca, cw)
found["product values"] = ops.int8_mm_dequant(found["product"], sa, sw, torch.float16, bias.half())
found["scaled"] = ops.int8_scaled_mm(ca, cw, sa, sw, bias.half(), torch.float16)
found["mixed"], _ = ops.int8_mixed_scaled_mm(half, ca, cw, sa, sw, columns, bias.half())
stack = torch.nn.Module()
stack.w = torch.nn.Parameter(torch.randn(4, 8, 64))
replace_parameter_4bit(stack, "w", quant_type="nf4", blocksize=64)
found["stack"] = stack.w
found |= {f"stack {key}": value for key, value in stack.state_dict().items()}
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Sequential(torch.nn.Linear(64, 32)))
bnb.utils.replace_linear(model, lambda i, o, b: bnb.nn.LinearNF4(i, o, b), skip_modules=(), copy_weights=True)
found["replaced"] = torch.tensor([isinstance(m, bnb.nn.Linear4bit) for m in model.modules()])
"""

# What the real one has on GPUs alone is computed from what it has on a CPU.
OUTS = """
ours = sys.argv[1] == "polybit"
def into(op, shape, dtype, *args):
    out = torch.full(shape, 7, dtype=dtype)
    assert op.out(*args, out=out) is None
    return out
found["product into"] = into(ops.int8_linear_matmul, (3, 64), torch.int32, ca, cw)
for kind in ("nf4", "fp4"):
    packed, scales = ops.quantize_4bit(w, 64, kind, torch.uint8)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        args = packed, scales, 64, kind, [64, 128], dtype
        values = into(ops.dequantize_4bit, (64, 128), dtype, *args) if ours else ops.dequantize_4bit(*args)
        found[f"{kind} into {dtype}"] = values
    dense = ops.dequantize_4bit(packed, scales, 64, kind, [64, 128], torch.float32)
    args = x[:1], packed, [64, 128], scales, F.get_4bit_type(kind, device="cpu"), 64
    found[f"{kind} row into"] = into(ops.gemv_4bit, (1, 64), x.dtype, *args) if ours else x[:1] @ dense.t()
    out = torch.empty_like(packed)
    given, state = F.quantize_4bit(w, out=out, absmax=torch.empty_like(scales), quant_type=kind)
    assert given is out and torch.equal(out, packed) and torch.equal(state.absmax, scales)
    out = torch.empty(3, 64)
    assert bnb.matmul_4bit(x, packed, state, out=out) is out
    found[f"{kind} product into"] = out
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    args = codes, torch.linspace(0.5, 1.5, 32), map8, 256, dtype
    values = into(ops.dequantize_blockwise, (64, 128), dtype, *args) if ours else ops.dequantize_blockwise(*args)
    found[f"8 bits into {dtype}"] = values
out, scales = torch.empty(64, 128, dtype=torch.uint8), torch.empty(32)
given, state = F.quantize_blockwise(w, out=out, absmax=scales, blocksize=256)
want, want_scales = ops.quantize_blockwise(w, map8, 256)
assert given is out and state.absmax is scales and torch.equal(out, want) and torch.equal(scales, want_scales)
out = torch.empty(3, 64, dtype=torch.float16)
assert F.int8_mm_dequant(found["product"], sa, sw, out, bias.half()) is out
found["product values into"] = out
for threshold in (0.0, 6.0):
    if ours:
        parts = F.int8_double_quant(half.clone(), threshold=threshold)
        same = ops.int8_double_quant(half.clone(), threshold)
        assert all(torch.equal(a, b) for a, b in zip(parts, same) if a is not None)
    else:
        rows, row_scales, columns = F.int8_vectorwise_quant(half.clone(), threshold)
        inner = half.masked_fill(half.abs() >= threshold, 0.0) if threshold else half
        column_scales = inner.abs().amax(0).float()
        parts = rows, (inner.float() * 127 / column_scales).round().to(torch.int8), row_scales, column_scales, columns
    assert (parts[4] is None) == (threshold == 0.0)
    for name, part in zip(("rows", "columns", "row scales", "column scales", "outliers"), parts):
        if part is not None:
            found[f"double {threshold} {name}"] = part
"""
OUTLIERS = """
w[:, 3] *= 20
w[:, [9, 77]] *= 12
found["dims"] = bnb.utils.find_outlier_dims(w)
found["dims, rows"] = bnb.utils.find_outlier_dims(w.t(), reduction_dim=1, zscore=2.0)
found["dims, 5"] = bnb.utils.find_outlier_dims(w, topk=5)
torch.manual_seed(1)
found["dims, random"] = bnb.utils.find_outlier_dims(w, topk=5, rdm=True)
layers = [torch.nn.Linear(128, 128) for _ in range(2)] + [torch.nn.Linear(128, 64)]
model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), torch.nn.Sequential(*layers[1:]))
layers[0].weight.data[:, 5] *= 30
layers[1].weight.data[:, [2, 11]] *= 20
layers[2].weight.data.copy_(w)
tracer = bnb.utils.OutlierTracer.get_instance()
tracer.initialize(model)
assert tracer is bnb.utils.OutlierTracer.get_instance() and tracer.is_initialized()
many = torch.randn(2, 10, 128)
many[0, 3, 7] = 9.0
many[1, 4] *= 5
model(many)
for number, layer in enumerate(layers):
    found[f"outliers of layer {number}"] = tracer.get_outliers(layer.weight)
assert tracer.get_outliers(torch.randn(4)) is None and len(tracer.outliers) == len(tracer.hvalues) == 3
hooks = [len(layer._forward_pre_hooks) for layer in layers]
model(many)  # the second pass ends it
found["hooks"] = torch.tensor(hooks + [len(layer._forward_pre_hooks) for layer in layers])
class Aware(bnb.nn.OutlierAwareLinear):
    def quantize_weight(self, w, outlier_idx):
        return w * 2
    def forward_with_outliers(self, x, outlier_idx):
        return x
aware = Aware(128, 64)
aware.weight = layers[2].weight
aware(many)
found["aware of"], found["aware weight"] = aware.outlier_dim, aware.weight
"""


def test_ops_and_parametrizations_give_the_values_of_bitsandbytes(tmp_path: Path) -> None:
    theirs, ours = both(VALUES + OUTS + OUTLIERS, tmp_path)
    assert len(ours) == 58
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype and value.shape == theirs[key].shape, key
        # fp16 products are rounded at another place; 8-bit codes: the real one does not take the nearest on a CPU.
        limit = 2e-3 if value.dtype == torch.float16 else 5e-3 if key == "quantize 8" else 1e-6
        check_error(key, value, theirs[key], limit)
