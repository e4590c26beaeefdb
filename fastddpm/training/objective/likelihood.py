"""Compute bits per dimension of 8-bit images under a model, term by term (Ho et al. 2020, eq. 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from fastddpm_kernels.philox import STREAM_LIKELIHOOD, normal
from torch import Tensor

from fastddpm.common import checks
from fastddpm.training.objective.losses import normal_kl, variational_bound
from fastddpm.training.objective.noise import noise_keys

if TYPE_CHECKING:
    from fastddpm.training.objective.gaussian import GaussianDiffusion


@dataclass(frozen=True, eq=False)
class BitsPerDim:
    """The variational bound on the negative log-likelihood of N images and its terms, in bits per dimension.

    Attributes:
        total: float64 [N], the bound: the terms of all timesteps and the prior's. For a part of the timesteps it is
            an estimate in which each term counts T / S times.
        prior: float64 [N], L_T = KL(q(x_T | x_0) || N(0, I)).
        timesteps: int64 [S], those visited, falling.
        terms: float64 [N, S], at t = 0 the decoder's L_0, else L_t.
        x0_mse, noise_mse: float64 [N, S], mean squared errors of the predicted x0 (clipped where the model clips) and
            of the noise that it stands for.
    """

    total: Tensor
    prior: Tensor
    timesteps: Tensor
    terms: Tensor
    x0_mse: Tensor
    noise_mse: Tensor


@torch.no_grad()
def bits_per_dim(
    diffusion: GaussianDiffusion,
    x: Tensor,
    *,
    labels: Tensor | None = None,
    batch_size: int = 16,
    timesteps: Tensor | None = None,
    first_sample: int = 0,
) -> BitsPerDim:
    """Return the bound for each image, with one noise per image and timestep, like guided-diffusion's `calc_bpd_loop`.

    The network runs in evaluation mode and in its own precision, or autocast's; all other arithmetic is float64. The
    noise of an image is a function of (the diffusion's seed, the image's number, t), whatever the batch size.

    Args:
        diffusion: the model.
        x: [N, C, ...], 8-bit images scaled to [-1, 1]: multiples of 2 / 255 from -1.
        labels: int64 [N], if the network takes them.
        batch_size: the number of images per pass through the network.
        timesteps: int64 [S], those to visit, falling; None for all.
        first_sample: the number of x[0], if x is a part of a larger set.

    Raises:
        TypeError, ValueError: `x` is not floating point, there are no images, values are not 8-bit ones, or another
            argument does not fit.
    """
    schedule = diffusion.schedule
    if timesteps is None:
        timesteps = torch.arange(schedule.num_train_timesteps - 1, -1, -1)
    timesteps = schedule.check_timesteps(timesteps)
    size = checks.positive(batch_size, "batch_size")
    _check_images(x)
    modules = [module for module in diffusion.modules() if module.training]
    diffusion.eval()
    try:
        parts = [
            _batch(diffusion, x[k : k + size], labels if labels is None else labels[k : k + size], timesteps, first)
            for k, first in zip(range(0, len(x), size), range(first_sample, first_sample + len(x), size), strict=True)
        ]
    finally:
        for module in modules:
            module.training = True
    prior, terms, x0_mse, noise_mse = (torch.cat(part) for part in zip(*parts, strict=True))
    total = terms.mean(1) * schedule.num_train_timesteps + prior
    return BitsPerDim(total, prior, timesteps, terms, x0_mse, noise_mse)


def _batch(
    diffusion: GaussianDiffusion, x: Tensor, labels: Tensor | None, timesteps: Tensor, first: int
) -> tuple[Tensor, ...]:
    """Return prior [n], and terms, x0_mse and noise_mse [n, S], of a batch."""
    keys = noise_keys(diffusion.seed, len(x), first, diffusion._tables.rows.device)
    x0 = x.to(keys.device).double()
    labels = None if labels is None else labels.to(keys.device)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    x_self = None
    for step in timesteps.tolist():
        t = torch.full((len(x),), step, dtype=torch.int64, device=keys.device)
        c = diffusion._tables.at(t, x0)
        z = normal(keys, x0.shape[1:], step=step, stream=STREAM_LIKELIHOOD).double()
        x_t = c.signal * x0 + c.sigma * z
        p = diffusion.p_mean_variance(x_t, t, labels=labels, self_condition=x_self)
        x_self = p.pred_x0 if diffusion.self_condition else None
        true_mean, _, true_log_variance = diffusion.q_posterior(x0, x_t, t)
        term = variational_bound(x0, t, true_mean, true_log_variance, p.mean, p.log_variance)
        noise = (x_t - c.signal * p.pred_x0) / c.sigma
        rows.append((term, _mean_square(p.pred_x0 - x0), _mean_square(noise - z)))
    last = torch.full((len(x),), diffusion.schedule.num_train_timesteps - 1, dtype=torch.int64, device=keys.device)
    mean, _, log_variance = diffusion.q_mean_variance(x0, last)
    zero = torch.zeros_like(mean)
    prior = normal_kl(mean, log_variance, zero, zero).flatten(1).mean(1) / math.log(2)
    return prior, *(torch.stack(list(column), dim=1) for column in zip(*rows, strict=True))


def _mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)


def _check_images(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x is {getattr(x, 'dtype', type(x).__name__)}, must be a floating-point tensor")
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"x has shape {list(x.shape)}, must be [N, C, ...] with at least one image")
    level = (x.double() + 1) * 127.5
    if not bool(((level - level.round()).abs() < 0.01).all()) or bool((x.abs() > 1.0001).any()):
        raise ValueError(
            f"x has values from {float(x.min()):.4g} to {float(x.max()):.4g} that are not 8-bit ones, must be "
            "k / 127.5 - 1 for k from 0 to 255"
        )
