"""Record a run in log.jsonl, and in TensorBoard's files if it is installed."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastddpm.common.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger(__name__)


class RunLog:
    """Write a line of JSON per record, and the same numbers for TensorBoard.

    A failure to write (such as a full disk) causes one warning, and training goes on.

    Args:
        folder: of the run.
        step: the first step of the run. Lines about later steps, from a run that was interrupted after its last
            checkpoint, are removed, and so is a truncated last line.
        tensorboard: also write TensorBoard's files; None does so if it is installed.

    Raises:
        ModuleNotFoundError: `tensorboard` is True, but it is not installed.
    """

    def __init__(self, folder: Path, step: int = 0, *, tensorboard: bool | None = None) -> None:
        self.path = folder / "log.jsonl"
        self._warned = False
        if self.path.is_file():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            atomic_write(self.path, lambda temporary: _write_lines(temporary, kept if step else []))
        writer = None if tensorboard is False else board_writer(needed=bool(tensorboard))
        self._board = None if writer is None else writer(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a record about `step`; numbers that are not finite become null."""
        record = {"step": step} | {name: _plain(value) for name, value in values.items()} | {"step": step}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            if not self._warned:
                self._warned = True
                _log.warning("%s cannot be written: %s", self.path, error.strerror or error)
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._on_board(lambda board: [board.add_scalar(name, value, step) for name, value in numbers.items()])

    def picture(self, step: int, picture: Image.Image) -> None:
        """Show a picture in TensorBoard."""
        import numpy as np

        pixels = np.asarray(picture)
        self._on_board(lambda board: board.add_image("samples", pixels, step, dataformats="HWC"))

    def close(self) -> None:
        """Flush buffered records."""
        self._on_board(lambda board: board.close())

    def _on_board(self, write: Callable[[Any], object]) -> None:
        """Write for TensorBoard until it fails (its thread reports a full disk at the next call)."""
        if self._board is None:
            return
        try:
            write(self._board)
        except Exception as error:
            self._board = None
            _log.warning("TensorBoard's files cannot be written any more: %s", str(error).partition("\n")[0])


def board_writer(*, needed: bool) -> Any:
    """Return torch's SummaryWriter, or None where TensorBoard is not installed.

    Raises:
        ModuleNotFoundError: it is `needed` but not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if needed:
            raise ModuleNotFoundError("tensorboard is missing: pip install tensorboard") from None
        return None
    return SummaryWriter


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a log.jsonl, without a truncated last line."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if _step_of(line) < math.inf]


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Meter:
    """Average losses and measure speed since the last record.

    Losses and norms stay on the device until a record is made. Checkpoints save them, so that a resumed run has the
    records of an uninterrupted one.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._steps, self._waited = 0, 0.0
        self.start_clock(0.0)

    def start_clock(self, waited: float) -> None:
        """Start to count time; `waited` is `TrainingStep.waited` now."""
        self._start, self._waited, self._steps = time.perf_counter(), waited, 0

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Add the loss and norm of a step, scalars."""
        self._losses.append(loss.detach())
        self._norms.append(norm.detach())
        self._steps += 1

    def means(self) -> Tensor:
        """Return mean loss and mean norm, float64 [2] (float32 where the device has no float64)."""
        pairs = torch.stack([torch.stack(self._losses), torch.stack(self._norms).to(self._losses[0].dtype)])
        return pairs.to(torch.float32 if pairs.device.type == "mps" else torch.float64).mean(1)

    def rates(self, waited: float) -> tuple[float, float]:
        """Return (steps per second, share of time spent waiting for data) since `start_clock`."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return self._steps / seconds, min(1.0, (waited - self._waited) / seconds)

    def clear(self) -> None:
        """Forget the losses and norms of the last record."""
        self._losses.clear()
        self._norms.clear()

    def state_dict(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
        """Return the losses and norms not yet recorded, as means over all processes; floats hold float32 exactly.

        Args:
            over_processes: takes the mean of a tensor over them.
        """
        lists = {"losses": self._losses, "norms": self._norms}
        return {name: over_processes(torch.stack(values)).tolist() if values else [] for name, values in lists.items()}

    def load_state_dict(self, state: Mapping[str, list[float]], device: torch.device) -> None:
        self._losses = [torch.tensor(value, device=device) for value in state["losses"]]
        self._norms = [torch.tensor(value, device=device) for value in state["norms"]]
