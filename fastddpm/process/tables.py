"""Make the coefficient table of a sampler: one row [A B C D E F S] per step.

    x0   = clip(A x_t + B out)
    next = C x0 + D x_t + E out + F x0_prev + S z,      z ~ N(0, I)

`fastddpm_kernels.reverse_step` executes a row. A sampler is therefore a function from timesteps to rows. The rows are
computed once, in float64, and stored in float32. `out` is the network's prediction, x0_prev the x0 of the step before.
This module has DDPM, DDIM and its inversion. `repaint` has RePaint; `multistep` and `sigma_space` have the solvers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastddpm.process.schedule import NoiseSchedule

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
CONVENTIONS = ("diffusers", "guided_diffusion", "denoising_diffusion_pytorch")

Level = tuple[float, float]
Shifts = Literal["mean", "epsilon", "clipped epsilon"]


@dataclass(frozen=True, eq=False)
class StepTable:
    """The coefficients and levels of a sampler at each step.

    Attributes:
        timesteps: int64 [S], which the network reads.
        rows: float64 [S, 7 to 10], the columns A B C D E F S, then F2, F3 and F4 of the x0 two to four steps before.
        log_variance: float64 [S, 2], the logarithms of the variance for v = -1 and v = 1, where the second half of the
            network's channels, v, sets the variance; column S is then 1 or 0. Else None.
        levels: float64 [S, 2], (signal, noise) of x after the step: sqrt(abar), sqrt(1 - abar).
        needs_network: bool [S]; False where the row uses neither x0 nor the network's output.
        start: (signal, noise) of x before the first step.
        learned: the meaning of v: "range" (between the two logarithms), "log" (v is the log-variance: the same formula
            with bounds -1 and 1), "variance" (v is the variance: as "log", after taking its logarithm), or None.
        mean_std: float64 [S], whose square is the factor by which a classifier's gradient moves the mean, where it
            differs from column S (like S, it multiplies v's standard deviation); else None.
        shifts: the quantity that a classifier's gradient moves, see `guidance.Classifier`.
        init_noise_sigma: the standard deviation of the noise to start from.
        stores: the quantity that A and B give and later rows combine: "x0"; for samplers that extrapolate
            other quantities "epsilon" or "out", the prediction itself.
        restart: a function that returns the table from a row on; None where slicing the rows gives the same.
        begins: the rows at which a step begins, for `restart`; a step may take several evaluations.
    """

    timesteps: Tensor
    rows: Tensor
    log_variance: Tensor | None
    levels: Tensor
    needs_network: Tensor
    start: Level
    learned: str | None = None
    mean_std: Tensor | None = None
    shifts: Shifts = "epsilon"
    init_noise_sigma: float = 1.0
    stores: str = "x0"
    restart: Callable[[int], StepTable] | None = None
    begins: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def multistep(self) -> bool:
        """Whether some row uses the x0 of the step before."""
        return self.history > 0

    @property
    def history(self) -> int:
        """The number of earlier predictions that the rows combine, 0 to 4."""
        return max((age for age, column in ((1, 5), (2, 7), (3, 8), (4, 9)) if self._uses(column)), default=0)

    def _uses(self, column: int) -> bool:
        return column < self.rows.shape[1] and bool((self.rows[:, column] != 0).any())

    def skip(self, index: int) -> StepTable:
        """Return the table from row `index` on, to start from a partly noised x.

        If the first row needs the x0 before it, it becomes of first order: F is added to C.

        Raises:
            ValueError: `index` is not from 0 to S - 1.
        """
        if not 0 <= index < len(self):
            raise ValueError(f"index is {index}, must be from 0 to {len(self) - 1}, the last row of the table")
        if index == 0:
            return self
        if self.restart is not None:
            rest = self.restart(index)  # may combine fewer predictions, but a loop's buffers have all columns
            return replace(rest, rows=pad(rest.rows, (0, self.rows.shape[1] - rest.rows.shape[1])))
        rows = self.rows[index:].clone()
        rows[0, 2] += rows[0, 5]
        rows[0, 5] = 0
        signal, noise = self.levels[index - 1].tolist()
        return replace(
            self,
            timesteps=self.timesteps[index:],
            rows=rows,
            log_variance=None if self.log_variance is None else self.log_variance[index:],
            levels=self.levels[index:],
            needs_network=self.needs_network[index:],
            start=(signal, noise),
            mean_std=None if self.mean_std is None else self.mean_std[index:],
        )


def ddpm_table(
    schedule: NoiseSchedule,
    timesteps: Sequence[int] | Tensor,
    *,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    convention: str = "diffusers",
) -> StepTable:
    """Return the table of ancestral sampling, on all or on strided steps (Ho et al. 2020, eq. 7 and 11).

    For strided steps alpha_t is abar_t / abar_prev (Nichol & Dhariwal 2021, eq. 19), with abar_prev = 1 at the last
    step. There beta_tilde is 0, and each library avoids its logarithm in its own way, named by `convention`:
    "diffusers" and "denoising_diffusion_pytorch" cut it at 1e-20, "guided_diffusion" takes the value of the step
    before. They also differ in which steps get noise: in the first two every timestep above 0, in guided-diffusion
    every step but the last. There a classifier's gradient still moves the last step, by the variance of that step.

    Args:
        schedule: the forward process the network was trained on.
        timesteps: [S], falling.
        prediction_type: what the network predicts: "epsilon", "sample" (x_0) or "v_prediction" (Salimans & Ho 2022).
        variance_type: "fixed_small" (beta_tilde), "fixed_small_log" (the same), "fixed_large" (beta),
            "fixed_large_log" (the same), "learned_range" (the second half of the network's channels interpolates their
            logarithms), or "learned" (that half is the variance in diffusers, the log-variance in the other two).
        convention: "diffusers", "guided_diffusion" or "denoising_diffusion_pytorch".

    Raises:
        ValueError: a type is not known, the timesteps do not fall or are out of range, or epsilon is predicted at a
            timestep without signal.
    """
    if variance_type not in VARIANCE_TYPES:
        raise ValueError(f"variance_type is {variance_type!r}, must be one of {', '.join(VARIANCE_TYPES)}")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}, must be one of {', '.join(CONVENTIONS)}")
    timesteps, bar, bar_prev = walk(schedule, timesteps)
    alpha = bar / bar_prev
    beta = 1 - alpha
    small = beta * (1 - bar_prev) / (1 - bar)
    if convention == "guided_diffusion":
        noisy = torch.arange(len(timesteps)) < len(timesteps) - 1
        small = torch.cat([small[:-1], small[-2:-1] if len(small) > 1 else beta])
    else:
        noisy = timesteps > 0
        small = small.clamp_min(1e-20)
    learned, bounds = None, None
    if variance_type == "learned_range":
        learned, bounds = "range", torch.stack([small.log(), beta.log()], dim=1)
    elif variance_type == "learned":
        learned = "variance" if convention == "diffusers" else "log"
        bounds = torch.tensor([[-1.0, 1.0]], dtype=torch.float64).repeat(len(timesteps), 1)
    large = variance_type in ("fixed_large", "fixed_large_log")
    std = torch.ones_like(beta) if learned else (beta if large else small).sqrt()
    zero = torch.zeros_like(beta)
    mean_std = None
    if convention == "guided_diffusion":
        # At the last step guided-diffusion's fixed variances are beta_tilde of the step before ("large") and 0.
        final = std[-1:] if learned else small[-1:].sqrt() if large else zero[-1:]
        mean_std = torch.cat([std[:-1], final])
    return make_table(
        timesteps,
        (
            *x0_from(prediction_type, bar, timesteps),
            bar_prev.sqrt() * beta / (1 - bar),
            alpha.sqrt() * (1 - bar_prev) / (1 - bar),
            zero,
            zero,
            torch.where(noisy, std, zero),
        ),
        before=bar,
        after=bar_prev,
        log_variance=bounds,
        learned=learned,
        mean_std=mean_std,
        shifts="mean",
    )


def ddim_table(
    schedule: NoiseSchedule,
    timesteps: Sequence[int] | Tensor,
    *,
    prediction_type: str = "epsilon",
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    set_alpha_to_one: bool = True,
) -> StepTable:
    """Return the table of DDIM (Song et al. 2021, eq. 12 and 16); `eta` 0 is deterministic, 1 gives DDPM's variance.

    Args:
        schedule, timesteps, prediction_type: as for `ddpm_table`.
        eta: share of DDPM's standard deviation, at least 0.
        use_clipped_model_output: derive epsilon again from the clipped x0, as guided-diffusion and
            denoising_diffusion_pytorch do, instead of using the network's own, as diffusers does.
        set_alpha_to_one: end at x_0; if False, at the level of timestep 0.

    Raises:
        ValueError: as `ddpm_table`, or `eta` is negative or not finite.
    """
    if not 0 <= eta < float("inf"):
        raise ValueError(f"eta is {eta}, must be a finite number of at least 0")
    timesteps, bar, bar_prev = walk(schedule, timesteps, set_alpha_to_one=set_alpha_to_one)
    std = eta * ((1 - bar_prev) / (1 - bar) * (1 - bar / bar_prev)).sqrt()
    direction = (1 - bar_prev - std.square()).clamp_min(0).sqrt()
    to_x0 = x0_from(prediction_type, bar, timesteps)
    c, d, e = _ddim_mean(prediction_type, bar, bar_prev, direction, rederive=use_clipped_model_output)
    shifts: Shifts = "clipped epsilon" if use_clipped_model_output else "epsilon"
    columns = (*to_x0, c, d, e, torch.zeros_like(bar), std)
    return make_table(timesteps, columns, before=bar, after=bar_prev, shifts=shifts)


def ddim_inversion_table(
    schedule: NoiseSchedule,
    timesteps: Sequence[int] | Tensor,
    *,
    prediction_type: str = "epsilon",
    use_clipped_model_output: bool = False,
    set_alpha_to_one: bool = True,
) -> StepTable:
    """Return the table of DDIM backwards, which encodes x_0 as the x_T that `ddim_table` with eta 0 decodes.

    It follows the ODE of Song et al. 2021 (section 4.3) from each level up to the next. As in diffusers'
    `DDIMInverseScheduler`, the network reads the timestep of the level that a step goes to.

    Args:
        schedule, timesteps, prediction_type, use_clipped_model_output: as for `ddim_table`. The timesteps are the
            falling ones of the sampler that will decode; the table has them rising.
        set_alpha_to_one: start from x_0 itself; if False, from x at the level of timestep 0.

    Raises:
        ValueError: as `ddim_table`; or "sample" is predicted with `set_alpha_to_one`: without noise, epsilon does not
            follow from x and x_0.
    """
    timesteps = schedule.check_timesteps(timesteps).flip(0)
    levels = schedule.alphas_cumprod
    bar_next = levels[timesteps]
    bar = torch.cat([levels.new_ones(1) if set_alpha_to_one else levels[:1], bar_next[:-1]])
    if prediction_type == "sample" or use_clipped_model_output:
        setting = "prediction_type is 'sample'" if prediction_type == "sample" else "use_clipped_model_output is True"
        if set_alpha_to_one:
            raise ValueError(f"{setting} but set_alpha_to_one is True: a clean image and x_0 do not tell epsilon")
    to_x0 = x0_from(prediction_type, bar, timesteps)
    c, d, e = _ddim_mean(prediction_type, bar, bar_next, (1 - bar_next).sqrt(), rederive=use_clipped_model_output)
    zero = torch.zeros_like(bar)
    return make_table(timesteps, (*to_x0, c, d, e, zero, zero), before=bar, after=bar_next)


def make_table(
    timesteps: Tensor,
    columns: Sequence[Tensor],
    *,
    before: Tensor,
    after: Tensor,
    log_variance: Tensor | None = None,
    learned: str | None = None,
    needs_network: Tensor | None = None,
    mean_std: Tensor | None = None,
    shifts: Shifts = "epsilon",
) -> StepTable:
    """Return a `StepTable` from its seven columns and abar before and after each step, all [S]."""
    return StepTable(
        timesteps,
        torch.stack(list(columns), dim=1),
        log_variance,
        torch.stack([after.sqrt(), (1 - after).sqrt()], dim=1),
        torch.ones_like(timesteps, dtype=torch.bool) if needs_network is None else needs_network,
        (float(before[0].sqrt()), float((1 - before[0]).sqrt())),
        learned,
        mean_std,
        shifts,
    )


def walk(
    schedule: NoiseSchedule, timesteps: Sequence[int] | Tensor, *, set_alpha_to_one: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the checked timesteps, abar at each, and abar at the next one visited (1 or abar_0 after the last)."""
    timesteps = schedule.check_timesteps(timesteps)
    levels = schedule.alphas_cumprod
    bar = levels[timesteps]
    return timesteps, bar, torch.cat([bar[1:], levels.new_ones(1) if set_alpha_to_one else levels[:1]])


def x0_from(prediction_type: str, bar: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return (A, B) in x0 = A x_t + B out.

    Raises:
        ValueError: `prediction_type` is not known, or is "epsilon" where abar is 0.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}, must be one of {', '.join(PREDICTION_TYPES)}")
    if prediction_type == "sample":
        return torch.zeros_like(bar), torch.ones_like(bar)
    if prediction_type == "v_prediction":
        return bar.sqrt(), -(1 - bar).sqrt()
    if bool((bar == 0).any()):
        raise ValueError(
            f"prediction_type is 'epsilon' but the schedule has zero terminal SNR (rescale_betas_zero_snr): x at "
            f"timestep {int(timesteps[bar == 0][0])} is pure noise, predict 'v_prediction' or 'sample'"
        )
    return 1 / bar.sqrt(), -((1 - bar) / bar).sqrt()


def _epsilon_from(prediction_type: str, bar: Tensor) -> tuple[Tensor, Tensor]:
    """Return (P, Q) in epsilon = P x_t + Q out."""
    if prediction_type == "epsilon":
        return torch.zeros_like(bar), torch.ones_like(bar)
    if prediction_type == "sample":
        return 1 / (1 - bar).sqrt(), -(bar / (1 - bar)).sqrt()
    return (1 - bar).sqrt(), bar.sqrt()


def _ddim_mean(
    prediction_type: str, bar: Tensor, bar_next: Tensor, direction: Tensor, *, rederive: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (C, D, E) of sqrt(abar_next) x0 + direction epsilon."""
    zero = torch.zeros_like(bar)
    if rederive:  # epsilon = (x_t - sqrt(abar) x0) / sqrt(1 - abar), with the clipped x0
        keep, eps_x, eps_out = -(bar / (1 - bar)).sqrt(), 1 / (1 - bar).sqrt(), zero
    else:
        keep = zero
        eps_x, eps_out = _epsilon_from(prediction_type, bar)
    return bar_next.sqrt() + direction * keep, direction * eps_x, direction * eps_out
