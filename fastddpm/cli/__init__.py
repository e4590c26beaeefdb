"""The command `fastddpm`.

`sample` draws images from a model, and `merge` joins its shards; `edit`, `inpaint`, `interpolate` and `upscale` start
from images; `train` makes a model from images; `evaluate` measures the quality of a model's samples; `profile` measures
a machine and a model on it; `tune` finds the fastest kernels for a model's shapes; `info` says what would run here and
why. Bad input ends in one line on standard error and exit code 2, before anything is computed or written.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fastddpm.cli import edit, evaluate, info, profile, sample, shards, train, tune
from fastddpm.cli.options import Parser, one_line
from fastddpm.cli.outputs import Unfinished, tolerant_streams


class _Terminated(BaseException):
    """SIGTERM was received."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    The code is 0; 1 if results are not finite or a job of shards is not complete; 2 for bad input; 130 when interrupted
    and 143 when terminated, after removing half-written files.
    """
    from fastddpm.common.version import __version__

    for stream in (sys.stdout, sys.stderr):  # file names may have characters that a terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser = Parser(prog="fastddpm", description="Fast sampling from denoising diffusion models.")
    parser.add_argument("--version", action="version", version=f"fastddpm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for module in (sample, shards, edit, train, evaluate, profile, tune, info):
        module.add_commands(commands)
    tolerant_streams()
    options = parser.parse_args(arguments)
    name = f"fastddpm {options.command}"

    def warn(message: Warning | str, *_: object) -> None:
        print(f"{name}: warning: {str(message).splitlines()[0]}", file=sys.stderr)

    import torch
    from fastddpm_kernels.backend import BackendError
    from fastddpm_kernels.native.machine import threads

    if threads() < torch.get_num_threads():  # the quota of a control group is for torch's own operations, too
        torch.set_num_threads(threads())
    try:
        with _terminable(), warnings.catch_warnings():
            warnings.showwarning = warn  # type: ignore[assignment]
            options.run(options)
    except Unfinished as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, ModuleNotFoundError, BackendError, torch.OutOfMemoryError) as error:
        message = one_line(error, options)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        message = "not enough memory; try a smaller --batch-size"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print("terminated", file=sys.stderr)
        return 143
    else:
        return 0
    print(f"{name}: error: {message}", file=sys.stderr)
    return 2


@contextmanager
def _terminable() -> Iterator[None]:
    """End the commands inside at SIGTERM by an exception, as at Ctrl-C, so that they remove half-written files."""

    def end(*_: object) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
