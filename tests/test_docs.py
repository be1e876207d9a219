"""The documentation: it builds without a warning, covers what is public, its examples run, and what it names exists."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import typer.main
from nbclient import NotebookClient
from tools import PACKAGE, run_python

import polybit
from polybit import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
MODULES = [path.stem for path in sorted((ROOT / "docs" / "api").glob("*.md"))]
SUFFIXES = r"c|cpp|cu|def|h|inl|ini|ipynb|json|md|metal|npz|py|toml|txt"
FOLDERS = (ROOT, ROOT / "docs", ROOT / "python", ROOT / "python" / "polybit")  # what paths are relative to
IGNORED = {".git", ".venv", "build", "__pycache__"}


def public(name: str) -> dict[str, object]:
    """The public classes and functions of a module by name: its __all__, or what it defines."""
    module = importlib.import_module(name)
    members = {key: value for key, value in vars(module).items() if inspect.isclass(value) or inspect.isfunction(value)}
    if hasattr(module, "__all__"):
        return {key: value for key, value in members.items() if key in module.__all__}
    own = {key: value for key, value in members.items() if value.__module__ == name}
    return {key: value for key, value in own.items() if not key.startswith("_")}


def unknown(found: dict[str, list[str]]) -> list[str]:
    return [f"{page}: {name}" for page, names in found.items() for name in names]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HTML, warnings as errors."""
    out = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(out / ".trees")]
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(out)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return out


def test_the_index_links_every_page(built: Path) -> None:
    index = (built / "index.html").read_text(encoding="utf-8")
    names = [path.stem for path in (ROOT / "docs").glob("*.md") if path.stem != "index"]
    assert {"numerics", "backends"} <= set(names)
    for name in [*names, *(f"api/{module}" for module in MODULES)]:
        assert f'href="{name}.html"' in index, name


def test_everything_public_is_documented(built: Path) -> None:
    """Under the module that defines it or one that exports it."""
    pages = "".join((built / "api" / f"{module}.html").read_text(encoding="utf-8") for module in MODULES)
    missing = []
    for module in MODULES:
        for name, value in public(module).items():
            if not (inspect.getdoc(value) and re.search(rf'id="polybit[\w.]*\.{name}"', pages)):
                missing.append(f"{module}.{name}")
    assert {"polybit", "polybit.nn", "polybit.backends", "polybit.functional", "polybit.testing"} <= set(MODULES)
    assert not missing


BLOCKS = [(name, code) for name, text in TEXTS.items() for code in re.findall(r"```python\n(.*?)```", text, re.S)]


@pytest.mark.parametrize(("page", "code"), BLOCKS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BLOCKS)])
def test_examples_run(page: str, code: str) -> None:
    """Each alone, in a fresh interpreter, with warnings as errors of our own code."""
    run_python(f"import warnings\nwarnings.simplefilter('error', RuntimeWarning)\n{code}")


def test_the_readme_has_an_example() -> None:
    assert "README.md" in dict(BLOCKS)


def numbers(text: str) -> list[float]:
    """Those with a decimal point."""
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=nbformat.NO_CONVERT)


def test_the_notebook_is_kept_as_its_author_wrote_it(notebook: nbformat.NotebookNode) -> None:
    """Valid, without outputs, and with nothing of the machine that it was last run on."""
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.metadata.kernelspec.name == "python3" and set(notebook.metadata.language_info) == {"name"}
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert not any(cell.metadata for cell in notebook.cells)
    assert not [line for cell in cells for line in cell.source.splitlines() if re.search(r"""["'](/|~|\w:\\)""", line)]


def test_the_notebook_runs(notebook: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Jupyter runs it: by nbclient, in a kernel of its own, which must find the polybit under test."""
    for name in [name for name in os.environ if name.startswith("POLYBIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE.parent))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # else jupyter_core warns
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):  # nothing of the user's own
        monkeypatch.setenv(name, str(tmp_path / name))
    ran = copy.deepcopy(notebook)
    ran.cells.append(nbformat.v4.new_code_cell("import sys; print(sys.executable, polybit.__file__)"))
    NotebookClient(ran, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in ran.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    printed = ["".join(out.text for out in cell.outputs if out.get("name") == "stdout") for cell in cells]
    _, tensor, model, close, mixed, saved, trained, where = printed
    assert where.split() == [sys.executable, polybit.__file__]
    assert "4.14 bits a weight, relative squared error 0.0085" in tensor
    assert "86.7 -> 50.9 MiB" in model and "format=nf4, block_size=64, double_quant=True" in model
    assert numbers(close) == pytest.approx([0.971, 0.9734, 0.9723, 0.9775], abs=2e-3)
    assert "closest to the first: The cat is lying on a rug." in close
    assert numbers(mixed) == pytest.approx([0.9736, 0.9835], abs=2e-3)
    assert saved == "['config.json', 'model.safetensors']\n"
    losses = [float(loss) for loss in re.findall(r"step \d: loss (\S+)", trained)]
    assert losses == sorted(losses, reverse=True) and losses[0] == pytest.approx(0.0236, abs=2e-3) and len(losses) == 10


def test_files_exist() -> None:
    names = set()
    for _, folders, files in os.walk(ROOT):
        folders[:] = set(folders) - IGNORED  # not walked: an environment has 100,000 files
        names.update(folders, files)
    tops = {path.name for path in ROOT.iterdir()}

    def exists(token: str) -> bool:
        if "/" not in token:
            return token in names
        return any(next(folder.glob(token.rstrip("/")), None) for folder in FOLDERS)

    def is_path(token: str) -> bool:
        if token.startswith(("build/", ".venv/")):  # what make builds
            return False
        return bool(re.fullmatch(rf"[\w./*-]+\.({SUFFIXES})", token)) or (token.split("/")[0] in tops and "/" in token)

    missing = {}
    for page, text in TEXTS.items():
        tokens = re.findall(r"`([\w./*-]+)`", text) + re.findall(r"\]\(([^)#:]+)\)", text)
        missing[page] = [token for token in tokens if is_path(token) and not exists(token)]
    assert not unknown(missing)
    assert not exists("core/no_such.h") and exists("core/polybit.h") and is_path("core/no_such.h")


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(VENV)", ".venv")
    targets = {name for line in re.findall(r"^([^\t#=:\n]+):(?!=)", makefile, re.M) for name in line.split()}
    named = {page: re.findall(r"(?:^|`|^ {4})make ([\w./-]+)", text, re.M) for page, text in TEXTS.items()}
    assert {"demo", "test"} <= set(named["README.md"])
    assert not unknown({page: [name for name in names if name not in targets] for page, names in named.items()})


def test_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)
    assert phony is not None
    assert set(re.findall(r'@echo "make ([\w-]+) ', makefile)) == set(phony[1].split()) - {"help"}


def test_environment_variables_exist() -> None:
    """Each is of the package, of a tool, or an option of CMake; and the table has every variable of the package."""
    reads = re.compile(r'(?:environ(?:\.get\(|\[)|getenv\()\s*"(POLYBIT_\w+)"')
    files = [path for folder in ("python/polybit", "core", "backends") for path in (ROOT / folder).rglob("*")]
    sources = [path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".cpp", ".h")]
    variables = {name for text in sources for name in reads.findall(text)}
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    cmake = re.search(r"foreach\(family (.*)\)", text)
    assert cmake is not None and "POLYBIT_BACKEND" in variables
    options = {f"POLYBIT_{family}" for family in cmake[1].split()} | set(re.findall(r"^option\((\w+)", text, re.M))
    for path in (ROOT / "backends").glob("*/CMakeLists.txt"):
        options.update(re.findall(r"^set\((POLYBIT_\w+) .* CACHE", path.read_text(encoding="utf-8"), re.M))
    tools = {name for path in (ROOT / "tools").glob("*.py") for name in reads.findall(path.read_text(encoding="utf-8"))}
    named = {page: re.findall(r"\bPOLYBIT_[A-Z]\w*", text) for page, text in TEXTS.items()}
    known = variables | options | tools
    assert not unknown({page: [name for name in names if name not in known] for page, names in named.items()})
    assert variables == set(re.findall(r"^\| `(POLYBIT_\w+)` \|", TEXTS["docs/backends.md"], re.M))


def test_command_lines_exist() -> None:
    """The commands and options of `polybit ...` lines in the pages are those of the program."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    options = {name: {flag for param in command.params for flag in param.opts} for name, command in commands.items()}
    wrong, seen = {}, set()
    for page, text in TEXTS.items():
        wrong[page] = []
        for name, rest in re.findall(r"(?:^ {4}|`)(?:\w+=\S+ )?polybit ([a-z][\w-]*)([^`\n#]*)", text, re.M):
            seen.add(name)
            flags = re.findall(r"--[\w-]+", rest)
            if name not in options or not set(flags) <= options[name] | {"--help"}:
                wrong[page].append(f"polybit {name}{rest}")
    assert {"info", "quantize"} <= seen
    assert not unknown(wrong)
