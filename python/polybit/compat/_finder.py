"""``import bitsandbytes`` gives polybit.compat.bitsandbytes. Standard library alone: every child process loads this."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "bitsandbytes"
OURS = "polybit.compat.bitsandbytes"
VERSION = "0.50.2"  # the one whose interface this is

# Functions that remember whether there is a bitsandbytes, and modules that took it as `bnb` if there was one.
_CACHES = {
    "transformers.utils.import_utils": ("is_bitsandbytes_available",),
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
}
_ANY = DistributionFinder.Context()
_HOLDERS = ("peft.helpers", "transformers.integrations.bitsandbytes")


def install() -> None:
    """Let `import bitsandbytes`, and that of its submodules, give polybit.compat.bitsandbytes in this process.

    It comes before an installed bitsandbytes, and importlib.metadata answers for it ("0.50.2"). The modules are the
    same under both names. Nothing is imported before somebody asks. A second call does nothing. Raises RuntimeError
    if the other bitsandbytes has been imported already: call this before `import peft`, which imports it.
    """
    loaded = sys.modules.get(NAME)
    if loaded is not None and loaded.__name__ != OURS:
        raise RuntimeError(
            f"polybit.compat.install: {NAME} has been imported already, from {getattr(loaded, '__file__', None)}; "
            f"call install() before anything imports it (`import peft` does), or use python -m polybit.run"
        )
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
    _forget()


def _forget() -> None:
    """Make libraries that were imported before look again."""
    for name, functions in _CACHES.items():
        for function in functions:
            cached = getattr(sys.modules.get(name), function, None)
            if cached is not None:
                cached.cache_clear()
    for name in _HOLDERS:
        holder: Any = sys.modules.get(name)
        if holder is not None and getattr(holder, "bnb", None) is None:
            holder.bnb = importlib.import_module(NAME)


class Finder(DistributionFinder):
    """Finds bitsandbytes and its submodules, and its distribution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of bitsandbytes or of a submodule that we have."""
        if fullname != NAME and not fullname.startswith(f"{NAME}."):
            return None
        ours = OURS + fullname.removeprefix(NAME)
        where = Path(__file__).parent.joinpath(*ours.split(".")[2:])
        if where.is_dir():
            spec = ModuleSpec(fullname, _Loader(ours), origin=str(where / "__init__.py"), is_package=True)
            spec.submodule_search_locations = [str(where)]
            return spec
        file = where.with_suffix(".py")
        return ModuleSpec(fullname, _Loader(ours), origin=str(file)) if file.is_file() else None

    def find_distributions(self, context: Any = _ANY) -> Iterator[Any]:
        """The distribution, if it is asked for."""
        if context.name is None or context.name.lower() == NAME:
            yield _Distribution()


class _Loader(Loader):
    """Loads a module of ours, under its own name, and gives that."""

    def __init__(self, ours: str) -> None:
        self.ours = ours
        self.spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.ours)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has put its own there
        if self.ours == OURS:
            importlib.import_module(f"{OURS}._ops")  # torch.ops.bitsandbytes


class _Distribution(Distribution):
    """What importlib.metadata says of it."""

    def read_text(self, filename: str) -> str | None:
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\nSummary: polybit under this name\n",
            "top_level.txt": f"{NAME}\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent.joinpath(path)
