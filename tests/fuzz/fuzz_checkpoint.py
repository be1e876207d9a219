"""Fuzz the reader of checkpoints with damaged state dicts.

    python tests/fuzz/fuzz_checkpoint.py --runs 1000000 --seed 0    random choices, the same for the same seed
    python tests/fuzz/fuzz_checkpoint.py --atheris -runs=100000     choices led by coverage; needs atheris
    python tests/fuzz/fuzz_checkpoint.py --replay HEX               one execution, from the bytes that a failure printed

An execution takes a valid state dict, damages it one to four times, and reads it. Either that raises ValueError with
"checkpoint: " and the name of an entry, or every entry was understood: the value can be restored, and writing it again
gives the same bytes. Anything else is a finding: another exception, a hang, a large allocation, other bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import struct
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from polybit import checkpoint
from polybit.qtensor import quantize

T = TypeVar("T")
State = dict[str, Any]

PREFIXES = ("layer.weight", "weight", "experts.up")
SECONDS = 20  # of one execution; a usual one takes a millisecond
MEMORY = 2**30  # bytes of address space on top of what a start takes


class Choices:
    """Decisions taken from bytes; when they are used up, the first option."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def below(self, count: int) -> int:
        """A number in 0...count - 1."""
        size = 1 if count <= 256 else 4
        taken = self.data[self.at : self.at + size]
        self.at += size
        return int.from_bytes(taken, "little") % count if count else 0

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`."""
        return options[self.below(len(options))]


def _valid() -> list[State]:
    """State dicts that are whole, each under every prefix."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[str, tuple[int, ...], int, bool, torch.dtype]] = [
        ("nf4", (8, 64), 64, True, torch.uint8),
        ("nf4", (5, 33), 32, False, torch.uint8),
        ("fp4", (4, 2, 64), 64, True, torch.bfloat16),
        ("nf4", (4, 64), 16, False, torch.float32),
        ("nf4", (34, 128), 16, True, torch.float16),  # 272 blocks, two groups
        ("int4", (8, 64), 128, False, torch.int8),
        ("lloyd3", (8, 64), 64, True, torch.uint8),
        ("nf2", (3, 11), 16, False, torch.uint8),
        ("dynamic8", (6, 40), 64, True, torch.uint8),
        ("int8", (6, 40), 64, False, torch.uint8),
        ("int8", (2, 3, 8), 64, False, torch.uint8),
        ("nf4", (0, 64), 64, True, torch.uint8),
    ]
    out = []
    for i, (format, shape, block, double, storage) in enumerate(cases):
        x = torch.randn(shape, generator=generator).to((torch.float32, torch.float16, torch.bfloat16)[i % 3])
        weight = quantize(x, format, block_size=block, double_quant=double)
        out += [checkpoint.to_tensors(weight, prefix, quant_storage=storage) for prefix in PREFIXES]
    return out


VALID = _valid()


def _json_key(state: State) -> str | None:
    return next((key for key in state if ".quant_state." in key), None)


def _text(state: State) -> bytes:
    key = _json_key(state)
    entry = state[key] if key else None
    whole = isinstance(entry, Tensor) and entry.dtype == torch.uint8 and entry.layout == torch.strided
    return bytes(entry.reshape(-1).tolist()) if whole and not entry.is_meta and entry.numel() < 2**20 else b"{}"


def _put(state: State, text: bytes) -> None:
    state[_json_key(state) or "weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)


NUMBERS: list[Any] = [
    0, 1, -1, 2, 16, 32, 48, 64, 256, 4096, 8192, 2**31, 2**60, 2**63, 2**64, 10**40, 10**4000, 64.0, 256.0, 0.5, -0.0,
    1e300, 1e-300, float("nan"), float("inf"), float("-inf"), 0.1, True, False, None,
]  # fmt: skip
TEXTS: list[Any] = [
    "", "64", "nf4", "fp4", "float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "int8", "torch.float32",
    "flöat32", "\ud800", "\x00", "x" * 5000, "__class__",
]  # fmt: skip
FIELDS = [
    "quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset", "version", "",
    "nested_", "absmax", "quant_map", "Shape", "\ud800",
]  # fmt: skip
SUFFIXES = [
    "", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".nested_offset", ".SCB", ".weight_format",
    ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".quant_state.polybit__nf4", ".zero_point",
    ".quant_state.polybit__int4", ".quant_state.polybit__int8", ".quant_state.polybit__dynamic8", ".quant_state.",
    ".quant_state.bitsandbytes__", ".quant_state.polybit__\ud800", ".quant_state.bitsandbytes__nf4.x", ".", ".absmax.x",
]  # fmt: skip
DTYPES = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16,
]  # fmt: skip


INSERTS = [b"NaN", b"Infinity", b"1e400", b'"', b"{", b"[", b"\xff", b"\x00", b" "]


def _value(c: Choices) -> Any:
    kind = c.below(6)
    if kind < 2:
        return c.pick(NUMBERS)
    if kind == 2:
        return c.pick(TEXTS)
    if kind == 3:
        return [c.pick(NUMBERS) for _ in range(c.below(5))]
    if kind == 4:
        return [c.pick([0, 1, 2, 3, 5, 8, 33, 64, 80, 2**31, 2**60, 2**62, 2**63]) for _ in range(c.below(6))]
    return c.pick([{}, {"a": {}}, [[64]], [1] * 100, [8, 64], [64, 8], [512], [2, 256], [], [[]], "[8, 64]"])


def edit_field(state: State, key: str, c: Choices) -> None:
    """Another value of one field of the JSON, or one more field, or one less."""
    try:
        content = json.loads(_text(state))
    except ValueError:
        return
    if not isinstance(content, dict):
        return
    field = c.pick(FIELDS)
    if c.below(5) == 0:
        content.pop(field, None)
    else:
        content[field] = _value(c)
    _put(state, json.dumps(content, ensure_ascii=bool(c.below(4))).encode(errors="surrogatepass"))


def edit_text(state: State, key: str, c: Choices) -> None:
    """Bytes of the JSON flipped, cut, doubled, inserted; or all of it replaced."""
    text = _text(state)
    at, size = c.below(len(text) + 1), c.below(8)
    kinds: list[Callable[[], bytes]] = [
        lambda: text[:at] + bytes([c.below(256)]) + text[at + 1 :],
        lambda: text[:at] + text[at + size :],
        lambda: text[:at] + text[at : at + 40] + text[at:],
        lambda: text[:at],
        lambda: text[:at] + c.pick(INSERTS) + text[at:],
        lambda: text[:-1] + b', "' + c.pick(FIELDS).encode(errors="replace") + b'": 1}',
        lambda: c.pick([b"[" * 50_000, b'{"a":' * 10_000, b" " * 70_000, b"1" * 60_000]),
        lambda: c.pick([b"", b"null", b"[]", b"1", b'"x"', b"{}"]),
        lambda: c.pick([b"\xef\xbb\xbf" + text, text.decode("latin1").encode("utf-16")]),
        lambda: text[:-1] + b', "nested_offset": ' + c.pick([b"NaN", b"-Infinity", b"1e39", b"9" * 500, b"0"]) + b"}",
    ]  # fmt: skip
    _put(state, kinds[c.below(len(kinds))]())


def drop(state: State, key: str, c: Choices) -> None:
    """One entry less."""
    del state[key]


def rename(state: State, key: str, c: Choices) -> None:
    """An entry, or one more copy of it, under another name."""
    prefix = c.pick(PREFIXES)
    value = state[key] if c.below(2) else state.pop(key)
    state[c.pick([prefix + c.pick(SUFFIXES), "layer.SCB", "SCB", "layer.weight_format", "weight_format"])] = value


def swap(state: State, key: str, c: Choices) -> None:
    """Two entries exchanged, or one taken from another checkpoint."""
    if c.below(2):
        other = c.pick(list(state))
        state[key], state[other] = state[other], state[key]
    else:
        donor = c.pick(VALID)
        state[key] = donor[c.pick(list(donor))]


def no_tensor(state: State, key: str, c: Choices) -> None:
    """Something that is not a tensor."""
    state[key] = c.pick([None, 0, "text", b"bytes", [1, 2], {}, 1.5])


def retype(state: State, key: str, c: Choices) -> None:
    """The same bytes as another dtype, or the same values."""
    dtype, entry = c.pick(DTYPES), state[key]
    data = entry.reshape(-1)
    if c.below(2) and not entry.is_complex():
        state[key] = data.to(dtype).reshape(entry.shape)
    elif data.numel() * data.element_size() % dtype.itemsize == 0:
        state[key] = data.contiguous().view(torch.uint8).view(dtype)


def resize(state: State, key: str, c: Choices) -> None:
    """Fewer or more elements."""
    data = state[key].reshape(-1)
    at = c.below(data.numel() + 1)
    state[key] = c.pick([data[:at], data[at:], torch.cat([data, data[:at]]), data.repeat(2), data[:0], data[:-1]])


def reshape(state: State, key: str, c: Choices) -> None:
    """The same elements in another shape or order of memory, or many from few."""
    entry = state[key]
    data = entry.reshape(-1)
    rows = c.pick([1, 2, 4, 8])
    if data.numel() % rows == 0:
        state[key] = c.pick([data.reshape(rows, -1), data.reshape(-1, rows), data.reshape(rows, -1).t()])
    kind = c.below(8)
    if kind == 0 and data.numel():
        state[key] = data[:1].expand(c.pick([data.numel(), 2**20, 2**40]))
    elif kind == 1:
        state[key] = torch.stack([data, data], 1)[:, 0].reshape(entry.shape)
    elif kind == 2:
        state[key] = torch.stack([data, data], 1)[:, 0]
    elif kind == 3:
        state[key] = torch.cat([data[:1], data])[1:]


def replace(state: State, key: str, c: Choices) -> None:
    """A tensor of another kind: meta, sparse, a parameter, quantized, negated or conjugated views."""
    entry = state[key]
    kind = c.below(5)
    if kind < 2:
        state[key] = entry.to("meta")
        if kind == 1:
            state.update({name: t.to("meta") for name, t in state.items() if isinstance(t, Tensor) and c.below(2)})
    elif kind == 2:
        state[key] = entry.reshape(-1).to_sparse()
    elif kind == 3 and entry.is_floating_point():
        state[key] = torch.nn.Parameter(entry)
    elif kind == 4 and entry.dtype == torch.float32:
        state[key] = torch.view_as_real(torch.view_as_complex(torch.stack([entry, entry], -1)).conj())[..., 1]


def spoil(state: State, key: str, c: Choices) -> None:
    """Other content: one element, one byte or all."""
    entry = state[key].clone()
    if not entry.numel() or entry.is_meta:
        return
    data = entry.contiguous().reshape(-1)
    if c.below(2):
        raw = data.view(torch.uint8)
        raw[c.below(raw.numel())] ^= 1 << c.below(8)
    elif entry.is_floating_point():
        value = c.pick([0.0, -0.0, -1.0, 1.0, float("nan"), float("inf"), float("-inf"), 1e-40, -1e-40])
        data[c.below(data.numel()) :][: c.pick([1, 1, 10**6])] = value
    state[key] = data.reshape(entry.shape)


DAMAGES: list[Callable[[State, str, Choices], None]] = [
    edit_field, edit_field, edit_field, edit_text, edit_text, drop, rename, rename, swap, no_tensor, retype, retype,
    resize, reshape, replace, spoil, spoil,
]  # fmt: skip


def damaged(c: Choices) -> tuple[State, str]:
    """A state dict, damaged, and the prefix to read."""
    which = c.below(len(VALID))
    state, prefix = dict(VALID[which]), PREFIXES[which % len(PREFIXES)]
    for _ in range(1 + c.pick([0, 0, 0, 1, 1, 2, 3])):
        if not state:
            break
        damage, key = c.pick(DAMAGES), c.pick(list(state))
        entry = state[key]
        plain = isinstance(entry, Tensor) and entry.layout == torch.strided and entry.numel() < 2**20
        if damage in TENSORS_ONLY and not plain:
            continue
        try:
            damage(state, key, c)
        except (RuntimeError, NotImplementedError, TypeError):
            continue  # torch has no such tensor: a sparse bool on meta, a view of an odd stride
    return state, prefix


TENSORS_ONLY = (retype, resize, reshape, replace, spoil)


def _bytes(entry: Tensor) -> Tensor:
    return entry.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _fields(entry: Tensor) -> str:
    content = json.loads(bytes(entry.tolist()))
    if "nested_offset" in content:
        (content["nested_offset"],) = struct.unpack("f", struct.pack("f", content["nested_offset"]))
    return json.dumps(content, sort_keys=True)


def check(state: State, prefix: str) -> str:
    """Read `state`; return "refused" or "read". Raises AssertionError, or what the reader raised, for a finding."""
    before = dict(state)
    try:
        weight = checkpoint.from_tensors(state, prefix)
    except ValueError as error:
        message = str(error)
        assert message.startswith("checkpoint: "), message
        assert any(key in message for key in (*checkpoint.owned_keys(state, prefix), prefix)), message
        assert len(message) < 1000, message
        return "refused"
    finally:
        assert before.keys() == state.keys() and all(before[key] is state[key] for key in state)
    value = weight.dequantize()
    assert value.shape == weight.shape and value.dtype == weight.dtype and value.is_meta == weight.is_meta
    storage = torch.uint8 if weight.format.kind == "int8" else state[prefix].dtype
    written = checkpoint.to_tensors(weight, prefix, quant_storage=storage)
    owned = set(checkpoint.owned_keys(state, prefix))
    assert owned == set(written) or owned == {key for key in written if not key.endswith("weight_format")}
    for key in owned:
        old, new = state[key], written[key]
        if ".quant_state." in key:
            assert new.is_meta or _fields(old) == _fields(new), key
        else:
            assert old.dtype == new.dtype and old.numel() == new.numel(), key
            assert old.is_meta or torch.equal(_bytes(old), _bytes(new)), key
    return "read"


def execute(data: bytes) -> str:
    """One execution."""
    state, prefix = damaged(Choices(data))
    return check(state, prefix)


def run(runs: int, seed: int) -> Counter[str]:
    """`runs` executions of random choices; counts of what came out. Prints the bytes of a finding and raises it."""
    generator = random.Random(seed)
    counts: Counter[str] = Counter()
    for _ in range(runs):
        data = generator.randbytes(96)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            counts[execute(data)] += 1
        except BaseException:
            print(f"finding: --replay {data.hex()}", file=sys.stderr)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    return counts


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _hang(*_: object) -> None:
    raise TimeoutError(f"an execution took more than {SECONDS} s")


def _run_atheris(arguments: list[str]) -> None:
    import atheris

    for name, function in list(vars(checkpoint).items()):
        if isinstance(function, types.FunctionType) and function.__module__ == checkpoint.__name__:
            setattr(checkpoint, name, atheris.instrument_func(function))
    atheris.Setup([sys.argv[0], *arguments], lambda data: execute(data) and None)
    atheris.Fuzz()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fuzz the reader of checkpoints.")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", metavar="HEX")
    parser.add_argument("--atheris", action="store_true", help="further arguments are libFuzzer's, as in -runs=1000")
    known, others = parser.parse_known_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _hang)
    if known.atheris:
        _run_atheris(others)
        return
    if others:
        parser.error(f"unknown arguments: {' '.join(others)}")
    if known.replay:
        state, prefix = damaged(Choices(bytes.fromhex(known.replay)))
        print(prefix, state)
        print(check(state, prefix))
        return
    _limit_memory()
    start = time.monotonic()
    counts = run(known.runs, known.seed)
    seconds = time.monotonic() - start
    print(f"{known.runs} executions, seed {known.seed}, {seconds:.0f} s, {known.runs / seconds:.0f} executions/s")
    print(f"{counts['read']} read, {counts['refused']} refused, no finding")


if __name__ == "__main__":
    main()
