"""Errors a user can do something about become one line and exit code 2."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from rich.console import Console

from ..errors import TransitionError

Command = TypeVar("Command", bound=Callable[..., Any])

# Ours are ValueErrors; diffusers raises ValueError and OSError for what it is given, and PyTorch RuntimeError.
EXPECTED = (ValueError, OSError, ImportError, RuntimeError)

USAGE = 2


def one_line(error: BaseException) -> str:
    """The message of an error without its line breaks, or without PyTorch's C++ backtrace."""
    text = str(error).split("\nException raised from")[0]
    return " ".join(text.split()) or type(error).__name__


def reported(command: Command) -> Command:
    """Print an expected error as one line and exit with code 2. With ``debug=True`` let it through, traceback and all."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, TransitionError):  # RuntimeErrors too; the last is a bug, and shows where
            raise
        except EXPECTED as error:
            ours = isinstance(error, ImportError) and (error.name or "").startswith("prefetch_offload")
            if kwargs.get("debug") or ours:
                raise
            # On the line of its own, unwrapped: it is for grep as much as for people.
            Console(stderr=True).print(f"error: {one_line(error)}", style="bold red", soft_wrap=True, markup=False)
            raise typer.Exit(USAGE) from None

    return run  # type: ignore[return-value]
