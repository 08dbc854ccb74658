"""The command line: the Typer app, and :func:`run`, which turns mistakes into one line and exit code 2."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import __version__
from ..core.errors import ThriftError
from .bench import bench
from .calibrate import app as calibrate
from .compress import compress
from .distill import app as distill
from .generate import generate
from .methods import methods
from .models import app as models
from .serve import serve
from .tune import tune

app = typer.Typer(
    help="Token reduction for transformers: measure it on your model and data, then apply the winner.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# The commands' modules import neither torch nor transformers, so that help is instant.
for command in (bench, tune, compress, methods, generate, serve):
    app.command()(command)
app.add_typer(models, name="models")
app.add_typer(calibrate, name="calibrate")
app.add_typer(distill, name="distill")


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def run(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 after one line about a mistake, 130 when interrupted."""
    try:
        app(args)
    except ThriftError as error:
        _fail(str(error))
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{place}")
    except KeyboardInterrupt:
        _interrupted()


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _interrupted() -> None:
    print("\ninterrupted", file=sys.stderr)
    sys.exit(130)
