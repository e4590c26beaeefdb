"""One progress bar for everything that takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, description: str, *, enabled: bool = True) -> Iterator[Callable[[], None]]:
    """A bar with rate and remaining time on standard error; yields the function that advances it by one.

    On something that is not a terminal, nothing is drawn until the end. Without `enabled` nothing is drawn at all.
    """
    if not enabled:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("<"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), expand=True) as bar:
        task = bar.add_task(description, total=total, rate="")

        def advance() -> None:
            bar.advance(task)
            if speed := bar.tasks[0].speed:
                bar.update(task, rate=f"{speed:.1f} steps/s")

        yield advance
