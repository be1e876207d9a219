"""Run a program of this machine on an emulated processor that has AVX512.

``python tests/bochs.py PROGRAM [ARGUMENT ...]``

Bochs emulates the processor; Debian's cloud kernel runs on it, with an initramfs of one shell script, the program, its
shared libraries and the files among its arguments; the output comes back over the serial port. All that is needed
comes from Debian's archive into build/bochs, and nothing is installed: whatever this machine's distribution is, the
emulator is the one of RELEASE. It says nothing about speed. Exit status: the program's, or 125 where the emulator or
what it needs did not work.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).absolute().parent.parent / "build" / "bochs"
RELEASE = "trixie"  # the first whose Bochs knows AVX512_BF16
DEFAULT_MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PACKAGES = (
    "bochs",
    "bochs-term",
    "busybox-static",
    "genisoimage",
    "isolinux",
    "linux-image-cloud-amd64",
    "syslinux-common",
)
# Bochs 3.0 announces AMX and then faults when the kernel turns it on.
PROCESSOR = 'model=sapphire_rapids, exclude_features="amx, amx_int8, amx_bf16"'
# Without ACPI, because switching to it enters the system management mode, on whose way back Bochs 3.0 stops.
KERNEL_OPTIONS = "console=ttyS0,115200 quiet acpi=off mitigations=off panic=-1 reboot=triple"
END = "emulated: end"


class EmulatorError(RuntimeError):
    """The emulator or what it needs did not work; says nothing about what was to run on it."""


@dataclass(frozen=True)
class Result:
    """What a command printed on the emulated machine, and its exit status."""

    status: int
    output: str


def run(commands: Sequence[Sequence[str | Path]], scratch: Path, *, timeout: float = 900) -> list[Result]:
    """Run commands one after the other on the emulated processor, in one boot.

    A Path in a command is a file of this machine, and has the same place there. ``scratch``: an empty folder, in which
    the emulator's logs are left. Raises EmulatorError if the end is not reached within ``timeout`` seconds.
    """
    system = debian()
    init = ["#!/bin/busybox sh"]
    for i, command in enumerate(commands):
        words = shlex.join(str(word.absolute()) if isinstance(word, Path) else word for word in command)
        init += [f"echo 'emulated: begin {i}'", f"{words} 2>&1", f'echo "emulated: status {i} $?"']
    # Should nobody be there any more to stop the emulator, the processor's reset does.
    init += [f"echo '{END}'", "/bin/busybox sleep 1", "exec /bin/busybox reboot -f"]
    (scratch / "init").write_text("\n".join(init) + "\n")
    files = {word.absolute() for command in commands for word in command if isinstance(word, Path)}
    files |= {library for file in files for library in shared_libraries(file)}
    inside = {str(file).lstrip("/"): file for file in sorted(files)}
    inside |= {"init": scratch / "init", "bin/busybox": system / "usr/bin/busybox"}
    text = boot(system, boot_image(system, inside, scratch), scratch, timeout)
    return [_result(text, i) for i in range(len(commands))]


def _result(text: str, i: int) -> Result:
    found = re.search(rf"^emulated: begin {i}\n(.*?)^emulated: status {i} (\d+)$", text, re.DOTALL | re.MULTILINE)
    if not found:
        raise EmulatorError(f"the serial port shows no result of command {i}:\n{text[-2000:]}")
    return Result(int(found[2]), found[1])


def debian() -> Path:
    """The folder of the unpacked packages, downloaded at the first call; apt checks their signatures."""
    system = CACHE / RELEASE
    if system.exists():
        return system
    if not KEYRING.exists():
        raise EmulatorError(f"{KEYRING} is missing: install debian-archive-keyring")
    apt = CACHE / "apt"
    (apt / "lists/partial").mkdir(parents=True, exist_ok=True)
    (apt / "archives/partial").mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror()} {RELEASE} main\n")
    options = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State": apt,
        "Dir::State::status": apt / "status",  # nothing is installed, so all dependencies come along
        "Dir::Cache": apt,
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
    }
    get = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    _call([*get, "update"])
    _call([*get, "install", "--yes", "--download-only", "--no-install-recommends", *PACKAGES])
    unpacked = CACHE / f"{RELEASE}.part"
    shutil.rmtree(unpacked, ignore_errors=True)
    for package in sorted((apt / "archives").glob("*.deb")):
        _call(["dpkg-deb", "--extract", str(package), str(unpacked)])
    shutil.rmtree(apt)
    return unpacked.rename(system)


def mirror() -> str:
    """The address of Debian's archive among this machine's own sources; Debian's own where there is none."""
    label = ["Origin: Debian", "Label: Debian", "Created-By: Packages"]
    return next(iter(_call(["apt-get", "indextargets", "--format", "$(SITE)", *label]).split()), DEFAULT_MIRROR)


def _call(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EmulatorError(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stderr}")
    return done.stdout


def _program(system: Path, name: str) -> list[str | Path]:
    """How to call a program of the unpacked packages, with their libraries instead of this machine's."""
    return [
        system / "usr/lib64/ld-linux-x86-64.so.2",
        "--library-path",
        system / "usr/lib/x86_64-linux-gnu",
        system / "usr/bin" / name,
    ]


def shared_libraries(file: Path) -> list[Path]:
    """What a program or library of this machine is linked to; nothing for any other file."""
    if not file.read_bytes().startswith(b"\x7fELF"):
        return []
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", _call(["ldd", file]))]


def archive(files: Mapping[str, Path]) -> bytes:
    """A cpio archive in the "newc" format, which the kernel unpacks into its first root folder."""
    folders = {str(parent): None for name in files for parent in reversed(Path(name).parents) if parent.name}
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in folders]
    entries += [(name, stat.S_IFREG | 0o755, file.read_bytes()) for name, file in files.items()]
    out = bytearray()
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


def boot_image(system: Path, inside: Mapping[str, Path], scratch: Path) -> Path:
    """A CD image that boots the kernel with ``inside`` as its root folder."""
    disc = scratch / "disc"
    disc.mkdir()
    (kernel,) = (system / "boot").glob("vmlinuz-*")
    shutil.copy(kernel, disc / "linux")
    shutil.copy(system / "usr/lib/ISOLINUX/isolinux.bin", disc)
    shutil.copy(system / "usr/lib/syslinux/modules/bios/ldlinux.c32", disc)
    (disc / "initrd").write_bytes(archive(inside))
    (disc / "isolinux.cfg").write_text(
        f"default polybit\nlabel polybit\n kernel linux\n append initrd=initrd {KERNEL_OPTIONS}\n"
    )
    image = scratch / "disc.iso"
    boot_record = ["-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    _call([*_program(system, "genisoimage"), "-quiet", *boot_record, "-o", image, disc])
    return image


def boot(system: Path, image: Path, scratch: Path, timeout: float) -> str:
    """Start Bochs, wait until the init script has come to its end, and return the text of the serial port."""
    firmware = system / "usr/share/bochs"
    serial, log, screen = scratch / "serial", scratch / "log", scratch / "screen"
    (scratch / "bochsrc").write_text(f"""\
cpu: {PROCESSOR}, count=1, ips=100000000, ignore_bad_msrs=1, reset_on_triple_fault=0
memory: guest=512, host=512
romimage: file={firmware}/BIOS-bochs-latest, options=fastboot
vgaromimage: file={firmware}/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path={image}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={serial}
clock: sync=none
display_library: term
log: {log}
panic: action=fatal
error: action=ignore
""")
    plugins = system / "usr/lib/x86_64-linux-gnu/bochs/plugins"
    environment = {**os.environ, "BXSHARE": str(firmware), "LTDL_LIBRARY_PATH": str(plugins), "TERM": "linux"}
    serial.touch()
    deadline = time.monotonic() + timeout
    with screen.open("wb") as screen_file:
        # Standard input must be readable at once: an idle processor waits a millisecond for it each time.
        emulator = subprocess.Popen(
            [*_program(system, "bochs-bin"), "-q", "-f", scratch / "bochsrc"],
            stdin=subprocess.DEVNULL,
            stdout=screen_file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while True:
                ended = emulator.poll() is not None
                text = serial.read_text(errors="replace").replace("\r\n", "\n")
                if f"\n{END}\n" in text:
                    return text
                if ended or time.monotonic() > deadline:
                    break
                time.sleep(0.2)
        finally:
            emulator.kill()
            emulator.wait()
    how = "ended by itself" if ended else f"was not ready after {timeout:.0f} seconds"
    tail = "".join(path.read_text(errors="replace")[-1500:] for path in (serial, log) if path.exists())
    raise EmulatorError(f"the emulated machine {how}; from its serial port and log:\n{tail}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--timeout", type=float, default=900, help="seconds (default 900)")
    parser.add_argument("program", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT")
    options = parser.parse_args()
    arguments = [Path(word) if Path(word).is_file() else word for word in options.arguments]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            (result,) = run([[options.program, *arguments]], Path(scratch), timeout=options.timeout)
    except EmulatorError as error:
        print(error, file=sys.stderr)
        return 125
    print(result.output, end="")
    return result.status


if __name__ == "__main__":
    sys.exit(main())
