"""Noise schedules: betas and what follows from them, in float64, and the timesteps that sampling visits.

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

TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The betas of a forward process and the float64 tables derived from them.

    Build one with `linear`, `scaled_linear`, `cosine`, `sigmoid`, `from_name` or `from_betas`.

    Attributes:
        betas: float64 [T], each in (0, 1).
        beta_schedule: diffusers' name of the schedule, or "trained_betas" for given betas.
        beta_start, beta_end: the range the schedule was made from, where it has one.
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
        if not bool(((betas > 0) & (betas < 1)).all()):
            index = int((~((betas > 0) & (betas < 1))).nonzero()[0])
            raise ValueError(f"betas[{index}] is {betas[index].item():g}, every beta must be in (0, 1)")
        if float(self.alphas_cumprod[-1]) <= 0:
            raise ValueError("betas are so large that the cumulative product of 1 - betas underflows to 0")

    # -- construction ---------------------------------------------------------------------------------------------

    @classmethod
    def linear(cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Betas from `beta_start` to `beta_end` in equal steps (Ho et al. 2020)."""
        _check_range(num_train_timesteps, beta_start, beta_end)
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        return cls(betas, "linear", beta_start, beta_end)

    @classmethod
    def scaled_linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Square roots of the betas in equal steps (latent diffusion, Rombach et al. 2022)."""
        _check_range(num_train_timesteps, beta_start, beta_end)
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64)
        return cls(roots.square(), "scaled_linear", beta_start, beta_end)

    @classmethod
    def cosine(cls, num_train_timesteps: int = 1000, max_beta: float = 0.999) -> NoiseSchedule:
        """abar_t = cos^2((t/T + 0.008) / 1.008 * pi/2), betas cut at `max_beta` (Nichol & Dhariwal 2021, eq. 17)."""
        steps = _check_timesteps(num_train_timesteps)
        if not 0 < max_beta < 1:
            raise ValueError(f"max_beta is {max_beta}, must be in (0, 1)")
        edges = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((edges + 0.008) / 1.008 * (math.pi / 2)).square()
        name = "squaredcos_cap_v2" if max_beta == 0.999 else "trained_betas"  # the one cut that the name stands for
        return cls((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta), name)

    @classmethod
    def sigmoid(
        cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Betas along a sigmoid over [-6, 6] (GeoDiff, Xu et al. 2022), as diffusers' `sigmoid`."""
        _check_range(num_train_timesteps, beta_start, beta_end)
        curve = torch.sigmoid(torch.linspace(-6, 6, num_train_timesteps, dtype=torch.float64))
        return cls(curve * (beta_end - beta_start) + beta_start, "sigmoid", beta_start, beta_end)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | np.ndarray | Tensor) -> NoiseSchedule:
        """A schedule from given betas [T], each finite and in (0, 1).

        Raises:
            ValueError: a beta is not finite or not in (0, 1), or `betas` is not one-dimensional.
        """
        try:
            values = torch.as_tensor(betas, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError) as error:
            raise ValueError(f"betas must be a sequence of numbers: {error}") from None
        return cls(values.clone())

    @classmethod
    def from_name(
        cls,
        beta_schedule: str,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
    ) -> NoiseSchedule:
        """The schedule that diffusers or this package calls `beta_schedule`.

        Raises:
            ValueError: no such schedule.
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

    # -- tables ---------------------------------------------------------------------------------------------------

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of steps of the forward process."""
        return self.betas.numel()

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar, float64 [T], falling from about 1 to about 0."""
        return torch.cumprod(1 - self.betas, dim=0)

    def q_sample_table(self) -> Tensor:
        """The pairs (sqrt(abar_t), sqrt(1 - abar_t)) that `fastddpm_kernels.q_sample` takes: float32 [T, 2]."""
        alpha_bar = self.alphas_cumprod
        return torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], dim=1).float()

    def timesteps(
        self, num_inference_steps: int | None = None, timestep_spacing: str = "leading", steps_offset: int = 0
    ) -> Tensor:
        """The timesteps that sampling visits, falling: int64 [num_inference_steps].

        The spacings are those of Table 2 in Lin et al. 2024 ("Common diffusion noise schedules and sample steps are
        flawed"), rounded as diffusers rounds.

        Args:
            num_inference_steps: from 1 to T; None for all T.
            timestep_spacing: "leading", "trailing" or "linspace".
            steps_offset: added to the timesteps of "leading".

        Raises:
            ValueError: `num_inference_steps` is out of range or not an integer, `timestep_spacing` is not known, or
                the offset leads past the last trained timestep.
        """
        total = self.num_train_timesteps
        count = total if num_inference_steps is None else num_inference_steps
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or not 1 <= count <= total:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps!r}, must be an integer from 1 to {total}, "
                "the number of steps the model was trained with"
            )
        count = int(count)
        if timestep_spacing == "leading":
            steps = np.arange(count)[::-1] * (total // count) + steps_offset
        elif timestep_spacing == "trailing":
            # diffusers walks a float grid by -T/S, which may end one past S by rounding; S is what was asked for.
            steps = np.round(np.arange(total, 0, -total / count))[:count] - 1
        elif timestep_spacing == "linspace":
            steps = np.linspace(0, total - 1, count).round()[::-1]
        else:
            raise ValueError(f"timestep_spacing is {timestep_spacing!r}, must be one of {', '.join(TIMESTEP_SPACINGS)}")
        if steps[0] >= total or steps[-1] < 0:
            raise ValueError(
                f"steps_offset is {steps_offset}: the timesteps run from {int(steps[0])} to {int(steps[-1])}, "
                f"must stay within 0 to {total - 1}"
            )
        return torch.from_numpy(steps.astype(np.int64))


def _check_timesteps(num_train_timesteps: int) -> int:
    if (
        isinstance(num_train_timesteps, bool)
        or not isinstance(num_train_timesteps, numbers.Integral)
        or num_train_timesteps < 1
    ):
        raise ValueError(f"num_train_timesteps is {num_train_timesteps!r}, must be a positive integer")
    return int(num_train_timesteps)


def _check_range(num_train_timesteps: int, beta_start: float, beta_end: float) -> None:
    _check_timesteps(num_train_timesteps)
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}, must be in (0, 1)")
