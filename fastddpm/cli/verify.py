"""`fastddpm verify`: prove every kernel on this machine's devices, and print the verdicts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastddpm.cli.model import MODEL_HELP
from fastddpm.cli.options import device_name, parsed
from fastddpm.cli.outputs import Unfinished, check_output

MEASURE_S = 120.0
budget = parsed(float, "a number of seconds", lambda value: 0 <= value < float("inf"))


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "verify",
        help="prove every kernel on this device against its definition",
        description="Run every kernel, a frozen network and each kind of CUDA graph against its definition, in a "
        "process of its own, and keep the verdicts: what does not pass is not used on this device. The same runs once "
        "by itself, at the first use of a device, unless the variable FASTDDPM_VERIFY is 0.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"prove this model's network, too: {MODEL_HELP}")
    parser.add_argument("--device", metavar="D", help="cuda, cuda:1 or cpu (default: all of this machine)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts to a file, for a bug report")
    parser.add_argument(
        "--measure", type=budget, default=MEASURE_S, metavar="SECONDS",
        help="on a GPU without a tuned table, measure whole layers against their parts in so many seconds, and use "
        f"what wins; 0: do not (default: {MEASURE_S:.0f})",
    )  # fmt: skip
    parser.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> None:
    import torch
    from fastddpm_kernels import proving, tuned

    from fastddpm.common.files import write_json
    from fastddpm.common.proofs import PROOFS
    from fastddpm.networks.network import usable_device
    from fastddpm.perf.verify import SUITE

    if options.json is not None:
        check_output("--json", options.json)
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]
    if options.device is not None:
        devices = [usable_device(options.device)]
    report: list[dict[str, Any]] = []
    failed = 0
    for device in devices:
        print(f"{device}: {device_name(device)}", flush=True)
        verdicts = proving.prove(device) + proving.prove(device, PROOFS)
        if options.model is not None:
            verdicts += proving.run(SUITE, str(device), "--model", options.model, seconds=600, each=300)
        for v in verdicts:
            print(line(v))
        bad = sum(v.verdict != proving.PASSED for v in verdicts)
        failed += bad
        print(f"{len(verdicts)} checks on {device}, {bad} not passed")
        if device.type == "cuda" and options.measure > 0:
            _measure(device, options.measure)
        report.append({"device": tuned.header(device), "verdicts": [v._asdict() for v in verdicts]})
    if options.json is not None:
        write_json(options.json, {"devices": report})
        print(f"wrote {options.json}")
    if failed:
        raise Unfinished(f"{failed} checks did not pass; fastddpm does not use these kernels here")


def _measure(device: Any, budget: float) -> None:
    """Measure the layers of well-known U-Nets where there is no table, and say what won."""
    from fastddpm_kernels.tuning import tuned_ops

    from fastddpm.perf.tuning.common import measure_common
    from fastddpm.perf.tuning.search import summary

    outcomes = measure_common(device, budget) if "fused_conv" in tuned_ops(device) else None
    if outcomes is not None:
        print(f"whole layers of CIFAR-10 and Stable Diffusion U-Nets: {summary(outcomes)}")


def line(verdict: Any) -> str:
    """Return a verdict as a line of a table."""
    numbers = "" if verdict.error is None else f"{verdict.error:.2g} of {verdict.bound:.2g}"
    text = f"{verdict.op:16} {verdict.variant:44} {verdict.verdict:10} {numbers:20} {verdict.seconds:6.2f} s"
    return f"{text}  {verdict.message}".rstrip()
