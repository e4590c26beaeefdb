"""Coefficient tables of the samplers that are more than one posterior step after another: DPM-Solver++ and RePaint."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import StepTable, ddim_table, ddpm_table, make_table, walk, x0_from

# What diffusers puts in place of abar = 0, so that log(signal / noise) is finite.
_LEAST_BAR = 2.0**-24


def dpmsolver_table(
    schedule: NoiseSchedule,
    timesteps: Sequence[int] | Tensor,
    *,
    prediction_type: str = "epsilon",
    solver_order: int = 2,
    lower_order_final: bool = True,
    final_sigmas_type: str = "zero",
) -> StepTable:
    """DPM-Solver++, multistep, midpoint (Lu et al. 2022b, algorithm 2), as diffusers' `DPMSolverMultistepScheduler`.

    With lambda = log(signal / noise) and h the step in it, the exact solution of the ODE takes x0 as constant (order
    1, which is DDIM) or as linear through the last two x0 (order 2). The first step is of order 1, and so is the last
    one where it ends at x_0, which is at lambda = infinity. diffusers visits other timesteps with this solver than
    with DDPM: `schedule.timesteps(..., multistep=True)`.

    Args:
        schedule, timesteps, prediction_type: as for `ddpm_table`.
        solver_order: 1 or 2.
        lower_order_final: with fewer than 15 steps the last one is of order 1. It always is if `final_sigmas_type` is
            "zero".
        final_sigmas_type: "zero" ends at x_0, "sigma_min" at the level of timestep 0.

    Raises:
        ValueError: as `ddpm_table`, or a setting is not one of those named.
    """
    if isinstance(solver_order, bool) or solver_order not in (1, 2):
        raise ValueError(f"solver_order is {solver_order!r}, must be 1 or 2")
    if final_sigmas_type not in ("zero", "sigma_min"):
        raise ValueError(f"final_sigmas_type is {final_sigmas_type!r}, must be 'zero' or 'sigma_min'")
    to_zero = final_sigmas_type == "zero"
    timesteps, bar, bar_next = walk(schedule, timesteps, set_alpha_to_one=to_zero)
    x0_from(prediction_type, bar, timesteps)  # epsilon where there is no signal is an error, before it is hidden
    bar = torch.where(bar == 0, _LEAST_BAR, bar)
    signal, noise, signal_next, noise_next = bar.sqrt(), (1 - bar).sqrt(), bar_next.sqrt(), (1 - bar_next).sqrt()
    shrink = noise_next / noise
    weight = signal_next - shrink * signal  # signal_next (1 - exp(-h)), also where h is infinite
    last = len(timesteps) - 1
    slope = torch.zeros_like(bar)
    if solver_order == 2:
        lower_last = to_zero or (lower_order_final and len(timesteps) < 15)
        inner = slice(1, last if lower_last else last + 1)
        log_snr = (signal / noise).log()
        step = (signal_next / noise_next).log() - log_snr
        slope[inner] = (step / (log_snr - log_snr.roll(1)))[inner] / 2  # 1 / (2 r), r = h_before / h
    zero = torch.zeros_like(bar)
    return make_table(
        timesteps,
        (
            *x0_from(prediction_type, bar, timesteps),
            weight * (1 + slope),
            shrink,
            zero,
            -weight * slope,
            zero,
        ),
        before=bar,
        after=bar_next,
    )


def repaint_table(
    schedule: NoiseSchedule,
    timesteps: Sequence[int] | Tensor,
    *,
    jump_length: int = 10,
    jump_n_sample: int = 10,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    eta: float | None = None,
    order: str = "diffusers",
) -> StepTable:
    """RePaint's walk (Lugmayr et al. 2022): denoising that every `jump_length` levels goes back up, several times.

    A row up is one step of the forward process, sqrt(alpha) x + sqrt(1 - alpha) z, without the network; inpainting
    blends the known region in after every row down.

    Args:
        schedule, timesteps, prediction_type, variance_type: as for `ddpm_table`.
        jump_length: levels that are gone up at each jump, and the distance between jumps; at least 1.
        jump_n_sample: how often each stretch is denoised, at least 1; 1 makes no jumps.
        eta: None for DDPM's rows down; a number for DDIM's with this eta, as in diffusers' `RePaintScheduler`, whose
            default is 0.
        order: "diffusers" jumps where `RePaintScheduler` does, one level below the original's ("repaint"), so that
            also the finished image is noised and denoised again.

    Raises:
        ValueError: as `ddpm_table`, a setting is not one of those named, or the variance is learned with `eta` given.
    """
    for name, value in (("jump_length", jump_length), ("jump_n_sample", jump_n_sample)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name} is {value!r}, must be an integer of at least 1")
    if order not in ("diffusers", "repaint"):
        raise ValueError(f"order is {order!r}, must be 'diffusers' or 'repaint'")
    if eta is None:
        down = ddpm_table(schedule, timesteps, prediction_type=prediction_type, variance_type=variance_type)
    elif variance_type in ("learned", "learned_range"):
        raise ValueError(f"variance_type is {variance_type!r} but eta is {eta}, which sets the variance itself")
    else:
        down = ddim_table(schedule, timesteps, prediction_type=prediction_type, eta=eta)
    return _resampled(down, jump_length, jump_n_sample, lowest=0 if order == "diffusers" else 1)


def _resampled(down: StepTable, jump_length: int, jump_n_sample: int, *, lowest: int) -> StepTable:
    """`down`'s rows in RePaint's order, with the rows up between them; `lowest`: level of the lowest jump, 0 is x_0."""
    steps = len(down)
    bar = torch.cat([torch.tensor([down.start[0]], dtype=torch.float64), down.levels[:, 0]]).square()
    # Level k has k rows to go; row i of `down` leads from level S - i to S - i - 1, bar[i] to bar[i + 1].
    jumps = dict.fromkeys(range(lowest, steps - jump_length + lowest, jump_length), jump_n_sample - 1)
    level, order, up = steps, [], []
    while level > 0:
        order.append(steps - level)
        up.append(False)
        level -= 1
        if jumps.get(level, 0) > 0:
            jumps[level] -= 1
            for _ in range(jump_length):
                level += 1
                order.append(steps - level)  # the row that undoes this one
                up.append(True)
    index, is_up = torch.tensor(order), torch.tensor(up)
    alpha = bar[:-1] / bar[1:]
    rows = down.rows[index]
    rows[is_up] = 0
    rows[is_up, 3] = alpha.sqrt()[index[is_up]]
    rows[is_up, 6] = (1 - alpha).sqrt()[index[is_up]]
    bounds = None if down.log_variance is None else down.log_variance[index]
    if bounds is not None:
        bounds[is_up] = 0  # exp(0) = 1: S alone is the standard deviation, whatever v is
    after = torch.where(is_up, bar[:-1][index], bar[1:][index])
    return make_table(
        down.timesteps[index],
        rows.unbind(1),
        before=bar[:1],
        after=after,
        log_variance=bounds,
        learned=down.learned,
        needs_network=~is_up,
        shifts=down.shifts,
    )
