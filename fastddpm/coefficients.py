"""The coefficient table of every sampler: one row [A B C D E F S] per step.

    x0   = clip(A x_t + B out)
    next = C x0 + D x_t + E out + F x0_prev + S z,      z ~ N(0, I)

`fastddpm_kernels.reverse_step` executes a row. A sampler is therefore a function from timesteps to rows; it is
computed once, in float64, and stored in float32. `out` is the network's prediction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastddpm.schedule import NoiseSchedule

METHODS = ("ddpm", "ddim")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")


@dataclass(frozen=True, eq=False)
class StepTable:
    """What a sampler does at each step.

    Attributes:
        timesteps: int64 [S], what the network is told, falling.
        rows: float64 [S, 7], the columns A B C D E F S.
        log_variance: float64 [S, 2], (log beta_tilde, log beta) for a learned variance, else None.
        levels: float64 [S, 2], (signal, noise) of x after the step: sqrt(abar_prev), sqrt(1 - abar_prev).
    """

    timesteps: Tensor
    rows: Tensor
    log_variance: Tensor | None
    levels: Tensor


def ddpm_table(
    schedule: NoiseSchedule,
    timesteps: Tensor,
    *,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
) -> StepTable:
    """Ancestral sampling, on all or on strided steps (Ho et al. 2020, eq. 7 and 11; Nichol & Dhariwal 2021, eq. 19).

    For strided steps alpha_t is abar_t / abar_prev. As in diffusers, noise is added at every timestep above 0, and
    the small variance is cut at 1e-20.

    Args:
        schedule: the forward process the network was trained on.
        timesteps: int64 [S], falling.
        prediction_type: what the network predicts: "epsilon", "sample" (x_0) or "v_prediction" (Salimans & Ho 2022).
        variance_type: "fixed_small" (beta_tilde), "fixed_small_log" (the same), "fixed_large" (beta), or
            "learned_range" (the network's second half of channels interpolates their logarithms).

    Raises:
        ValueError: a type is not known.
    """
    if variance_type not in VARIANCE_TYPES:
        raise ValueError(f"variance_type is {variance_type!r}, must be one of {', '.join(VARIANCE_TYPES)}")
    bar, bar_prev = _alpha_bars(schedule, timesteps)
    alpha = bar / bar_prev
    beta = 1 - alpha
    to_x0_x, to_x0_out = _x0_from(prediction_type, bar)
    small = (beta * (1 - bar_prev) / (1 - bar)).clamp_min(1e-20)
    noisy = timesteps > 0
    if variance_type == "learned_range":
        std = torch.ones_like(beta)
    else:
        std = (beta if variance_type == "fixed_large" else small).sqrt()
    zero = torch.zeros_like(beta)
    rows = [
        to_x0_x,
        to_x0_out,
        bar_prev.sqrt() * beta / (1 - bar),
        alpha.sqrt() * (1 - bar_prev) / (1 - bar),
        zero,
        zero,
        torch.where(noisy, std, zero),
    ]
    bounds = torch.stack([small.log(), beta.log()], dim=1) if variance_type == "learned_range" else None
    return StepTable(timesteps, torch.stack(rows, dim=1), bounds, _levels(bar_prev))


def ddim_table(
    schedule: NoiseSchedule,
    timesteps: Tensor,
    *,
    prediction_type: str = "epsilon",
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
) -> StepTable:
    """DDIM (Song et al. 2021, eq. 12 and 16); `eta` 0 is deterministic, 1 has the variance of DDPM.

    Args:
        schedule, timesteps, prediction_type: as for `ddpm_table`.
        eta: share of DDPM's standard deviation, at least 0.
        use_clipped_model_output: derive epsilon again from the clipped x0, instead of using the network's own.

    Raises:
        ValueError: a type is not known, or `eta` is negative or not finite.
    """
    if not 0 <= eta < float("inf"):
        raise ValueError(f"eta is {eta}, must be a finite number of at least 0")
    bar, bar_prev = _alpha_bars(schedule, timesteps)
    to_x0_x, to_x0_out = _x0_from(prediction_type, bar)
    std = eta * ((1 - bar_prev) / (1 - bar) * (1 - bar / bar_prev)).sqrt()
    direction = (1 - bar_prev - std.square()).clamp_min(0).sqrt()
    zero = torch.zeros_like(bar)
    if use_clipped_model_output:
        # eps = (x_t - sqrt(abar) x0) / sqrt(1 - abar), with the clipped x0
        keep, eps_x, eps_out = -bar.sqrt() / (1 - bar).sqrt(), 1 / (1 - bar).sqrt(), zero
    else:
        keep = zero
        eps_x, eps_out = _epsilon_from(prediction_type, bar)
    rows = [
        to_x0_x,
        to_x0_out,
        bar_prev.sqrt() + direction * keep,
        direction * eps_x,
        direction * eps_out,
        zero,
        std,
    ]
    return StepTable(timesteps, torch.stack(rows, dim=1), None, _levels(bar_prev))


def _alpha_bars(schedule: NoiseSchedule, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """abar at each timestep and at the one visited next; 1 after the last."""
    bar = schedule.alphas_cumprod[timesteps]
    return bar, torch.cat([bar[1:], bar.new_ones(1)])


def _levels(bar_prev: Tensor) -> Tensor:
    return torch.stack([bar_prev.sqrt(), (1 - bar_prev).sqrt()], dim=1)


def _x0_from(prediction_type: str, bar: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) in x0 = A x_t + B out."""
    if prediction_type == "epsilon":
        return 1 / bar.sqrt(), -((1 - bar) / bar).sqrt()
    if prediction_type == "sample":
        return torch.zeros_like(bar), torch.ones_like(bar)
    if prediction_type == "v_prediction":
        return bar.sqrt(), -(1 - bar).sqrt()
    raise ValueError(f"prediction_type is {prediction_type!r}, must be one of {', '.join(PREDICTION_TYPES)}")


def _epsilon_from(prediction_type: str, bar: Tensor) -> tuple[Tensor, Tensor]:
    """(P, Q) in epsilon = P x_t + Q out."""
    if prediction_type == "epsilon":
        return torch.zeros_like(bar), torch.ones_like(bar)
    if prediction_type == "sample":
        return 1 / (1 - bar).sqrt(), -(bar / (1 - bar)).sqrt()
    return (1 - bar).sqrt(), bar.sqrt()
