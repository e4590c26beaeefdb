"""Choose the noise levels to visit: the grids of diffusers' schedulers that work with sigma = noise / signal."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import numpy as np

from fastddpm.process.schedule import NoiseSchedule

SIGMA_SCHEDULES = ("karras", "exponential", "beta", "lu", "flow")
SPACINGS = ("leading", "trailing", "linspace")
# diffusers' substitute for abar = 0, which keeps sigma and log(signal / noise) finite.
LEAST_BAR = 2.0**-24


class SigmaGrid(NamedTuple):
    """Falling levels of noise, and the timestep that the network reads at each.

    Attributes:
        timesteps: float64 [S], which need not be integers.
        sigmas: float64 [S + 1], noise / signal, or the noise itself for flows; the sampler ends at the last one.
        flow: whether signal is 1 - noise (flow matching) rather than sqrt(1 - noise^2).
        init_noise_sigma: standard deviation of the first state, as the network reads it; None for the level's noise.
        trained: float64 [T], sigma of every trained timestep; levels between them are interpolated from it.
        inner: float64 [S, 3], of DPM2: sigma of the second evaluation of a step, the sigma that the step goes down to,
            and the standard deviation of the noise added then, as a library has rounded them; None to compute them.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray
    flow: bool = False
    init_noise_sigma: float | None = None
    trained: np.ndarray = np.empty(0)
    inner: np.ndarray | None = None

    def timestep(self, sigma: float) -> float:
        """Return the fractional timestep of a level."""
        return float(timesteps_of(np.array([sigma]), self.trained)[0])

    @property
    def signal(self) -> np.ndarray:
        """Return the factor of x_0 in the state at each sigma, float64 [S + 1]."""
        return 1 - self.sigmas if self.flow else 1 / np.sqrt(1 + self.sigmas**2)

    @property
    def noise(self) -> np.ndarray:
        """Return the standard deviation of the noise in the state at each sigma, float64 [S + 1]."""
        return self.sigmas if self.flow else self.sigmas * self.signal

    def skip(self, index: int) -> SigmaGrid:
        """Return the grid from level `index` on."""
        inner = None if self.inner is None else self.inner[index:]
        rest = self._replace(timesteps=self.timesteps[index:], sigmas=self.sigmas[index:], inner=inner)
        return rest._replace(init_noise_sigma=None)


def trained_sigmas(schedule: NoiseSchedule) -> np.ndarray:
    """Return noise / signal of every trained timestep, float64 [T], rising."""
    bar = schedule.alphas_cumprod.numpy().copy()
    bar[bar == 0] = LEAST_BAR
    return np.sqrt((1 - bar) / bar)


def sigma_grid(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    timestep_spacing: str = "linspace",
    *,
    steps_offset: int = 0,
    multistep: bool = False,
    sigma_schedule: str | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    flow_shift: float = 1.0,
    lambda_min_clipped: float = -math.inf,
    final_sigmas_type: str = "zero",
    round_timesteps: bool | None = None,
) -> SigmaGrid:
    """Return the levels that a sampler visits in `num_inference_steps` steps.

    Args:
        schedule: the forward process the network was trained on.
        num_inference_steps: S, at least 1.
        timestep_spacing: "leading", "trailing" or "linspace" (Lin et al. 2024, table 2).
        steps_offset: added to the timesteps of "leading".
        multistep: space "leading" and "linspace" for one more point and leave out the lowest, on integer timesteps, as
            diffusers' multistep solvers do; else "linspace" reaches timestep 0 and may visit fractional timesteps.
        sigma_schedule: the levels between the first and last trained one: "karras" (Karras et al. 2022, eq. 5),
            "exponential" (equal ratios), "beta" (Lee et al. 2024; needs SciPy), "lu" (equal steps of log sigma, Lu et
            al. 2022), "flow" (levels of flow matching, shifted by `flow_shift`), or None for those of the timesteps.
        sigma_min, sigma_max: the ends of "karras", "exponential" and "beta"; None for those of the schedule (of the
            visited timesteps where not `multistep`).
        rho: exponent of "karras".
        flow_shift: the shift of "flow".
        lambda_min_clipped: the lowest log(signal / noise) to visit, for schedules that begin in almost pure noise.
        final_sigmas_type: end at "zero", or at "sigma_min", the level of timestep 0.
        round_timesteps: whether to round timesteps found from sigmas; None rounds them for "karras" and "lu", as
            diffusers' multistep solvers do (these cut them to integers in any case).

    Raises:
        ValueError: a setting is not known or out of range.
        ImportError: "beta" needs SciPy, which is not installed.
    """
    total = schedule.num_train_timesteps
    steps = _count(num_inference_steps)
    if timestep_spacing not in SPACINGS:
        raise ValueError(f"timestep_spacing is {timestep_spacing!r}, must be one of {', '.join(SPACINGS)}")
    if sigma_schedule is not None and sigma_schedule not in SIGMA_SCHEDULES:
        raise ValueError(f"sigma_schedule is {sigma_schedule!r}, must be None or one of {', '.join(SIGMA_SCHEDULES)}")
    if final_sigmas_type not in ("zero", "sigma_min"):
        raise ValueError(f"final_sigmas_type is {final_sigmas_type!r}, must be 'zero' or 'sigma_min'")
    trained = trained_sigmas(schedule)
    last = total - int(np.searchsorted(-np.log(trained[::-1]), lambda_min_clipped))
    timesteps = _timesteps(total, last, steps, timestep_spacing, steps_offset, multistep)
    sigmas = np.interp(timesteps, np.arange(total), trained)
    final = 0.0 if final_sigmas_type == "zero" else float(trained[0])
    if sigma_schedule == "flow":
        sigmas = flow_sigmas(total, steps, flow_shift)
        timesteps = sigmas * total
        timesteps = np.floor(timesteps) if multistep else timesteps
        return SigmaGrid(timesteps, np.append(sigmas, final), flow=True, init_noise_sigma=1.0, trained=trained)
    if sigma_schedule is not None:
        ends = (trained[-1], trained[0]) if multistep else (sigmas[0], sigmas[-1])
        high = ends[0] if sigma_max is None else sigma_max
        low = ends[1] if sigma_min is None else sigma_min
        sigmas = spread_sigmas(sigma_schedule, steps, low, high, rho)
        timesteps = timesteps_of(sigmas, trained)
        if multistep:
            rounds = sigma_schedule in ("karras", "lu") if round_timesteps is None else round_timesteps
            timesteps = np.round(timesteps) if rounds else np.floor(timesteps)
        elif round_timesteps:
            timesteps = np.round(timesteps)
    unscaled = multistep or timestep_spacing == "leading"
    return SigmaGrid(timesteps, np.append(sigmas, final), init_noise_sigma=1.0 if unscaled else None, trained=trained)


def grid_at(schedule: NoiseSchedule, timesteps: Any, final_sigmas_type: str = "zero") -> SigmaGrid:
    """Return the grid of a falling list of timesteps, at the levels of the schedule.

    Raises:
        ValueError: as `NoiseSchedule.check_timesteps`, or `final_sigmas_type` is not known.
    """
    if final_sigmas_type not in ("zero", "sigma_min"):
        raise ValueError(f"final_sigmas_type is {final_sigmas_type!r}, must be 'zero' or 'sigma_min'")
    visited, trained = schedule.check_timesteps(timesteps).numpy(), trained_sigmas(schedule)
    final = 0.0 if final_sigmas_type == "zero" else trained[0]
    return SigmaGrid(visited.astype(np.float64), np.append(trained[visited], final), False, 1.0, trained)


def lcm_grid(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    timestep_spacing: str = "leading",
    *,
    steps_offset: int = 0,
    original_inference_steps: int = 50,
) -> SigmaGrid:
    """Return the levels of a consistency model's sampler, evenly among those it was distilled on.

    Args:
        original_inference_steps: the number of levels that the model was distilled on.
        others: as for `sigma_grid`; the spacing and its offset have no effect.

    Raises:
        ValueError: there are fewer distilled levels than steps.
    """
    steps, total = _count(num_inference_steps), schedule.num_train_timesteps
    if not steps <= original_inference_steps <= total:
        raise ValueError(
            f"original_inference_steps is {original_inference_steps}, must be from {steps}, the steps, to {total}"
        )
    origin = (np.arange(1, original_inference_steps + 1) * (total // original_inference_steps) - 1)[::-1]
    visited = origin[np.floor(np.linspace(0, len(origin), steps, endpoint=False)).astype(np.int64)]
    return grid_at(schedule, visited.copy())


def plms_grid(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    timestep_spacing: str = "leading",
    *,
    steps_offset: int = 0,
    set_alpha_to_one: bool = False,
) -> SigmaGrid:
    """Return the levels of PLMS, one for every T // S timesteps.

    Args:
        set_alpha_to_one: end at x_0; if False, at the level of timestep 0.
        others: as for `sigma_grid`.
    """
    steps, total = _count(num_inference_steps), schedule.num_train_timesteps
    if timestep_spacing == "leading":
        visited = np.arange(steps)[::-1] * (total // steps) + int(steps_offset)
    elif timestep_spacing == "linspace":
        visited = np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)
    else:
        visited = np.round(np.arange(total, 0, -total / steps)).astype(np.int64)[:steps] - 1
    return grid_at(schedule, visited.copy(), "zero" if set_alpha_to_one else "sigma_min")


def spread_sigmas(sigma_schedule: str, steps: int, low: float, high: float, rho: float = 7.0) -> np.ndarray:
    """Return `steps` levels from `high` down to `low`, float64; see `sigma_grid`."""
    for name, value in (("sigma_min", low), ("sigma_max", high), ("rho", rho)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, must be positive and finite")
    ramp = np.linspace(0, 1, steps)
    if sigma_schedule == "karras":
        return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    if sigma_schedule in ("exponential", "lu"):
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    try:
        from scipy.stats import beta
    except ImportError:
        raise ImportError("sigma_schedule 'beta' needs SciPy: pip install scipy") from None
    return low + beta.ppf(1 - ramp, 0.6, 0.6) * (high - low)


def flow_sigmas(total: int, steps: int, flow_shift: float) -> np.ndarray:
    """Return the levels of flow matching, falling from near 1, float64 [steps] (Esser et al. 2024, eq. 23)."""
    sigmas = 1 - np.linspace(1, 1 / total, steps + 1)
    return (flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas))[::-1][:-1].copy()


def timesteps_of(sigmas: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Return the fractional timesteps whose log sigma, linear between trained timesteps, is that of `sigmas`."""
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(trained), np.arange(len(trained)))


def _timesteps(total: int, last: int, steps: int, spacing: str, offset: int, multistep: bool) -> np.ndarray:
    if isinstance(offset, bool) or not isinstance(offset, numbers.Integral):
        raise ValueError(f"steps_offset is {offset!r}, must be an integer")
    more = int(multistep)
    if spacing == "linspace":
        found = np.linspace(0, last - 1, steps + more)[::-1][:steps]
        return np.round(found) if multistep else found.astype(np.float32).astype(np.float64)
    if spacing == "leading":
        found = np.arange(steps + more)[::-1][:steps] * (last // (steps + more)) + int(offset)
    else:
        found = np.round(np.arange(last, 0, -total / steps))[:steps] - 1
    if found[0] >= total:
        raise ValueError(f"steps_offset is {offset}: the first timestep is {int(found[0])}, must be below {total}")
    return found.astype(np.float64)


def _count(num_inference_steps: object) -> int:
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, numbers.Integral):
        raise ValueError(f"num_inference_steps is {num_inference_steps!r}, must be an integer of at least 1")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is {num_inference_steps}, must be an integer of at least 1")
    return int(num_inference_steps)
