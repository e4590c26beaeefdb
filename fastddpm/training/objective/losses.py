"""Compute losses of diffusion models per sample: errors of the prediction, and terms of the variational bound.

The bound of Ho et al. 2020 (eq. 5) in bits per dimension: at t = 0 the negative log-likelihood of the 8-bit image under
the decoder, above it KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

POINTWISE = ("mse", "l1", "huber")
LOSSES = (*POINTWISE, "kl", "rescaled_kl", "hybrid", "rescaled_mse")


def pointwise(loss: str, prediction: Tensor, target: Tensor, huber_delta: float) -> Tensor:
    """Return the mean over each sample of a loss of the difference: [N].

    Args:
        loss: "mse"; "l1"; "huber", d^2 / 2 where |d| < huber_delta, else huber_delta (|d| - huber_delta / 2).
        prediction, target: [N, ...], of one dtype.
        huber_delta: above 0.
    """
    if loss == "l1":
        each = F.l1_loss(prediction, target, reduction="none")
    elif loss == "huber":
        each = F.huber_loss(prediction, target, reduction="none", delta=huber_delta)
    else:
        each = F.mse_loss(prediction, target, reduction="none")
    return each.flatten(1).mean(1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats, elementwise."""
    ratio = torch.exp(log_variance1 - log_variance2)
    return 0.5 * (log_variance2 - log_variance1 + ratio - 1 + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log-probability in nats of 8-bit values under a discretised normal (Ho et al. 2020, eq. 13).

    This is the mass of the bin of width 2 / 255 around each value; the bins of -1 and 1 reach to infinity. It uses the
    exact normal distribution, which OpenAI's code approximates, and is finite however far the tail.

    Args:
        x: multiples of 2 / 255 from -1 to 1: (2 k - 255) / 255 for k from 0 to 255.
        mean, log_variance: broadcastable against `x`.
    """
    inverse_std = torch.exp(-0.5 * log_variance)
    lower, upper = (x - mean - 1 / 255) * inverse_std, (x - mean + 1 / 255) * inverse_std
    # Mirror both edges into the lower tail, where the logarithm of the distribution function keeps its digits.
    mirrored = lower + upper > 0
    low, high = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    log_high = torch.special.log_ndtr(high)
    # Far in the tail both round to the same number.
    gap = (torch.special.log_ndtr(low) - log_high).clamp(max=-torch.finfo(log_high.dtype).tiny)
    inside = log_high + torch.log(-torch.expm1(gap))
    below, above = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
    return torch.where(x < -0.999, below, torch.where(x > 0.999, above, inside))


def variational_bound(
    x0: Tensor, t: Tensor, true_mean: Tensor, true_log_variance: Tensor, mean: Tensor, log_variance: Tensor
) -> Tensor:
    """Return the term of the variational bound at each sample's timestep, in bits per dimension: [N].

    Args:
        x0: 8-bit values in [-1, 1], [N, ...].
        t: int64 [N].
        true_mean, true_log_variance: of q(x_{t-1} | x_t, x_0), broadcastable against `x0`.
        mean, log_variance: of the model's p(x_{t-1} | x_t), also broadcastable.
    """
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    decoder = -discretized_gaussian_log_likelihood(x0, mean, log_variance)
    first = (t == 0).view(-1, *[1] * (x0.ndim - 1))
    return torch.where(first, decoder, kl).flatten(1).mean(1) / math.log(2)
