"""Run the samplers of denoising_diffusion_pytorch's `ElucidatedDiffusion` (EDM) as step tables.

The state is y = c_in(sigma) x, which the network reads. The noise that churn adds before a step belongs to the previous
row.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from fastddpm_kernels import philox
from torch import Tensor

from fastddpm.common import checks
from fastddpm.interop.lucidrains.accelerated import Accelerated
from fastddpm.interop.lucidrains.run import Drawing, Traits, Variant
from fastddpm.process.tables import StepTable


class _Level(NamedTuple):
    """The coefficients of `preconditioned_network_forward` at one noise level, computed in float32 as it does."""

    sigma: float
    c_in: float
    a: float  # of the denoised image: a y + b out
    b: float
    told: float

    @classmethod
    def of(cls, diffusion: Any, sigma: float) -> _Level:
        at = torch.tensor([sigma], dtype=torch.float32)
        c_in = float(diffusion.c_in(at))
        told = float(diffusion.c_noise(at))
        return cls(sigma, c_in, float(diffusion.c_skip(at)) / c_in, float(diffusion.c_out(at)), told)


class Heun(NamedTuple):
    """The sampler of `ElucidatedDiffusion.sample`.

    Attributes:
        table: 2 N - 1 rows (Karras et al. 2022, algorithm 2).
        draws: for each row, whether the original draws noise after it.
        first: standard deviations, in y, of the initial noise and of the noise that churn adds to it.
    """

    table: StepTable
    draws: list[bool]
    first: tuple[float, float]


def heun(diffusion: Any, steps: int) -> Heun:
    """Return the table and the noise of `sample` with churn.

    Raises:
        ValueError: a setting leaves no finite schedule.
    """
    sigmas = _sigmas(diffusion, steps)
    share = min(diffusion.S_churn / steps, math.sqrt(2) - 1)
    churned = (sigmas >= diffusion.S_tmin) & (sigmas <= diffusion.S_tmax)
    gammas = torch.where(churned, share, 0.0).tolist()
    levels = sigmas.tolist()
    hats = [sigma + gamma * sigma for sigma, gamma in zip(levels, gammas, strict=True)]
    added = [
        diffusion.S_noise * math.sqrt(max(hat**2 - sigma**2, 0.0)) for hat, sigma in zip(hats, levels, strict=True)
    ]
    rows, told, after = [], [], []
    for step, following in enumerate(levels[1:]):
        at = _Level.of(diffusion, hats[step])
        ratio = following / at.sigma  # Euler: x moves to ratio x + (1 - ratio) denoised
        told.append(at.told)
        if following == 0:
            rows.append([at.a, at.b, 1.0, 0.0, 0.0, 0.0, 0.0])
            after.append((1.0, 0.0))
            break
        then = _Level.of(diffusion, following)
        rows.append([at.a, at.b, then.c_in * (1 - ratio), then.c_in * ratio / at.c_in, 0.0, 0.0, 0.0])
        after.append((then.c_in, then.c_in * following))
        # The trapezoid corrects x by half the difference of the two slopes; both use the same x.
        told.append(then.told)
        half, scale = 0.5 * (following - at.sigma) / following, _Level.of(diffusion, hats[step + 1]).c_in
        rows.append([then.a, then.b, -half * scale, scale / then.c_in, 0.0, half * scale, scale * added[step + 1]])
        after.append((scale, scale * hats[step + 1]))
    start = _Level.of(diffusion, hats[0]).c_in
    table = _table(told, rows, after, (start, start * hats[0]))
    draws = [False, True] * (steps - 1) + [False]
    return Heun(table, draws, (start * levels[0], start * added[0]))


def dpmpp_table(diffusion: Any, steps: int) -> StepTable:
    """Return the table of `sample_using_dpmpp`: DPM-Solver++(2M) (Lu et al. 2022), x0 not clipped.

    Raises:
        ValueError: a setting leaves no finite schedule.
    """
    sigmas = _sigmas(diffusion, steps)
    t = -sigmas.log()
    rows, told, after = [], [], []
    for step, following in enumerate(sigmas[1:]):
        at, h = _Level.of(diffusion, float(sigmas[step])), t[step + 1] - t[step]
        extrapolated = 0.0
        if step and following != 0:
            extrapolated = float(-1 / (2 * ((t[step] - t[step - 1]) / h)))
        scale = 1.0 if following == 0 else _Level.of(diffusion, float(following)).c_in
        ratio, of_x0 = float((-t[step + 1]).exp() / (-t[step]).exp()), -scale * float((-h).expm1())
        told.append(at.told)
        rows.append([at.a, at.b, of_x0 * (1 - extrapolated), scale * ratio / at.c_in, 0.0, of_x0 * extrapolated, 0.0])
        after.append((scale, scale * float(following)))
    start = _Level.of(diffusion, float(sigmas[0])).c_in
    return _table(told, rows, after, (start, start * float(sigmas[0])))


def _table(
    told: list[float], rows: list[list[float]], after: list[tuple[float, float]], start: tuple[float, float]
) -> StepTable:
    wide = torch.float64
    needs = torch.ones(len(told), dtype=torch.bool)
    levels = torch.tensor(after, dtype=wide)
    return StepTable(torch.tensor(told), torch.tensor(rows, dtype=wide), None, levels, needs, start)


def _sigmas(diffusion: Any, steps: int) -> Tensor:
    """Return the levels of `sample_schedule`, float32 [steps + 1], the last 0.

    Raises:
        ValueError: there are too few, or they are not finite and falling.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"num_sample_steps is {steps!r}, must be an integer of at least 2")
    sigmas: Tensor = diffusion.sample_schedule(steps).float().cpu()
    if not bool(sigmas.isfinite().all()) or not bool((sigmas.diff() < 0).all()):
        own = ", ".join(f"{name} {getattr(diffusion, name)}" for name in ("sigma_min", "sigma_max", "rho"))
        raise ValueError(f"{own} give levels that do not fall, must be such that sigma_min is below sigma_max")
    return sigmas


class AcceleratedElucidatedDiffusion(Accelerated):
    """An `ElucidatedDiffusion` that samples with `Sampler`.

    Its methods take the arguments of the original, and the keyword arguments of `AcceleratedDiffusion`.
    """

    of = (("elucidated_diffusion", "ElucidatedDiffusion"),)
    methods = ("sample", "sample_using_dpmpp")
    traits = Traits(network="net", table=lambda diffusion: heun(diffusion, diffusion.num_sample_steps).table)

    def sample(
        self, batch_size: int = 16, num_sample_steps: int | None = None, clamp: bool = True, **drawing: Any
    ) -> Tensor:
        """Draw images [N, C, H, W] in [0, 1] by Heun's method with churn; `clamp` clips the denoised image."""
        sampler = heun(self.diffusion, self._steps(num_sample_steps))

        def start(draw: Drawing) -> Tensor:
            first, second = sampler.first
            return first * draw.initial() + second * draw.initial(stream=philox.STREAM_Q_SAMPLE)

        variant = Variant(clip=bool(clamp))
        shape = self._shape(batch_size)
        x, _ = self._walk(sampler.table, sampler.draws, shape, drawing, variant=variant, start_of=start)
        return (x.clamp_(-1, 1) + 1) * 0.5

    def sample_using_dpmpp(self, batch_size: int = 16, num_sample_steps: int | None = None, **drawing: Any) -> Tensor:
        """Draw images [N, C, H, W] in [0, 1] by DPM-Solver++(2M).

        A self-conditioned network receives no earlier prediction.
        """
        table = dpmpp_table(self.diffusion, self._steps(num_sample_steps))
        variant, noise = Variant(clip=False, conditioned=False), table.start[1]
        x, _ = self._walk(
            table, [False] * len(table), self._shape(batch_size), drawing, variant=variant,
            start_of=lambda draw: noise * draw.initial(),
        )  # fmt: skip
        return (x.clamp_(-1, 1) + 1) * 0.5

    def _steps(self, given: int | None) -> int:
        return self.diffusion.num_sample_steps if given is None else given

    def _shape(self, batch_size: int) -> tuple[int, ...]:
        size = self.diffusion.image_size
        return (checks.positive(batch_size, "batch_size"), self.diffusion.channels, size, size)
