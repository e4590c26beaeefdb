"""The command `fastddpm`.

`sample` draws images from a model, and `merge` joins its shards; `edit`, `inpaint`, `interpolate` and `upscale` start
from images; `train` makes a model from images; `evaluate` measures the quality of a model's samples; `profile` measures
a machine and a model on it; `tune` finds the fastest kernels for a model's shapes; `info` says what would run here and
why. Bad input ends in one line on standard error and exit code 2, before anything is computed or written.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fastddpm.cli import edit, evaluate, info, profile, sample, shards, train, tune, verify
from fastddpm.cli.options import Parser, one_line
from fastddpm.cli.outputs import Unfinished, tolerant_streams

# Signals that end a command as Ctrl-C does, so that it removes half-written files, and the words that say so.
_ENDS = {"SIGTERM": "terminated", "SIGHUP": "hung up"}
_OUTPUT = "standard output"


class _Ended(BaseException):
    """A signal that ends the command was received."""

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(by)
        self.by = by


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    The code is 0; 1 if results are not finite or a job of shards is not complete; 2 for bad input; 128 and the number
    of the signal after one: 130 when interrupted, 143 when terminated, 129 when the terminal is gone, 141 when the
    reader of the output is, each after removing half-written files.
    """
    tolerant_streams()
    options = _parser().parse_args(arguments)
    try:
        with _ended_by_signals():
            return _run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except _Ended as end:
        print(_ENDS[end.by.name], file=sys.stderr)
        return 128 + end.by


@functools.cache
def _parser() -> Parser:
    from fastddpm.common.version import __version__

    parser = Parser(prog="fastddpm", description="Fast sampling from denoising diffusion models.")
    parser.add_argument("--version", action="version", version=f"fastddpm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for module in (sample, shards, edit, train, evaluate, profile, tune, verify, info):
        module.add_commands(commands)
    return parser


def _run(options: argparse.Namespace) -> int:
    """Run the chosen command and return its exit code; say in one line why it failed."""
    import torch
    from fastddpm_kernels.backend import BackendError

    name = f"fastddpm {options.command}"

    def warn(message: Warning | str, *_: object) -> None:
        print(f"{name}: warning: {str(message).splitlines()[0]}", file=sys.stderr)

    from fastddpm_kernels.native.machine import threads

    if threads() < torch.get_num_threads():  # the quota of a control group is for torch's own operations, too
        torch.set_num_threads(threads())
    try:
        with warnings.catch_warnings():
            warnings.showwarning = warn  # type: ignore[assignment]
            options.run(options)
        if (error := _error_of_output()) is not None:
            raise error
    except Unfinished as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, ModuleNotFoundError, BackendError, torch.OutOfMemoryError) as error:
        cause = _error_of_output() or error
        if isinstance(cause, BrokenPipeError) and cause.filename == _OUTPUT:  # as in `fastddpm info | head`
            return 128 + 13  # SIGPIPE
        message = one_line(cause, options)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        message = "not enough memory" + ("; try a smaller --batch-size" if hasattr(options, "batch_size") else "")
    else:
        return 0
    print(f"{name}: error: {message}", file=sys.stderr)
    return 2


def _error_of_output() -> OSError | None:
    """Write the rest of what was printed; return the error if the disk is full or nobody reads any more."""
    if sys.stdout is None:
        return None
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again at its end
        return OSError(error.errno, error.strerror, _OUTPUT)
    return None


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End the block at a signal of `_ENDS` by an exception; one that is ignored, as under nohup, stays ignored."""

    def end(number: int, _: object) -> None:
        raise _Ended(signal.Signals(number))

    numbers = [signal.Signals[name] for name in _ENDS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            if before[number] != signal.SIG_IGN:
                signal.signal(number, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
