"""What the examples of the general path share: a short training, a plain loop to compare with, plots."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastddpm import GaussianDiffusion, NoiseSchedule, Sampler
from fastddpm.networks.unet.layers import timestep_embedding


def arguments(doc: str, steps: int, picture: str) -> argparse.Namespace:
    """Return the options of an example: the steps of training, and where its picture goes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="of training (default: %(default)s)")
    parser.add_argument("--plot", type=Path, default=Path(picture), help="picture to write (default: %(default)s)")
    return parser.parse_args()


def sinusoids(t: Tensor, channels: int = 32) -> Tensor:
    """Return what a network reads of the timesteps [N]: float32 [N, channels]."""
    return timestep_embedding(t, channels, flip_sin_to_cos=True, freq_shift=0)


def some_of(sets: list[Tensor], count: int) -> Tensor:
    """Return `count` entries of one of the sets, [count, ...]."""
    chosen = sets[torch.randint(len(sets), ())]
    return chosen[torch.randint(len(chosen), (count,))]


def train(model: nn.Module, batch: Callable[[], Tensor], steps: int, lr: float = 2e-3) -> nn.Module:
    """Return the moving average of `model` after training it to predict the noise in batches."""
    diffusion = GaussianDiffusion(model, NoiseSchedule.cosine(1000))
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    started = time.perf_counter()
    for step in range(steps):
        loss = diffusion(batch(), step=step)  # the noise depends on the step alone
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.update_parameters(model)
        if step % 200 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step}: loss {float(loss.detach()):.4f} after {seconds:.0f} s", flush=True)
    return average.module.eval()


@torch.no_grad()
def plain_ddim(model: nn.Module, shape: tuple[int, ...], steps: int) -> Tensor:
    """Draw samples by DDIM (Song et al. 2021) as it is usually written: the loop before."""
    bars, x = NoiseSchedule.cosine(1000).alphas_cumprod.float(), torch.randn(shape)
    visited = torch.arange(steps).flip(0) * (1000 // steps)
    for t in visited:
        bar, before = bars[t], bars[t - 1000 // steps] if t >= 1000 // steps else torch.tensor(1.0)
        epsilon = model(x, t.expand(len(x)))
        x0 = ((x - (1 - bar).sqrt() * epsilon) / bar.sqrt()).clamp(-1, 1)
        x = before.sqrt() * x0 + (1 - before).sqrt() * (x - bar.sqrt() * x0) / (1 - bar).sqrt()
    return x


def draw(model: nn.Module, count: int, shape: tuple[int, ...], steps: int = 50, seed: int = 0) -> Tensor:
    """Draw samples with `Sampler`: the loop after."""
    sampler = Sampler(model, NoiseSchedule.cosine(1000), "ddim", steps, use_clipped_model_output=True)
    return sampler.sample(count, shape=shape, seed=seed)


def plot(path: Path, panels: dict[str, dict[str, Tensor]]) -> None:
    """Draw a panel per label of the abscissa: curves [N, 2] as they are, or the histograms of numbers [N], by name."""
    fig, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3), squeeze=False)
    for axis, (label, curves) in zip(axes[0], panels.items(), strict=True):
        for name, values in curves.items():
            if values.ndim == 2:
                axis.plot(*values.T.numpy(), lw=0.7, label=name)
            else:
                axis.hist(values.numpy(), bins=60, density=True, histtype="step", label=name)
        axis.set(xlabel=label, yticks=[])
        axis.legend()
    fig.savefig(path, bbox_inches="tight", dpi=120)


def show(path: Path, pictures: list[Tensor]) -> None:
    """Write gray pictures [height, width] of equal widths below each other; -1 is black and 1 white."""
    plt.imsave(path, torch.cat(pictures), cmap="gray", vmin=-1, vmax=1)


def compare_loops(before: nn.Module, after: nn.Module, count: int, shape: tuple[int, ...], steps: int = 50) -> None:
    """Print how long both loops take, the median of three runs each, taken in turn."""
    taken: dict[str, list[float]] = {"before": [], "after": []}
    for _ in range(4):
        for name, run in (
            ("before", lambda: plain_ddim(before, (count, *shape), steps)),
            ("after", lambda: draw(after, count, shape, steps)),
        ):
            started = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - started)
    medians = {name: sorted(seconds[1:])[1] for name, seconds in taken.items()}  # the first ones warm up
    print(f"{count} samples in {steps} steps: {medians['before']:.2f} s before, {medians['after']:.2f} s after")
