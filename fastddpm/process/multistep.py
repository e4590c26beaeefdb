"""Tables of multistep and singlestep solvers in log(signal / noise): DPM-Solver, DPM-Solver++, DEIS, UniPC, PLMS.

They solve the probability flow ODE (or the SDE) of Song et al. 2021 exactly, except that they replace the network by a
polynomial through its last few predictions. lambda = log(signal / noise), and h is a step in it.
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import numpy as np
from numpy.polynomial import Polynomial

from fastddpm.process.grids import SigmaGrid
from fastddpm.process.tables import StepTable
from fastddpm.process.trace import Symbol, Trace, lagrange, on_grid

ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
FEW_STEPS = 15  # with fewer steps diffusers lowers the order of the last ones


@on_grid()
def dpmsolver_table(
    grid: SigmaGrid,
    *,
    prediction_type: str = "epsilon",
    algorithm_type: str = "dpmsolver++",
    solver_order: int = 2,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> StepTable:
    """Return the table of DPM-Solver or DPM-Solver++, multistep (Lu et al. 2022a and 2022b).

    diffusers' `DPMSolverMultistepScheduler`.

    Args:
        grid: the levels to visit, see `on_grid`.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        algorithm_type: "dpmsolver++" extrapolates x0, "dpmsolver" epsilon; "sde-..." solve the SDE, with noise.
        solver_order: 1, 2 or 3; the first steps are of lower order.
        solver_type: "midpoint" or "heun", of second order.
        lower_order_final: with fewer than 15 steps lower the order towards the end.
        euler_at_final: make the last step of order 1, as it always is where the grid ends at zero noise.

    Raises:
        ValueError: a setting is not known, or the algorithm cannot end at zero noise.
    """
    _check_solver(algorithm_type, solver_order, solver_type, grid)
    if solver_order == 3 and algorithm_type == "sde-dpmsolver":
        raise ValueError("solver_order is 3 but algorithm_type is 'sde-dpmsolver', must be 1 or 2 with it")
    levels, trace = _Levels(grid), _trace(grid, prediction_type, _stored(algorithm_type))
    x, seen = trace.sample, list[Symbol]()
    few = lower_order_final and levels.steps < FEW_STEPS
    for i in range(levels.steps):
        x, m0 = levels.evaluate(trace, x, i)
        seen = [m0, *seen][:solver_order]
        order = min(solver_order, i + 1)
        if i == levels.steps - 1 and (euler_at_final or few or grid.sigmas[-1] == 0):
            order = 1
        elif i == levels.steps - 2 and few:
            order = min(order, 2)
        c, h = _coefficients(algorithm_type, levels, i, i + 1)
        following = c.keep * x + c.c0 * m0
        lam = levels.log_snr
        if order == 2:
            d1 = (m0 - seen[1]) * (h / (lam[i] - lam[i - 1]))
            following += (c.c1 if solver_type == "heun" else c.c0 / 2) * d1
        elif order == 3:
            r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
            first, second = (m0 - seen[1]) / r0, (seen[1] - seen[2]) / r1
            following += c.c1 * (first + (first - second) * (r0 / (r0 + r1)))
            following += c.c2 * (first - second) / (r0 + r1)
        x = following + c.noise * trace.noise() if c.noise else following
    return trace.finish(x, **levels.at(levels.steps))


@on_grid()
def dpmsolver_singlestep_table(
    grid: SigmaGrid,
    *,
    prediction_type: str = "epsilon",
    algorithm_type: str = "dpmsolver++",
    solver_order: int = 2,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
) -> StepTable:
    """Return the table of DPM-Solver or DPM-Solver++, singlestep (Lu et al. 2022a, algorithms 1 and 2).

    Steps come in groups of 1, 2 or 3 evaluations. The last step of a group is of full order and starts from the state
    at the group's beginning. diffusers' `DPMSolverSinglestepScheduler`.

    Args:
        grid, prediction_type, solver_type: as for `dpmsolver_table`.
        algorithm_type: "dpmsolver++" or "dpmsolver"; the others with order 1 only.
        solver_order: 1, 2 or 3.
        lower_order_final: end with steps of order 1. This is needed where the number of steps is not a multiple of the
            order, and where the grid ends at zero noise.

    Raises:
        ValueError: as `dpmsolver_table`.
    """
    _check_solver(algorithm_type, solver_order, solver_type, grid)
    if algorithm_type.startswith("sde") and solver_order > 1:
        raise ValueError(f"algorithm_type is {algorithm_type!r}, must be 'dpmsolver++' or 'dpmsolver' where singlestep")
    levels, trace = _Levels(grid), _trace(grid, prediction_type, _stored(algorithm_type))
    lower = lower_order_final or levels.steps % solver_order != 0 or grid.sigmas[-1] == 0
    x, seen, base, begin = trace.sample, list[Symbol](), trace.sample, 0
    for i, order in enumerate(_singlestep_orders(levels.steps, solver_order, lower, grid.sigmas[-1] == 0)):
        x, m0 = levels.evaluate(trace, x, i)
        seen = [m0, *seen][:solver_order]
        order = min(order, len(seen))
        if order == 1:
            base, begin = x, i
        begin = i - order + 1
        c, h = _coefficients(algorithm_type, levels, begin, i + 1)
        lam, oldest = levels.log_snr, seen[order - 1]
        following = c.keep * base + c.c0 * oldest
        if order == 2:
            d1 = (m0 - oldest) * (h / (lam[i] - lam[begin]))
            following += (c.c1 if solver_type == "heun" else c.c0 / 2) * d1
        elif order == 3:
            r0, r1 = (lam[i] - lam[begin]) / h, (lam[i - 1] - lam[begin]) / h
            d10, d11 = (seen[1] - oldest) / r1, (m0 - oldest) / r0
            if solver_type == "heun":
                following += c.c1 * (r0 * d10 - r1 * d11) / (r0 - r1) + c.c2 * 2.0 * (d11 - d10) / (r0 - r1)
            else:
                following += c.c1 * d11
        x = following + c.noise * trace.noise() if c.noise else following
    return trace.finish(x, **levels.at(levels.steps))


@on_grid(final_sigmas_type="sigma_min")
def deis_table(
    grid: SigmaGrid, *, prediction_type: str = "epsilon", solver_order: int = 2, lower_order_final: bool = True
) -> StepTable:
    """Return the table of DEIS, log-rho multistep (Zhang & Chen 2023); diffusers' `DEISMultistepScheduler`.

    Epsilon is a polynomial in log(noise / signal) through the last predictions, and is integrated exactly.

    Args:
        grid: the levels to visit; it cannot end at zero noise.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        solver_order: 1, 2 or 3; the first steps are of lower order.
        lower_order_final: with fewer than 15 steps lower the order towards the end.

    Raises:
        ValueError: a setting is not known, or the grid ends at zero noise.
    """
    _check_solver("dpmsolver", solver_order, "midpoint", grid, name="method 'deis'")
    levels, trace = _Levels(grid), _trace(grid, prediction_type, "epsilon")
    x, seen = trace.sample, list[Symbol]()
    few = lower_order_final and levels.steps < FEW_STEPS
    for i in range(levels.steps):
        x, m0 = levels.evaluate(trace, x, i)
        seen = [m0, *seen][:solver_order]
        order = min(solver_order, i + 1)
        if few:
            order = min(order, levels.steps - i)
        # With u = log rho = -lambda, x / signal changes by the integral of epsilon over d rho = e^u d u.
        nodes = [-float(levels.log_snr[i - k]) for k in range(order)]
        end = -float(levels.log_snr[i + 1])
        weights = [_integral_with_exp(lagrange(nodes, k), nodes[0], end) for k in range(order)]
        moved = sum((weight * m for weight, m in zip(weights, seen, strict=False)), start=Symbol({}))
        x = float(levels.signal[i + 1]) * (x / float(levels.signal[i]) + moved)
    return trace.finish(x, **levels.at(levels.steps))


@on_grid()
def unipc_table(
    grid: SigmaGrid,
    *,
    prediction_type: str = "epsilon",
    solver_order: int = 2,
    predict_x0: bool = True,
    solver_type: str = "bh2",
    lower_order_final: bool = True,
    disable_corrector: tuple[int, ...] = (),
) -> StepTable:
    """Return the table of UniPC (Zhao et al. 2023); diffusers' `UniPCMultistepScheduler`.

    Each evaluation first corrects the step that led to it, then predicts the next one.

    Args:
        grid: the levels to visit, see `on_grid`.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        solver_order: 1 to 3.
        predict_x0: extrapolate x0; False extrapolates epsilon, which cannot end at zero noise.
        solver_type: "bh1" or "bh2", the function B(h) of the paper.
        lower_order_final: lower the order towards the end.
        disable_corrector: indices of the steps that are not corrected.

    Raises:
        ValueError: a setting is not known, or `predict_x0` or `lower_order_final` is False at zero final noise.
    """
    if solver_type not in ("bh1", "bh2"):
        raise ValueError(f"solver_type is {solver_type!r}, must be 'bh1' or 'bh2'")
    _check_solver("dpmsolver++" if predict_x0 else "dpmsolver", solver_order, "midpoint", grid)
    if grid.sigmas[-1] == 0 and not lower_order_final and solver_order > 1:
        raise ValueError("lower_order_final is False but the grid ends at zero noise, must be True or 'sigma_min'")
    levels, trace = _Levels(grid), _trace(grid, prediction_type, "x0" if predict_x0 else "epsilon")
    x, before, seen, order = trace.sample, trace.sample, list[Symbol](), 0
    for i in range(levels.steps):
        x, m = levels.evaluate(trace, x, i)
        if i > 0 and i - 1 not in disable_corrector:
            x = _unipc_step(levels, before, seen, i - 1, order, predict_x0, solver_type, corrected=m)
        seen = [m, *seen][:solver_order]
        order = min(solver_order, i + 1, levels.steps - i if lower_order_final else solver_order)
        before, x = x, _unipc_step(levels, x, seen, i, order, predict_x0, solver_type)
    return trace.finish(x, **levels.at(levels.steps))


@on_grid()
def plms_table(grid: SigmaGrid, *, prediction_type: str = "epsilon") -> StepTable:
    """Return the table of PLMS (Liu et al. 2022, PNDM without its Runge-Kutta start), with S + 1 evaluations.

    diffusers' `PNDMScheduler` with `skip_prk_steps`. It extrapolates predictions with the coefficients of Adams and
    Bashforth, and rises to order 4. The first step is done twice, the second time with the mean of two predictions.

    Args:
        grid: the levels to visit, evenly spaced timesteps.
        prediction_type: "epsilon", or "v_prediction", which is extrapolated without conversion.

    Raises:
        ValueError: `prediction_type` is neither.
    """
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type is {prediction_type!r}, must be 'epsilon' or 'v_prediction' with PLMS")
    levels, trace = _Levels(grid), _trace(grid, prediction_type, "out")
    x, seen = trace.sample, list[Symbol]()
    for i in range(levels.steps):
        trace.begin_step()
        x, out = levels.evaluate(trace, x, i)
        seen = [out, *seen][: len(_ADAMS)]
        if i == 0 and levels.steps > 1:
            _, again = levels.evaluate(trace, _ddim_step(levels, prediction_type, x, out, 0), 1)
            x = _ddim_step(levels, prediction_type, x, (out + again) / 2, 0)
            continue
        extrapolated = sum((w * e for w, e in zip(_ADAMS[len(seen) - 1], seen, strict=True)), start=Symbol({}))
        x = _ddim_step(levels, prediction_type, x, extrapolated, i)
    return trace.finish(x, **levels.at(levels.steps))


# Weights of the last predictions, the newest first (Adams and Bashforth 1883), by their number.
_ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class _Levels:
    """The signal, noise and lambda at each level of a grid."""

    def __init__(self, grid: SigmaGrid) -> None:
        self.grid, self.signal, self.noise = grid, grid.signal, grid.noise
        with np.errstate(divide="ignore"):
            self.log_snr = np.log(self.signal) - np.log(self.noise)
        self.steps = len(grid.timesteps)

    def at(self, index: int) -> dict[str, float]:
        """Return the level `index` as arguments of `Trace`."""
        return {"signal": float(self.signal[index]), "noise": float(self.noise[index])}

    def evaluate(self, trace: Trace, x: Symbol, index: int) -> tuple[Symbol, Symbol]:
        """Evaluate the network at the level `index`."""
        signal, noise = float(self.signal[index]), float(self.noise[index])
        return trace.evaluate(x, timestep=float(self.grid.timesteps[index]), signal=signal, noise=noise)


class _Coefficients(NamedTuple):
    """Factors in a step of the state, of D0, D1 and D2 (derivatives of the prediction in lambda), and of noise."""

    keep: float
    c0: float
    c1: float
    c2: float
    noise: float


def _coefficients(algorithm_type: str, levels: _Levels, begin: int, end: int) -> tuple[_Coefficients, float]:
    """Return the factors of the step between two levels, and h (Lu et al. 2022b, eq. 9 and appendix B)."""
    signal, noise = float(levels.signal[end]), float(levels.noise[end])
    h = float(levels.log_snr[end] - levels.log_snr[begin])
    if algorithm_type == "dpmsolver++":
        keep, e, sign, factor, deviation = noise / float(levels.noise[begin]), -h, -1.0, signal, 0.0
    elif algorithm_type == "dpmsolver":
        keep, e, sign, factor, deviation = signal / float(levels.signal[begin]), h, -1.0, noise, 0.0
    elif algorithm_type == "sde-dpmsolver++":
        keep = noise / float(levels.noise[begin]) * math.exp(-h)
        e, sign, factor, deviation = -2 * h, -1.0, signal, noise * math.sqrt(max(0.0, -math.expm1(-2 * h)))
    else:
        keep = signal / float(levels.signal[begin])
        e, sign, factor, deviation = h, -2.0, noise, noise * math.sqrt(max(0.0, math.expm1(2 * h)))
    # phi_k(e) are the integrals of exp against powers; with h infinite only the first is used.
    phi1 = math.expm1(e)
    c0 = sign * factor * phi1
    if not math.isfinite(e) or h == 0:  # a step to zero noise, or of no length, is of order 1
        return _Coefficients(keep, c0, 0.0, 0.0, deviation), h
    c1 = sign * factor * (phi1 / e - 1)
    # For the SDE diffusers adds where the ODE's formula subtracts; we follow it, because its images are the reference.
    half = -0.5 if algorithm_type == "sde-dpmsolver++" else 0.5
    c2 = sign * factor * ((phi1 - e) / e**2 - half)
    return _Coefficients(keep, c0, c1, c2, deviation), h


def _unipc_step(
    levels: _Levels,
    x: Symbol,
    seen: list[Symbol],
    begin: int,
    order: int,
    predict_x0: bool,
    solver_type: str,
    corrected: Symbol | None = None,
) -> Symbol:
    """Return the state after the step from level `begin`: predicted, or corrected by the prediction after the step."""
    c, h = _coefficients("dpmsolver++" if predict_x0 else "dpmsolver", levels, begin, begin + 1)
    m0, lam = seen[0], levels.log_snr
    following = c.keep * x + c.c0 * m0
    ratios = [float(lam[begin - k] - lam[begin]) / h for k in range(1, order)]
    differences = [(seen[k] - m0) / ratio for k, ratio in enumerate(ratios, start=1)]
    e = -h if predict_x0 else h
    b_h = math.expm1(e) if solver_type == "bh2" else e
    factor = float(levels.signal[begin + 1] if predict_x0 else levels.noise[begin + 1])
    if corrected is not None:
        ratios, differences = [*ratios, 1.0], [*differences, corrected - m0]
    if not differences:
        return following
    if len(differences) == 1:
        weights = [0.5]  # as in the authors' code; the exact weight differs by O(h)
    else:
        phi, factorial, right = math.expm1(e) / e - 1, 1.0, []
        for k in range(1, len(differences) + 1):
            right.append(phi * factorial / b_h)
            factorial *= k + 1
            phi = phi / e - 1 / factorial
        weights = list(np.linalg.solve(np.vander(ratios, increasing=True).T, np.array(right)))
    return following - factor * b_h * sum((w * d for w, d in zip(weights, differences, strict=True)), start=Symbol({}))


def _ddim_step(levels: _Levels, prediction_type: str, x: Symbol, out: Symbol, begin: int) -> Symbol:
    """Return the state at the next level, without noise, for a prediction (Song et al. 2021, eq. 12)."""
    signal, noise = float(levels.signal[begin]), float(levels.noise[begin])
    epsilon = signal * out + noise * x if prediction_type == "v_prediction" else out
    return float(levels.signal[begin + 1]) * (x - noise * epsilon) / signal + float(levels.noise[begin + 1]) * epsilon


def _singlestep_orders(steps: int, order: int, lower_final: bool, to_zero: bool) -> list[int]:
    """Return the order of every step: groups that rise from 1 to `order`, then steps of lower order to fill or end."""
    whole, rest = divmod(steps, order)
    group = list(range(1, order + 1))
    if order == 1 or not lower_final:
        orders = group * whole
    elif rest == 0:
        orders = group * (whole - 1) + (group[:-1] if order == 3 else [1]) + [1]
    else:
        orders = group * whole + group[:rest]
    if to_zero:
        orders[-1] = 1
    return orders


def _integral_with_exp(polynomial: Polynomial, begin: float, end: float) -> float:
    """Return the integral of polynomial(u) * exp(u) from `begin` to `end`."""
    parts, sign = polynomial, -1.0
    for k in range(1, polynomial.degree() + 1):
        parts, sign = parts + sign * polynomial.deriv(k), -sign
    return float(math.exp(end) * parts(end) - math.exp(begin) * parts(begin))


def _trace(grid: SigmaGrid, prediction_type: str, stores: str) -> Trace:
    deviation = float(grid.noise[0]) if grid.init_noise_sigma is None else grid.init_noise_sigma
    return Trace(prediction_type, stores, init_noise_sigma=deviation)


def _stored(algorithm_type: str) -> str:
    return "x0" if algorithm_type.endswith("++") else "epsilon"


def _check_solver(algorithm_type: str, order: object, solver_type: str, grid: SigmaGrid, name: str = "") -> None:
    if algorithm_type not in ALGORITHMS:
        raise ValueError(f"algorithm_type is {algorithm_type!r}, must be one of {', '.join(ALGORITHMS)}")
    if isinstance(order, bool) or not isinstance(order, numbers.Integral) or not 1 <= int(order) <= 3:
        raise ValueError(f"solver_order is {order!r}, must be 1, 2 or 3")
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"solver_type is {solver_type!r}, must be 'midpoint' or 'heun'")
    if grid.sigmas[-1] == 0 and not algorithm_type.endswith("++"):
        what = name or f"algorithm_type is {algorithm_type!r}, which"
        raise ValueError(f"{what} cannot end at zero noise: final_sigmas_type must be 'sigma_min'")
