"""Noise schedules: betas and the values derived from them, in float64.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, abar_t = prod_{s <= t} (1 - beta_s)   (Ho et al. 2020, eq. 4)
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastddpm.process.timesteps import checked_timesteps, spaced_timesteps

MOST_STEPS = 1_000_000  # far more than any model was trained on; a schedule of them takes milliseconds


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The betas of a forward process and the float64 tables derived from them.

    Build one with `linear`, `scaled_linear`, `cosine`, `sigmoid`, `from_name` or `from_betas`.

    Attributes:
        betas: float64 [T], each in (0, 1); the last may be 1, which leaves nothing of x_0 at T - 1.
        beta_schedule: diffusers' name of the schedule, or "trained_betas" for given betas.
        beta_start, beta_end: the range that the schedule was made from, if it has one.
    """

    betas: Tensor
    beta_schedule: str = "trained_betas"
    beta_start: float | None = None
    beta_end: float | None = None

    def __post_init__(self) -> None:
        betas = self.betas
        if betas.ndim != 1 or betas.numel() == 0:
            raise ValueError(f"betas has shape {list(betas.shape)}, must be one-dimensional and not empty")
        if not bool(torch.isfinite(betas).all()):
            index = int((~torch.isfinite(betas)).nonzero()[0])
            raise ValueError(f"betas[{index}] is {betas[index].item()}, every beta must be finite")
        legal = (betas > 0) & (betas < 1)
        legal[-1] |= betas[-1] == 1
        if not bool(legal.all()):
            index = int((~legal).nonzero()[0])
            raise ValueError(
                f"betas[{index}] is {betas[index].item():g}, every beta must be in (0, 1) (the last one may be 1)"
            )
        if bool((self.alphas_cumprod[:-1] == 0).any()) or (not self.zero_terminal_snr and self.alphas_cumprod[-1] == 0):
            what = "betas are" if self.beta_end is None else f"beta_end is {self.beta_end} over {len(betas)} timesteps,"
            step = int((self.alphas_cumprod == 0).nonzero()[0])
            raise ValueError(f"{what} so large that the product of 1 - betas underflows to 0 at timestep {step}")

    # -- construction ---------------------------------------------------------------------------------------------

    @classmethod
    def linear(cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Return betas from `beta_start` to `beta_end` in equal steps (Ho et al. 2020)."""
        _check_range(num_train_timesteps, beta_start, beta_end)
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        return cls(betas, "linear", beta_start, beta_end)

    @classmethod
    def scaled_linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Return betas whose square roots rise in equal steps (latent diffusion, Rombach et al. 2022)."""
        _check_range(num_train_timesteps, beta_start, beta_end)
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64)
        return cls(roots.square(), "scaled_linear", beta_start, beta_end)

    @classmethod
    def cosine(cls, num_train_timesteps: int = 1000, max_beta: float = 0.999) -> NoiseSchedule:
        """Return betas of abar_t = cos^2((t/T + 0.008) / 1.008 * pi/2), cut at `max_beta` (Nichol & Dhariwal 2021)."""
        steps = _check_count(num_train_timesteps)
        if not 0 < max_beta < 1:
            raise ValueError(f"max_beta is {max_beta}, must be in (0, 1)")
        edges = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((edges + 0.008) / 1.008 * (math.pi / 2)).square()
        name = "squaredcos_cap_v2" if max_beta == 0.999 else "trained_betas"  # diffusers' name implies this cut
        return cls((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta), name)

    @classmethod
    def sigmoid(
        cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Return betas along a sigmoid over [-6, 6] (GeoDiff, Xu et al. 2022), as diffusers' `sigmoid`."""
        _check_range(num_train_timesteps, beta_start, beta_end)
        curve = torch.sigmoid(torch.linspace(-6, 6, num_train_timesteps, dtype=torch.float64))
        return cls(curve * (beta_end - beta_start) + beta_start, "sigmoid", beta_start, beta_end)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | np.ndarray | Tensor) -> NoiseSchedule:
        """Return a schedule of given betas [T], each finite and in (0, 1); the last may be 1.

        Raises:
            ValueError: a beta is not finite or out of range, or `betas` is not one-dimensional.
        """
        try:
            values = torch.as_tensor(betas, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"betas is a {type(betas).__name__}, must be a sequence of numbers: {reason}") from None
        return cls(values.clone())

    @classmethod
    def from_name(
        cls,
        beta_schedule: str,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
    ) -> NoiseSchedule:
        """Return the schedule that diffusers or this package calls `beta_schedule`; "cosine" takes no range of betas.

        Raises:
            ValueError: the name is not known.
        """
        ranged: dict[str, Callable[[int, float, float], NoiseSchedule]] = {
            "linear": cls.linear,
            "scaled_linear": cls.scaled_linear,
            "sigmoid": cls.sigmoid,
        }
        if beta_schedule in ("cosine", "squaredcos_cap_v2"):
            return cls.cosine(num_train_timesteps)
        if beta_schedule not in ranged:
            raise ValueError(
                f"beta_schedule is {beta_schedule!r}, must be 'linear', 'scaled_linear', 'cosine' "
                "(also called 'squaredcos_cap_v2') or 'sigmoid'"
            )
        return ranged[beta_schedule](num_train_timesteps, beta_start, beta_end)

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """Return the schedule, shifted and scaled so that nothing of x_0 is left at the end (Lin et al. 2024, alg. 1).

        diffusers' `rescale_betas_zero_snr`. It maps sqrt(abar) linearly: the first stays, the last becomes 0. Epsilon
        says nothing about x_0 at that step, so predict "v_prediction" or "sample", and use "trailing" spacing.

        Raises:
            ValueError: the schedule has only one step.
        """
        if self.num_train_timesteps == 1:
            raise ValueError("num_train_timesteps is 1, must be at least 2 to rescale the schedule")
        roots = self.alphas_cumprod.sqrt()
        bar = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))).square()
        return NoiseSchedule(1 - torch.cat([bar[:1], bar[1:] / bar[:-1]]))

    # -- tables ---------------------------------------------------------------------------------------------------

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of steps of the forward process."""
        return self.betas.numel()

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last step is pure noise, abar = 0."""
        return bool(self.betas[-1] == 1)

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar, float64 [T], which falls from about 1 to about 0, or to 0."""
        return torch.cumprod(1 - self.betas, dim=0)

    def q_sample_table(self) -> Tensor:
        """Return the pairs (sqrt(abar_t), sqrt(1 - abar_t)) that `fastddpm_kernels.q_sample` takes: float32 [T, 2]."""
        alpha_bar = self.alphas_cumprod
        return torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], dim=1).float()

    def timesteps(
        self,
        num_inference_steps: int | str | None = None,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        *,
        multistep: bool = False,
    ) -> Tensor:
        """Return the timesteps to visit, falling: int64 [S]; see `fastddpm.process.timesteps.spaced_timesteps`.

        Args:
            num_inference_steps: from 1 to T; None for all T; a string such as "ddim25" or "10,10,5" for
                "guided_diffusion".
            timestep_spacing: "leading", "trailing", "linspace", "denoising_diffusion_pytorch" or "guided_diffusion".
            steps_offset: added to the timesteps of "leading".
            multistep: the grids of diffusers' multistep solvers (method "dpmsolver++").

        Raises:
            ValueError: `num_inference_steps` is out of range or not an integer, `timestep_spacing` is not known, or
                the offset leads past the last trained timestep.
        """
        return spaced_timesteps(
            self.num_train_timesteps, num_inference_steps, timestep_spacing, steps_offset, multistep=multistep
        )

    def check_timesteps(self, timesteps: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Return an explicit list of timesteps as int64 [S].

        Raises:
            ValueError: the list is empty, does not fall, or has values that are not integers from 0 to T - 1.
        """
        return checked_timesteps(self.num_train_timesteps, timesteps)


def _check_count(num_train_timesteps: int) -> int:
    if (
        isinstance(num_train_timesteps, bool)
        or not isinstance(num_train_timesteps, numbers.Integral)
        or not 1 <= num_train_timesteps <= MOST_STEPS
    ):
        raise ValueError(
            f"num_train_timesteps is {num_train_timesteps!r}, must be a positive integer up to {MOST_STEPS}"
        )
    return int(num_train_timesteps)


def _check_range(num_train_timesteps: int, beta_start: float, beta_end: float) -> None:
    _check_count(num_train_timesteps)
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not isinstance(value, numbers.Real) or not 0 < value < 1:
            raise ValueError(f"{name} is {value!r}, must be in (0, 1)")
