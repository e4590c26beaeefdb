"""diffusers' schedulers as schedules and tables, and the random numbers that their pipelines draw.

The levels and timesteps that a loop visits are read off the scheduler once it has set them, in its own rounding; the
formulas that lead from level to level are those of `fastddpm.process`.
"""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.interop.scheduler_config import noise_schedule, scheduler_settings
from fastddpm.interop.shared import StepNoise
from fastddpm.networks.comparing import difference
from fastddpm.process.grids import SigmaGrid, trained_sigmas
from fastddpm.process.methods import METHODS
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.sigma_space import euler_table
from fastddpm.process.tables import StepTable, ddim_inversion_table, ddim_table, ddpm_table
from fastddpm.sampling.sampler import Sampler

# Rounding of float32 grows by the gain of the first step, from noise to x0: 160 for 1000 steps.
_SAME_TO = 1e-3
_OF_A_LOOP = (
    "timesteps", "sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "log_sigmas", "prk_timesteps",
    "plms_timesteps", "sample", "last_sample", "cur_sample", "cur_model_output", "prev_derivative", "dt",
)  # fmt: skip
# Each with the method that has its formulas; None: its config says which.
SCHEDULERS: dict[str, str | None] = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DDIMInverseScheduler": "ddim_inverse",
    "DPMSolverMultistepScheduler": None,
    "DPMSolverSinglestepScheduler": None,
    "DEISMultistepScheduler": "deis",
    "UniPCMultistepScheduler": "unipc",
    "PNDMScheduler": "plms",
    "LCMScheduler": "lcm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2_a",
    "LMSDiscreteScheduler": "lms",
    "EDMEulerScheduler": "edm_euler",
}
# Their state is x_0 + sigma * epsilon, and `scale_model_input` makes the network's input of it.
_SCALE = ("euler", "euler_a", "heun", "dpm2", "dpm2_a", "lms", "edm_euler")
# Their steps go by timesteps, and levels are those of the schedule; the others have sigmas.
_BY_TIMESTEPS = ("ddpm", "ddim", "ddim_inverse", "plms", "lcm")


@dataclass(frozen=True, eq=False)
class Recognised:
    """What a scheduler of diffusers does.

    Attributes:
        name: of its class.
        method: `Sampler`'s name of it, or "ddim_inverse" or "edm_euler".
        schedule: its noise levels, for the methods that go by timesteps to the last bit of its float32; of EDM, which
            has none, that of the levels that it visits, in units of `sigma_data`.
        settings: of its table and of `Sampler`.
    """

    name: str
    method: str
    schedule: NoiseSchedule
    settings: dict[str, Any]

    @property
    def learned_variance(self) -> bool:
        """Whether the network has channels for the variance."""
        return self.settings.get("variance_type") in ("learned", "learned_range")

    @property
    def scales(self) -> bool:
        """Whether its loop has to scale the first noise and every input of the network."""
        return self.method in _SCALE

    @property
    def of_sampler(self) -> dict[str, Any]:
        """Return the settings of `Sampler` beside its table."""
        names = (
            "variance_type", "clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio",
            "sample_max_value",
        )  # fmt: skip
        clips = self.method in ("ddpm", "ddim", "ddim_inverse")
        return {"clip_sample": clips, **{name: self.settings[name] for name in names if name in self.settings}}

    def check_channels(self, channels: int, out_channels: int) -> None:
        """Raise ValueError unless a network of so many channels fits.

        diffusers' solvers take the first three channels where the variance is learned.
        """
        variance = self.settings.get("variance_type")
        if self.learned_variance and self.method != "ddpm" and channels != 3:
            raise ValueError(
                f"{self.name}: variance_type is {variance!r} but unet.config.in_channels is {channels}, must be 3"
            )
        expected = channels * (2 if self.learned_variance else 1)
        if out_channels != expected:
            raise ValueError(
                f"unet.config.out_channels is {out_channels}, must be {expected} for in_channels {channels} and "
                f"{self.name}'s variance_type {variance!r}"
            )

    def table(self, scheduler: Any, *, eta: float = 0.0, use_clipped_model_output: bool = False) -> StepTable:
        """Return the coefficients of the steps that a scheduler has set.

        The states of those that scale are taken as the network reads them. The last row undoes that, so that the
        table ends with the scheduler's sample; `initial_scale` does it for the first.

        Args:
            scheduler: the one that was recognised, after its `set_timesteps`.
            eta, use_clipped_model_output: of DDIM.

        Raises:
            ValueError: timesteps do not fall or repeat, or a step has no finite coefficients.
        """
        close = ValueError("num_inference_steps: two levels it visits are so close that a step has no coefficients")
        try:
            with np.errstate(all="ignore"):
                table = self._table(scheduler, eta, use_clipped_model_output)
        except (ArithmeticError, np.linalg.LinAlgError):
            raise close from None
        if len(table) != len(scheduler.timesteps):
            raise ValueError(f"timesteps are {len(scheduler.timesteps)}, must be {len(table)} for its config")
        if not bool(torch.isfinite(table.rows).all()):
            raise close
        return table

    def _table(self, scheduler: Any, eta: float, use_clipped_model_output: bool) -> StepTable:
        prediction_type = self.settings.get("prediction_type", "epsilon")
        if self.method in ("ddpm", "ddim", "ddim_inverse"):
            timesteps, options = scheduler.timesteps.cpu(), {"prediction_type": prediction_type}
            if self.method == "ddpm":
                variance_type = self.settings.get("variance_type", "fixed_small")
                table = ddpm_table(self.schedule, timesteps, variance_type=variance_type, **options)
                return _rounded_ddpm_table(table, self.schedule, variance_type)
            # DDIM steps by T // S, wherever the next timestep is.
            stride = self.schedule.num_train_timesteps // scheduler.num_inference_steps
            options["set_alpha_to_one"] = self.settings.get("set_alpha_to_one", True)
            if self.method == "ddim_inverse":
                return _strided_inversion_table(self.schedule, timesteps, stride, **options)
            options |= {"eta": eta, "use_clipped_model_output": use_clipped_model_output}
            return _strided_ddim_table(self.schedule, timesteps, stride, **options)
        told = scheduler.timesteps.cpu().double()
        if len(told) > 1 and bool((told[1:] == told[0]).any()) and not (self.method == "plms" and len(told) == 2):
            raise ValueError(f"num_inference_steps: its first timestep, {told[0]:g}, is visited twice")
        grid = self._grid(scheduler)
        if self.method == "edm_euler":
            table = euler_table(self.schedule, grid, prediction_type="v_prediction")
        else:
            method = METHODS[self.method]
            own = inspect.signature(method.table).parameters
            options = {name: value for name, value in self.settings.items() if name in own}
            if "stores" in own and not (self.settings.get("clip_sample") or self.settings.get("thresholding")):
                options["stores"] = "epsilon"
            table = method.table(self.schedule, grid, **{**options, **method.fixed})
        timesteps = told.to(torch.int64) if bool((told == told.round()).all()) else told
        return self._as_scaled(replace(table, timesteps=timesteps), scheduler)

    def _as_scaled(self, table: StepTable, scheduler: Any) -> StepTable:
        """Return a table, and what it restarts as, for the network's convention and ending with the sample."""
        if not self.scales:
            return table
        rows, restart = table.rows.clone(), table.restart
        if self.method == "edm_euler":
            if self.settings.get("prediction_type", "epsilon") == "epsilon":  # its network says -v
                rows[:, [1, 4]] *= -1
            rows[-1, 2:] *= scheduler.config.sigma_data
        rows[-1, 2:] /= table.levels[-1, 0]
        again = None if restart is None else lambda index: self._as_scaled(restart(index), scheduler)
        return replace(table, rows=rows, restart=again)

    def initial_scale(self, scheduler: Any) -> float:
        """Return what a network reads of an initial sample, as a factor, once the timesteps are set."""
        if not self.scales:
            return 1.0
        return 1 / math.hypot(float(scheduler.sigmas[0]), scheduler.config.get("sigma_data", 1.0))

    def _grid(self, scheduler: Any) -> SigmaGrid:
        """Return the levels that a scheduler has set, one for every step."""
        told = scheduler.timesteps.cpu().double().numpy()
        trained = trained_sigmas(self.schedule)
        if self.method in ("lcm", "plms"):
            levels = scheduler.alphas_cumprod.cpu().double().numpy()
            if self.method == "lcm":
                last = 1.0
            else:
                told = np.append(told[:1], told[2:])
                stride = self.schedule.num_train_timesteps // scheduler.num_inference_steps
                if (np.diff(told) != -stride).any():
                    raise ValueError(f"timesteps are not {stride} apart, must be as of timestep_spacing 'leading'")
                after = int(told[-1]) - stride
                last = float(levels[after] if after >= 0 else scheduler.final_alpha_cumprod)
            bar = np.append(levels[told.astype(np.int64)], last)
            return SigmaGrid(told, np.sqrt((1 - bar) / bar), init_noise_sigma=1.0, trained=trained)
        sigmas = scheduler.sigmas.cpu().double().numpy()
        if self.method in ("dpm2", "dpm2_a"):  # twice each, as of two evaluations
            sigmas = np.append(sigmas[:1], sigmas[1:-1:2])
        elif self.method == "heun":
            sigmas = np.concatenate([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])
        else:
            sigmas = sigmas[: len(told) + 1]
        if self.method == "edm_euler":
            sigmas = sigmas / scheduler.config.sigma_data
        flow, inner = bool(scheduler.config.get("use_flow_sigmas")), None
        if self.method in ("dpm2", "dpm2_a"):
            inner = self._inner(scheduler, len(sigmas) - 1)
        return SigmaGrid(told[: len(sigmas) - 1], sigmas, flow, init_noise_sigma=1.0, trained=trained, inner=inner)

    def _inner(self, scheduler: Any, steps: int) -> np.ndarray:
        """Return the inner levels of DPM2's steps, see `SigmaGrid`. Float32 leaves few digits of some of them."""
        first = 0 if self.method == "dpm2_a" else 1
        middle = scheduler.sigmas_interpol.cpu().double().numpy()[first : first + 2 * steps : 2]
        if self.method == "dpm2":
            return np.stack([middle, scheduler.sigmas.cpu().double().numpy()[1::2][:steps], 0 * middle], axis=1)
        down, up = (getattr(scheduler, f"sigmas_{way}").cpu().double().numpy() for way in ("down", "up"))
        return np.stack([middle, down[: 2 * steps : 2], up[: 2 * steps : 2]], axis=1)

    def draws(self, timesteps: Tensor, eta: float) -> list[bool]:
        """Return at which steps diffusers draws noise, whether or not it then counts."""
        rows = range(len(timesteps))
        if self.method == "ddpm":
            return (timesteps > 0).tolist()
        if self.method == "lcm":
            return [row < len(timesteps) - 1 for row in rows]
        if self.method == "dpm2_a":  # at the second evaluation of a step
            return [row % 2 == 1 for row in rows]
        always = self.method == "euler_a" or self.method.startswith("sde-") or (self.method == "ddim" and eta > 0)
        return [always] * len(timesteps)


def recognise(scheduler: Any) -> Recognised:
    """Return what a scheduler does, by its class, its config and its noise levels.

    Raises:
        ValueError: its class or a setting is not supported; the message names it and what is.
    """
    name, module = type(scheduler).__name__, type(scheduler).__module__
    if name not in SCHEDULERS or module.partition(".")[0] != "diffusers":
        raise ValueError(f"scheduler is a {name} of {module}, must be one of {', '.join(SCHEDULERS)} of diffusers")
    config = {**scheduler.config, "_class_name": name}
    levels = getattr(scheduler, "alphas_cumprod", torch.ones(1))
    if bool((levels[:-1] == 0).any()):
        raise ValueError(
            f"{name}: beta_end is {config.get('beta_end')}, so large that alphas_cumprod is 0 in float32 from timestep "
            f"{int((levels == 0).nonzero()[0])} of {config['num_train_timesteps']} on"
        )
    if name == "EDMEulerScheduler":
        schedule, settings = _edm_schedule(config), {"prediction_type": config["prediction_type"]}
    elif name == "DDIMInverseScheduler":
        schedule, settings = scheduler_settings({**config, "_class_name": "DDIMScheduler"}, name)
    else:
        schedule, settings = scheduler_settings(config, name)
    method = SCHEDULERS[name] or settings["method"]
    if method in _BY_TIMESTEPS:
        schedule = _own_levels(scheduler, name)
    if settings.get("variance_type") and method != "ddpm" and settings.get("prediction_type") != "epsilon":
        raise ValueError(
            f"{name}: variance_type is {settings['variance_type']!r} but prediction_type is "
            f"{settings['prediction_type']!r}, must be 'epsilon'"
        )
    if settings.get("variance_type") == "fixed_large_log":
        raise ValueError(f"{name}: variance_type is 'fixed_large_log', whose root diffusers takes of the logarithm")
    stores_x0 = method not in METHODS or METHODS[method].stores_x0
    if settings.get("thresholding") and not (stores_x0 and settings.get("predict_x0", True)):
        raise ValueError(f"{name}: thresholding is True, must be False for an algorithm that extrapolates epsilon")
    result = Recognised(name, method, schedule, settings)
    _check_same(scheduler, result)
    return result


def _own_levels(scheduler: Any, name: str) -> NoiseSchedule:
    """Return the schedule of a scheduler's levels, which are rounded to float32, rather than of its config's betas.

    What is as small as 1 - abar at the end of sampling would differ by that rounding.
    """
    levels = scheduler.alphas_cumprod.detach().cpu().double()
    betas = 1 - levels / torch.cat([levels.new_ones(1), levels[:-1]])
    try:
        return noise_schedule({"trained_betas": betas.tolist()})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _edm_schedule(config: dict[str, Any]) -> NoiseSchedule:
    """Return a schedule with the levels of EDM's trained range, in units of `sigma_data`."""
    low, high = (math.log(config[end] / config["sigma_data"]) for end in ("sigma_min", "sigma_max"))
    bar = 1 / (1 + np.exp(2 * np.linspace(low, high, int(config["num_train_timesteps"]))))
    return NoiseSchedule.from_betas(1 - bar / np.append(1.0, bar[:-1]))


def state_of(scheduler: Any) -> tuple[Any, ...]:
    """Return what decides what a scheduler does: class, config, values and methods, but not where a loop stands."""
    kind = type(scheduler)
    methods = tuple(id(value) for base in kind.__mro__[:-1] for value in vars(base).values() if callable(value))
    own: list[Any] = [kind, methods, repr(sorted(scheduler.config.items(), key=str))]
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor) and name not in _OF_A_LOOP:
            own += [name, value.cpu().numpy().tobytes()]
        elif isinstance(value, (float, str)):  # integers count steps
            own += [name, value]
        elif callable(value):
            own += [name, id(value)]
    return tuple(own)


@torch.no_grad()
def _check_same(scheduler: Any, recognised: Recognised) -> None:
    """Take a few steps of a small network with a copy of the scheduler and with the table, at the same noise.

    Raises:
        ValueError: a method has been replaced, no table is made of its config, or the results differ by more than
            rounding.
    """
    theirs, name = copy.deepcopy(scheduler), recognised.name
    if replaced := [own for own, value in vars(theirs).items() if callable(value) and hasattr(type(theirs), own)]:
        raise ValueError(f"{name}: its {', '.join(replaced)} has been replaced, must be that of its class")
    steps = max(1, min(5, recognised.schedule.num_train_timesteps // 4))
    copies = 2 if recognised.learned_variance else 1
    eta = 0.5 if recognised.method == "ddim" else 0.0

    def network(x: Tensor, t: Tensor) -> Tensor:
        out = torch.tanh(x + 1e-3 * t.to(x.dtype).view(-1, 1, 1, 1))
        return torch.cat([out, out.abs() / 2], dim=1) if copies == 2 else out  # variances are positive

    shape, theirs_noise, ours_noise = (1, 3, 4, 4), torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    given = {"eta": eta, "generator": theirs_noise}
    call = {option: given[option] for option in inspect.signature(theirs.step).parameters if option in given}
    try:
        theirs.set_timesteps(steps)
        table = recognised.table(theirs, eta=eta)
        start = x = torch.randn(shape, generator=theirs_noise) * theirs.init_noise_sigma
        scale, timesteps = recognised.initial_scale(theirs), theirs.timesteps.cpu()
        if not recognised.scales and theirs.init_noise_sigma != 1:
            raise ValueError(f"its steps are not those of its config: init_noise_sigma is {theirs.init_noise_sigma}")
        for t in timesteps:
            out = network(theirs.scale_model_input(x, t), t[None])
            x = theirs.step(out, t, x, **call).prev_sample
    except Exception as error:  # whatever a scheduler raises that is not set up to run
        raise ValueError(f"{name}: {str(error).strip().partition(chr(10))[0]}") from None
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name}: its steps give NaN for its config and values")
    torch.randn(shape, generator=ours_noise)  # the start
    draws = recognised.draws(timesteps, eta)
    ours = Sampler(network, table, device="cpu", backend="eager", **recognised.of_sampler).sample(
        1, shape=shape[1:], x_T=start * scale,
        noise=StepNoise(draws, lambda: torch.randn(shape, generator=ours_noise)) if any(draws) else None,
    )  # fmt: skip
    if apart := difference(x, ours, torch.float32, floor=_SAME_TO):
        raise ValueError(
            f"{name}: its steps are not those of its config ({apart} after {steps}): a method or a value was changed"
        )


def _rounded_ddpm_table(table: StepTable, schedule: NoiseSchedule, variance_type: str) -> StepTable:
    """DDPM's table with the coefficients of x0, x_t and the noise as `DDPMScheduler` has them, in float32.

    Where little noise is left, 1 - abar_t / abar_prev has but three digits there: 5e-5 in the image.
    """
    timesteps = table.timesteps
    bar = schedule.alphas_cumprod.float()[timesteps]  # the scheduler's own, to the last bit
    before = torch.cat([bar[1:], bar.new_ones(1)])
    alpha = bar / before
    beta = 1 - alpha
    rows = table.rows.clone()
    rows[:, 2] = before.sqrt() * beta / (1 - bar)
    rows[:, 3] = alpha.sqrt() * (1 - before) / (1 - bar)
    if table.learned is None:
        small = ((1 - before) / (1 - bar) * beta).clamp_min(1e-20)
        std = (beta if variance_type == "fixed_large" else small).sqrt()
        rows[:, 6] = torch.where(timesteps > 0, std, torch.zeros_like(std))
    return replace(table, rows=rows)


def _strided_ddim_table(schedule: NoiseSchedule, timesteps: Tensor, stride: int, **options: Any) -> StepTable:
    """DDIM's table with steps from t to t - `stride`, also where that is not the next timestep."""
    table = ddim_table(schedule, timesteps, **options)
    previous = (timesteps - stride).clamp_min(-1)
    following = torch.cat([timesteps[1:], torch.tensor([-1])])
    rows, levels = table.rows.clone(), table.levels.clone()
    for index in (previous != following).nonzero().flatten().tolist():
        pair = [t for t in (int(timesteps[index]), int(previous[index])) if t >= 0]
        step = ddim_table(schedule, pair, **options)
        rows[index], levels[index] = step.rows[0], step.levels[0]
    return replace(table, rows=rows, levels=levels)


def _strided_inversion_table(schedule: NoiseSchedule, timesteps: Tensor, stride: int, **options: Any) -> StepTable:
    """Return the table of DDIM's inversion with steps from t - `stride` up to t."""
    found = [ddim_inversion_table(schedule, [t], **options) for t in timesteps.tolist()]
    rows, levels = torch.cat([table.rows for table in found]), torch.cat([table.levels for table in found])
    for index, t in enumerate(timesteps.tolist()):
        if t >= stride:
            step = ddim_inversion_table(schedule, [t, t - stride], **{**options, "set_alpha_to_one": False})
            rows[index], levels[index] = step.rows[1], step.levels[1]
    return replace(found[0], timesteps=timesteps, rows=rows, levels=levels, needs_network=torch.ones(len(rows)) > 0)
