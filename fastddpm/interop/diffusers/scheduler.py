"""diffusers' schedulers as schedules and tables, and the random numbers that their pipelines draw."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastddpm.interop.scheduler_config import scheduler_settings
from fastddpm.interop.shared import StepNoise
from fastddpm.networks.comparing import difference
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.solvers import dpmsolver_table
from fastddpm.process.tables import StepTable, ddim_table, ddpm_table
from fastddpm.sampling.sampler import Sampler

# Rounding of float32 grows by the gain of the first step, from noise to x0: 160 for 1000 steps.
_SAME_TO = 1e-3
_OF_A_LOOP = ("timesteps", "sigmas")
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler")


@dataclass(frozen=True, eq=False)
class Recognised:
    """What a scheduler of diffusers does.

    Attributes:
        name: of its class.
        method: `Sampler`'s name of it.
        schedule: its noise levels, to the last bit of its float32.
        settings: keyword arguments of `Sampler`, `method` among them.
    """

    name: str
    method: str
    schedule: NoiseSchedule
    settings: dict[str, Any]

    @property
    def learned_variance(self) -> bool:
        """Whether the network has channels for the variance."""
        return self.settings.get("variance_type") in ("learned", "learned_range")

    def check_channels(self, channels: int, out_channels: int) -> None:
        """Raises ValueError unless a network of so many channels fits.

        diffusers' multistep solver takes the first three channels where the variance is learned.
        """
        variance = self.settings.get("variance_type")
        if self.learned_variance and self.method == "dpmsolver++" and channels != 3:
            raise ValueError(
                f"{self.name}: variance_type is {variance!r} but unet.config.in_channels is {channels}, must be 3"
            )
        expected = channels * (2 if self.learned_variance else 1)
        if out_channels != expected:
            raise ValueError(
                f"unet.config.out_channels is {out_channels}, must be {expected} for in_channels {channels} and "
                f"{self.name}'s variance_type {variance!r}"
            )

    def table(
        self, timesteps: Tensor, num_inference_steps: int, *, eta: float = 0.0, use_clipped_model_output: bool = False
    ) -> StepTable:
        """The coefficients of its steps.

        Args:
            timesteps: int64 [S], those that the scheduler has set.
            num_inference_steps: what it has set them for. A DDIMScheduler steps by T // this, wherever the next
                timestep is.
            eta, use_clipped_model_output: of DDIM.

        Raises:
            ValueError: a setting is not supported, or timesteps do not fall.
        """
        prediction_type = self.settings.get("prediction_type", "epsilon")
        if self.method == "ddpm":
            variance_type = self.settings.get("variance_type", "fixed_small")
            table = ddpm_table(self.schedule, timesteps, prediction_type=prediction_type, variance_type=variance_type)
            return _rounded_ddpm_table(table, self.schedule, variance_type)
        if self.method == "ddim":
            stride = self.schedule.num_train_timesteps // num_inference_steps
            return _strided_ddim_table(
                self.schedule,
                timesteps,
                stride,
                prediction_type=prediction_type,
                eta=eta,
                use_clipped_model_output=use_clipped_model_output,
                set_alpha_to_one=self.settings.get("set_alpha_to_one", True),
            )
        names = ("solver_order", "lower_order_final", "final_sigmas_type")
        options = {name: self.settings[name] for name in names if name in self.settings}
        return dpmsolver_table(self.schedule, timesteps, prediction_type=prediction_type, **options)

    def draws(self, timesteps: Tensor, eta: float) -> list[bool]:
        """At which steps diffusers draws noise, whether or not it then counts."""
        if self.method == "ddpm":
            return (timesteps > 0).tolist()
        return [self.method == "ddim" and eta > 0] * len(timesteps)


def recognise(scheduler: Any) -> Recognised:
    """What a scheduler does, by its class, its config and its noise levels.

    Raises:
        ValueError: its class or a setting is not supported; the message names it and what is.
    """
    name = type(scheduler).__name__
    if name not in SCHEDULERS or type(scheduler).__module__.partition(".")[0] != "diffusers":
        raise ValueError(f"scheduler is a {name}, must be one of {', '.join(SCHEDULERS)} of diffusers")
    # Its levels, which are rounded to float32, rather than the betas of its config: what is as small as
    # 1 - abar at the end of sampling would differ by that rounding.
    levels = scheduler.alphas_cumprod.detach().cpu().double()
    if name == "DPMSolverMultistepScheduler" and scheduler.config.get("rescale_betas_zero_snr"):
        levels[-1] = 0  # where diffusers has put 2**-24, which may be more than the level before
    betas = 1 - levels / torch.cat([levels.new_ones(1), levels[:-1]])
    config = {**scheduler.config, "_class_name": name, "trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
    schedule, settings = scheduler_settings(config, name)
    method = settings["method"]
    if settings.get("variance_type") and method == "dpmsolver++" and settings.get("prediction_type") != "epsilon":
        raise ValueError(
            f"{name}: variance_type is {settings['variance_type']!r} but prediction_type is "
            f"{settings['prediction_type']!r}, must be 'epsilon'"
        )
    result = Recognised(name, method, schedule, settings)
    first, middle = schedule.num_train_timesteps - 1, schedule.num_train_timesteps // 2
    try:
        result.table(torch.tensor([middle, 0] if middle else [0]), 1)  # raises for what no table is made of
        if schedule.zero_terminal_snr and result.settings.get("timestep_spacing") == "trailing":
            result.table(torch.tensor([first]), 1)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    _check_same(scheduler, result)
    return result


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
        ValueError: a method has been replaced, or the results differ by more than rounding.
    """
    theirs, name = copy.deepcopy(scheduler), recognised.name
    if replaced := [own for own, value in vars(theirs).items() if callable(value) and hasattr(type(theirs), own)]:
        raise ValueError(f"{name}: its {', '.join(replaced)} has been replaced, must be that of its class")
    steps = max(1, min(5, recognised.schedule.num_train_timesteps // 4))
    theirs.set_timesteps(steps)
    timesteps, copies = theirs.timesteps.cpu(), 2 if recognised.learned_variance else 1
    eta, call = 0.0, {}
    if recognised.method == "ddim":
        eta = call["eta"] = 0.5

    def network(x: Tensor, t: Tensor) -> Tensor:
        out = torch.tanh(x + 1e-3 * t.view(-1, 1, 1, 1))
        return torch.cat([out, out.abs() / 2], dim=1) if copies == 2 else out  # variances are positive

    shape, theirs_noise, ours_noise = (1, 3, 4, 4), torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    start = x = torch.randn(shape, generator=theirs_noise)
    x = x * theirs.init_noise_sigma
    for t in timesteps:
        out = network(theirs.scale_model_input(x, t), t[None])
        x = theirs.step(out, t, x, generator=theirs_noise, **call).prev_sample
    table = recognised.table(timesteps, steps, eta=eta)
    torch.randn(shape, generator=ours_noise)  # the start
    draws = recognised.draws(timesteps, eta)
    ours = Sampler(
        network, recognised.schedule, timesteps=timesteps, device="cpu", backend="eager", **recognised.settings
    ).sample(
        1, shape=shape[1:], x_T=start, table=table,
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
