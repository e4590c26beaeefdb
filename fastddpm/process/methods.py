"""The sampling methods by name. A method is a function that returns a coefficient table:

    ddim_table(schedule, timesteps, eta=0.5)
    method_table("ddim", schedule, timesteps, eta=0.5)     # the same by name

The keyword-only parameters of the function are the method's settings: their names, owners and defaults stand nowhere
else. To add a method, write its function and give it a line in `METHODS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.solvers import dpmsolver_table
from fastddpm.process.tables import StepTable, ddim_table, ddpm_table

# What the network returns. It may be said for every method, and goes to those that take it.
OF_THE_NETWORK = ("prediction_type", "variance_type")


class Method(NamedTuple):
    """A sampling method.

    Attributes:
        table: called as table(schedule, timesteps, **settings).
        multistep: whether diffusers lays the timesteps as for its multistep solvers, see `NoiseSchedule.timesteps`.
    """

    table: Callable[..., StepTable]
    multistep: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The settings and their defaults."""
        parameters = inspect.signature(self.table).parameters.values()
        return {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


METHODS: dict[str, Method] = {
    "ddpm": Method(ddpm_table),
    "ddim": Method(ddim_table),
    "dpmsolver++": Method(dpmsolver_table, multistep=True),
}


def find_method(name: str) -> Method:
    """Return the method of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}, must be one of {', '.join(METHODS)}")
    return METHODS[name]


def owners(setting: str) -> list[str]:
    """Return the names of the methods that have a setting."""
    return [name for name, method in METHODS.items() if setting in method.settings]


def own_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` without those that other methods have and this one has not."""
    own = find_method(name).settings
    return {
        setting: value
        for setting, value in settings.items()
        if setting in own or setting in OF_THE_NETWORK or not owners(setting)
    }


def method_table(
    name: str, schedule: NoiseSchedule, timesteps: Sequence[int] | Tensor, **settings: Any
) -> StepTable:
    """Return the table of a method.

    Args:
        name: one of `METHODS`.
        schedule: the forward process the network was trained on.
        timesteps: [S], falling.
        **settings: the method's. A setting of other methods is let through at its default.

    Raises:
        TypeError: no method has such a setting.
        ValueError: only other methods have it, or as the method's function.
    """
    own = find_method(name).settings
    given = {}
    for setting, value in settings.items():
        others = owners(setting)
        if setting in own:
            given[setting] = value
        elif setting in OF_THE_NETWORK:
            continue
        elif not others:
            raise TypeError(f"{setting} is no setting of a method; method {name!r} has {', '.join(own)}")
        elif all(value != METHODS[other].settings[setting] for other in others):
            raise ValueError(
                f"{setting} is {value!r} but method is {name!r}, which has no such setting; "
                f"{' and '.join(map(repr, others))} {'has' if len(others) == 1 else 'have'} it"
            )
    return METHODS[name].table(schedule, timesteps, **given)
