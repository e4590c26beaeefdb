"""Choose the timesteps that sampling visits: by the name of a spacing, or from an explicit list."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TIMESTEP_SPACINGS = ("leading", "trailing", "linspace", "denoising_diffusion_pytorch", "guided_diffusion")


def spaced_timesteps(
    total: int,
    num_inference_steps: int | str | None = None,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
    *,
    multistep: bool = False,
) -> Tensor:
    """Return the falling timesteps to visit, for a model trained on `total`: int64 [num_inference_steps].

    "leading", "trailing" and "linspace" are those of Table 2 in Lin et al. 2024 ("Common diffusion noise schedules and
    sample steps are flawed"), rounded as diffusers rounds. "denoising_diffusion_pytorch" is the grid of that library's
    DDIM, linspace(-1, T - 1) without its lowest point. "guided_diffusion" divides [0, T - 1] in equal fractional
    strides as its `space_timesteps` does (Nichol & Dhariwal 2021, section 4), and accepts that function's strings:
    "250", "ddim25" (an integer stride from 0) or "10,10,5" (steps in each of three equal sections, the least noisy
    one first).

    Args:
        total: T.
        num_inference_steps: from 1 to T, or a string for "guided_diffusion"; None for all T.
        timestep_spacing: one of `TIMESTEP_SPACINGS`.
        steps_offset: added to the timesteps of "leading".
        multistep: use the grids of diffusers' multistep solvers, which space "leading" and "linspace" for one more
            point and leave out the lowest, so that the last step is as long as the others. All T steps stay all T.

    Raises:
        ValueError: `num_inference_steps` is out of range or not an integer, `timestep_spacing` is not known, or the
            offset leads past the last trained timestep.
    """
    if timestep_spacing not in TIMESTEP_SPACINGS:
        raise ValueError(f"timestep_spacing is {timestep_spacing!r}, must be one of {', '.join(TIMESTEP_SPACINGS)}")
    if isinstance(num_inference_steps, str):
        if timestep_spacing != "guided_diffusion":
            raise ValueError(
                f"num_inference_steps is {num_inference_steps!r} but timestep_spacing is {timestep_spacing!r}; "
                "a string is a setting of spacing 'guided_diffusion'"
            )
        return _to_tensor(_sections(total, num_inference_steps))
    if isinstance(steps_offset, bool) or not isinstance(steps_offset, numbers.Integral):
        raise ValueError(f"steps_offset is {steps_offset!r}, must be an integer")
    if not -(2**31) <= steps_offset < 2**31:
        raise ValueError(f"steps_offset is {steps_offset}, which no timestep below {total} can have added")
    count = total if num_inference_steps is None else num_inference_steps
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or not 1 <= count <= total:
        raise ValueError(
            f"num_inference_steps is {num_inference_steps!r}, must be an integer from 1 to {total}, "
            "the number of steps the model was trained with"
        )
    count = int(count)
    if timestep_spacing == "guided_diffusion":
        return _to_tensor(_sections(total, str(count)))
    more = int(multistep and count < total)
    if timestep_spacing == "leading":
        steps = np.arange(count + more)[::-1][:count] * (total // (count + more)) + steps_offset
    elif timestep_spacing == "trailing":
        # diffusers walks a float grid by -T/S, which rounding may end at S + 1 points; keep the S requested.
        steps = np.round(np.arange(total, 0, -total / count))[:count] - 1
    elif timestep_spacing == "linspace":
        steps = np.linspace(0, total - 1, count + more).round()[::-1][:count]
    else:  # in float32, cut and not rounded, to get that library's integers
        steps = torch.linspace(-1, total - 1, count + 1).int().numpy()[:0:-1]
    if steps[0] >= total or steps[-1] < 0:
        raise ValueError(
            f"steps_offset is {steps_offset}: the timesteps run from {int(steps[0])} to {int(steps[-1])}, "
            f"must stay within 0 to {total - 1}"
        )
    return _to_tensor(steps)


def checked_timesteps(total: int, timesteps: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    """Return explicit timesteps as int64 [S] on the CPU.

    Raises:
        ValueError: the list is empty, does not fall, or has values that are not integers from 0 to `total` - 1.
    """
    listed = timesteps if isinstance(timesteps, list | tuple) else ()
    if large := [step for step in listed if isinstance(step, int) and abs(step) >= 2**63]:  # no tensor has such values
        raise ValueError(f"timesteps has {large[0]}, every one must be from 0 to {total - 1}")
    try:
        steps = torch.as_tensor(timesteps).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"timesteps must be a sequence of integers: {error}") from None
    if steps.ndim != 1 or steps.numel() == 0:
        raise ValueError(f"timesteps has shape {list(steps.shape)}, must be one-dimensional and not empty")
    if steps.dtype.is_floating_point or steps.dtype.is_complex or steps.dtype == torch.bool:
        raise ValueError(f"timesteps has dtype {steps.dtype}, must be integers")
    steps = steps.to(torch.int64)
    outside = (steps < 0) | (steps >= total)
    if bool(outside.any()):
        raise ValueError(f"timesteps has {int(steps[outside][0])}, every one must be from 0 to {total - 1}")
    rising = (steps.diff() >= 0).nonzero()
    if len(rising):
        index = int(rising[0])
        raise ValueError(f"timesteps has {int(steps[index])} before {int(steps[index + 1])}, every one must be lower")
    return steps


def _sections(total: int, text: str) -> np.ndarray:
    """Return the timesteps of guided-diffusion's `space_timesteps`, falling."""
    wrong = ValueError(
        f"num_inference_steps is {text!r}, must be a number, 'ddim' and a number, or numbers with commas between"
    )
    if text.startswith("ddim"):
        count = _number(text[4:], wrong)
        for whole in range(1, total + 1):
            if len(range(0, total, whole)) == count:
                return np.arange(0, total, whole)[::-1]
        raise ValueError(f"num_inference_steps is {text!r}: no integer stride over {total} steps takes {count} steps")
    counts = [_number(part, wrong) for part in text.split(",")]
    start, steps = 0, []
    for index, count in enumerate(counts):
        size = total // len(counts) + (index < total % len(counts))
        if count > size:
            raise ValueError(f"num_inference_steps is {text!r}: {count} steps do not fit in a section of {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        at = 0.0  # summed, not multiplied, to round as the original does
        for _ in range(count):
            steps.append(start + round(at))
            at += stride
        start += size
    return np.array(steps)[::-1]


def _number(text: str, wrong: ValueError) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise wrong
    return int(text)


def _to_tensor(steps: np.ndarray) -> Tensor:
    return torch.from_numpy(steps.astype(np.int64))
