"""Find sampling methods by name. A method is a function that returns a coefficient table:

    ddim_table(schedule, timesteps, eta=0.5)
    method_table("ddim", schedule, timesteps, eta=0.5)     # the same by name

The method's settings are the keyword-only parameters of that function and of the function that chooses its levels.
Their names, owners and defaults stand nowhere else. To add a method, write its function and give it a line in
`METHODS`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastddpm.process import multistep, sigma_space
from fastddpm.process.grids import SPACINGS, SigmaGrid, lcm_grid, plms_grid, sigma_grid
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import StepTable, ddim_table, ddpm_table

# Settings that say what the network returns. Every method accepts them; only those with such a parameter use them.
OF_THE_NETWORK = ("prediction_type", "variance_type")


class Method(NamedTuple):
    """A sampling method.

    Attributes:
        table: called as table(schedule, timesteps, **settings).
        grid: grid(schedule, steps, spacing, steps_offset=0, **settings) chooses levels rather than timesteps; or None.
        multistep: whether diffusers spaces the timesteps as for its multistep solvers, see `NoiseSchedule.timesteps`.
        spacing: the default of `timestep_spacing`.
        clips: the default of `clip_sample`.
        stores_x0: whether the method combines x0, so that it can be clipped.
        fixed: arguments of the function that are fixed, so that they are no settings of the method.
        defaults: the method's defaults that differ from the function's.
    """

    table: Callable[..., StepTable]
    grid: Callable[..., SigmaGrid] | None = None
    multistep: bool = False
    spacing: str = "leading"
    clips: bool = False
    stores_x0: bool = True
    fixed: Mapping[str, Any] = {}
    defaults: Mapping[str, Any] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings and their defaults."""
        own = {**self.grid_settings, **_keywords(self.table), **self.defaults}
        return {name: value for name, value in own.items() if name not in self.fixed}

    @property
    def grid_settings(self) -> dict[str, Any]:
        """Return the settings that choose levels, and their defaults."""
        own = {} if self.grid is None else _keywords(self.grid)
        return {name: value for name, value in own.items() if name not in ("multistep", "steps_offset")}


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


def _solver(table: Callable[..., StepTable], **others: Any) -> Method:
    return Method(table, grid=functools.partial(sigma_grid, multistep=True), multistep=True, **others)


def _in_sigma(table: Callable[..., StepTable], **others: Any) -> Method:
    return Method(table, grid=sigma_grid, spacing="linspace", **others)


def _dpm(algorithm_type: str, table: Callable[..., StepTable] = multistep.dpmsolver_table) -> Method:
    of_x0 = algorithm_type.endswith("++")
    ends = {} if of_x0 else {"final_sigmas_type": "sigma_min"}
    return _solver(table, stores_x0=of_x0, fixed={"algorithm_type": algorithm_type}, defaults=ends)


METHODS: dict[str, Method] = {
    "ddpm": Method(ddpm_table, clips=True),
    "ddim": Method(ddim_table, clips=True),
    "dpmsolver++": _dpm("dpmsolver++"),
    "dpmsolver": _dpm("dpmsolver"),
    "sde-dpmsolver++": _dpm("sde-dpmsolver++"),
    "sde-dpmsolver": _dpm("sde-dpmsolver"),
    "dpmsolver++_singlestep": _dpm("dpmsolver++", multistep.dpmsolver_singlestep_table),
    "dpmsolver_singlestep": _dpm("dpmsolver", multistep.dpmsolver_singlestep_table),
    "unipc": _solver(multistep.unipc_table),
    "deis": _solver(multistep.deis_table, stores_x0=False, defaults={"final_sigmas_type": "sigma_min"}),
    "plms": Method(multistep.plms_table, grid=plms_grid, stores_x0=False),
    "euler": _in_sigma(sigma_space.euler_table),
    "euler_a": _in_sigma(sigma_space.euler_ancestral_table),
    "heun": _in_sigma(sigma_space.heun_table),
    "dpm2": _in_sigma(sigma_space.dpm2_table, fixed={"ancestral": False}),
    "dpm2_a": _in_sigma(sigma_space.dpm2_table, fixed={"ancestral": True}),
    "lms": _in_sigma(sigma_space.lms_table, stores_x0=False),
    "edm": _in_sigma(sigma_space.edm_table, defaults={"sigma_schedule": "karras"}),
    "lcm": Method(sigma_space.lcm_table, grid=lcm_grid),
}


def find_method(name: str) -> Method:
    """Return the method of that name.

    Raises:
        ValueError: no method has that name.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}, must be one of {', '.join(METHODS)}")
    return METHODS[name]


def owners(setting: str) -> list[str]:
    """Return the names of the methods that have a setting."""
    return [name for name, method in METHODS.items() if setting in method.settings]


def own_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` without those that only other methods have."""
    own = find_method(name).settings
    return {
        setting: value
        for setting, value in settings.items()
        if setting in own or setting in OF_THE_NETWORK or not owners(setting)
    }


def method_table(
    name: str,
    schedule: NoiseSchedule,
    timesteps: Sequence[int] | Tensor | None = None,
    *,
    num_inference_steps: int | str | None = None,
    timestep_spacing: str | None = None,
    steps_offset: int = 0,
    **settings: Any,
) -> StepTable:
    """Return the table of a method, at given timesteps or for a number of steps.

    Args:
        name: one of `METHODS`.
        schedule: the forward process the network was trained on.
        timesteps: [S], falling; None to choose them by the next three arguments.
        num_inference_steps, timestep_spacing, steps_offset: see `NoiseSchedule.timesteps`; None for all T steps and
            the method's own spacing.
        **settings: the method's. A setting of other methods is accepted if it has the default of the first of them.

    Raises:
        TypeError: no method has such a setting.
        ValueError: only other methods have the setting; or an error of the method's function.
    """
    method = find_method(name)
    given = {**method.defaults, **_own(name, method.settings, settings), **method.fixed}
    if timesteps is not None and num_inference_steps is not None:
        raise ValueError(f"num_inference_steps is {num_inference_steps} but timesteps are given; must be one of them")
    spacing = method.spacing if timestep_spacing is None else timestep_spacing
    for_grid = {setting: given.pop(setting) for setting in method.grid_settings if setting in given}
    if timesteps is None and method.grid is not None and _lays_levels(method, schedule, num_inference_steps, spacing):
        steps = schedule.num_train_timesteps if num_inference_steps is None else num_inference_steps
        return method.table(
            schedule, method.grid(schedule, steps, spacing, steps_offset=steps_offset, **for_grid), **given
        )
    if "final_sigmas_type" in for_grid:
        given["final_sigmas_type"] = for_grid.pop("final_sigmas_type")
    for setting, value in for_grid.items():
        if value != method.settings[setting]:
            raise ValueError(f"{setting} is {value!r} but the timesteps are given, must be left out with them")
    if timesteps is None:
        timesteps = schedule.timesteps(num_inference_steps, spacing, steps_offset, multistep=method.multistep)
    return method.table(schedule, timesteps, **given)


def _lays_levels(method: Method, schedule: NoiseSchedule, steps: int | str | None, spacing: str) -> bool:
    """Return whether the method's grid chooses the levels; a solver in all T steps visits the timesteps themselves."""
    whole = method.multistep and steps in (None, schedule.num_train_timesteps)
    return spacing in SPACINGS and not whole and not isinstance(steps, str)


def _own(name: str, own: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a method has; see `method_table`."""
    given = {}
    for setting, value in settings.items():
        others = owners(setting)
        if setting in own:
            given[setting] = value
        elif setting in OF_THE_NETWORK:
            continue
        elif not others:
            raise TypeError(f"{setting} is no setting of a method; method {name!r} has {', '.join(own)}")
        elif value != METHODS[others[0]].settings[setting]:
            raise ValueError(
                f"{setting} is {value!r} but method is {name!r}; {setting} is a setting of method "
                f"{', '.join(map(repr, others))}"
            )
    return given
