"""Run the samplers of denoising_diffusion_pytorch's continuous-time diffusions as step tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm.common import checks
from fastddpm.interop.lucidrains.accelerated import Accelerated
from fastddpm.interop.lucidrains.run import Traits, Variant
from fastddpm.interop.shared import kind_of
from fastddpm.process.tables import StepTable, make_table


def continuous_table(diffusion: Any) -> StepTable:
    """Return the table of `p_sample_loop`: the network receives log(SNR) at `num_sample_steps` times from 1 to 0.

    The coefficients are computed in float32 and in the library's order: where alpha is tiny, the rounding matters.

    Raises:
        ValueError: `num_sample_steps` or `pred_objective` is not valid, or a coefficient is not finite.
    """
    count = diffusion.num_sample_steps
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"num_sample_steps is {count!r}, must be a positive integer")
    device = next(diffusion.model.parameters()).device
    times = torch.linspace(1.0, 0.0, count + 1, device=device)
    with torch.no_grad():
        levels = torch.stack([diffusion.log_snr(time) for time in times]).float().cpu()
    log_snr, following = levels[:-1], levels[1:]
    c = -torch.special.expm1(log_snr - following)
    bar, bar_next = log_snr.sigmoid(), following.sigmoid()
    alpha, sigma, alpha_next = bar.sqrt(), (-log_snr).sigmoid().sqrt(), bar_next.sqrt()
    std = ((-following).sigmoid() * c).sqrt()
    std[-1] = 0
    zero = torch.zeros_like(std)
    a, b = (alpha, -sigma) if _predicts_v(diffusion) else (1 / alpha, -sigma / alpha)
    columns = (a, b, alpha_next * c, alpha_next * ((1 - c) / alpha), zero, zero, std)
    table = make_table(log_snr, [column.double() for column in columns], before=bar.double(), after=bar_next.double())
    if wrong := (~table.rows.isfinite().all(dim=1)).nonzero().flatten().tolist():
        step = wrong[0]
        raise ValueError(
            f"log_snr falls from {float(following[step])} to {float(log_snr[step])} between times "
            f"{float(times[step + 1]):g} and {float(times[step]):g}, must be finite and fall"
        )
    return table


def _predicts_v(diffusion: Any) -> bool:
    objective = getattr(diffusion, "pred_objective", None)
    if objective is None:  # only simple_diffusion has none
        return not hasattr(diffusion, "min_snr_loss_weight")
    if objective not in ("v", "eps"):
        raise ValueError(f"pred_objective is {objective!r}, must be 'v' or 'eps'")
    return bool(objective == "v")


class AcceleratedContinuousDiffusion(Accelerated):
    """A continuous-time diffusion that samples with `Sampler`.

    It stands for `ContinuousTimeGaussianDiffusion`, `VParamContinuousTimeGaussianDiffusion` and
    `simple_diffusion.GaussianDiffusion`. `sample` and `p_sample_loop` take the arguments of the original, and the
    keyword arguments of `AcceleratedDiffusion`.
    """

    of = (
        ("continuous_time_gaussian_diffusion", "ContinuousTimeGaussianDiffusion"),
        ("v_param_continuous_time_gaussian_diffusion", "VParamContinuousTimeGaussianDiffusion"),
        ("simple_diffusion", "GaussianDiffusion"),
    )
    methods = ("sample", "p_sample_loop")
    traits = Traits(by_name=True, table=continuous_table)

    def sample(self, batch_size: int = 16, **drawing: Any) -> Tensor:
        """Draw images [N, C, H, W] in [0, 1]."""
        size = self.diffusion.image_size
        shape = (checks.positive(batch_size, "batch_size"), self.diffusion.channels, size, size)
        return self.p_sample_loop(shape, **drawing)

    def p_sample_loop(self, shape: tuple[int, ...], **drawing: Any) -> Tensor:
        """Draw images of `shape` [N, C, H, W]; otherwise like `sample`."""
        table = continuous_table(self.diffusion)
        # simple_diffusion clips whatever its setting says.
        clips = kind_of(self.diffusion).startswith("simple_diffusion.") or bool(self.diffusion.clip_sample_denoised)
        draws = [True] * (len(table) - 1) + [False]
        x, _ = self._walk(table, draws, shape, drawing, variant=Variant(clip=clips))
        return (x.clamp_(-1, 1) + 1) * 0.5
