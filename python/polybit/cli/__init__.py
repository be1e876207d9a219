"""The command line: polybit info | check | doctor | bench | quantize | eval."""

from __future__ import annotations

import typer

from polybit.backends import BackendError
from polybit.cli import bench, doctor, evaluate, quantize, support
from polybit.cli.common import USAGE

app = typer.Typer(
    no_args_is_help=True,
    help="Quantize PyTorch models; see what runs where.",
    epilog="Exit codes: 0 ok, 1 something was found wrong, 2 wrong usage or input. "
    "With --json, standard output holds one JSON object and nothing else.",
)
app.command("info")(support.info)
app.command("check")(support.check)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)
app.command("quantize")(quantize.quantize)
app.command("eval")(evaluate.evaluate)


def main() -> None:
    """Entry point of the `polybit` script and of `python -m polybit`."""
    try:
        app(prog_name="polybit")
    except BackendError as problem:  # of any command: what POLYBIT_BACKEND and the other variables name
        typer.echo(f"polybit: {problem}", err=True)
        raise SystemExit(USAGE) from None
