"""Build step tables of denoising_diffusion_pytorch's samplers from the buffers of a diffusion object.

The buffers, not the name of a schedule, define what such an object does: loading a checkpoint replaces them. They are
float32, rounded from float64. A row made of them matches the library's code up to the rounding of the step itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastddpm.process.tables import StepTable, make_table
from fastddpm.process.timesteps import spaced_timesteps

# The library's names of the predictions, and this package's.
OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}


def prediction_type(diffusion: Any) -> str:
    """Return the prediction type of the diffusion's `objective`.

    Raises:
        ValueError: the objective is not known.
    """
    objective = diffusion.objective
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}, must be one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]


def p_sample_table(diffusion: Any, *, predicts: str | None = None, learned: bool = False) -> StepTable:
    """Return the table of `p_sample` at every timestep from T - 1 to 0: DDPM without noise at timestep 0.

    The sampler clips x0.

    Args:
        diffusion: the object.
        predicts: the prediction type; None for that of its `objective`.
        learned: whether the network's second half of channels sets the variance, between beta_tilde and beta.

    Raises:
        ValueError: the objective is not known, or a coefficient is not finite.
    """
    timesteps = torch.arange(int(diffusion.num_timesteps) - 1, -1, -1)
    low = _buffer(diffusion, "posterior_log_variance_clipped")[timesteps]
    bounds = torch.stack([low, _buffer(diffusion, "betas")[timesteps].log()], dim=1).double() if learned else None
    std = torch.ones(len(timesteps), dtype=torch.float64) if learned else (0.5 * low).exp().double()
    zero = torch.zeros_like(std)
    columns = (
        *_x0_from(diffusion, timesteps, predicts),
        _buffer(diffusion, "posterior_mean_coef1")[timesteps].double(),
        _buffer(diffusion, "posterior_mean_coef2")[timesteps].double(),
        zero,
        zero,
        torch.where(timesteps > 0, std, zero),
    )
    bar = _buffer(diffusion, "alphas_cumprod")[timesteps].double()
    table = make_table(
        timesteps, columns, before=bar, after=_following(bar), log_variance=bounds,
        learned="range" if learned else None,
    )  # fmt: skip
    return _checked(diffusion, table)


def ddim_sample_table(diffusion: Any, *, rederive: bool) -> StepTable:
    """Return the table of `ddim_sample` with the diffusion's `sampling_timesteps` and `ddim_sampling_eta`.

    Args:
        diffusion: the object.
        rederive: for `pred_noise`, whether to compute the noise again from the clipped x0 (`GaussianDiffusion`) or to
            use the network's output (the one-dimensional and the class-conditional variant). The other objectives
            always compute it from x0.

    Raises:
        ValueError: the objective is not known, `sampling_timesteps` is out of range, or a coefficient is not finite.
    """
    total, steps, eta = int(diffusion.num_timesteps), diffusion.sampling_timesteps, diffusion.ddim_sampling_eta
    try:
        timesteps = spaced_timesteps(total, steps, "denoising_diffusion_pytorch")
    except ValueError:
        raise ValueError(f"sampling_timesteps is {steps!r}, must be an integer from 1 to {total}") from None
    bars = _buffer(diffusion, "alphas_cumprod")
    # As the library does it: in the buffers' dtype, in this order.
    alpha, following = bars[timesteps[:-1]], bars[timesteps[1:]]
    sigma = eta * ((1 - alpha / following) * (1 - following) / (1 - alpha)).sqrt()
    direction = (1 - following - sigma**2).sqrt().double()
    signal = following.sqrt().double()
    of_x, of_x0 = torch.zeros_like(direction), signal
    of_out = direction
    if rederive or diffusion.objective != "pred_noise":  # noise = (recip x - x0) / recipm1
        recip, recipm1 = (
            _buffer(diffusion, name)[timesteps[:-1]].double()
            for name in ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
        )
        of_x, of_x0, of_out = direction * recip / recipm1, signal - direction / recipm1, torch.zeros_like(direction)
    zero, one = direction.new_zeros(1), direction.new_ones(1)  # the last step returns x0
    columns = (
        *_x0_from(diffusion, timesteps),
        torch.cat([of_x0, one]),
        torch.cat([of_x, zero]),
        torch.cat([of_out, zero]),
        torch.zeros(len(timesteps), dtype=torch.float64),
        torch.cat([sigma.double(), zero]),
    )
    bar = bars[timesteps].double()
    return _checked(diffusion, make_table(timesteps, columns, before=bar, after=_following(bar)))


def _x0_from(diffusion: Any, timesteps: Tensor, predicts: str | None = None) -> tuple[Tensor, Tensor]:
    """Return (A, B) in x0 = A x + B out, float64 [S]."""
    predicts = predicts or prediction_type(diffusion)
    if predicts == "sample":
        zero = torch.zeros(len(timesteps), dtype=torch.float64)
        return zero, torch.ones_like(zero)
    names = ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
    if predicts == "v_prediction":
        names = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    a, b = (_buffer(diffusion, name)[timesteps].double() for name in names)
    return a, -b


def _buffer(diffusion: Any, name: str) -> Tensor:
    value = getattr(diffusion, name, None)
    total = int(diffusion.num_timesteps)
    if not isinstance(value, Tensor) or value.shape != (total,):
        held = f"has shape {list(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
        raise ValueError(f"the diffusion's {name} {held}, must be a tensor of num_timesteps, {total}, values")
    return value.detach().cpu()


def _following(bar: Tensor) -> Tensor:
    return torch.cat([bar[1:], bar.new_ones(1)])


def _checked(diffusion: Any, table: StepTable) -> StepTable:
    wrong = (~table.rows.isfinite().all(dim=1)).nonzero()
    if not len(wrong):
        return table
    t = int(table.timesteps[int(wrong[0])])
    eta, bar = diffusion.ddim_sampling_eta, float(diffusion.alphas_cumprod[t])
    if math.isfinite(bar) and 0 < bar < 1:
        raise ValueError(f"ddim_sampling_eta is {eta}, too large: timestep {t} has less variance than that")
    raise ValueError(
        f"alphas_cumprod[{t}] is {bar}, which objective {diffusion.objective!r} cannot be sampled with, must be in "
        "(0, 1): fewer than 21 timesteps of the linear beta_schedule leave nothing"
    )
