"""`fastddpm info`: print versions, devices, and what would run here."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastddpm.cli.model import add_model_options, open_model
from fastddpm.cli.options import device_name, integer, wide_console

if TYPE_CHECKING:
    from rich.table import Table

FUSION = ("auto", "full", "parts")
OF_STEP = 2  # kernels outside the network
# Kinds of instructions and their work.
KINDS = {
    "time": "rows of the time table, made before the first step",
    "conv": "convolutions, upsampling folded in; whole ones with norm, sums, shortcut and statistics",
    "norm": "GroupNorm with time embedding, FiLM, SiLU, residual and skip connection",
    "pointwise": "1x1 convolutions: shortcuts with bias and residual, projections of the attention",
    "attention": "softmax(q k) v, or the whole block of one head",
    "residual": "residuals and biases before a convolution that pads, with the padding",
    "other": "the bias of the last convolution, and rare layers",
}


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    info = commands.add_parser(
        "info",
        help="versions, devices, and what would run here and why",
        description="Versions, devices, which backend each op would use here and why not another; with --model, what "
        "one step of a model launches on a CUDA GPU, counted without one.",
    )
    info.add_argument(
        "--model", nargs="?", const="", metavar="MODEL",
        help="count the kernels of one sampling step of a model, named as for sample (without MODEL: the bundled one)",
    )  # fmt: skip
    info.add_argument(
        "--batch-size", type=integer(1), metavar="B", help="of the step that is counted, with --model (default: 1)"
    )
    info.add_argument(
        "--fusion", choices=FUSION, default="full",
        help="how the layers of the step that is counted are divided: whole layers (full, the default), the "
        "vendor's convolutions with norms between them (parts), or as measured on a device (auto: parts here)",
    )  # fmt: skip
    info.add_argument("--json", action="store_true", help="print only the counts of --model, as JSON")
    add_model_options(info)
    info.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> None:
    import torch
    from fastddpm_kernels.tuned import describe

    kernels = None  # counted first, because the model may be invalid
    if options.model is not None:
        unet = open_model(options, latents=True).unet
        if options.json:
            print(json.dumps(_counts(unet, options), indent=1))
            return
        kernels = _kernels(unet, options)
    elif options.json:
        raise ValueError("--json is given but --model is not; it prints the counts of a model's step")
    elif options.batch_size is not None:
        raise ValueError(f"--batch-size is {options.batch_size} but --model is not given; it is of a model's step")
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    devices += [torch.device("mps")] * torch.backends.mps.is_available() + [torch.device("cpu")]

    console = wide_console()
    console.print(_versions())
    console.print(_table("Devices", ("device", "what it is"), [(str(d), device_name(d)) for d in devices]))
    for device_type in dict.fromkeys(device.type for device in devices):
        console.print(_backends(device_type))
    for device in devices:
        for line in describe(device) or ["none: heuristics choose"]:
            console.print(f"Tuned choices on {device}: {line}", soft_wrap=True, markup=False, highlight=False)
    for device in devices:
        console.print(_verdicts(device), soft_wrap=True, markup=False, highlight=False)
    console.print(_graphs(devices[0]))
    console.print(f"TRITON_INTERPRET: {os.environ.get('TRITON_INTERPRET', 'unset')}")
    if kernels is not None:
        console.print(kernels)
        console.print("Counted from the instructions, for a GPU of 132 multiprocessors; libraries may split some.")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def _versions() -> Table:
    import importlib.metadata
    import platform

    rows = [("python", platform.python_version())]
    for package in ("fastddpm", "torch", "triton", "numpy", "safetensors", "diffusers"):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return _table("Versions", ("package", "version"), rows)


def _backends(device_type: str) -> Table:
    """Return the backend of each op on a kind of device, and the reasons against others."""
    import torch
    from fastddpm_kernels.backend import BACKENDS, OPS, resolve, why_not

    rows = []
    for op in OPS:
        op = {"group_norm_silu": "group_norm_silu_"}.get(op, op)  # a sampler calls the one in place
        chosen = resolve(op, "auto", device_type, torch.float32)
        others = [name for name in BACKENDS if name != chosen]
        reasons = [f"{name}: {why_not(name, device_type, op) or 'slower, on request'}" for name in others]
        rows.append((op, chosen, "\n".join(reasons)))
    return _table(f"Backends on {device_type}, float32", ("op", "uses", "not"), rows)


def _verdicts(device: Any) -> str:
    """Return one line on what `fastddpm verify` found on a device."""
    from fastddpm_kernels.proving import enabled, failed, read

    from fastddpm.common.proofs import PROOFS

    if device.type == "mps":
        return f"Checks on {device}: none, it has no kernels"
    if not enabled():
        return f"Checks on {device}: FASTDDPM_VERIFY is 0, all kernels are trusted"
    verdicts = [*(read(device) or []), *(read(device, PROOFS) or [])]
    if not verdicts:
        return f"Checks on {device}: none yet, the first use runs them (or fastddpm verify)"
    bad = "".join(f"; {op} is not used: {why}" for op, why in failed(verdicts).items())
    return f"Checks on {device}: {sum(v.verdict == 'passed' for v in verdicts)} of {len(verdicts)} passed{bad}"


def _graphs(device: Any) -> Table:
    from fastddpm.sampling.cuda_graph import MODES, why_not

    return _table("CUDA graphs", ("loop", "can be used"), [(mode, why_not(mode, device) or "yes") for mode in MODES])


def _counts(unet: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Return how many kernels one step launches: by kind, and for each way to divide layers."""
    from fastddpm.networks.frozen import cuda_instructions

    batch_size, by_fusion = options.batch_size or 1, {}
    for fusion in FUSION[1:]:
        found = cuda_instructions(unet, batch_size, fusion=fusion)
        kinds = {kind: sum(i.kernels for i in found if i.kind == kind) for kind in KINDS}
        by_fusion[fusion] = {kind: count for kind, count in kinds.items() if count} | {"step": OF_STEP}
    chosen = "parts" if options.fusion == "auto" else options.fusion
    return {
        "model": options.model or "the bundled model", "batch_size": batch_size, "dtype": "float16", "fusion": chosen,
        "launches_per_step": sum(by_fusion[chosen].values()),
        "launches_per_step_by_fusion": {name: sum(kinds.values()) for name, kinds in by_fusion.items()},
        "launches_by_kind": by_fusion[chosen],
    }  # fmt: skip


def _kernels(unet: Any, options: argparse.Namespace) -> Table:
    """Return a table of the kernels that one step launches, by kind."""
    from rich.table import Table

    from fastddpm.networks.frozen import cuda_instructions

    batch_size = options.batch_size or 1
    instructions = cuda_instructions(unet, batch_size, fusion=options.fusion)
    title = f"One step of {options.model or 'the bundled model'} on CUDA, float16, batch {batch_size}"
    table = Table(title=f"{title}, fusion {options.fusion}")
    table.title_justify = "left"
    for name in ("what", "kernels", "GFLOP", "MB", ""):
        table.add_column(name, justify="right" if name in ("kernels", "GFLOP", "MB") else "left")

    def sums(chosen: list[Any]) -> tuple[int, str, str]:
        flops, size = sum(i.flops for i in chosen), sum(i.bytes for i in chosen)
        return sum(i.kernels for i in chosen), f"{flops / 1e9:.3f}", f"{size / 1e6:.2f}"

    total = OF_STEP
    for kind, text in KINDS.items():
        kernels, flops, size = sums([instruction for instruction in instructions if instruction.kind == kind])
        total += kernels
        if kernels:
            table.add_row(kind, str(kernels), flops, size, text)
    table.add_row("step", str(OF_STEP), "", "", "reverse_step, and the counter")
    table.add_section()
    _, flops, size = sums(instructions)
    table.add_row("all", str(total), flops, size, "bytes: all operands once, weights too")
    return table
