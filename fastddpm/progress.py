"""One progress bar for everything that takes long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Bar:
    """What moves a progress bar: a function that advances it. Of one that is not drawn, nothing happens."""

    def __init__(self, progress: Any = None, task: Any = None) -> None:
        self._progress, self._task = progress, task

    def __call__(self, steps: int = 1) -> None:
        """`steps` more are done."""
        if self._progress is None:
            return
        self._progress.advance(self._task, steps)
        if speed := self._progress.tasks[0].speed:
            self._progress.update(self._task, rate=f"{speed:.1f} steps/s")

    def extend(self, steps: int) -> None:
        """`steps` more are to be done than was known."""
        if self._progress is not None:
            self._progress.update(self._task, total=self._progress.tasks[0].total + steps)


@contextmanager
def progress_bar(total: int, description: str, *, enabled: bool = True) -> Iterator[Bar]:
    """A bar with rate and remaining time on standard error; yields the function that advances it.

    On something that is not a terminal, nothing is drawn until the end. Without `enabled` nothing is drawn at all.
    """
    if not enabled:
        yield Bar()
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
    with Progress(*columns, console=Console(stderr=True), expand=True) as progress:
        yield Bar(progress, progress.add_task(description, total=total, rate=""))
