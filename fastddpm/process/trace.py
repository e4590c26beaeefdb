"""Turn a sampler's formulas into rows of the coefficient table.

A multistep or multi-stage sampler combines the network's predictions at this and earlier evaluations, the states at
those evaluations, and noise. All of it is linear. With `Trace` a sampler is written as in its paper, over symbols;
`Trace` solves for the rows that give the same numbers:

    trace = Trace("epsilon")
    x = trace.sample                              # the state before the first step
    for i in range(steps):
        x, x0 = trace.evaluate(x, ...)            # the network reads x: ends one row of the table, begins the next
        x = shrink[i] * x + weight[i] * x0
    table = trace.finish(x, ...)

A row sees the state that the network read, its prediction, the predictions of up to `HISTORY` rows before, and one
draw of noise. Earlier states are not kept. Where a formula uses one (the second stage of Heun's method), `Trace` solves
for it from the present state.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Polynomial

from fastddpm.process.grids import SigmaGrid, grid_at
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import StepTable

HISTORY = 4  # the kernel has columns for that many predictions before the last one
_ROUNDING = 1e-9  # relative size below which a coefficient counts as 0 with a rounding error


class Symbol:
    """A linear combination of states ("s3"), predictions ("m3") and draws of noise ("z3") of rows.

    Supports addition, subtraction, and multiplication and division by numbers.
    """

    __slots__ = ("terms",)
    __array_ufunc__ = None  # so that a NumPy number on the left defers to `__rmul__`

    def __init__(self, terms: dict[str, float]) -> None:
        self.terms = terms

    def __add__(self, other: Symbol | float) -> Symbol:
        if not isinstance(other, Symbol):  # the 0 that `sum` starts from
            return self
        terms = dict(self.terms)
        for name, value in other.terms.items():
            terms[name] = terms.get(name, 0.0) + value
        return Symbol(terms)

    __radd__ = __add__

    def __mul__(self, factor: float) -> Symbol:
        return Symbol({name: value * float(factor) for name, value in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Symbol:
        return self * (1 / float(divisor))

    def __neg__(self) -> Symbol:
        return self * -1.0

    def __sub__(self, other: Symbol) -> Symbol:
        return self + -other

    def __getitem__(self, name: str) -> float:
        return self.terms.get(name, 0.0)


@dataclasses.dataclass
class _Row:
    timestep: float
    to_stored: tuple[float, float]  # (A, B)
    level: tuple[float, float]  # (signal, noise) of the state that the network reads
    network: bool = True
    following: Symbol = dataclasses.field(default_factory=lambda: Symbol({}))  # the state after the row


class Trace:
    """Records the evaluations of a sampler and solves for its rows.

    Args:
        prediction_type: of the network, see `at_level`.
        stores: the quantity that an evaluation stores and later rows combine: "x0", "epsilon" or "out" (the prediction
            itself).
        init_noise_sigma: standard deviation of the first state, as drawn.

    Attributes:
        sample: the state before the first step, as the network reads it.
    """

    def __init__(self, prediction_type: str, stores: str = "x0", *, init_noise_sigma: float = 1.0) -> None:
        self._prediction_type, self._stores = prediction_type, stores
        self._init_noise_sigma = init_noise_sigma
        self._rows: list[_Row] = []
        self._begins: list[int] = []
        self.sample = Symbol({"s0": 1.0})

    def begin_step(self) -> None:
        """Mark the next row as the first of a step, in samplers whose steps take several rows."""
        self._begins.append(len(self._rows))

    def add_noise(self, x: Symbol, deviation: float, *, timestep: float, signal: float, noise: float) -> Symbol:
        """Return x plus noise of a standard deviation, for samplers that draw before they evaluate the network.

        Before the first evaluation the draw takes a row of its own, without the network. Later it belongs to the row
        before.
        """
        if deviation == 0:
            return x
        if not self._rows:
            self._begin(_Row(timestep, (0.0, 0.0), (signal, noise), network=False), x)
        return x + deviation * self.noise()

    def noise(self) -> Symbol:
        """Return noise, N(0, I); between two evaluations it is always the same draw."""
        return Symbol({f"z{len(self._rows) - 1}": 1.0})

    def evaluate(
        self, x: Symbol, *, timestep: float, signal: float, noise: float,
        to_stored: tuple[float, float] | None = None,
    ) -> tuple[Symbol, Symbol]:  # fmt: skip
        """Evaluate the network on x, and return the symbol of that state and of the stored prediction.

        Args:
            x: the state as the network reads it, signal * x_0 + noise * epsilon.
            timestep: the timestep that the network reads.
            signal, noise: the level of `x`.
            to_stored: (A, B) of the stored prediction A x + B out; None for those of the prediction type.
        """
        if to_stored is None:
            to_stored = at_level(signal, noise, self._prediction_type, self._stores)
        k = self._begin(_Row(timestep, to_stored, (signal, noise)), x)
        return Symbol({f"s{k}": 1.0}), Symbol({f"m{k}": 1.0})

    def finish(self, x: Symbol, *, signal: float, noise: float) -> StepTable:
        """Return the table that ends with the state `x`, at the level (signal, noise).

        Raises:
            ValueError: a row needs more than `HISTORY` earlier predictions.
        """
        self._rows[-1].following = x
        rows = np.stack([self._coefficients(k) for k in range(len(self._rows))])
        used = max((h for h in range(2, HISTORY + 1) if rows[:, 5 + h].any()), default=1)
        timesteps = torch.tensor([row.timestep for row in self._rows], dtype=torch.float64)
        if bool((timesteps == timesteps.round()).all()):
            timesteps = timesteps.to(torch.int64)
        levels = [row.level for row in self._rows[1:]] + [(signal, noise)]
        return StepTable(
            timesteps,
            torch.from_numpy(rows[:, : 6 + used].copy()),
            None,
            torch.tensor(levels, dtype=torch.float64),
            torch.tensor([row.network for row in self._rows]),
            self._rows[0].level,
            init_noise_sigma=self._init_noise_sigma,
            stores=self._stores,
            begins=tuple(self._begins or range(len(self._rows))),
        )

    def _begin(self, row: _Row, x: Symbol) -> int:
        """Add a row whose network reads x, and return its index."""
        if self._rows:
            self._rows[-1].following = self._in_terms_of(len(self._rows) - 1, x)
        elif set(x.terms) != {"s0"} or abs(x.terms["s0"] - 1) > _ROUNDING:
            raise ValueError("the first evaluation reads another state than `sample`")
        self._rows.append(row)
        return len(self._rows) - 1

    def _in_terms_of(self, k: int, x: Symbol) -> Symbol:
        """Return x without states of rows before k; each is solved for from later ones."""
        for j in range(k):
            share = x.terms.get(f"s{j}", 0.0)
            if share == 0:
                continue
            following = self._rows[j].following
            keeps = following.terms.get(f"s{j}", 0.0)
            if keeps == 0:
                raise ValueError(f"the state of row {j} is needed at row {k} but cannot be told from later states")
            others = Symbol({name: value for name, value in following.terms.items() if name != f"s{j}"})
            rest = Symbol({name: value for name, value in x.terms.items() if name != f"s{j}"})
            x = rest + (share / keeps) * (Symbol({f"s{j + 1}": 1.0}) - others)
        return x

    def _coefficients(self, k: int) -> np.ndarray:
        """Return row k: the columns A B C D E F S, and one for each prediction before the last."""
        row = self._rows[k]
        following = self._in_terms_of(k, row.following)
        scale = max((abs(value) for value in following.terms.values()), default=0.0)
        columns = np.zeros(6 + HISTORY)  # A to S, then one for each prediction before the last
        columns[:2] = row.to_stored
        for name, value in following.terms.items():
            kind, age = name[0], k - int(name[1:])
            if kind == "m" and age <= HISTORY:
                columns[(2, 5, 7, 8, 9)[age]] = value if abs(value) > _ROUNDING * 1e-4 * scale else 0.0
            elif age == 0:
                columns[{"s": 3, "z": 6}[kind]] = value
            elif abs(value) > _ROUNDING * scale:
                raise ValueError(f"row {k} needs more than {HISTORY} earlier predictions")
        return columns


def on_grid(final_sigmas_type: str = "zero") -> Callable[[Callable[..., StepTable]], Callable[..., StepTable]]:
    """Turn `build(grid, **settings)` into a sampler's function, table(schedule, timesteps, **settings).

    Its `timesteps` are a `SigmaGrid` or a falling list. A list has the levels of the schedule, and ends as the setting
    `final_sigmas_type` says. `StepTable.skip` restarts the table at a step by calling `build` on the rest of the grid.

    Args:
        final_sigmas_type: the default of that setting.
    """

    def decorate(build: Callable[..., StepTable]) -> Callable[..., StepTable]:
        def on(grid: SigmaGrid, settings: dict[str, Any]) -> StepTable:
            found = build(grid, **settings)
            begins = found.begins

            def restart(index: int) -> StepTable:
                if index not in begins:
                    raise ValueError(f"index is {index}, inside a step; a step begins at {', '.join(map(str, begins))}")
                return on(grid.skip(begins.index(index)), settings)

            return dataclasses.replace(found, restart=restart)

        @functools.wraps(build)
        def table(schedule: NoiseSchedule, timesteps: Any, **settings: Any) -> StepTable:
            final = settings.pop("final_sigmas_type", final_sigmas_type)
            grid = timesteps if isinstance(timesteps, SigmaGrid) else grid_at(schedule, timesteps, final)
            return on(grid, settings)

        parameters = [
            inspect.Parameter("schedule", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            inspect.Parameter("timesteps", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            inspect.Parameter("final_sigmas_type", inspect.Parameter.KEYWORD_ONLY, default=final_sigmas_type),
            *list(inspect.signature(build).parameters.values())[1:],
        ]
        table.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return table

    return decorate


def at_level(signal: float, noise: float, prediction_type: str, stores: str) -> tuple[float, float]:
    """Return (A, B) of x0 or epsilon, A x + B out, for a prediction at the level (signal, noise).

    Args:
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction" (epsilon - x_0, Lipman et al. 2023).
        stores: "x0", "epsilon" or "out", the prediction itself.

    Raises:
        ValueError: `prediction_type` is not known.
    """
    if prediction_type == "epsilon":
        a, b = 1 / signal, -noise / signal
    elif prediction_type == "sample":
        a, b = 0.0, 1.0
    elif prediction_type == "v_prediction":
        a, b = signal, -noise
    elif prediction_type == "flow_prediction":
        a, b = 1.0, -noise
    else:
        raise ValueError(
            f"prediction_type is {prediction_type!r}, must be one of epsilon, sample, v_prediction, flow_prediction"
        )
    if stores == "out":
        return 0.0, 1.0
    if stores == "x0":
        return a, b
    if prediction_type == "epsilon":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        return noise, signal
    return (1 - signal * a) / noise, -signal * b / noise


def lagrange(nodes: list[float], k: int) -> Polynomial:
    """Return the polynomial that is 1 at node k and 0 at the others."""
    found = Polynomial([1.0])
    for j, node in enumerate(nodes):
        if j != k:
            found = found * Polynomial([-node, 1.0]) / (nodes[k] - node)
    return found
