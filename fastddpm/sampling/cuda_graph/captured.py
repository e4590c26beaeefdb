"""Capture a body of the loop as CUDA graphs, and run it any number of times without the host.

All CUDA-graph state of the project is here. A body is a callable without arguments that advances static device memory
in place by one step and ends by adding 1 to a step counter on the device. It is captured once. Then

- "step" replays it, once per step;
- "unrolled" replays a graph of several steps in a row, and the single step for the rest;
- "while" launches one graph for all steps: a conditional node that repeats the body until a counter on the device
  reaches zero.

Importing this needs neither CUDA nor cuda-bindings.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import statistics
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fastddpm_kernels import proving
from torch import Tensor

from fastddpm.common.proofs import PROOFS
from fastddpm.sampling.cuda_graph import while_graph
from fastddpm.sampling.cuda_graph.capture_check import CaptureError, explain

MODES = ("while", "unrolled", "step")

_ROUNDS = 4  # measurements of each mode, in turn
_STEPS = 24  # steps of one measurement
_SLOW_US = 5000  # a longer step hides the difference between modes: measure it once

_log = logging.getLogger(__name__)
_capturing = threading.Lock()  # one thread captures at a time
_sides: dict[int, torch.cuda.Stream] = {}  # by index of the device: blocks of a pool are reused on one stream only
_failed: list[torch.cuda.CUDAGraph] = []  # kept alive: torch's allocator of pinned memory may still refer to them
_tuning = threading.Lock()
_tuned = {"depth": 0, "before": False}


def why_not(mode: str, device: torch.device, *, trusted: bool = False) -> str | None:
    """Return why `mode`, one of `MODES`, cannot be used on `device`, or None if it can. Never raises.

    Args:
        mode, device: as above.
        trusted: whether its check on this device (`sampling.verify`) must have passed, too.
    """
    if mode not in MODES:
        return f"it is none of {', '.join(MODES)}"
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, not {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    reason = while_graph.why_not(device) if mode == "while" else None
    return proving.why_not(f"graph {mode}", device, PROOFS) if reason is None and trusted else reason


@contextlib.contextmanager
def tuned() -> Iterator[None]:
    """Let cuDNN measure its algorithms for each new shape inside and keep the fastest, as for a capture.

    A plain loop inside this runs the same algorithms as a captured one in the same thread, and gives the same bits.
    Without CUDA it does nothing. Several threads may be inside at once; the last one that leaves restores the setting
    (`torch.backends.cudnn.benchmark`).
    """
    if not torch.cuda.is_available():
        yield
        return
    with _tuning:
        if _tuned["depth"] == 0:
            _tuned["before"] = torch.backends.cudnn.benchmark
        _tuned["depth"] += 1
        torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        with _tuning:
            _tuned["depth"] -= 1
            if _tuned["depth"] == 0:
                torch.backends.cudnn.benchmark = bool(_tuned["before"])


class CapturedBody:
    """A captured body. Threads and streams may share it: its steps run in the order of the calls.

    Attributes:
        mode: how it runs, one of `MODES`.
        measured: with mode "auto", microseconds per step of every mode that was tried.
        captures: how many captures were made.
        device: where it runs.
    """

    def __init__(
        self,
        body: Callable[[], None],
        step: Tensor,
        *,
        mode: str = "auto",
        unroll: int = 8,
        reset: Callable[[], None] | None = None,
        warmup: int = 3,
        pool: Any = None,
        max_steps: int = _STEPS,
    ) -> None:
        """Warm `body` up and capture it on a stream of its own, after waiting for the current stream.

        Afterwards the state is as `reset` leaves it; without `reset` only `step` is restored.

        Args:
            body: one step, as in the module's docstring. It is kept with everything it refers to, since the graphs
                read and write these.
            step: int64 [1] on the device, the counter to which `body` adds 1.
            mode: one of `MODES`, or "auto": the fastest usable one, by measurement.
            unroll: steps in the graph of mode "unrolled", at least 2.
            reset: restores a state that `max_steps` steps may follow. It is called before every run made here.
            warmup: runs of `body` before the capture, at least 1: cuDNN chooses, Triton compiles.
            pool: `torch.cuda.graph_pool_handle()` shared with graphs that never run at the same time, or None.
            max_steps: how many steps may follow a reset, at least 1. The constructor runs no more at a time, and
                "auto" considers no graph of more.

        Raises:
            CaptureError: `mode` cannot be used here, or `body` cannot be captured; the message says why.
            TypeError, ValueError: an argument is not as described, or `body` does not add 1 to `step`.
        """
        self._run: Callable[[int], None] | None = None
        _check(body, step, mode, reset, unroll=(unroll, 2), warmup=(warmup, 1), max_steps=(max_steps, 1))
        self.device = step.device
        wanted = _usable(mode, self.device, unroll, max_steps)
        self.measured: dict[str, float] = {}
        self.captures = 0
        self._body, self._step, self._reset, self._max_steps = body, step, reset, max_steps
        self._unroll, self._lock = unroll, threading.Lock()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by the number of steps
        self._while: while_graph.WhileGraph | None = None
        self._done, self._stream = torch.cuda.Event(), torch.cuda.current_stream(self.device)
        with _capturing, torch.cuda.device(self.device), tuned():
            self._owns_pool = pool is None
            self._pool = torch.cuda.graph_pool_handle() if pool is None else pool
            index = torch.cuda.current_device()
            if index not in _sides:  # one kept forever: torch reuses the same 32, also for other threads
                _sides[index] = torch.cuda.Stream()
            side = _sides[index]
            side.wait_stream(self._stream)
            # Leaving this restores the caller's stream; a failed capture does not do so in all versions of torch.
            with torch.cuda.stream(side):
                self._start = step.clone()
                try:
                    self.mode, run = self._choose(wanted, mode == "auto", self._warm_up(warmup))
                    self._rewind()
                except BaseException:
                    side.synchronize()
                    self._free()
                    raise
                self._done.record(side)
            self._stream.wait_stream(side)
        self._run = run

    def advance(self, count: int) -> None:
        """Enqueue `count` >= 0 steps on the current stream, after those enqueued before. The host does not wait."""
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"count is a {type(count).__name__}, must be an int")
        if count < 0:
            raise ValueError(f"count is {count}, must be at least 0")
        with self._lock, torch.cuda.device(self.device):
            if self._run is None:
                raise RuntimeError("this CapturedBody is closed")
            stream = torch.cuda.current_stream()
            if stream != self._stream:
                stream.wait_event(self._done)
            if count:
                self._run(count)
            self._done.record(stream)
            self._stream = stream

    def close(self) -> None:
        """Wait for the steps enqueued, then free the graphs and their memory. Also done when the object dies."""
        run, self._run = self._run, None
        if run is not None:
            # During another capture the host cannot wait; memory is then freed in the order of the streams.
            if not torch.cuda.is_current_stream_capturing():
                self._done.synchronize()
            self._free()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            with contextlib.suppress(Exception):
                self.close()

    def _warm_up(self, runs: int) -> bool:
        """Run the body and check that it counts. Return whether it draws from torch's generator."""
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        for _ in range(runs):
            self._rewind()
            before, offset = int(self._step), generator.get_offset()
            self._body()
            if int(self._step) != before + 1:
                raise ValueError(f"body added {int(self._step) - before} to step, must add 1")
            draws = generator.get_offset() != offset
        return draws

    def _choose(self, wanted: list[str], auto: bool, draws: bool) -> tuple[str, Callable[[int], None]]:
        """Capture for the modes `wanted`. Return the fastest and its runner; free what only the others need."""
        self._graphs[1] = self._capture(1, keep="while" in wanted)
        runs: dict[str, Callable[[int], None]] = {}
        for mode in wanted:
            try:
                runs[mode] = self._runner(mode, draws)
                self._try(mode, runs[mode])
            except CaptureError as error:
                runs.pop(mode, None)
                if not auto or mode == "step":
                    raise
                _log.info("CUDA graph: mode %r is left out: %s", mode, error)
        if auto:
            self._measure(runs)
        chosen = min(self.measured, key=self.measured.__getitem__) if auto else wanted[0]
        if chosen != "while" and self._while is not None:
            self._while.close()
            self._while = None
        if chosen != "unrolled" and self._unroll in self._graphs:
            self._graphs.pop(self._unroll).reset()
        return chosen, runs[chosen]  # the graph of one step always stays: all memory is counted with it

    def _runner(self, mode: str, draws: bool) -> Callable[[int], None]:
        """Return a function that runs steps in `mode`, after capturing the graphs it lacks."""
        single, unroll = self._graphs[1], self._unroll
        if mode == "while":
            if draws:  # each step would draw the same numbers
                self._rewind()
                raise CaptureError(explain(self._body) or "the body draws from torch's generator")
            repeat = self._while = while_graph.WhileGraph(single.raw_cuda_graph(), self.device)
            return lambda count: repeat.launch(count, torch.cuda.current_stream())
        several = None
        if mode == "unrolled":
            several = self._graphs[unroll] = self._capture(unroll, keep=False)

        def run(count: int) -> None:  # without `self`, so that no cycle keeps the graphs alive
            if several is not None:
                for _ in range(count // unroll):
                    several.replay()
                count %= unroll
            for _ in range(count):
                single.replay()

        return run

    def _capture(self, steps: int, *, keep: bool) -> torch.cuda.CUDAGraph:
        """Capture a graph of `steps` steps; `keep` its description too, for a WHILE node. Raises CaptureError."""
        graph = torch.cuda.CUDAGraph(keep_graph=keep)
        self._rewind()
        said = ""
        collecting = gc.isenabled()
        gc.disable()  # objects freed by a collection during a capture can end it
        # Else the graph would use the memory that cuBLAS keeps for the stream, at the same time as other graphs.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            side = torch.cuda.current_stream()
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                try:
                    for _ in range(steps):
                        self._body()
                except Exception as error:
                    said = while_graph.first_line(error)  # ending the capture raises too, and says less
                    raise
        except Exception as error:
            said = said or while_graph.first_line(error)
            for each in (error, error.__context__):
                traceback.clear_frames(None if each is None else each.__traceback__)  # frames hold tensors of the pool
            self._abandon(graph)
            self._rewind()
            found = explain(self._body, random=False) or "the body cannot be captured as a CUDA graph"
            raise CaptureError(f"{found}. The capture ended with: {said}") from error
        finally:
            torch._C._cuda_clearCublasWorkspaces()
            if collecting:
                gc.enable()
        self.captures += 1
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Clean up after a failed capture.

        torch < 2.12 leaves its allocator capturing (pytorch pull request 180395), and < 2.14 the pool in use (190348).
        """
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):  # raises where the allocator is not capturing
            torch._C._cuda_endAllocateToPool(device, self._pool)
        graph.reset()
        _failed.append(graph)
        if self._owns_pool and not self._graphs:  # else the pool is rightly in use
            torch.cuda.empty_cache()
            segments: list[Any] = []
            with contextlib.suppress(RuntimeError):  # the cause of the failure matters more
                segments = torch.cuda.memory_snapshot()
            if any(tuple(segment["segment_pool_id"]) == tuple(self._pool) for segment in segments):
                with contextlib.suppress(RuntimeError):  # raises where the pool is not in use
                    torch._C._cuda_releasePool(device, self._pool)
                torch.cuda.empty_cache()
        # torch < 2.12 has its generator capturing too, and refuses to draw until some capture has ended well.
        with (
            contextlib.suppress(RuntimeError),
            torch.cuda.graph(
                torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            ),
        ):
            self._step.add_(0)

    def _try(self, mode: str, run: Callable[[int], None]) -> None:
        """Run a few steps (the first ones are slow) and raise CaptureError unless the body counted them all."""
        count = min(self._max_steps, self._unroll + 1)
        self._rewind()
        before = int(self._step)
        run(count)
        taken = int(self._step) - before
        if taken != count:
            raise CaptureError(f"mode {mode!r} took {taken} steps for {count}: is all the body's work on one stream?")

    def _measure(self, runs: dict[str, Callable[[int], None]]) -> None:
        """Fill `measured` with the medians over a few rounds, in which the modes take turns."""
        count = min(self._max_steps, _STEPS)
        times: dict[str, list[float]] = {mode: [] for mode in runs}
        for _ in range(_ROUNDS):
            for mode, run in runs.items():
                self._rewind()
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                run(count)
                end.record()
                end.synchronize()
                times[mode].append(begin.elapsed_time(end) * 1000 / count)
            if min(each[0] for each in times.values()) > _SLOW_US:
                break
        self.measured = {mode: statistics.median(each) for mode, each in times.items()}
        _log.info("CUDA graph: microseconds per step %s", {mode: round(us, 1) for mode, us in self.measured.items()})

    def _rewind(self) -> None:
        self._step.copy_(self._start)
        if self._reset is not None:
            self._reset()

    def _free(self) -> None:
        if self._while is not None:
            self._while.close()
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()


def _usable(mode: str, device: torch.device, unroll: int, max_steps: int) -> list[str]:
    """Return the modes to try on `device`. Raises CaptureError if there is none."""
    if mode != "auto":
        reason = why_not(mode, device)
        if reason is not None:
            raise CaptureError(f"mode {mode!r} cannot be used: {reason}")
        return [mode]
    reasons = {mode: why_not(mode, device, trusted=True) for mode in MODES}
    if max_steps < unroll:
        reasons["unrolled"] = reasons["unrolled"] or f"a graph of {unroll} steps is longer than {max_steps}"
    for name, reason in reasons.items():
        if reason is not None:
            _log.info("CUDA graph: mode %r is left out: %s", name, reason)
    if reasons["step"] is not None:
        raise CaptureError(f"no mode can be used: {reasons['step']}")
    return [name for name in MODES if reasons[name] is None]


def _check(body: object, step: object, mode: object, reset: object, **counts: tuple[object, int]) -> None:
    """Raise TypeError or ValueError unless these are arguments of `CapturedBody`; `counts` with their minima."""
    if not callable(body):
        raise TypeError(f"body is a {type(body).__name__}, must be callable")
    if reset is not None and not callable(reset):
        raise TypeError(f"reset is a {type(reset).__name__}, must be callable or None")
    if not isinstance(step, Tensor):
        raise TypeError(f"step is a {type(step).__name__}, must be a tensor")
    if step.dtype != torch.int64 or step.shape != (1,):
        raise ValueError(f"step is {step.dtype} of shape {list(step.shape)}, must be torch.int64 of shape [1]")
    if mode != "auto" and mode not in MODES:
        raise ValueError(f"mode is {mode!r}, must be one of 'auto', {', '.join(map(repr, MODES))}")
    for name, (count, least) in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name} is a {type(count).__name__}, must be an int")
        if count < least:
            raise ValueError(f"{name} is {count}, must be at least {least}")
