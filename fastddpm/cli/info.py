"""`fastddpm info`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from fastddpm.cli.options import device_name


def add_commands(commands: Any) -> None:
    """Adds the command to the parser."""
    info = commands.add_parser("info", help="versions, devices, and which backend each op would use here")
    info.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> None:
    import importlib.metadata
    import platform

    import torch
    from fastddpm_kernels._backend import BACKENDS, OPS, resolve, why_not
    from rich.console import Console
    from rich.table import Table

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
        table = Table("op", "uses", "not", title=f"Backends on {device_type}", title_justify="left")
        for op in OPS:
            chosen = resolve(op, "auto", device_type)
            others = [
                f"{name}: {why_not(name, device_type) or 'slower, on request'}" for name in BACKENDS if name != chosen
            ]
            table.add_row(op, chosen, "\n".join(others))
        console.print(table)
    interpreter = os.environ.get("TRITON_INTERPRET", "unset")
    console.print(f"CUDA graphs: not used by this version. TRITON_INTERPRET: {interpreter}")
