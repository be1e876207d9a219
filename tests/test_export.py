"""torch.export of every native layer, saved and loaded: the numbers of the layer, for any batch."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from test_compile import NATIVE, inputs, make
from tools import HERE, run_python
from torch import Tensor, nn
from torch.export import Dim

from polybit.nn import StableEmbedding

# torch's warning about itself: dynamo instantiates a Function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def export(module: nn.Module, x: Tensor, strict: bool) -> torch.export.ExportedProgram:
    return torch.export.export(module, (x,), dynamic_shapes=({0: Dim("rows", min=1, max=1024)},), strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("layer", NATIVE)
def test_export_save_load(layer: str, strict: bool) -> None:
    module = make(layer).eval()
    program, buffer = export(module, inputs(layer, 5), strict), io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    graphs = [part.graph for part in loaded.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    ops = [str(node.target) for graph in graphs for node in graph.nodes if "polybit" in str(node.target)]
    assert ops, "the op is in the graph, not what it is made of"
    for rows in (5, 1, 12):
        x = inputs(layer, rows)
        with torch.no_grad():
            wanted = module(x)
            assert torch.equal(program.module()(x), wanted)
            assert torch.equal(loaded.module()(x), wanted)


@pytest.mark.parametrize("strict", [False, True])
def test_stable_embedding(strict: bool) -> None:
    """All of it is torch's own."""
    torch.manual_seed(0)
    module, index, buffer = StableEmbedding(20, 64), inputs("embedding-4bit", 5), io.BytesIO()
    torch.export.save(export(module, index, strict), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for rows in (5, 1, 12):
        index = inputs("embedding-4bit", rows)
        assert torch.equal(loaded(index), module(index))


ELSEWHERE = """
import torch, polybit
from test_compile import NATIVE, inputs
for layer in NATIVE:
    program = torch.export.load(f"FOLDER/{layer}.pt2")
    wanted = torch.load(f"FOLDER/{layer}.pt")
    with torch.no_grad():
        assert torch.equal(program.module()(inputs(layer, 7)), wanted), layer
print(len(NATIVE), "programs")
"""


def test_a_program_file_runs_in_another_process(tmp_path: Path) -> None:
    for layer in NATIVE:
        module = make(layer).eval()
        torch.export.save(export(module, inputs(layer, 5), False), tmp_path / f"{layer}.pt2")
        torch.save(module(inputs(layer, 7)).detach(), tmp_path / f"{layer}.pt")
    done = run_python(ELSEWHERE.replace("FOLDER", str(tmp_path)), PYTHONPATH=str(HERE))
    assert done.stdout.split()[0] == str(len(NATIVE))
