"""Hold tables by timestep for training steps and likelihoods; they stay float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import ddpm_table
from fastddpm.training.objective.weighting import loss_weights

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")


class Coefficients(NamedTuple):
    """The coefficients of each sample's timestep, [N, 1, ...]: x_t = signal x0 + sigma z, and those of the methods.

    `log_posterior` is the logarithm of the posterior's variance; at t = 0, where that is 0, the value of t = 1.
    """

    signal: Tensor
    sigma: Tensor
    of_x_t: Tensor
    of_output: Tensor
    posterior_x0: Tensor
    posterior_x_t: Tensor
    posterior_variance: Tensor
    log_posterior: Tensor
    log_beta: Tensor
    log_fixed: Tensor

    def pred_x0(self, x_t: Tensor, out: Tensor) -> Tensor:
        """Return the x0 that the network's output implies."""
        return self.of_x_t * x_t + self.of_output * out

    def posterior_mean(self, x0: Tensor, x_t: Tensor) -> Tensor:
        """Return the mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
        return self.posterior_x0 * x0 + self.posterior_x_t * x_t

    def model_log_variance(self, v: Tensor | None) -> Tensor:
        """Return the log-variance: fixed, or learned between posterior and beta (Nichol & Dhariwal 2021, eq. 15)."""
        if v is None:
            return self.log_fixed
        return self.log_posterior + (v + 1) / 2 * (self.log_beta - self.log_posterior)


class Tables(nn.Module):
    """Hold the tables of a schedule: they move with the module, and no cast changes them.

    Attributes:
        rows: float64 [T, 10], the columns of `Coefficients`.
        q_sample: float32 [T, 2], as `fastddpm_kernels.q_sample` takes it.
        weights: float64 [T], of the loss.
    """

    rows: Tensor
    q_sample: Tensor
    weights: Tensor

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction_type: str,
        variance_type: str,
        *,
        weighting: str,
        min_snr_gamma: float,
        p2_gamma: float,
        p2_k: float,
    ) -> None:
        """Take the arguments of `GaussianDiffusion` and raise its errors."""
        super().__init__()
        if variance_type not in VARIANCE_TYPES:
            raise ValueError(f"variance_type is {variance_type!r}, must be one of {', '.join(VARIANCE_TYPES)}")
        bar = schedule.alphas_cumprod
        falling = torch.arange(schedule.num_train_timesteps - 1, -1, -1)
        # guided-diffusion chooses the log-variance at t = 0 so that its decoder has a finite width.
        table = ddpm_table(
            schedule,
            falling,
            prediction_type=prediction_type,
            variance_type="learned_range",
            convention="guided_diffusion",
        )
        assert table.log_variance is not None
        of_x_t, of_output, posterior_x0, posterior_x_t = table.rows.flip(0)[:, :4].unbind(1)
        log_small, log_large = table.log_variance.flip(0).unbind(1)
        log_fixed = torch.cat([log_small[:1], log_large[1:]]) if variance_type == "fixed_large" else log_small
        bar_before = torch.cat([bar.new_ones(1), bar[:-1]])
        self.rows = torch.stack(
            [
                bar.sqrt(),
                (1 - bar).sqrt(),
                of_x_t,
                of_output,
                posterior_x0,
                posterior_x_t,
                schedule.betas * (1 - bar_before) / (1 - bar),
                log_small,
                log_large,
                log_fixed,
            ],
            dim=1,
        )
        self.q_sample = schedule.q_sample_table()
        self.weights = loss_weights(
            schedule, weighting, prediction_type, min_snr_gamma=min_snr_gamma, p2_gamma=p2_gamma, p2_k=p2_k
        )

    def at(self, t: Tensor, like: Tensor) -> Coefficients:
        """Return the coefficients at t int64 [N], in the dtype of `like` [N, ...] and broadcastable to it."""
        rows = self.rows.index_select(0, t).to(like.dtype)
        return Coefficients(*rows.view(len(t), -1, *[1] * (like.ndim - 1)).unbind(1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tables:
        super()._apply(fn, recurse)
        device = fn(self.rows.new_empty(0)).device
        wide = torch.float32 if device.type == "mps" else torch.float64  # which has no float64
        self.rows, self.weights = self.rows.to(device, wide), self.weights.to(device, wide)
        self.q_sample = self.q_sample.to(device)
        return self
