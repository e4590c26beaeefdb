"""Step tables of MONAI's DDPM and DDIM schedulers, from their own buffers.

Both use the buffers at t - 1 or t - T // S whatever the distance between the timesteps that they visit: DDPM's rows are
those of the training process, with its betas. Strided timesteps therefore skip noise levels, here as there.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fastddpm.process.tables import StepTable

KNOWN = ("DDPMScheduler", "DDIMScheduler")


def why_not(scheduler: Any) -> str | None:
    """Return why a table cannot say what a scheduler does, or None."""
    name = type(scheduler).__name__
    if type(scheduler).__module__.partition(".")[0] != "monai" or name not in KNOWN:
        return f"the scheduler is a {name}, must be a {' or '.join(KNOWN)} of MONAI"
    if scheduler.clip_sample and scheduler.clip_sample_values[0] != -scheduler.clip_sample_values[1]:
        low, high = scheduler.clip_sample_values
        return f"the scheduler's clip_sample_min is {low} and clip_sample_max {high}, must be symmetric"
    variance = getattr(scheduler, "variance_type", "fixed_small")
    if variance not in ("fixed_small", "fixed_large"):
        return f"the scheduler's variance_type is {str(variance)!r}, must be 'fixed_small' or 'fixed_large'"
    return None


def table_of(scheduler: Any) -> StepTable:
    """Return the table of a scheduler that `why_not` accepts, for the timesteps that it is set to.

    Raises:
        ValueError: there are no timesteps, or they are not within those of training.
    """
    visited = [int(t) for t in scheduler.timesteps]
    total = int(scheduler.num_train_timesteps)
    if not visited or not all(0 <= t < total for t in visited):
        raise ValueError(f"scheduler.timesteps has {len(visited)} entries, must be from 0 to {total - 1}")
    bars, alphas, betas = (buffer.double().tolist() for buffer in
                           (scheduler.alphas_cumprod, scheduler.alphas, scheduler.betas))  # fmt: skip
    of_ddim = type(scheduler).__name__ == "DDIMScheduler"
    stride = total // scheduler.num_inference_steps if of_ddim else 1
    final = float(scheduler.final_alpha_cumprod) if of_ddim else 1.0
    rows, after = [], []
    for t in visited:
        bar, before = bars[t], bars[t - stride] if t >= stride else final
        signal, noise = math.sqrt(bar), math.sqrt(1 - bar)
        a, b, of_x, of_out = _prediction(str(scheduler.prediction_type), signal, noise)
        if of_ddim:
            direction = math.sqrt(1 - before)
            rows.append([a, b, math.sqrt(before), direction * of_x, direction * of_out, 0.0, 0.0])
        else:
            share = (1 - before) / (1 - bar)
            variance = betas[t] if scheduler.variance_type == "fixed_large" else max(share * betas[t], 1e-20)
            deviation = math.sqrt(variance) if t > 0 else 0.0
            x0 = math.sqrt(before) * betas[t] / (1 - bar)
            rows.append([a, b, x0, math.sqrt(alphas[t]) * share, 0.0, 0.0, deviation])
        after.append((math.sqrt(before), math.sqrt(1 - before)))
    first = bars[visited[0]]
    return StepTable(
        torch.tensor(visited),
        torch.tensor(rows, dtype=torch.float64),
        None,
        torch.tensor(after, dtype=torch.float64),
        torch.ones(len(visited), dtype=torch.bool),
        (math.sqrt(first), math.sqrt(1 - first)),
    )


def _prediction(kind: str, signal: float, noise: float) -> tuple[float, float, float, float]:
    """Return (A, B, P, Q) in x0 = A x + B out, before clipping, and epsilon = P x + Q out."""
    if kind == "epsilon":
        return 1 / signal, -noise / signal, 0.0, 1.0
    if kind == "sample":
        return 0.0, 1.0, 1 / noise, -signal / noise
    return signal, -noise, noise, signal
