"""The coefficient table of RePaint, which goes back up between steps down."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import StepTable, ddim_table, ddpm_table, make_table

MOST_ROWS = 1 << 20  # days of sampling


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
    """Return the table of RePaint (Lugmayr et al. 2022), which goes back up every `jump_length` levels, several times.

    A row up is one step of the forward process, sqrt(alpha) x + sqrt(1 - alpha) z, without the network. Inpainting
    blends the known region in after every row down.

    Args:
        schedule, timesteps, prediction_type, variance_type: as for `ddpm_table`.
        jump_length: levels that each jump goes up, and the distance between jumps; at least 1.
        jump_n_sample: how often each stretch is denoised, at least 1; 1 makes no jumps.
        eta: None for DDPM's rows down; a number for DDIM's with this eta, as in diffusers' `RePaintScheduler`, whose
            default is 0.
        order: "diffusers" jumps where `RePaintScheduler` does, one level below the original ("repaint"), so that
            the finished image is also noised and denoised again.

    Raises:
        ValueError: as `ddpm_table`; or a setting is out of range, or `eta` is given with a learned variance.
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
    """Order the rows of `down` as RePaint does, with rows up between them.

    `lowest` is the level of the lowest jump; 0 is x_0.
    """
    steps = len(down)
    bar = torch.cat([torch.tensor([down.start[0]], dtype=torch.float64), down.levels[:, 0]]).square()
    # Level k has k rows to go; row i of `down` leads from level S - i to S - i - 1, bar[i] to bar[i + 1].
    jumps = dict.fromkeys(range(lowest, steps - jump_length + lowest, jump_length), jump_n_sample - 1)
    count = steps + len(jumps) * (jump_n_sample - 1) * 2 * jump_length
    if count > MOST_ROWS:
        raise ValueError(f"jump_n_sample is {jump_n_sample}, which makes {count} steps, may make at most {MOST_ROWS}")
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
