"""What fastddpm is worth on this CPU: other libraries' samplers before and after `accelerate`, in turn.

    python benchmarks/cpu_check.py --out results.json [--steps 10] [--rounds 5] [--batch-sizes 1,16] [--threads 2]

The arms of a network and batch size take turns, so that a ratio is one of the same minutes: medians, and the 20 % and
80 % quantiles of the rounds' ratios. Whole calls are timed, with everything in them. Weights are random but seeded, and
so is the noise, which both arms draw alike; then their images are compared, as floats and as 8-bit pixels.

    cifar10      diffusers' DDPMPipeline with the configuration of google/ddpm-cifar10-32
    lucidrains   GaussianDiffusion of denoising_diffusion_pytorch with its default Unet (dim 64), 32x32
    step         one evaluation of the first's U-Net, beside diffusers, torch.compile and OpenVINO at their best
                 (`cpu_step.py`): minutes of compiling

`float32` is the default and what is claimed; `bfloat16` of whole calls is shown for information.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # for what it shares with gpu_check.py

import report
from cpu_step import ARMS, measure, versions
from fastddpm_kernels import backend as _backend
from gpu.results import commit_here
from measuring import Missing, peer
from networks import CONFIGS, make_problem

from fastddpm.common.files import write_json
from fastddpm.perf.profiling.compare import CPU_SCHEMA
from fastddpm.perf.profiling.timing import interleave, quantiles, timed

Arm = Callable[[], np.ndarray]  # a whole call: images [N, H, W, 3] in [0, 1]
NETWORKS = ("cifar10", "lucidrains", "step")


def _random(model: nn.Module) -> nn.Module:
    """Give a model seeded weights: those of norms differ from 1 and 0, and no output is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim > 1 and not name.startswith("g"):
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)
                else:
                    parameter.copy_((name in ("weight", "g")) + 0.1 * noise)
    return model.eval()


def cifar10(base: str, batch: int, steps: int, dtypes: list[str]) -> dict[str, Arm]:
    """Return the pipeline, and accelerated ones; `base` names the U-Net's configuration."""
    peer("diffusers")
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    from fastddpm.interop import accelerate

    unet = _random(UNet2DModel(**CONFIGS[base]))
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, variance_type="fixed_large")
    original: Any = DDPMPipeline(unet=unet, scheduler=scheduler)
    pipelines = {"original": original}
    for dtype in dtypes:
        pipelines[dtype] = accelerate(copy.deepcopy(original), **({} if dtype == "float32" else {"dtype": dtype}))

    def arm(pipeline: Any) -> Arm:
        pipeline.set_progress_bar_config(disable=True)
        return lambda: np.asarray(
            pipeline(batch, torch.manual_seed(0), num_inference_steps=steps, output_type="np").images
        )

    return {name: arm(pipeline) for name, pipeline in pipelines.items()}


def lucidrains(base: str, batch: int, steps: int, dtypes: list[str]) -> dict[str, Arm]:
    """Return the diffusion, and accelerated ones."""
    peer("denoising_diffusion_pytorch")
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    from fastddpm.interop.lucidrains import accelerate

    original: Any = GaussianDiffusion(
        _random(Unet(dim=64 if base == "cifar10" else 8)), image_size=32, timesteps=steps
    ).eval()
    samplers = {"original": original}
    for dtype in dtypes:
        own = {} if dtype == "float32" else {"dtype": dtype}
        samplers[dtype] = accelerate(copy.deepcopy(original), noise="torch", **own)

    def arm(sampler: Any) -> Arm:
        @torch.no_grad()
        def run() -> np.ndarray:
            torch.manual_seed(0)
            return sampler.sample(batch).permute(0, 2, 3, 1).float().numpy()

        return run

    return {name: arm(sampler) for name, sampler in samplers.items()}


def differences(images: np.ndarray, original: np.ndarray) -> dict[str, float | int]:
    """Return how far images in [0, 1] are from each other, as floats and as the 8-bit pixels that are saved."""
    a, b = ((x * 255).round().astype(np.int32) for x in (images, original))
    return {
        "largest": float(np.abs(images.astype(np.float64) - original).max()),
        "rms": float(np.sqrt(np.square(images.astype(np.float64) - original).mean())),
        "pixels": int(a.size),
        "pixels_differ": int((a != b).sum()),
        "pixels_differ_by_more_than_1": int((np.abs(a - b) > 1).sum()),
    }


def compare(arms: dict[str, Arm], rounds: int) -> list[dict[str, Any]]:
    """Time the arms in turn; the first is what the others are compared with."""
    images = {name: run() for name, run in arms.items()}  # builds what is built once
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    runs = {name: partial(timed, run, torch.device("cpu")) for name, run in arms.items()}
    for name, value in interleave(runs, seconds=float("inf"), least=rounds, most=rounds):
        seconds[name].append(value)
    first = next(iter(arms))
    records = []
    for name, own in seconds.items():
        median, ratios = quantiles(own)["median"], [a / b for a, b in zip(seconds[first], own, strict=True)]
        spread = quantiles(ratios)
        records.append(
            {
                "arm": name,
                "median_s": median,
                "times_as_fast": spread["median"],
                "times_as_fast_p20": spread["p20"],
                "times_as_fast_p80": spread["p80"],
                "images": differences(images[name], images[first]),
            }
        )
    return records


def _counts(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be positive whole numbers, separated by commas")
    return values


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code: 1 where something was not measured, as for want of a library."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="what is measured (default: %(default)s)")
    parser.add_argument("--batch-sizes", type=_counts, default=[1, 16], metavar="N,N", help="default: 1,16")
    parser.add_argument("--steps", type=int, default=10, help="of a call (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of all arms (default: %(default)s)")
    parser.add_argument("--step-rounds", type=int, default=15, help="of all arms of step (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--no-bfloat16", action="store_true", help="leave out what is only for information")
    parser.add_argument("--arms", default=",".join(ARMS), help="of step (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny U-Nets, to try the code")
    options = parser.parse_args(arguments)
    networks, base = options.networks.split(","), "small" if options.small else "cifar10"
    if unknown := set(networks) - set(NETWORKS):
        parser.error(f"--networks is {options.networks}, has unknown {', '.join(sorted(unknown))}")
    if min(options.steps, options.rounds, options.step_rounds, options.threads or 1) < 1:
        parser.error("--steps, --rounds, --step-rounds and --threads must be at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    dtypes = ["float32"] + ([] if options.no_bfloat16 else ["bfloat16"])
    commit, dirty = commit_here()
    content: dict[str, Any] = {
        "schema": CPU_SCHEMA,
        "commit": commit,
        "dirty": dirty,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native": _backend.why_not("native", "cpu") or "yes",
        "steps": options.steps,
        "rounds": options.rounds,
        "records": [],
    }
    print(f"{content['cpu']}, {content['threads']} threads, torch {content['torch']}, native: {content['native']}")
    missing = False
    for network in networks:
        for batch in options.batch_sizes:
            if network == "step":
                problem, chosen = make_problem(base, torch.device("cpu")), options.arms.split(",")
                arms = {name: build for name, build in ARMS.items() if name in chosen}
                found = measure(problem, batch, options.step_rounds, dtypes, arms)
                about = {"rounds": options.step_rounds, "versions": versions(), "records": []}
                content.setdefault("step", about)["records"] += found
                missing |= any(record["status"] not in ("ok", "unavailable") for record in found)
            else:
                try:
                    make = partial(cifar10 if network == "cifar10" else lucidrains, base)
                    arms = make(batch, options.steps, dtypes)
                    found = compare(arms, options.rounds)
                    content["records"] += [{"network": network, "batch": batch, **record} for record in found]
                except Missing as error:
                    print(f"{network}: {error}")
                    missing = True
                    break
            if options.out:
                write_json(options.out, content)
    print(report.table([content]).removeprefix(report.NOTHING).strip())
    return int(missing)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
