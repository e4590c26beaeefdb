"""Let SIGTERM, SIGHUP and Ctrl-C end the training after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequest:
    """A record of whether the process has been told to stop.

    Attributes:
        by: the signal, SIGTERM, SIGHUP or SIGINT; None if there was none.
    """

    def __init__(self) -> None:
        self.by: signal.Signals | None = None

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.by == signal.SIGINT:
            raise KeyboardInterrupt  # the second request stops at once
        self.by = signal.Signals(number)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Let SIGTERM, SIGHUP and the first SIGINT set a flag instead of ending the process; in the main thread only.

    In other threads Python cannot handle signals, and they keep their effect. SIGHUP that is ignored, as under nohup,
    stays ignored.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before: dict[signal.Signals, Any] = {number: signal.signal(number, request._receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
