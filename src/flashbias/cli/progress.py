"""The progress bar of long commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["progress_bar"]


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on the standard error stream, so that the standard output stays clean.

    The bar appears with the first step: an argument that cannot be used is answered by its one line alone.

    Yields:
        A function to call with the number of steps done, the number of steps, and what is going on.
    """
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task("", total=None)

    def show(done: int, total: int, what: str) -> None:
        progress.start()
        progress.update(task, completed=done, total=total, description=what)

    try:
        yield show
    finally:
        if progress.live.is_started:
            progress.stop()
