"""Show one kind of progress bar for every long task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Report = Callable[[int, int], object]


class Bar:
    """Count the steps done and the steps to do.

    Args:
        total: how many are to be done.
        report: told of every change as report(done, total), or None.
        done: how many were done before.

    Attributes:
        text: what is drawn in place of the rate, if not None.
    """

    def __init__(self, total: int, report: Report | None = None, done: int = 0) -> None:
        self.done, self.total = done, total
        self.text: str | None = None
        self._report = report

    def __call__(self, steps: int = 1) -> None:
        """Count `steps` more as done."""
        self.done += steps
        self._tell()

    def extend(self, steps: int) -> None:
        """Add `steps` to those to do."""
        self.total += steps
        self._tell()

    def _tell(self) -> None:
        if self._report is not None:
            self._report(self.done, self.total)


@contextmanager
def progress_bar(total: int, description: str, *, done: int = 0, enabled: bool | Report = True) -> Iterator[Bar]:
    """Draw a bar with rate and remaining time on standard error; yield what moves it.

    On something that is not a terminal, nothing is drawn until the end. Where `enabled` is False nothing is drawn at
    all; where it is a function, that is told of the progress in place of a bar. `done` of the `total` steps were done
    before.
    """
    if not isinstance(enabled, bool):
        yield Bar(total, enabled, done)
        return
    if not enabled:
        yield Bar(total, None, done)
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
        task = progress.add_task(description, total=total, completed=done, rate="")

        def draw(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            if bar.text is not None:
                progress.update(task, rate=bar.text)
            elif speed := progress.tasks[0].speed:
                progress.update(task, rate=f"{speed:.1f} steps/s")

        bar = Bar(total, draw, done)
        yield bar


def check_progress(progress: Any) -> None:
    """Raise TypeError unless `progress` can be the `enabled` of `progress_bar`."""
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress is a {type(progress).__name__}, must be True, False or a function (done, total)")
