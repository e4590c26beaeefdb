"""Tables of samplers in sigma = noise / signal: Euler, Heun, DPM2, LMS, ancestral and stochastic ones, and LCM.

The state divided by its signal is x = x_0 + sigma * epsilon, and the probability flow ODE is
d x / d sigma = (x - x0) / sigma (Karras et al. 2022, eq. 3). The network reads that state times `c_in`. DDPM's
networks were trained with signal^2 + noise^2 = 1, so their `c_in` is 1 / sqrt(1 + sigma^2).
"""

from __future__ import annotations

import math
import numbers

from fastddpm.process.grids import SigmaGrid
from fastddpm.process.tables import StepTable
from fastddpm.process.trace import Symbol, Trace, lagrange, on_grid


class _Walk:
    """A trace whose states are x_0 + sigma * epsilon.

    A step of two evaluations solves for the state before it. From a much higher sigma that multiplies the first stored
    prediction, and its rounding, by about the ratio of the two sigmas. Where epsilon is predicted, x0 has an error of
    sigma times float32's, and epsilon only float32's. So tables whose x0 nobody clips should store "epsilon".
    """

    def __init__(self, grid: SigmaGrid, prediction_type: str, stores: str = "x0") -> None:
        if grid.flow:
            raise ValueError("sigma_schedule is 'flow', must be another for samplers in sigma")
        if stores not in ("x0", "epsilon"):
            raise ValueError(f"stores is {stores!r}, must be 'x0' or 'epsilon'")
        self.stores = stores
        self.grid, self.sigmas = grid, [float(sigma) for sigma in grid.sigmas]
        self.timesteps = [float(t) for t in grid.timesteps]
        deviation = float(grid.noise[0]) if grid.init_noise_sigma is None else grid.init_noise_sigma
        self.trace = Trace(prediction_type, stores, init_noise_sigma=deviation)
        self.x = self.trace.sample / _signal(self.sigmas[0])

    def __len__(self) -> int:
        return len(self.timesteps)

    def evaluate(self, x: Symbol, sigma: float, timestep: float) -> tuple[Symbol, Symbol]:
        """Return the state x at `sigma`, and the stored prediction there: x0, or what else the walk stores."""
        signal = _signal(sigma)
        x, x0 = self.trace.evaluate(signal * x, timestep=timestep, signal=signal, noise=sigma * signal)
        return x / signal, x0

    def slope(self, x: Symbol, sigma: float, timestep: float) -> tuple[Symbol, Symbol]:
        """Return the state x at `sigma`, and d x / d sigma there."""
        x, stored = self.evaluate(x, sigma, timestep)
        return x, stored if self.stores == "epsilon" else (x - stored) / sigma

    def heun_step(self, x: Symbol, i: int, sigma: float, timestep: float) -> Symbol:
        """Return x one step on, from `sigma` to level i + 1: Heun's step, and Euler's where that is the last level."""
        after = self.sigmas[i + 1]
        x, slope = self.slope(x, sigma, timestep)
        there = x + slope * (after - sigma)
        if i == len(self) - 1:
            return there
        _, second = self.slope(there, after, self.timesteps[i + 1])
        return x + (slope + second) * ((after - sigma) / 2)

    def finish(self, x: Symbol) -> StepTable:
        """Return the table that ends with state x at the last sigma."""
        signal = _signal(self.sigmas[-1])
        return self.trace.finish(signal * x, signal=signal, noise=self.sigmas[-1] * signal)


@on_grid()
def euler_table(
    grid: SigmaGrid,
    *,
    prediction_type: str = "epsilon",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> StepTable:
    """Return the table of Euler's method (Karras et al. 2022, algorithm 2 without its correction).

    diffusers' `EulerDiscreteScheduler`. With churn it adds the noise to the state AFTER the network has read it.

    Args:
        grid: the levels to visit.
        prediction_type: "epsilon", "sample" or "v_prediction".
        s_churn, s_tmin, s_tmax, s_noise: noise added at every step with sigma in [s_tmin, s_tmax]; `s_churn` 0 adds
            none.

    Raises:
        ValueError: a setting is not known, or `s_churn` is not 0 with "v_prediction".
    """
    walk = _Walk(grid, prediction_type)
    if s_churn and prediction_type == "v_prediction":
        raise ValueError("prediction_type is 'v_prediction' but s_churn is not 0, must be 'epsilon' or 'sample'")
    x = walk.x
    for i, (sigma, after) in enumerate(zip(walk.sigmas[:-1], walk.sigmas[1:], strict=True)):
        x, x0 = walk.evaluate(x, sigma, walk.timesteps[i])
        sigma_hat = _churned(sigma, s_churn, s_tmin, s_tmax, len(walk))
        if sigma_hat > sigma:
            epsilon = (x - x0) / sigma
            x = x + s_noise * math.sqrt(sigma_hat**2 - sigma**2) * walk.trace.noise()
            x0 = x - sigma_hat * epsilon if prediction_type == "epsilon" else x0
        x = x + (x - x0) * ((after - sigma_hat) / sigma_hat)
    return walk.finish(x)


@on_grid()
def euler_ancestral_table(
    grid: SigmaGrid, *, prediction_type: str = "epsilon", eta: float = 1.0, s_noise: float = 1.0
) -> StepTable:
    """Return the table of Euler's method with ancestral noise; diffusers' `EulerAncestralDiscreteScheduler`.

    Each step goes down further than the next level, then adds noise to reach it; with `eta` 1 the variance is DDPM's
    (Song et al. 2021, eq. 16).

    Args:
        grid, prediction_type: as for `euler_table`.
        eta: share of the ancestral standard deviation, at least 0.
        s_noise: factor of the noise.

    Raises:
        ValueError: a setting is not known or out of range.
    """
    walk = _Walk(grid, prediction_type)
    x = walk.x
    for i, (sigma, after) in enumerate(zip(walk.sigmas[:-1], walk.sigmas[1:], strict=True)):
        x, x0 = walk.evaluate(x, sigma, walk.timesteps[i])
        down, up = _ancestral(sigma, after, eta)
        x = x + (x - x0) * ((down - sigma) / sigma)
        if up > 0:
            x = x + s_noise * up * walk.trace.noise()
    return walk.finish(x)


@on_grid()
def heun_table(grid: SigmaGrid, *, prediction_type: str = "epsilon", stores: str = "x0") -> StepTable:
    """Return the table of Heun's method, with 2 S - 1 evaluations (Karras et al. 2022, algorithm 1).

    diffusers' `HeunDiscreteScheduler`. The last step, to zero noise, is a step of Euler's method.

    Args:
        grid, prediction_type: as for `euler_table`.
        stores: "x0", which can be clipped, or "epsilon", which rounds less where steps are long.

    Raises:
        ValueError: a setting is not known.
    """
    walk = _Walk(grid, prediction_type, stores)
    x = walk.x
    for i, sigma in enumerate(walk.sigmas[:-1]):
        walk.trace.begin_step()
        x = walk.heun_step(x, i, sigma, walk.timesteps[i])
    return walk.finish(x)


@on_grid()
def dpm2_table(
    grid: SigmaGrid, *, prediction_type: str = "epsilon", ancestral: bool = False, stores: str = "x0"
) -> StepTable:
    """Return the table of the midpoint method in log sigma, with 2 S - 1 evaluations (DPM-Solver-2, Lu et al. 2022a).

    diffusers' `KDPM2DiscreteScheduler` and, with `ancestral`, `KDPM2AncestralDiscreteScheduler`.

    Args:
        grid, prediction_type: as for `euler_table`.
        ancestral: go down further than the next level, then add noise to reach it.
        stores: as for `heun_table`.

    Raises:
        ValueError: a setting is not known.
    """
    walk = _Walk(grid, prediction_type, stores)
    x = walk.x
    for i, (sigma, after) in enumerate(zip(walk.sigmas[:-1], walk.sigmas[1:], strict=True)):
        walk.trace.begin_step()
        x, slope = walk.slope(x, sigma, walk.timesteps[i])
        if after == 0:
            x = x + slope * (after - sigma)
            continue
        if grid.inner is not None:
            middle, down, up = (float(value) for value in grid.inner[i])
        else:
            down, up = _ancestral(sigma, after, 1.0) if ancestral else (after, 0.0)
            middle = math.exp((math.log(sigma) + math.log(down)) / 2)
        _, slope = walk.slope(x + slope * (middle - sigma), middle, grid.timestep(middle))
        x = x + slope * (down - sigma)
        if up > 0:
            x = x + up * walk.trace.noise()
    return walk.finish(x)


@on_grid()
def lms_table(grid: SigmaGrid, *, prediction_type: str = "epsilon", order: int = 4) -> StepTable:
    """Return the table of the linear multistep method in sigma; diffusers' `LMSDiscreteScheduler`.

    It takes the slope as a polynomial in sigma through the last `order` slopes, and integrates it exactly (diffusers
    integrates it numerically).

    Args:
        grid, prediction_type: as for `euler_table`.
        order: 1 to 4.

    Raises:
        ValueError: `order` is out of range.
    """
    if isinstance(order, bool) or not isinstance(order, numbers.Integral) or not 1 <= order <= 4:
        raise ValueError(f"order is {order!r}, must be an integer from 1 to 4")
    walk, slopes = _Walk(grid, prediction_type, "epsilon"), list[Symbol]()
    x = walk.x
    for i, (sigma, after) in enumerate(zip(walk.sigmas[:-1], walk.sigmas[1:], strict=True)):
        x, slope = walk.evaluate(x, sigma, walk.timesteps[i])
        slopes = [slope, *slopes][:order]
        nodes = [walk.sigmas[i - k] for k in range(len(slopes))]
        for k, past in enumerate(slopes):
            integral = lagrange(nodes, k).integ()
            x = x + float(integral(after) - integral(sigma)) * past
    return walk.finish(x)


@on_grid()
def edm_table(
    grid: SigmaGrid,
    *,
    prediction_type: str = "epsilon",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    stores: str = "x0",
) -> StepTable:
    """Return the table of EDM's stochastic sampler: churn, then Heun's step (Karras et al. 2022, algorithm 2).

    With churn the network is evaluated at the raised sigma and its timestep.

    Args:
        grid, prediction_type: as for `euler_table`.
        s_churn, s_tmin, s_tmax, s_noise: noise added before each step with sigma in [s_tmin, s_tmax].
        stores: as for `heun_table`.
    """
    walk = _Walk(grid, prediction_type, stores)
    x = walk.x
    for i, sigma in enumerate(walk.sigmas[:-1]):
        sigma_hat, told = _churned(sigma, s_churn, s_tmin, s_tmax, len(walk)), walk.timesteps[i]
        walk.trace.begin_step()
        if sigma_hat > sigma:
            told = grid.timestep(sigma_hat)
            deviation = s_noise * math.sqrt(sigma_hat**2 - sigma**2)
            level = {"signal": _signal(sigma), "noise": sigma * _signal(sigma)}
            x = walk.trace.add_noise(x, deviation, timestep=told, **level)
        x = walk.heun_step(x, i, sigma_hat, told)
    return walk.finish(x)


@on_grid()
def lcm_table(
    grid: SigmaGrid, *, prediction_type: str = "epsilon", timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> StepTable:
    """Return the table of a consistency model's sampler (Luo et al. 2023, LCM); diffusers' `LCMScheduler`.

    Each step predicts x_0 by the boundary condition c_skip x + c_out x0, and adds noise to reach the next level.

    Args:
        grid: the levels to visit.
        prediction_type: "epsilon", "sample" or "v_prediction".
        timestep_scaling, sigma_data: parameters of the boundary condition.
    """
    trace = Trace(prediction_type)
    x, signal, noise = trace.sample, grid.signal, grid.noise
    for i, timestep in enumerate(grid.timesteps):
        x, x0 = trace.evaluate(x, timestep=float(timestep), signal=float(signal[i]), noise=float(noise[i]))
        scaled = float(timestep) * timestep_scaling
        x = (sigma_data**2 * x + scaled * math.hypot(scaled, sigma_data) * x0) / (scaled**2 + sigma_data**2)
        if i < len(grid.timesteps) - 1:
            x = float(signal[i + 1]) * x + float(noise[i + 1]) * trace.noise()
    return trace.finish(x, signal=1.0, noise=0.0)


def _signal(sigma: float) -> float:
    return 1 / math.sqrt(1 + sigma * sigma)


def _churned(sigma: float, churn: float, low: float, high: float, steps: int) -> float:
    """Return `sigma` raised by the churn (Karras et al. 2022, algorithm 2)."""
    for name, value in (("s_churn", churn), ("s_tmin", low)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, must be a finite number of at least 0")
    return sigma * (1 + min(churn / steps, math.sqrt(2) - 1)) if low <= sigma <= high else sigma


def _ancestral(sigma: float, after: float, eta: float) -> tuple[float, float]:
    """Return the sigma to go down to, and the standard deviation of the noise that leads from there up to `after`."""
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta is {eta}, must be a finite number of at least 0")
    up = min(after, eta * math.sqrt(max(0.0, after**2 * (sigma**2 - after**2) / sigma**2)))
    return math.sqrt(after**2 - up**2), up
