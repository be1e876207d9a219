"""The kernels written once: on the emulator, under sanitizers, compiled by nvcc and clang."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import require_tool, run_python

import polybit
from polybit.backends import list_backends
from polybit.spec import OPS, blockwise, codebooks
from polybit.spec.optim import RULES

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "tests" / "simt"
EMULATOR = ROOT / "backends" / "emulator"
ORDERS = ("ascending", "descending", "shuffled:7")
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
WIDTHS = (16, 32, 64)
DTYPES = ("fp32", "fp16", "bf16")
# tests/test_cuda.py and tests/test_hip.py look at the registers of all architectures.
ARCHITECTURES = (pytest.param(75, marks=pytest.mark.slow), 90, pytest.param(120, marks=pytest.mark.slow))
PRODUCTS = ("matmul", "gemv")  # written with fma; elsewhere one would be a contraction
# Of each kernel in core/kernels/entries.def that must have some, how many 16-byte loads.
QUANTIZERS = ("blockwise", *(f"kbit{bits}{search}" for bits in (2, 3, 4) for search in ("", "_search")))
WIDE_LOADS = {
    f"quantize_{format}_{dtype}": 2 if dtype == "fp32" else 1 for format in QUANTIZERS for dtype in DTYPES
} | {"quantize_absmax": 2, "copy_bytes": 1, "sum_chunks": 4, "scale_multi": 8}
# Of a product: x; of a gemv also the codes of two rows of the weight.
for dtype in DTYPES:
    for form in ("kbit", "kbit_transposed", "linear_int8_transposed"):
        WIDE_LOADS[f"matmul_{form}_{dtype}"] = 2 if dtype == "fp32" else 1
    WIDE_LOADS[f"gemv_kbit_1_{dtype}"] = 4 if dtype == "fp32" else 3
    WIDE_LOADS[f"quantize_int8_{dtype}"] = 4 if dtype == "fp32" else 2  # once for absmax, once for the codes
    WIDE_LOADS[f"mark_outliers_{dtype}"] = 2 if dtype == "fp32" else 1
    for form in ("matmul_linear_int8", "gemv_linear_int8_1"):
        WIDE_LOADS[f"{form}_{dtype}"] = 2
    WIDE_LOADS[f"matmul_kbit_int8_{dtype}"] = 1
    WIDE_LOADS[f"gemv_kbit_int8_1_{dtype}"] = 3
WIDE_LOADS |= {"matmul_int8": 2, "gemv_int8_1": 3}
# Written with a product of four signed bytes at once, dp4a or v_dot4.
DOT4 = re.compile(r"(matmul_int8|gemv_int8(_1)?|(matmul|gemv)_(linear|kbit)_int8(_1)?_(fp32|fp16|bf16))$")
# Of the optimizers: parameter and gradient in each of three dtypes, and states in fp32.
for name, rule in RULES.items():
    WIDE_LOADS[f"optimizer_32bit_{name}"] = 8 + 2 * rule.states
    if rule.states:
        WIDE_LOADS[f"optimizer_8bit_{name}"] = 8
WIDE_LOADS |= {"optimizer_32bit_lamb_norms": 12, "optimizer_8bit_lamb_norms": 8, "optimizer_lars_norms": 8}


def execute(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        cwd=SOURCES,
        timeout=300,
        check=False,
    )


def build(folder: Path, name: str, *flags: str, compiler: str = "") -> Path:
    """Compile tests/simt/<name>.cpp with the emulator's own sources; only the program "emulator" needs the backend."""
    (folder / "polybit_abi.h").write_text("#define PB_ABI 1ull\n")
    program = folder / name
    own = [source for source in sorted(EMULATOR.glob("*.cpp")) if name == "emulator" or source.stem != "backend"]
    compiler = compiler or require_tool("g++", "c++", "clang++")
    flags = ("-std=c++17", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", *flags)
    (folder / "ops.def").write_text("PB_OP(quantize_kbit, )\n")  # the one that the programs call
    flags = (*flags, f'-DPB_TABLE_OPS="{folder}/ops.def"')
    done = execute(compiler, *flags, f"-I{folder}", f"-I{ROOT / 'core'}", SOURCES / f"{name}.cpp", *own, "-o", program)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulator"), "emulator")


@pytest.fixture(scope="module")
def misuse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("misuse"), "misuse")


@pytest.mark.parametrize("order", ORDERS)
def test_emulator_matches_the_numerics(emulator: Path, order: str) -> None:
    done = execute(emulator, POLYBIT_EMULATOR_ORDER=order)
    assert (done.returncode, done.stdout) == (0, "2430 cases, 0 wrong\n")


def test_an_unknown_order_is_refused(emulator: Path) -> None:
    done = execute(emulator, POLYBIT_EMULATOR_ORDER="sideways")
    assert done.returncode == 1
    assert "POLYBIT_EMULATOR_ORDER: got 'sideways', wanted ascending" in done.stdout


def test_missing_barriers_are_noticed(tmp_path: Path) -> None:
    program = build(tmp_path, "emulator", "-DPB_MUTATE_NO_BARRIER")
    for order in ORDERS:
        done = execute(program, "7", POLYBIT_EMULATOR_ORDER=order)
        match = re.search(r"348 cases, (\d+) wrong", done.stdout)
        assert done.returncode == 1 and match and int(match[1]) > 140, done.stdout


# @1, @2: the first, the second call in the source of that case; T: a thread.
MISUSE = {
    "correct": "nothing",
    "correct_shuffle": "nothing",
    "correct_members": "nothing",
    "correct_atomics": "nothing",
    "correct_group_memory": "nothing",
    "exit_before_barrier": "divergent barrier: T at @2, thread 3 has left the kernel after the shuffle_xor at @1",
    "two_barriers": "divergent barrier: (T at @1, T at @2|T at @2, T at @1)",
    "barrier_against_shuffle": r"deadlock: thread 0 at @2 waits in shuffle_xor \(1\d\d in all\), "
    r"thread 5 at @1 waits in barrier \([248] in all\)",
    "members_that_wait_in_a_circle": r"deadlock: thread 0 at @1 waits in shuffle_xor \([248] in all\), "
    r"thread 1 at @2 waits in shuffle_xor \([248] in all\), thread 2 at @4 waits in barrier \(1\d\d in all\)",
    "deadlock_at_many_places": "deadlock: " + ", ".join(rf"thread {i} at @{i + 1} .*?" for i in range(4)) + r", \.\.\.",
    "mixed_places": r"mixed collectives: (T at @1 C, T at @2 C|T at @2 C, T at @1 C)",
    "mixed_kinds": r"mixed collectives: (T at @1 \(shuffle_xor by 1, .*, T at @2 \(shuffle, |T at @2 .*, T at @1 )",
    "mixed_masks": r"mixed collectives: T at @1 \(shuffle_xor by (1|2), .*, T at @1 \(shuffle_xor by (?!\1)[12], ",
    "mixed_members": r"mixed collectives: T at @1 .*, members (0xfff[f0])\), T at @1 .*, members (?!\1)0xfff[f0]\)",
    "exit_before_shuffle": r"divergent collective: T at @1, thread \d*[02468] has left the kernel",
    "exit_of_a_member": r"divergent collective: T at @2, thread \d+ has left the kernel after the barrier at @1",
    "no_member": r"shuffle_xor: lane (1[4-9]|[2-6]\d) is no member: T at @1",
    "source_no_member": r"shuffle: lane 4 is read but no member: T at @1",
    "members_too_many": r"shuffle_xor: members beyond the wave: T at @1",
    "mask_too_wide": r"shuffle_xor: a mask beyond the wave: T at @1",
    "source_too_far": r"shuffle: lane (16|32|64) is beyond the wave: T at @1",
    "unaligned": r"an access of 16 bytes is not aligned: T at @1",
    "unaligned_atomic": r"an atomic of 4 bytes is not aligned: T at @1",
    "too_much_group_memory": r"group memory: T at @1 wants 32769 bytes, at most 32768",
    "too_much_private_memory": r"private memory: T at @1 uses 7\d{4} bytes of stack, at most 65536",
}
CALL = re.compile(r"\b(barrier|shuffle\w*|load16|atomic_add|PB_SHARED)\(")


def misuse_patterns() -> dict[str, str]:
    """The patterns of MISUSE with the files and lines of the calls."""
    lines: dict[str, list[int]] = {}
    name = ""
    for number, line in enumerate((SOURCES / "misuse.cpp").read_text().splitlines(), 1):
        if start := re.match(r"void (\w+)\(\)", line):
            name = start[1]
        if CALL.search(line):
            lines.setdefault(name, []).append(number)
    result = {}
    for name, pattern in MISUSE.items():
        for short, long in (("T at", r"thread \d+ at"), (" C", r" \(\w+ by 1, members 0xf+\)")):
            pattern = pattern.replace(short, long)
        result[name] = re.sub(r"@(\d)", lambda n, at=name: rf"misuse\.cpp:{lines[at][int(n[1]) - 1]}\b", pattern)
    return result


def check_misuse(order: str, *program: str | Path) -> None:
    done = execute(*program, order)
    assert (done.returncode, done.stderr) == (0, "")
    said = {}
    for line in done.stdout.splitlines():
        name, lanes, text = line.split(" ", 2)
        said[name, int(lanes)] = text
    assert set(said) == {(name, width) for name in MISUSE for width in WIDTHS}
    assert said.pop(("members_too_many", 64)) == "nothing"  # every bit is a lane
    patterns = misuse_patterns()
    for (name, width), text in said.items():
        assert re.match(patterns[name], text), f"{name} {width}: {text}, wanted {patterns[name]}"


@pytest.mark.parametrize("order", ORDERS)
def test_misuse_is_reported_with_its_place(misuse: Path, order: str) -> None:
    check_misuse(order, misuse)


def test_misuse_under_sanitizers(tmp_path: Path) -> None:
    """Failing unwinds one fiber and abandons the others: neither may be an error of its own."""
    program = build(tmp_path, "misuse", *SANITIZERS)
    check_misuse("shuffled:7", program)
    done = execute(program, "ascending", "overrun")
    assert done.returncode != 0 and "use-after-poison" in done.stderr, done.stderr
    assert re.search(r"#0 .* in \S*overrun\S* .*misuse\.cpp:\d+", done.stderr), done.stderr


def test_misuse_with_the_portable_switch(tmp_path: Path) -> None:
    check_misuse("shuffled:7", build(tmp_path, "misuse", "-DPB_FIBER_UCONTEXT"))


def test_misuse_with_the_switch_of_aarch64(tmp_path: Path) -> None:
    compiler, qemu = require_tool("aarch64-linux-gnu-g++"), require_tool("qemu-aarch64")
    program = build(tmp_path, "misuse", compiler=compiler)
    check_misuse("shuffled:7", qemu, "-L", "/usr/aarch64-linux-gnu", program)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles_without_spills_and_with_wide_loads(tmp_path: Path, architecture: int) -> None:
    nvcc = require_tool("nvcc")
    flags = ("-std=c++17", f"-arch=sm_{architecture}", "-fmad=false", "-Werror", "all-warnings", SOURCES / "kernels.cu")
    # Keeps the PTX that the cubin is made of.
    kept = ("-keep", "-keep-dir", tmp_path)
    cubin = execute(nvcc, *flags, *kept, "-Xptxas", "-v", "-cubin", "-o", tmp_path / "kernels.cubin")
    assert cubin.returncode == 0, cubin.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", cubin.stderr)
    assert set(spills) == {("0", "0", "0")}, cubin.stderr

    entries = dict(re.findall(r"\.entry (\w+)\((.*?)(?=\.visible|\Z)", (tmp_path / "kernels.ptx").read_text(), re.S))
    assert set(entries) >= set(WIDE_LOADS) and len(entries) == len(spills)
    for name, body in entries.items():
        assert len(re.findall(r"ld\.global(\.nc)?\.v4\.(u32|b32|f32)", body)) >= WIDE_LOADS.get(name, 0), name
        assert set(re.findall(r"\bdiv\.\S*f32", body)) <= {"div.rn.f32"}, name
        assert not re.search(r"\bmad\.\S*f32|\.ftz|\.approx", body), name
        assert not re.search(r"\bfma\.", body) or name.startswith(PRODUCTS), name
        assert bool(re.search(r"\bdp4a\.", body)) == bool(DOT4.match(name)), name


def require_clang() -> str:
    return require_tool("clang++", *(f"clang++-{version}" for version in range(22, 13, -1)))


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "width"), (("gfx90a", 64), ("gfx1030", 32)))
def test_clang_compiles_for_amd_without_spills_and_with_wide_loads(
    tmp_path: Path, architecture: str, width: int
) -> None:
    target = ("-x", "hip", "--cuda-device-only", f"--offload-arch={architecture}", "-nogpuinc", "-nogpulib")
    flags = ("-std=c++17", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-S")
    done = execute(require_clang(), *target, *flags, SOURCES / "kernels.cu", "-o", tmp_path / "kernels.s")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "kernels.s").read_text()
    entries = len(re.findall(r"^\s+\.amdhsa_kernel ", text, re.M))
    assert entries > len(WIDE_LOADS)
    for field, value in (("vgpr_spill_count", 0), ("sgpr_spill_count", 0), ("wavefront_size", width)):
        assert re.findall(rf"\.{field}: +(\d+)", text) == [str(value)] * entries
    assert len(re.findall(r"global_load_(?:dwordx4|b128)", text)) >= sum(WIDE_LOADS.values())


def require_emulator() -> None:
    with polybit.backend("emulator:32"):  # the family is looked for only when it is named
        names = [info.name for info in list_backends() if info.usable]
    assert {f"emulator:{width}" for width in WIDTHS} <= set(names), names


def codebook(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """16 values by stored code, in a shuffled order of codes, with their midpoints."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.linspace(-1.0, 1.0, 16).pow(3)
    order = torch.randperm(16, generator=generator)
    code = torch.empty(16)
    code[order] = values
    return code, (values[1:] + values[:-1]) * 0.5, order.to(torch.uint8)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_emulator_equals_cpu(width: int, dtype: torch.dtype) -> None:
    require_emulator()
    code, thresholds, order = codebook(width)
    torch.manual_seed(0)
    for block in (16, 64, 128, 256, 512, 1024, 4096):
        for count in (0, 1, 17, block, 3 * block + 5, 20000):
            x = torch.randn(count).to(dtype)
            if count > 2 * block:
                x[:block] = 0
                x[block + 3] = float("nan")
            args = (x, code, thresholds, order, block, 4, 0)
            want = OPS["quantize_kbit"].reference(*args)
            for name in ("cpu", f"emulator:{width}"):
                with polybit.backend(name):
                    q, absmax = torch.ops.polybit.quantize_kbit(*args)
                    assert (polybit.backends.last_backend() or "").startswith(name)
                assert torch.equal(q, want[0]), (name, block, count)
                assert torch.equal(absmax.view(torch.int32), want[1].view(torch.int32)), (name, block, count)


def quantizations() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(id, op, arguments): every format, on values with a zero block, NaN, infinity and a short last block."""
    x = torch.randn(4099, generator=torch.Generator().manual_seed(5))
    x[:512] = 0.0
    x[600], x[1200] = float("nan"), float("inf")
    for name, (code, thresholds, order) in codebooks.kbit().items():
        bits = len(code).bit_length() - 1
        for dtype, block, search in ((torch.float32, 64, 0), (torch.bfloat16, 512, 1), (torch.float16, 4096, 0)):
            case = f"{name}-{block}-search={search}"
            yield case, "quantize_kbit", (x.to(dtype), code, thresholds, order, block, bits, search)
    for name, book in blockwise.maps().items():
        for dtype, block in ((torch.float32, 16), (torch.bfloat16, 256), (torch.float16, 4096)):
            yield f"{name}-{block}", "quantize_blockwise", (x.to(dtype), book.code, block)
        yield f"{name}-absmax", "quantize_absmax", (x.nan_to_num(posinf=3.0).abs(), book.code)


def test_quantizers_give_the_same_bits_everywhere() -> None:
    """Of every variant of the CPU backend and every width of the emulator; tests/test_golden.py holds them to files."""
    require_emulator()
    families = ("cpu:", "emulator:")
    backends = [info.name for info in list_backends() if info.usable and info.name.startswith(families)]
    assert len(backends) > len(WIDTHS)
    for case, op, args in quantizations():
        want = OPS[op].reference(*args)
        for backend in backends:
            with polybit.backend(backend, fallback="error"):
                got = getattr(torch.ops.polybit, op)(*args)
                assert (polybit.backends.last_backend() or "").startswith(backend.partition(":")[0])
            for g, w in zip(got, want, strict=True):
                assert g.numpy().tobytes() == w.numpy().tobytes(), (case, op, backend)


def test_launchers_on_memory_that_the_host_cannot_read(tmp_path: Path) -> None:
    done = execute(build(tmp_path, "launchers"))
    assert (done.returncode, done.stdout) == (0, "2003 cases, 0 wrong\n"), done.stdout


DETERMINISTIC = """
import torch, polybit
from polybit.spec.blockwise import noise
from polybit.spec.kbit import weight

x = noise((70, 200), 1)
x[5:40, ::7] *= 6  # outliers that only some rows have
q, q_absmax = (noise((33, 200), 2) * 40).clamp(-127, 127).to(torch.int8), noise(33, 3).abs()
run = weight(noise((33, 200), 4), "nf4", 64, True)

def products(x):
    ops = torch.ops.polybit
    return (
        ops.matmul_kbit(x, *run, None, None, 33, 64, 4, 0, 0),
        ops.linear_int8(x, q, q_absmax, None, 6.0, 1),
    )

with polybit.backend("emulator:32"):
    together = products(x)
    for row in (0, 5, 33, 69):
        for whole, alone in zip(together, products(x[row : row + 1].clone())):
            print(bool(torch.equal(whole[row : row + 1], alone)))
"""


def test_a_row_depends_on_itself_alone_where_that_is_asked_for() -> None:
    assert run_python(DETERMINISTIC, POLYBIT_DETERMINISTIC="1").stdout.split() == ["True"] * 8
    assert "False" in run_python(DETERMINISTIC).stdout  # otherwise a faster kernel takes a single row


def test_the_emulator_is_never_chosen_by_itself() -> None:
    done = run_python("import polybit; print(polybit.backends.resolve('quantize_kbit').owner)")
    assert done.stdout.startswith("cpu:"), done.stdout
