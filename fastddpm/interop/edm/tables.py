"""Step tables of EDM's and PhysicsNeMo's samplers (Karras et al. 2022, algorithm 2 and its ablations).

The state is y = c_in(sigma) x / s, which the network reads. The noise that churn adds before a step belongs to the last
row of the step before; that of the first step is added to the latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddpm.interop.edm.preconditioning import level_of
from fastddpm.process.tables import StepTable
from fastddpm.process.trace import Symbol, Trace

_KNOWN = {
    "solver": ("euler", "heun"),
    "discretization": ("vp", "ve", "iddpm", "edm"),
    "schedule": ("vp", "ve", "linear"),
    "scaling": ("vp", "none"),
}
_Function = Callable[[Tensor], Tensor]


class Churn(NamedTuple):
    """The noise that is added before a step: its amount, the levels where, and its factor."""

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0


class Path(NamedTuple):
    """Noise level and scale of a state as functions of time: x(t) = s(t) (x_0 + sigma(t) noise)."""

    sigma: _Function
    slope: _Function  # of sigma
    inverse: _Function
    scale: _Function
    scale_slope: _Function


class Walk(NamedTuple):
    """A sampler for one network.

    Attributes:
        table: its rows, two for every step of Heun's method.
        draws: for each row, whether the library draws noise after it.
        first: factors of the latents and of the noise of the first step; their sum is the first state.
        sigmas: the noise levels of the steps.
    """

    table: StepTable
    draws: list[bool]
    first: tuple[float, float]
    sigmas: list[float]


LINEAR = Path(lambda t: t, torch.ones_like, lambda sigma: sigma, torch.ones_like, torch.zeros_like)


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float, dtype: torch.dtype | None) -> Tensor:
    """Return noise levels from sigma_max to sigma_min, [num_steps] (Karras et al. 2022, eq. 5).

    Args:
        dtype: of the calculation; None for integers divided as torch does, in its default dtype.
    """
    steps = torch.arange(num_steps, dtype=dtype)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas: Tensor = (high + steps / (num_steps - 1) * (low - high)) ** rho
    return sigmas


def edm_walk(
    net: Any, num_steps: int, sigma_min: float, sigma_max: float, rho: float, churn: Churn, *,
    dtype: torch.dtype | None, bounded: bool,
) -> Walk:  # fmt: skip
    """Return Heun's method with churn on the levels of `karras_sigmas`: EDM's `edm_sampler`.

    Args:
        dtype: as for `karras_sigmas`.
        bounded: whether churn raises a level by a factor of sqrt(2) at most; PhysicsNeMo's sampler has no bound.
    """
    low, high = _limits(net, num_steps, sigma_min, sigma_max, rho)
    sigmas = net.round_sigma(karras_sigmas(num_steps, low, high, rho, dtype))
    return walk(net, sigmas, LINEAR, churn, bounded=bounded)


def ablation_walk(
    net: Any, num_steps: int, sigma_min: float | None, sigma_max: float | None, rho: float, churn: Churn, *,
    solver: str, discretization: str, schedule: str, scaling: str, epsilon_s: float, C_1: float, C_2: float, M: int,
    alpha: float, vp_beta_d: float, dtype: torch.dtype = torch.float64,
) -> Walk:  # fmt: skip
    """Return the sampler of EDM's ablations, PhysicsNeMo's `deterministic_sampler`.

    Args:
        vp_beta_d: of the default levels of "vp", which differ between the libraries.
        dtype: of the calculation.
        others: as in the libraries.

    Raises:
        ValueError: a setting is not known, or levels are out of order.
    """
    chosen = {"solver": solver, "discretization": discretization, "schedule": schedule, "scaling": scaling}
    for name, value in chosen.items():
        if value not in _KNOWN[name]:
            raise ValueError(f"{name} is {value!r}, must be one of {', '.join(_KNOWN[name])}")
    default = _vp(vp_beta_d, 0.1)
    if sigma_min is None:
        vp = float(default.sigma(torch.tensor(epsilon_s, dtype=torch.float64)))
        sigma_min = {"vp": vp, "ve": 0.02, "iddpm": 0.002, "edm": 0.002}[discretization]
    if sigma_max is None:
        vp = float(default.sigma(torch.tensor(1.0, dtype=torch.float64)))
        sigma_max = {"vp": vp, "ve": 100.0, "iddpm": 81.0, "edm": 80.0}[discretization]
    low, high = _limits(net, num_steps, sigma_min, sigma_max, rho)
    beta_d = 2 * (math.log(low**2 + 1) / epsilon_s - math.log(high**2 + 1)) / (epsilon_s - 1)
    own = _vp(beta_d, math.log(high**2 + 1) - 0.5 * beta_d)
    share = torch.arange(num_steps, dtype=dtype) / (num_steps - 1)
    if discretization == "vp":
        sigmas = own.sigma(1 + share * (epsilon_s - 1))
    elif discretization == "ve":
        sigmas = (high**2 * (low**2 / high**2) ** share).sqrt()
    elif discretization == "iddpm":
        sigmas = _iddpm_sigmas(low, high, share, C_1, C_2, M, dtype)
    else:
        sigmas = karras_sigmas(num_steps, low, high, rho, dtype)
    path = own
    if schedule == "ve":
        path = LINEAR._replace(sigma=torch.sqrt, slope=lambda t: 0.5 / t.sqrt(), inverse=torch.square)
    elif schedule == "linear":
        path = LINEAR
    if scaling == "vp":
        sigma, slope = path.sigma, path.slope

        def scale(t: Tensor) -> Tensor:
            return 1 / (1 + sigma(t) ** 2).sqrt()

        path = path._replace(scale=scale, scale_slope=lambda t: -sigma(t) * slope(t) * scale(t) ** 3)
    else:
        path = path._replace(scale=torch.ones_like, scale_slope=torch.zeros_like)
    return walk(net, net.round_sigma(sigmas), path, churn, bounded=True, heun=solver == "heun", alpha=alpha)


def walk(
    net: Any, sigmas: Tensor, path: Path, churn: Churn, *, bounded: bool = True, heun: bool = True, alpha: float = 1.0
) -> Walk:
    """Return the sampler that visits `sigmas` and ends at 0.

    Args:
        net: the preconditioner, which rounds levels and gives its coefficients at each.
        sigmas: [N], falling, in the dtype in which the library computes.
        path: of the state.
        churn: the noise added before a step; `bounded` as for `edm_walk`.
        heun: whether a step has a second evaluation, the trapezoidal rule.
        alpha: where between two levels the second evaluation is; 1 is Heun's method.

    Raises:
        ValueError: the levels are not finite and falling, or a setting of churn is out of range.
    """
    _check(sigmas, churn)
    count = len(sigmas)
    times = torch.cat([path.inverse(sigmas), torch.zeros_like(sigmas[:1])])
    share = churn.S_churn / count
    share = min(share, math.sqrt(2) - 1) if bounded else share
    hats, added = [], []
    for now in times[:-1]:
        level = path.sigma(now)
        gamma = share if churn.S_min <= level <= churn.S_max else 0.0
        hat = path.inverse(net.round_sigma(level + gamma * level))
        hats.append(hat)
        spread = (path.sigma(hat) ** 2 - level**2).clip(min=0).sqrt()
        added.append(float(spread * path.scale(hat) * churn.S_noise))

    trace = Trace("sample")

    def evaluate(x: Symbol, at: Tensor) -> tuple[Symbol, Symbol]:
        """Return the state x at a time, and its slope there."""
        sigma, scale = path.sigma(at), float(path.scale(at))
        level = level_of(net, sigma)
        factor = level.c_in / scale
        y, denoised = trace.evaluate(
            x * factor, timestep=level.c_noise, signal=level.c_in, noise=level.c_in * float(sigma),
            to_stored=(level.c_skip / level.c_in, level.c_out),
        )  # fmt: skip
        x = y / factor
        rate = float(path.slope(at) / sigma)
        return x, (rate + float(path.scale_slope(at)) / scale) * x - rate * scale * denoised

    def scale_of(time: Tensor) -> float:
        return float(path.scale(time))

    start = hats[0]
    first = level_of(net, path.sigma(start)).c_in / scale_of(start)
    x = trace.sample / first
    draws: list[bool] = []
    for i, (hat, after) in enumerate(zip(hats, times[1:], strict=True)):
        trace.begin_step()
        if i:
            x = scale_of(hat) / scale_of(times[i]) * x
            if added[i]:
                x = x + added[i] * trace.noise()
        begin, slope = evaluate(x, hat)
        length, last = float(after - hat), i == count - 1
        x = begin + length * slope
        draws.append(not last)
        if heun and not last:
            middle = hat + alpha * (after - hat)
            _, then = evaluate(begin + alpha * length * slope, middle)
            x = begin + length * ((1 - 1 / (2 * alpha)) * slope + 1 / (2 * alpha) * then)
            draws[-1:] = [False, True]
    table = trace.finish(x, signal=1.0, noise=0.0)
    return Walk(table, draws, (first * float(sigmas[0]) * scale_of(start), first * added[0]), sigmas.tolist())


def _vp(beta_d: float, beta_min: float) -> Path:
    def sigma(t: Tensor) -> Tensor:
        return torch.expm1(0.5 * beta_d * t**2 + beta_min * t).sqrt()

    def inverse(level: Tensor) -> Tensor:
        return ((beta_min**2 + 2 * beta_d * (level**2 + 1).log()).sqrt() - beta_min) / beta_d

    def slope(t: Tensor) -> Tensor:
        return 0.5 * (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t))

    return Path(sigma, slope, inverse, torch.ones_like, torch.zeros_like)


def _iddpm_sigmas(low: float, high: float, share: Tensor, C_1: float, C_2: float, M: int, dtype: torch.dtype) -> Tensor:
    """Return levels of improved DDPM's schedule within [low, high] (Karras et al. 2022, table 1, "iDDPM")."""
    index = torch.arange(M + 1, dtype=dtype)
    bar = (0.5 * math.pi * index / M / (C_2 + 1)).sin() ** 2
    levels = torch.zeros(M + 1, dtype=dtype)
    for j in range(M, 0, -1):
        levels[j - 1] = ((levels[j] ** 2 + 1) / (bar[j - 1] / bar[j]).clip(min=C_1) - 1).sqrt()
    inside = levels[(levels >= low) & (levels <= high)]
    if len(inside) < len(share):
        raise ValueError(f"num_steps is {len(share)}, must be at most {len(inside)} for discretization 'iddpm'")
    return inside[((len(inside) - 1) * share).round().to(torch.int64)]


def _limits(net: Any, num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> tuple[float, float]:
    """Return the lowest and highest level, within those that the network supports."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 2:
        raise ValueError(f"num_steps is {num_steps!r}, must be an integer of at least 2")
    low, high = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"sigma_min is {sigma_min} and sigma_max {sigma_max}, for a network of levels {net.sigma_min} to "
            f"{net.sigma_max}: must be positive, finite and rising within these"
        )
    if not 0 < rho < math.inf:
        raise ValueError(f"rho is {rho}, must be a positive finite number")
    return low, high


def _check(sigmas: Tensor, churn: Churn) -> None:
    if not bool(sigmas.isfinite().all()) or not bool((sigmas.diff() < 0).all()) or not bool(sigmas[-1] > 0):
        few = ", ".join(f"{sigma:.4g}" for sigma in sigmas[:4].tolist())
        raise ValueError(f"the levels of {len(sigmas)} steps are {few}, ..., must be finite, positive and falling")
    for name in ("S_churn", "S_min"):
        value = getattr(churn, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, must be a finite number of at least 0")
    if not churn.S_min <= churn.S_max:
        raise ValueError(f"S_min is {churn.S_min} and S_max {churn.S_max}, must be from low to high")
    if not math.isfinite(churn.S_noise):
        raise ValueError(f"S_noise is {churn.S_noise}, must be a finite number")
