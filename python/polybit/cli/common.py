"""What the commands share: where output goes, and how a command ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console

from polybit.backends import BackendError

WRONG = 1
USAGE = 2

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def print_json(content: Any) -> None:
    """The one JSON object on standard output."""
    typer.echo(json.dumps(content, indent=2))


def console() -> Console:
    """Standard output for tables, as wide as the terminal; wide where there is none."""
    out = Console(highlight=False, markup=False)
    if not out.is_terminal:
        out.width = 140
    return out


def stop(command: str, problem: object, code: int = USAGE) -> NoReturn:
    """End a command with a message on standard error."""
    typer.echo(f"polybit {command}: {problem}", err=True)
    raise typer.Exit(code)


@contextmanager
def input_errors(command: str) -> Iterator[None]:
    """Whatever the library says about its input, or the machine lacks, becomes a message and exit code 2."""
    try:
        yield
    except torch.OutOfMemoryError as problem:
        stop(command, f"the device has too little memory: {str(problem).partition('. ')[0]}")
    except MemoryError:
        stop(command, "there is too little memory")
    except OSError as problem:
        stop(command, f"{problem.filename}: {problem.strerror}" if problem.filename and problem.strerror else problem)
    except (ValueError, TypeError, ImportError, BackendError) as problem:
        stop(command, problem)
