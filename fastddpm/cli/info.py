"""`fastddpm info`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from fastddpm.cli.model import add_model_options, open_model
from fastddpm.cli.options import device_name, integer

if TYPE_CHECKING:
    from rich.table import Table


def add_commands(commands: Any) -> None:
    """Adds the command to the parser."""
    info = commands.add_parser(
        "info",
        help="versions, devices, and what would run here and why",
        description="Versions, devices, which backend each op would use here and why not another; with --model, what "
        "one step of a model launches on a CUDA GPU, counted without one.",
    )
    info.add_argument(
        "--model",
        nargs="?",
        const="",
        metavar="MODEL",
        help="count the kernels of one sampling step of a model, named as for sample (without MODEL: the bundled one)",
    )
    info.add_argument(
        "--batch-size", type=integer(1), metavar="B", help="of the step that is counted, with --model (default: 1)"
    )
    add_model_options(info)
    info.set_defaults(run=_info)


def _kernels(options: argparse.Namespace, batch_size: int) -> Table:
    """What one step launches, by kind."""
    from rich.table import Table

    from fastddpm.networks.frozen import cuda_instructions

    unet = open_model(options, latents=True).unet
    instructions = cuda_instructions(unet, batch_size)
    what = {
        "time": "rows of the time table, made before the first step",
        "conv": "convolutions, upsampling folded in",
        "norm": "GroupNorm with time embedding, FiLM, SiLU, residual and skip connection",
        "pointwise": "1x1 convolutions: shortcuts with bias and residual, projections of the attention",
        "attention": "softmax(q k) v",
        "residual": "residuals and biases before a convolution that pads, with the padding",
        "other": "the bias of the last convolution, and what else is rare",
    }
    table = Table(title=f"One step of {options.model or 'the bundled model'} on CUDA, float16, batch {batch_size}")
    table.title_justify = "left"
    for name, justify in (("what", "left"), ("kernels", "right"), ("GFLOP", "right"), ("MB", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    total = 2
    for kind, text in what.items():
        chosen = [instruction for instruction in instructions if instruction.kind == kind]
        kernels = sum(instruction.kernels for instruction in chosen)
        total += kernels
        if kernels:
            flops, size = sum(i.flops for i in chosen), sum(i.bytes for i in chosen)
            table.add_row(kind, str(kernels), f"{flops / 1e9:.3f}", f"{size / 1e6:.2f}", text)
    table.add_row("step", "2", "", "", "reverse_step, and the counter")
    flops, size = sum(i.flops for i in instructions), sum(i.bytes for i in instructions)
    table.add_section()
    table.add_row("all", str(total), f"{flops / 1e9:.3f}", f"{size / 1e6:.2f}", "bytes: all operands once, weights too")
    return table


def _info(options: argparse.Namespace) -> None:
    import importlib.metadata
    import platform

    import torch
    from fastddpm_kernels.backend import BACKENDS, OPS, resolve, why_not
    from fastddpm_kernels.tuned import describe
    from rich.console import Console
    from rich.table import Table

    from fastddpm.sampling.cuda_graph import MODES
    from fastddpm.sampling.cuda_graph import why_not as why_not_mode

    kernels = None  # first of all, since the model may be wrong
    if options.model is not None:
        kernels = _kernels(options, options.batch_size or 1)
    elif options.batch_size is not None:
        raise ValueError(f"--batch-size is {options.batch_size} but --model is not given; it is of a model's step")
    console = Console(width=None if sys.stdout.isatty() else 120)
    versions = Table("package", "version", title="Versions", title_justify="left")
    versions.add_row("python", platform.python_version())
    for package in ("fastddpm", "torch", "triton", "numpy", "safetensors", "diffusers"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        versions.add_row(package, version)
    console.print(versions)

    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    found.append(torch.device("cpu"))
    devices = Table("device", "what it is", title="Devices", title_justify="left")
    for device in found:
        devices.add_row(str(device), device_name(device))
    console.print(devices)

    for device_type in dict.fromkeys(device.type for device in found):
        title = f"Backends on {device_type}, float32"
        table = Table("op", "uses", "not", title=title, title_justify="left")
        for op in OPS:
            op = {"group_norm_silu": "group_norm_silu_"}.get(op, op)  # as a sampler calls it
            chosen = resolve(op, "auto", device_type, torch.float32)
            others = [
                f"{name}: {why_not(name, device_type, op) or 'slower, on request'}"
                for name in BACKENDS
                if name != chosen
            ]
            table.add_row(op, chosen, "\n".join(others))
        console.print(table)
    for device in found:
        for line in describe(device) or ["none: heuristics choose"]:
            console.print(f"Tuned choices on {device}: {line}", soft_wrap=True, markup=False, highlight=False)
    graphs = Table("loop", "can be used", title="CUDA graphs", title_justify="left")
    for mode in MODES:
        graphs.add_row(mode, why_not_mode(mode, found[0]) or "yes")
    console.print(graphs)
    console.print(f"TRITON_INTERPRET: {os.environ.get('TRITON_INTERPRET', 'unset')}")
    if kernels is not None:
        console.print(kernels)
        console.print("Counted from the instructions, for a GPU of 132 multiprocessors; libraries may split some.")
