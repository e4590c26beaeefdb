"""Compile every Triton kernel that sampling launches on the pretended device, specialised as it is launched.

    python tests/shared/fake_cuda_compile.py [--target sm_90 ...] [--json PATH]

With several targets each kernel is compiled for all of them; with `--rotate` for one, in turn. The kernels are those of
all cases of `fake_cuda_runs` and of one step of a small U-Net of every kind in three dtypes. Nothing is computed. It
prints a line of JSON for every kernel and target: registers, spills, shared memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ |= {"FASTDDPM_TUNED": "0", "FASTDDPM_VERIFY": "0", "FAKE_CUDA_COMPILES": "1"}

import fake_cuda
import fake_cuda_runs as runs
import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastddpm.networks.frozen import FrozenUNet

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100")
# Bytes of shared memory that a program may have.
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}


def condition() -> nn.Module:
    """Return a small U-Net of diffusers that attends to text."""
    from conditional_objects import unet

    return unet()


def monai() -> nn.Module:
    """Return a small U-Net of MONAI that attends to a context."""
    from monai.networks.nets import DiffusionModelUNet

    return DiffusionModelUNet(
        spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16), num_res_blocks=(1, 2), norm_num_groups=4,
        attention_levels=(False, True), num_head_channels=4, with_conditioning=True, cross_attention_dim=6,
        transformer_num_layers=2,
    )  # fmt: skip


def edm() -> nn.Module:
    """Return a small U-Net of EDM."""
    import edm_restated

    return edm_restated.EDM.SongUNet(8, 3, 3)


def policy() -> nn.Module:
    """Return a small network of a robot's diffusion policy."""
    import policies_restated

    return policies_restated.ConditionalUnet1D(
        input_dim=3, diffusion_step_embed_dim=16, down_dims=(16, 24, 32), kernel_size=5, global_cond_dim=7
    )


KINDS: dict[str, Callable[[], nn.Module]] = {
    "unet": runs.unet, "lucidrains": runs.lucidrains, "condition": condition, "monai": monai, "edm": edm,
    "policy": policy,
}  # fmt: skip


class Requests:
    """The kernels that were asked for: each specialisation once."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Any, ...]] = {}
        self.failures: dict[str, str] = {}

    def watch(self) -> None:
        """Note what is to be compiled, from now on, and launch nothing."""
        found, run = self.found, JITFunction.run

        def compile_(kernel: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attrs: Any,
                     warmup: bool) -> None:  # fmt: skip
            found.setdefault(f"{kernel.__name__} {key}", (kernel, signature, constants, options, attrs))

        JITFunction._do_compile = compile_
        JITFunction.run = lambda self, *args, grid, warmup, **named: run(self, *args, grid=grid, warmup=True, **named)

    def of(self, name: str, function: Callable[[], object]) -> None:
        """Run a function and note why it failed."""
        try:
            function()
        except Exception:
            self.failures[name] = traceback.format_exc()[-1500:]


class Driver:
    """Stands for triton's driver of a GPU: it says which one, and has nothing to launch on."""

    utils = launcher_cls = None

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def set_current_device(self, device: int) -> None: ...

    @classmethod
    def is_active(cls) -> bool:
        return True


@torch.no_grad()
def one_step(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """Run one step of a network of a kind, frozen for the device."""
    torch.manual_seed(0)
    unet = make().eval().requires_grad_(False)
    frozen = FrozenUNet(unet, dtype, "cuda:0", backend="triton")
    blueprint, device = frozen.blueprint, torch.device("cuda", 0)
    size = (16,) if blueprint.dims == 1 else (blueprint.factor * 2, blueprint.factor * 2)
    inputs = frozen.new_input((2, blueprint.in_channels, *size))
    conditions = blueprint.some_conditions(2, device)
    program = frozen.bind(inputs, torch.arange(4).to(device), blueprint.some_labels(2, device), conditions)
    program(torch.zeros(1, dtype=torch.int64).to(device))


def collect() -> Requests:
    """Return what all cases and kinds ask to be compiled."""
    requests = Requests()
    prepared = {name: make().eval().requires_grad_(False) for name, (make, _, _) in runs.CASES.items()}
    triton.runtime.driver.set_active(Driver(90))
    fake_cuda.install()
    fake_cuda.computes = False
    requests.watch()
    for name, (_, settings, arguments) in runs.CASES.items():
        if (
            name == "lucidrains"
        ):  # compared with its module before it is frozen, and here nothing is computed: a kind below
            continue
        whole = {"cuda_graph": "step", "dtype": "float16", **settings, "device": "cuda:0"}
        requests.of(name, lambda: runs.drawn(runs.sampler_of(prepared[name].to("cuda:0"), whole), arguments))  # noqa: B023
    for name, make in KINDS.items():
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            requests.of(f"{name} {dtype}", lambda: one_step(make, dtype))  # noqa: B023
    return requests


def compiled(requests: Requests, targets: list[str], rotate: bool) -> list[dict[str, Any]]:
    """Return a row for every kernel and target."""
    from fastddpm_kernels.device.compile import _nvidia_usage

    rows = []
    for index, (kernel, signature, constants, options, attrs) in enumerate(requests.found.values()):
        for name in [targets[index % len(targets)]] if rotate else targets:
            target = GPUTarget("cuda", int(name[3:]), 32)
            triton.runtime.driver.set_active(Driver(target.arch))
            row: dict[str, Any] = {"kernel": kernel.__name__, "target": name}
            given = {key: value for key, value in options.__dict__.items() if key in ("num_warps", "num_stages",
                     "enable_fp_fusion", "launch_pdl", "maxnreg")}  # fmt: skip
            try:
                source = triton.compiler.ASTSource(kernel, signature, constants, attrs)
                row |= _nvidia_usage(triton.compile(source, target=target, options=given)).as_dict()
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[-500:]
            rows.append(row)
            print("ROW", json.dumps(row), flush=True)
    return rows


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--rotate", action="store_true", help="compile each kernel for one of the targets, in turn")
    parser.add_argument("--json", type=Path, help="write a summary of each kernel and target")
    options = parser.parse_args()
    requests = collect()
    print("FOUND", json.dumps({"kernels": len(requests.found), "failures": requests.failures}), flush=True)
    rows = compiled(requests, options.target, options.rotate)
    if options.json is not None:
        lines = ",\n".join(json.dumps(row) for row in summary(rows))
        options.json.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    bad = [row for row in rows if row.get("error") or row["spills"] or row["shared"] > SHARED[row["target"]]]
    return 1 if bad or requests.failures else 0


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for every kernel function and target, how many specialisations compiled and the most that one uses."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["kernel"], row["target"]), []).append(row)
    return [
        {"kernel": kernel, "target": target, "specialisations": len(members)}
        | {
            name: max(row.get(name, -1) for row in members)
            for name in ("registers", "spills", "shared", "instructions")
        }
        | {"errors": sum("error" in row for row in members)}
        for (kernel, target), members in sorted(found.items())
    ]


if __name__ == "__main__":
    sys.exit(main())
