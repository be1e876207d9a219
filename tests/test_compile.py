"""torch.compile of every layer and of a small Llama: no graph break, few compilations, the numbers of eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from tools import HERE, run_python
from torch import Tensor, nn

import polybit.compat.bitsandbytes as bnb
from polybit.nn import (
    Embedding4bit,
    Embedding8bit,
    EmbeddingKbit,
    Linear4bit,
    Linear8bit,
    Linear8bitTraining,
    LinearKbit,
    StableEmbedding,
    quantize_,
)

# torch's warnings about itself: inductor imports scripted modules, dynamo instantiates a Function that it traces, and
# torch 2.6 writes down its own configuration.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parametrized() -> nn.Module:
    """A dense layer whose weight bitsandbytes' parametrization restores."""
    module = nn.Linear(64, 32)
    bnb.nn.parametrize.replace_parameter_4bit(module, "weight")
    return module


LINEARS: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: Linear4bit(64, 32),
    "fp4": lambda: LinearKbit(64, 32, format="fp4", double_quant=False),
    "lloyd3": lambda: LinearKbit(64, 32, format="lloyd3"),
    "nf2": lambda: LinearKbit(64, 32, format="nf2", bias=False),
    "int8-6": lambda: Linear8bit(64, 32),
    "int8-0": lambda: Linear8bit(64, 32, threshold=0.0),
    "training": lambda: Linear8bitTraining(64, 32),
    # Without a compute_dtype the first call sets it, and the second is compiled again.
    "compat-nf4": lambda: bnb.nn.LinearNF4(64, 32, compute_dtype=torch.float32).to("cpu"),
    "compat-fp4-bf16": lambda: bnb.nn.LinearFP4(
        64, 32, compute_dtype=torch.bfloat16, compress_statistics=False, quant_storage=torch.bfloat16
    ).to("cpu"),
    "compat-int8-6": lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0).to("cpu"),
    "compat-int8-0": lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu"),
    "compat-training": lambda: bnb.nn.Linear8bitLt(64, 32, threshold=6.0).to("cpu"),
    "compat-parametrized": parametrized,
}
EMBEDDINGS: dict[str, Callable[[], nn.Module]] = {
    "embedding-nf3": lambda: EmbeddingKbit(20, 64, format="nf3"),
    "embedding-4bit": lambda: Embedding4bit(20, 64, padding_idx=1),
    "embedding-8bit": lambda: Embedding8bit(20, 64),
    "compat-embedding-nf4": lambda: bnb.nn.EmbeddingNF4(20, 64).to("cpu"),
    "compat-embedding-8bit": lambda: bnb.nn.Embedding8bit(20, 64).to("cpu"),
}
LAYERS = {**LINEARS, **EMBEDDINGS}
NATIVE = [name for name in LAYERS if not name.startswith("compat")]
# inductor takes about a second for each.
LAYERS_BY_INDUCTOR = [pytest.param(name, marks=[] if name in NATIVE else [pytest.mark.slow]) for name in LAYERS]


def make(layer: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[layer]()


def inputs(layer: str, rows: int) -> Tensor:
    if layer in LINEARS:
        return randn(rows, 64, seed=rows) * 3  # some beyond the threshold
    return torch.randint(20, (rows, 4), generator=torch.Generator().manual_seed(rows))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def assert_whole(graphs: int) -> None:
    """No graph break, and so many compilations."""
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("layer", LAYERS_BY_INDUCTOR)
def test_inductor_warm(layer: str) -> None:
    """After an eager call; bit for bit, because the op is opaque to the compiler."""
    module, x = make(layer).eval(), inputs(layer, 5)
    with torch.no_grad():
        wanted = module(x)
        assert torch.equal(torch.compile(module, fullgraph=True)(x), wanted)
    assert_whole(1)


COLD = """
import torch, sys
sys.path.insert(0, "tests")
from test_compile import LAYERS, inputs, make
with torch.no_grad():
    for layer in LAYERS:
        module, x = make(layer).eval(), inputs(layer, 5)
        got = torch.compile(module, fullgraph=True, backend=BACKEND)(x)  # the first call of all
        assert torch.equal(got, module(x)), layer
assert not torch._dynamo.utils.counters["graph_break"]
print(len(LAYERS), "layers")
"""


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_cold(backend: str) -> None:
    """In a new process, before any eager call."""
    done = run_python(COLD.replace("BACKEND", repr(backend)), PYTHONPATH=str(HERE))
    assert done.stdout.split()[0] == str(len(LAYERS))


def check_dynamic_batch(layer: str, backend: str, dynamic: bool | None, graphs: int) -> None:
    module = make(layer).eval()
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        for rows in (3, 5, 9, 17):
            x = inputs(layer, rows)
            assert torch.equal(compiled(x), module(x))
    assert_whole(graphs)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_batch_that_changes_compiles_once_more(layer: str) -> None:
    check_dynamic_batch(layer, "aot_eager", None, 2)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_dynamic_batch_compiles_once(layer: str) -> None:
    check_dynamic_batch(layer, "aot_eager", True, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_dynamic_batch_by_inductor(layer: str, dynamic: bool | None) -> None:
    check_dynamic_batch(layer, "inductor", dynamic, 1 if dynamic else 2)


def step(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """The gradients of one step, by name; "x" is that of the input."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    call(x).square().sum().backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {**grads, "x": x.grad}


def check_training(layer: str, backend: str) -> None:
    module = make(layer)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for rows in (3, 5, 9):
        x = inputs(layer, rows)
        wanted, got = step(module, module, x), step(module, compiled, x)
        assert list(got) == list(wanted) and ("bias" in got) == (module.bias is not None)
        for name in wanted:
            # Where inductor fuses, it does not round to bf16 in between.
            limit = 0.02 if "bf16" in layer and backend == "inductor" else 1e-5
            torch.testing.assert_close(got[name], wanted[name], rtol=limit, atol=limit)
    assert_whole(2)


@pytest.mark.parametrize("layer", LINEARS)
def test_gradients(layer: str) -> None:
    check_training(layer, "aot_eager")


@pytest.mark.parametrize("layer", ["nf4", *(pytest.param(x, marks=pytest.mark.slow) for x in LINEARS if x != "nf4")])
def test_gradients_by_inductor(layer: str) -> None:
    check_training(layer, "inductor")


def test_stable_embedding() -> None:
    """All of it is torch's own, its gradients included: inductor's layer norm rounds in another order."""
    torch.manual_seed(0)
    module, index = StableEmbedding(20, 64), torch.randint(20, (5, 4), generator=torch.Generator().manual_seed(5))
    results = []
    for call in (module, torch.compile(module, fullgraph=True)):
        module.zero_grad()
        y = call(index)
        y.pow(3).sum().backward()
        results.append((y.detach(), *(p.grad for p in module.parameters())))
    assert len(results[0]) == 4
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert_whole(1)


@pytest.mark.parametrize("layer", ["nf4", "int8-6", "training"])
def test_autocast(layer: str) -> None:
    module, x = make(layer), inputs(layer, 5)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = module(x)
        return y

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, call(x))


@pytest.mark.parametrize("layer", ["nf4", "int8-6", "training"])
def test_torch_func_inside_a_compiled_function(layer: str) -> None:
    module, x = make(layer), inputs(layer, 3)

    def jacobian(x: Tensor) -> Tensor:
        y: Tensor = torch.func.jacrev(module)(x)
        return y

    got = torch.compile(jacobian, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, jacobian(x), rtol=1e-5, atol=1e-5)


class LoRA(nn.Module):
    """A frozen layer with a trained product of two thin matrices beside it."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + x @ self.down.t() @ self.up.t()
        return y


def llama(format: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        use_cache=False,
    )
    model: nn.Module = quantize_(transformers.LlamaForCausalLM(config), format)
    return model


def with_lora(model: nn.Module) -> nn.Module:
    """Adapters on the query and value projections; nothing else is trained."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.endswith(("q_proj", "v_proj")):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, LoRA(module))
    return model


def tokens(rows: int, length: int = 6) -> Tensor:
    return torch.randint(128, (rows, length), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_llama(format: str) -> None:
    """Equal logits: what lies between the products is run by the same kernels under aot_eager."""
    model = llama(format).eval()
    ids = tokens(2)
    explained = torch._dynamo.explain(model)(input_ids=ids)
    assert (explained.graph_break_count, explained.graph_count) == (0, 1), explained.break_reasons
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (2, 3, 5):
            wanted, got = model(input_ids=tokens(rows)).logits, compiled(input_ids=tokens(rows)).logits
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def check_lora_step(format: str, backend: str) -> None:
    model = with_lora(llama(format).train())
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for call in (model, compiled):
        ids = tokens(2)
        loss = call(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
        model.zero_grad()
    (wanted, wanted_grads), (got, got_grads) = results
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert len(got_grads) == 8
    for name, grad in wanted_grads.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(got_grads[name], grad, rtol=1e-4, atol=1e-6)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_llama_lora_step(format: str) -> None:
    check_lora_step(format, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_llama_by_inductor(format: str) -> None:
    """inductor fuses norms and activations, so that fp32 rounding differs; int8 codes may flip by one step."""
    model, ids = llama(format).eval(), tokens(2)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        got = torch.compile(copy.deepcopy(model), fullgraph=True)(input_ids=ids).logits
    error = (got - wanted).norm() / wanted.norm()
    assert error < (1e-5 if format == "nf4" else 1e-2), error


@pytest.mark.slow
def test_llama_lora_step_by_inductor() -> None:
    check_lora_step("nf4", "inductor")
