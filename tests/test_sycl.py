"""The kernels as SYCL, at several sub-group sizes: all compiled by DPC++, one run on the CPU as an OpenCL device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from intel import SOURCES, Launch, build_sycl_compile, compile_sycl, run_kernel

from polybit.spec import OPS

GUARD = b"\xa5" * 64  # behind each output, where nobody may write
DTYPES = {"float": torch.float32, "pb::Fp16": torch.float16, "pb::Bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sycl_compile(tmp_path_factory.mktemp("sycl"))


# What differs by the size of a sub-group is one constant.
@pytest.mark.parametrize("sub_group", [16, *(pytest.param(size, marks=pytest.mark.slow) for size in (32, 64))])
def test_every_kernel_compiles(program: Path, sub_group: int) -> None:
    done = compile_sycl(program, SOURCES / "kernels.sycl.cpp", sub_group)
    assert (done.returncode, done.stdout) == (0, "")


def test_an_error_is_reported_with_its_place(program: Path, tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    text = '#include "core/simt/sycl.h"\nPB_FN float broken(PB_GLOBAL const pb::u32 *p) { return pb::load16(p); }\n'
    source.write_text(text)
    done = compile_sycl(program, source, 16)
    assert done.returncode == 1
    narrow = compile_sycl(program, source, 8)
    assert narrow.returncode == 1 and "the kernels are for waves of 16, 32, 64" in narrow.stdout
    assert ":2:" in done.stdout and "error: no viable conversion from returned value of type 'U4'" in done.stdout


def data(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def tensor_file(path: Path, tensor: torch.Tensor, behind: bytes = b"") -> Path:
    path.write_bytes(data(tensor) + behind)
    return path


def values(count: int, block: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(block)) * torch.logspace(-3, 3, count)
    x[:block] = 0  # a zero block
    x[block + 3] = float("nan")
    x[2 * block + 1] = 1e-39  # subnormal
    return x.to(dtype)


@pytest.mark.parametrize("sub_group", [16, 32, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", ["pb::Fp16", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("float", "pb::Bf16"))]
)
def test_quantize_kbit_equals_the_specification(program: Path, tmp_path: Path, kind: str, sub_group: int) -> None:
    generator = torch.Generator().manual_seed(sub_group)
    order = torch.randperm(16, generator=generator).to(torch.uint8)
    code = torch.empty(16)
    code[order.long()] = torch.linspace(-1.0, 1.0, 16).pow(3)
    ranked = code[order.long()]
    thresholds = (ranked[1:] + ranked[:-1]) * 0.5
    launches, checks = [], []
    for block in (16, 64, 1024, 4096):  # within a sub-group, and of several, up to a whole group
        folder = tmp_path / str(block)
        folder.mkdir()
        n = 4 * block + 5
        x = values(n, block, DTYPES[kind])
        want = OPS["quantize_kbit"].reference(x, code, thresholds, order, block, 4, 0)
        inputs = {"x": x, "code": code, "thresholds": thresholds, "order": order}
        files = [tensor_file(folder / name, tensor) for name, tensor in inputs.items()]
        outputs = [tensor_file(folder / name, torch.zeros_like(t), GUARD) for name, t in zip(("q", "absmax"), want)]
        threads = max(block // 8, 128)
        launches.append(Launch(-(-n // (threads * 8)), threads, [*files, *outputs, n, block.bit_length() - 1, 1]))
        checks += zip(outputs, want)
    run_kernel(program, tmp_path, f"pb::QuantizeKbit<{kind}, 4, false>", sub_group, launches)
    for path, tensor in checks:
        assert path.read_bytes() == data(tensor) + GUARD, path
