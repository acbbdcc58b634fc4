"""`python -m benchmarks compare | plot`; `python -m benchmarks.offload` and `benchmarks.gpu_suite` make what these read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def compare(
    old: Path,
    new: Path,
    band: Annotated[float, typer.Option(min=0, help="Relative growth of a time that is taken for noise.")] = 0.05,
) -> None:
    """Exit code 1: something got worse beyond the noise, and is printed. 2: the files cannot be compared."""
    from .compare import compare as _compare

    try:
        findings, n_rows = _compare(old, new, band)
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    for finding in findings:
        typer.echo(str(finding))
    typer.echo(f"{n_rows} rows compared, {len(findings)} worse.")
    if findings:
        raise typer.Exit(1)


@app.command()
def plot(result: Path) -> None:
    """Draw latency over memory and over steps, beside a result's offload.csv."""
    from .plots import draw

    for path in draw(result):
        typer.echo(str(path))


if __name__ == "__main__":
    app()
