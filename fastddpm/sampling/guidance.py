"""Change the prediction between the network and `reverse_step`, as far as the settings ask for it.

Plain classifier-free guidance is not here: the kernel combines the doubled batch itself. These functions read and
write only device memory, so a graph can capture them with the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastddpm.process.tables import Shifts, StepTable

ClassifierFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Classifier:
    """Guidance by the gradient of another model (Dhariwal & Nichol 2021).

    Attributes:
        gradient: (x float32 [N, ...], t int64 [N], labels int64 [N]) -> gradient of log p(label | x_t) in x, [N, ...].
        scale: of the gradient.
        shifts: "mean", of the step, by its variance times the gradient (algorithm 1, for ancestral sampling; at the
            last step, which adds no noise, in convention "guided_diffusion" alone),
            "epsilon", by -sqrt(1 - abar) times the gradient (algorithm 2, for DDIM and its like), or "clipped epsilon":
            the same for the epsilon that belongs to the clipped x0, and x0 is not clipped again (guided-diffusion's
            `condition_score`).
    """

    gradient: ClassifierFn
    scale: float
    shifts: Shifts

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Return scale * gradient, float32 like `x`. The function may differentiate in its x, a detached view."""
        with torch.enable_grad():
            gradient = self.gradient(x.detach(), t, labels)
        if not isinstance(gradient, Tensor) or gradient.shape != x.shape:
            what = list(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
            raise ValueError(f"classifier_fn returned {what}, must return a gradient of x's shape, {list(x.shape)}")
        return self.scale * gradient.detach().float()


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): x0 is clipped to +-s and divided by s.

    s is the `ratio`-quantile of |x0| in each sample, kept within [1, `maximum`].
    """

    ratio: float
    maximum: float

    def __call__(self, x0: Tensor) -> Tensor:
        """Return s, float32 [N], for the predicted x0 [N, ...]; quantiles interpolate as `torch.quantile` does."""
        magnitudes = x0.flatten(1).abs()
        position = self.ratio * (magnitudes.shape[1] - 1)
        below = int(position)
        # Only the values above the quantile must be sorted.
        top = magnitudes.topk(magnitudes.shape[1] - below, dim=1).values
        quantile = top[:, -1] if top.shape[1] == 1 else torch.lerp(top[:, -1], top[:, -2], position - below)
        return quantile.clamp(1, self.maximum)


def combine(out: Tensor, channels: int, scale: Tensor | None) -> Tensor:
    """Return the prediction in float32 [N, `channels`, ...]; for a doubled batch it is u + scale * (c - u)."""
    prediction = out[:, :channels].float()
    if scale is None:
        return prediction
    unconditional, conditional = prediction.chunk(2)
    return unconditional + per_sample(scale, prediction) * (conditional - unconditional)


def rescale_guidance(out: Tensor, channels: int, scale: Tensor, rescale: float) -> Tensor:
    """Scale a doubled batch so that guidance gives it the standard deviation of the conditional half.

    Lin et al. 2024, eq. 15 and 16: f * (u + s * (c - u)) is guidance with f * u and f * c, which leaves the
    combination to the kernel. f is 1 - `rescale` + `rescale` * std(c) / std(u + s * (c - u)), per sample.
    """
    guided, conditional = combine(out, channels, scale), out[len(out) // 2 :, :channels].float()
    ratio = _std(conditional) / _std(guided)
    factor = torch.lerp(torch.ones_like(ratio), ratio, rescale)
    return torch.cat([out[:, :channels] * per_sample(torch.cat([factor, factor]), out), out[:, channels:]], dim=1)


def _std(x: Tensor) -> Tensor:
    return x.flatten(1).std(1, correction=0).clamp_min(torch.finfo(x.dtype).tiny)


def add_to_prediction(out: Tensor, channels: int, shift: Tensor) -> Tensor:
    """Add `shift` [N, `channels`, ...] to the prediction in `out`, to both halves of a doubled batch."""
    shift = shift.repeat(len(out) // len(shift), *[1] * (shift.ndim - 1))
    return torch.cat([out[:, :channels] + shift, out[:, channels:]], dim=1)


def clipped_prediction(
    prediction: Tensor, x: Tensor, row: Tensor, clip_range: float | None, threshold: DynamicThreshold | None
) -> Tensor:
    """Return the prediction [N, ...] for the clipped x0: the `out` with A x + B out = clipped x0.

    Args:
        row: [7], of the table.
        clip_range, threshold: how x0 is clipped, if at all.
    """
    a, b = row[0], row[1]
    x0 = a * x + b * prediction
    if threshold is not None:
        limit = per_sample(threshold(x0), x0)
        x0 = x0.clamp(-limit, limit) / limit
    elif clip_range is not None:
        x0 = x0.clamp(-clip_range, clip_range)
    return torch.where(b == 0, prediction, (x0 - a * x) / b)  # for a clean x, x0 does not determine the prediction


def log_of_variance(out: Tensor, channels: int) -> Tensor:
    """Take the logarithm of the second half of channels, for networks that predict the variance itself."""
    return torch.cat([out[:, :channels].float(), out[:, channels:].float().log()], dim=1)


def learned_std(out: Tensor, channels: int, bounds: Tensor) -> Tensor:
    """Return the standard deviation [N, `channels`, ...] that v, the second half of the channels, stands for.

    Args:
        out: [N or 2N, 2 * `channels`, ...]; bounds: [1, 2], the log-variances of v = -1 and v = 1.
    """
    v = out[:, channels:].float()
    low, high = bounds.to(v.dtype).unbind(1)
    return torch.lerp(low, high, (v + 1) / 2).mul(0.5).exp()


def score_shift(table: StepTable) -> Tensor:
    """Return the factor by which a score (a gradient of log p) changes the network's output, per row: float64 [S].

    A score g changes x0 by (1 - abar) / sqrt(abar) * g, whatever is predicted, and x0 = A x + B out. At pure noise,
    where abar is 0, a label says nothing about x_t, and it is 0.
    """
    levels = torch.cat([torch.tensor([table.start], dtype=torch.float64), table.levels[:-1].double()])
    signal, noise = levels.unbind(1)
    reach = signal * table.rows[:, 1]
    return torch.where(reach == 0, 0.0, noise.square() / torch.where(reach == 0, 1.0, reach))


def per_sample(scale: Tensor, like: Tensor) -> Tensor:
    """Return a scale [1] or [N] as [., 1, ...], to multiply a tensor [N, ...]."""
    return scale.view(-1, *[1] * (like.ndim - 1))
