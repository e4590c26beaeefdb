"""How long a robot waits for a plan: a diffusion policy's network and loop on the CPU, batch 1, arms in turn.

    original        ConditionalUnet1D restated from its contract, and diffusers' scheduler, as the policies call them
    torch.compile   the same with the network compiled by inductor, weights frozen
    openvino        the same with the network converted, as OpenVINO's hint for the precision says
    fastddpm        `fastddpm.interop.accelerate((network, scheduler))`

    python benchmarks/robots.py --json benchmarks/results/robots_cpu.json
    python benchmarks/robots.py --floor     # a step's time over that of reading its weights

Default widths of lerobot (512, 1024, 2048; kernel 5; 252 million weights), an observation of 132 values, actions of 2.
10 and 16 steps are DDIM's, 100 are DDPM's. Every arm starts from the same draws, and its plan is held against the
original's before it is timed. Calls of all arms take turns; of slow arms there are fewer.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))
os.environ.setdefault("CI", "true")  # OpenVINO then does not report its use

import policies_restated as restated
from diffusers import DDIMScheduler, DDPMScheduler
from fastddpm_kernels.native.memory import empty

from fastddpm.interop import accelerate

WIDTHS = {"down_dims": (512, 1024, 2048), "kernel_size": 5, "diffusion_step_embed_dim": 128, "cond_predict_scale": True}
OBSERVED, ACTION, T = 132, 2, 100
Draw = Callable[[torch.Generator], Tensor]
# What an arm may differ from the original by, at most: of values in [-1, 1].
WITHIN = {"float32": 2e-3, "bfloat16": 0.2}


def loop(network: Callable[..., Tensor], scheduler: Any, steps: int, horizon: int, cond: Tensor) -> Draw:
    """Return the original's loop around a network."""

    @torch.no_grad()
    def draw(generator: torch.Generator) -> Tensor:
        x = torch.randn(1, horizon, ACTION, generator=generator)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.reshape(1), cond), t, x, generator=generator).prev_sample
        return x

    return draw


def of_openvino(unet: Any, horizon: int, precision: str) -> Callable[..., Tensor]:
    """Return the network converted by OpenVINO for one horizon."""
    import openvino

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            result: Tensor = self.unet(x, t, global_cond=cond)
            return result

    example = (torch.zeros(1, horizon, ACTION), torch.zeros(1, dtype=torch.int64), torch.zeros(1, OBSERVED))
    model = openvino.convert_model(Positional().eval(), example_input=example, input=[x.shape for x in example])
    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads()}
    compiled = openvino.Core().compile_model(model, "CPU", options)
    request = compiled.create_infer_request()

    def network(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        found = request.infer([x.numpy(), t.numpy(), cond.numpy()], share_inputs=True, share_outputs=False)
        return torch.from_numpy(found[0])

    return network


def threads() -> int:
    return torch.get_num_threads()


def networks(unet: Any, names: list[str], horizon: int) -> dict[str, Any]:
    """Return what evaluates the network in each arm: a function, or the options of `accelerate`."""

    def plain(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        result: Tensor = unet(x, t, global_cond=cond)
        return result

    made: dict[str, Any] = {
        "original": lambda precision: plain,
        "torch.compile": lambda precision: torch.compile(plain, options={"freezing": True}, dynamic=False),
        "openvino": lambda precision: of_openvino(unet, horizon, precision),
        "fastddpm": lambda precision: {"dtype": precision},
    }
    parts = (name.partition(" ") for name in names)
    return {f"{library} {precision}": made[library](precision) for library, _, precision in parts}


def arms(unet: Any, evaluates: dict[str, Any], steps: int, horizon: int, cond: Tensor) -> dict[str, Draw]:
    """Return the arms, each a function that draws a plan."""
    kind = DDPMScheduler if steps == T else DDIMScheduler
    found: dict[str, Draw] = {}
    for name, network in evaluates.items():
        scheduler = kind(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2", clip_sample=True)
        if not isinstance(network, dict):
            found[name] = loop(network, scheduler, steps, horizon, cond)
            continue
        sample = accelerate((unet, scheduler), **network).sample
        found[name] = partial(_planned, sample, (1, horizon, ACTION), cond, steps)
    return found


def _planned(sample: Any, shape: Any, cond: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    result: Tensor = sample(shape, global_cond=cond, generator=generator, num_inference_steps=steps)
    return result


def seconds_of(draw: Draw, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    draw(generator)
    return time.perf_counter() - begin


def measure(found: dict[str, Draw], calls: int, seconds: float) -> list[dict[str, Any]]:
    """Return a record of every arm: its difference from the original, and quantiles of the seconds of a call.

    Args:
        found: the arms, the original first.
        calls: of an arm, at most.
        seconds: after which an arm is not called again.
    """
    expected = next(iter(found.values()))(torch.Generator().manual_seed(0))
    apart: dict[str, float] = {}
    for name, draw in found.items():
        apart[name] = float((draw(torch.Generator().manual_seed(0)) - expected).abs().max())
        bound = WITHIN["bfloat16" if name.endswith("bfloat16") else "float32"]
        if not apart[name] <= bound:
            raise SystemExit(f"{name} differs from the original by {apart[name]:.3g}, must be at most {bound}")
    taken: dict[str, list[float]] = {name: [] for name in found}
    gc.collect()
    for call in range(calls):
        for name, draw in found.items():
            if sum(taken[name]) < seconds:
                taken[name].append(seconds_of(draw, call))
                time.sleep(0.1 * min(taken[name][-1], 1.0))  # a process of real-time priority is stopped otherwise
    records = []
    for name, values in taken.items():
        values.sort()
        quantile = {f"p{q}_s": values[min(len(values) - 1, len(values) * q // 100)] for q in (50, 99)}
        records.append({"arm": name, "calls": len(values), "differs": apart[name], **quantile})
    return records


def read_rate(size: int = 2**28) -> float:
    """Return the best bytes per second at which torch adds up a tensor of `size` bytes."""
    values, best = torch.ones(size // 4), float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - begin)
    return size / best


def measure_floor(unet: Any, horizon: int, cond: Tensor, precision: str, seconds: float) -> dict[str, Any]:
    """Return the share of a step in which its weights can be read: both take turns, the rate changes within seconds."""
    draw = arms(unet, {"fastddpm": {"dtype": precision}}, 10, horizon, cond)["fastddpm"]
    layers = [m for m in unet.modules() if isinstance(m, (torch.nn.Conv1d, torch.nn.ConvTranspose1d))]
    size = sum(m.weight.numel() for m in layers) * (4 if precision == "float32" else 2)
    values = empty((size // 4,), torch.float32).fill_(1.0)

    def read() -> float:
        begin = time.perf_counter()
        values.sum()
        return time.perf_counter() - begin

    shares, steps, reads, end = [], [], [read()], time.perf_counter() + seconds
    while time.perf_counter() < end or len(steps) < 3:
        steps.append(seconds_of(draw, len(steps)) / 10)
        reads.append(read())
        shares.append((reads[-2] + reads[-1]) / 2 / steps[-1])
    middle = {"share": shares, "step_s": steps, "read_s": reads}
    found = {name: statistics.median(some) for name, some in middle.items()}
    return {"precision": precision, "horizon": horizon, "bytes": size, "rounds": len(steps), **found}


ARMS = (
    "original float32", "torch.compile float32", "openvino float32", "openvino bfloat16", "fastddpm float32",
    "fastddpm bfloat16",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the records")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 16, 100])
    parser.add_argument("--horizon", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--calls", type=int, default=1000, help="of an arm, at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="that an arm may take for one row of the table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--floor", action="store_true", help="only compare steps with reads of as many bytes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    unet = restated.ConditionalUnet1D(ACTION, global_cond_dim=OBSERVED, **WIDTHS).eval()
    cond = torch.randn(1, OBSERVED)
    result: dict[str, Any] = {
        "torch": torch.__version__, "threads": options.threads, "weights": sum(p.numel() for p in unet.parameters()),
        "read_bytes_per_s": read_rate(), "records": [],
    }  # fmt: skip
    if options.json and options.json.exists():
        result["records"] = json.loads(options.json.read_text())["records"]
    if options.floor:
        result = json.loads(options.json.read_text()) if options.json and options.json.exists() else result
        result["floor"] = [measure_floor(unet, 16, cond, name, min(options.seconds, 60)) for name in WITHIN]
        print(json.dumps(result["floor"], indent=1))
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
        return
    for horizon in options.horizon:
        evaluates = networks(unet, options.arms, horizon)
        for steps in options.steps:
            found = arms(unet, evaluates, steps, horizon, cond)
            for record in measure(found, options.calls, options.seconds):
                print(horizon, steps, json.dumps(record), flush=True)
                result["records"].append({"horizon": horizon, "steps": steps, **record})
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
