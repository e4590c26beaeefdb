"""The command `fastddpm`.

`sample` draws images from a model; `edit`, `inpaint`, `interpolate` and `upscale` start from images; `train` makes a
model from images; `evaluate` measures how good a model's samples are; `profile` measures a machine and a model on it;
`tune` finds the fastest kernels for a model's shapes; `info` says what would run here and why. Bad input ends in one
line on standard error and exit code 2, before anything is computed or written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastddpm.cli import edit, evaluate, info, profile, sample, train, tune
from fastddpm.cli.options import Parser, one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 2 for bad input, 130 when interrupted."""
    from fastddpm.common.version import __version__

    parser = Parser(prog="fastddpm", description="Fast sampling from denoising diffusion models.")
    parser.add_argument("--version", action="version", version=f"fastddpm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for module in (sample, edit, train, evaluate, profile, tune, info):
        module.add_commands(commands)
    options = parser.parse_args(arguments)

    import torch
    from fastddpm_kernels.backend import BackendError

    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ModuleNotFoundError, BackendError, torch.OutOfMemoryError) as error:
        message = one_line(error, options)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        message = "not enough memory; try a smaller --batch-size"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    else:
        return 0
    print(f"fastddpm {options.command}: error: {message}", file=sys.stderr)
    return 2
