"""`python -m benchmarks compare | table | plot`: readers of what `benchmarks.offload` and `benchmarks.gpu_suite` write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .compare import bands

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command(
    help="Exit code 1: something got worse beyond the noise, and is printed. 2: the files cannot be compared.\n\n"
    + bands(0.05)
)
def compare(
    old: Path,
    new: Path,
    band: Annotated[float, typer.Option(min=0, help="Relative growth of a time that is taken for noise.")] = 0.05,
    any_machine: Annotated[
        bool, typer.Option("--any-machine", help="Also results of different GPUs or hosts.")
    ] = False,
) -> None:
    from .compare import compare as _compare
    from .compare import links

    try:
        findings, n_rows = _compare(old, new, band, any_machine)
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    for finding in findings:
        typer.echo(str(finding))
    if told := links(old, new):
        typer.echo(told)
    typer.echo(f"{n_rows} rows compared, {len(findings)} worse. {bands(band)}")
    if findings:
        raise typer.Exit(1)


@app.command()
def table(
    results: Annotated[list[Path], typer.Argument(help="One or several offload.csv.")],
) -> None:
    """Print the results as Markdown, with the goals that they meet or miss."""
    from .tables import rows_of, tables

    try:
        typer.echo(tables(rows_of(results)), nl=False)
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


@app.command()
def plot(
    results: Annotated[list[Path], typer.Argument(help="One or several offload.csv: all of them in one picture.")],
) -> None:
    """Draw latency over memory, latency over steps, and timelines from the traces, beside the first file; and tables.md."""
    from .plots import draw
    from .tables import rows_of, tables

    written = results[0].parent / "tables.md"
    written.write_text(tables(rows_of(results)))  # first: it needs no matplotlib
    for path in (written, *draw(results)):
        typer.echo(str(path))


if __name__ == "__main__":
    app()
