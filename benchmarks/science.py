"""How long EDM's and MONAI's samplers take on the CPU, theirs and ours in turn.

    edm     DDPM++ for CIFAR-10 (55.7 million weights), 18 Heun steps, batch 16: NVlabs' code from a checkout that
            FASTDDPM_EDM names, else its network restated in `tests/shared/edm_restated.py`
    monai   a 2-D `DiffusionModelUNet` (128, 256, 256 channels, attention at two levels), DDIM, 64x64, batch 2
    monai3d the same in three dimensions (32, 64, 64 channels), 32x32x32, batch 1: layers fused, not frozen

    python benchmarks/science.py --json benchmarks/results/science_cpu.json

Both draw from the same random numbers; images are compared before times count. A record is written after each call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))

from fastddpm.interop import accelerate

Draw = Callable[[int], Tensor]  # of a number of steps
WITHIN = 1e-3  # rms of the difference over the rms of the images


def with_weights(model: Any) -> Any:
    """Fill layers that begin as zeros: images of an untrained network would show nothing of them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and float(parameter.abs().max()) < 1e-3:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval()


def edm(batch: int) -> tuple[dict[str, Draw], str]:
    torch.manual_seed(0)
    ddpmpp = {"model_channels": 128, "channel_mult": (2, 2, 2), "num_blocks": 4, "attn_resolutions": (16,)}
    latents = torch.randn(batch, 3, 32, 32)
    if folder := os.environ.get("FASTDDPM_EDM"):
        sys.path.insert(0, folder)
        from training.networks import EDMPrecond  # type: ignore[import-not-found]

        net = with_weights(EDMPrecond(32, 3, model_type="SongUNet", augment_dim=9, **ddpmpp))
        source = "NVlabs/edm"
    else:
        from edm_restated import EDM

        net, source = with_weights(EDM.EDMPrecond(EDM.SongUNet(32, 3, 3, **ddpmpp), 32, 3)), "restated"
    from edm_restated import heun

    ours = accelerate(net, allow_general=False)

    def original(steps: int) -> Tensor:
        ramp = torch.arange(steps, dtype=torch.float64) / (steps - 1)
        sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        sigmas = torch.cat([net.round_sigma(sigmas), torch.zeros(1, dtype=torch.float64)])
        return heun(lambda x, sigma: net(x, sigma), latents.double(), sigmas, torch.zeros_like)

    zeros = torch.zeros_like
    return {
        "original": original,
        "fastddpm": lambda n: ours.edm_sampler(latents, randn_like=zeros, num_steps=n),
    }, source


def monai(dimensions: int, channels: tuple[int, ...], size: int, batch: int) -> tuple[dict[str, Draw], str]:
    import monai
    from monai.inferers import DiffusionInferer
    from monai.networks.nets import DiffusionModelUNet
    from monai.networks.schedulers import DDIMScheduler

    torch.manual_seed(0)
    unet = with_weights(
        DiffusionModelUNet(
            spatial_dims=dimensions, in_channels=1, out_channels=1, channels=channels, num_res_blocks=2,
            attention_levels=(False, True, True), num_head_channels=32,
        )
    )  # fmt: skip
    scheduler = DDIMScheduler(1000)
    noise = torch.randn(batch, 1, *[size] * dimensions)
    theirs, ours = DiffusionInferer(scheduler), accelerate((unet, scheduler))

    def drawn(inferer: Any, steps: int) -> Tensor:
        scheduler.set_timesteps(steps)
        result: Tensor = inferer.sample(noise, diffusion_model=unet, scheduler=scheduler, verbose=False)
        return result

    return {
        "original": lambda steps: drawn(theirs, steps), "fastddpm": lambda steps: drawn(ours, steps),
    }, f"monai {monai.__version__}"  # fmt: skip


CASES: dict[str, tuple[Callable[[], tuple[dict[str, Draw], str]], int, dict[str, Any]]] = {
    "monai": (lambda: monai(2, (128, 256, 256), 64, 2), 10, {"size": "64x64", "batch": 2}),
    "monai3d": (lambda: monai(3, (32, 64, 64), 32, 1), 10, {"size": "32x32x32", "batch": 1}),
    "edm": (lambda: edm(16), 18, {"size": "32x32", "batch": 16}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the records")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"records": {}}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text())
    result |= {"torch": torch.__version__, "threads": options.threads}
    for name in options.cases:
        make, steps, about = CASES[name]
        arms, source = make()
        with torch.no_grad():
            images = {arm: draw(2) for arm, draw in arms.items()}  # also warms up
            theirs, found = images["original"].double(), images["fastddpm"].double()
            differs = float((found - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())
            if not differs <= WITHIN:
                raise SystemExit(f"{name}: images differ by {differs:.2g} of the rms, must be at most {WITHIN}")
            taken: dict[str, list[float]] = {arm: [] for arm in arms}
            record = about | {"original": source, "steps": steps, "differs_after_2_steps": differs, "seconds": taken}
            result["records"][name] = record
            for _ in range(options.rounds):
                for arm in ("fastddpm", "original"):
                    begin = time.perf_counter()
                    arms[arm](steps)
                    taken[arm].append(time.perf_counter() - begin)
                    medians = {one: statistics.median(values) for one, values in taken.items() if values}
                    if len(medians) == 2:
                        record["times_as_fast"] = medians["original"] / medians["fastddpm"]
                    if options.json:
                        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
