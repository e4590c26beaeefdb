"""The networks and policies of lerobot and diffusion_policy, restated from their contracts, under their own names.

Their packages need much that tests do not. Where a variable names a checkout, its networks are used in their place: see
`checkouts`.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import checkouts
import torch
import torch.nn.functional as F
from torch import Tensor, nn

OF_POLICY = "diffusion_policy.model.diffusion."
OF_LEROBOT = "lerobot.policies.diffusion.modeling_diffusion"


def of(module: str) -> Callable[[type], type]:
    """Let a class say that it is of a module."""

    def mark(cls: type) -> type:
        cls.__module__ = module
        return cls

    return mark


# diffusion_policy


@of(OF_POLICY + "positional_embedding")
class SinusoidalPosEmb(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * -(math.log(10000) / (half - 1)))
        angles = t[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


@of(OF_POLICY + "conv1d_components")
class Conv1dBlock(nn.Module):
    def __init__(self, channels: int, outputs: int, kernel: int, groups: int = 8) -> None:
        super().__init__()
        convolution = nn.Conv1d(channels, outputs, kernel, padding=kernel // 2)
        self.block = nn.Sequential(convolution, nn.GroupNorm(groups, outputs), nn.Mish())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@of(OF_POLICY + "conv1d_components")
class Downsample1d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@of(OF_POLICY + "conv1d_components")
class Upsample1d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(channels, channels, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def film(h: Tensor, values: Tensor, scales: bool) -> Tensor:
    """FiLM after the activation, with the factor itself rather than 1 + it."""
    if not scales:
        return h + values[..., None]
    scale, shift = values[..., None].chunk(2, dim=1)
    return h * scale + shift


@of(OF_POLICY + "conditional_unet1d")
class ConditionalResidualBlock1D(nn.Module):
    def __init__(self, channels: int, outputs: int, condition: int, kernel: int, groups: int, scales: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [Conv1dBlock(channels, outputs, kernel, groups), Conv1dBlock(outputs, outputs, kernel, groups)]
        )
        self.cond_predict_scale, self.out_channels = scales, outputs
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(condition, outputs * (2 if scales else 1)))
        self.residual_conv = nn.Conv1d(channels, outputs, 1) if channels != outputs else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = film(self.blocks[0](x), self.cond_encoder(condition), self.cond_predict_scale)
        return self.blocks[1](h) + self.residual_conv(x)


@of(OF_POLICY + "conditional_unet1d")
class ConditionalUnet1D(nn.Module):
    def __init__(
        self, input_dim: int, local_cond_dim: int | None = None, global_cond_dim: int | None = None,
        diffusion_step_embed_dim: int = 256, down_dims: tuple[int, ...] = (256, 512, 1024), kernel_size: int = 3,
        n_groups: int = 8, cond_predict_scale: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        width = diffusion_step_embed_dim
        self.diffusion_step_encoder = nn.Sequential(
            SinusoidalPosEmb(width), nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
        )

        def block(channels: int, outputs: int) -> nn.Module:
            condition = width + (global_cond_dim or 0)
            return ConditionalResidualBlock1D(channels, outputs, condition, kernel_size, n_groups, cond_predict_scale)

        self.local_cond_encoder = None
        if local_cond_dim is not None:
            self.local_cond_encoder = nn.ModuleList([block(local_cond_dim, down_dims[0]) for _ in range(2)])
        self.down_modules, self.up_modules, self.mid_modules = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        levels = list(zip((input_dim, *down_dims[:-1]), down_dims, strict=True))
        for index, (channels, outputs) in enumerate(levels):
            down = Downsample1d(outputs) if index < len(levels) - 1 else nn.Identity()
            self.down_modules.append(nn.ModuleList([block(channels, outputs), block(outputs, outputs), down]))
        self.mid_modules.extend([block(down_dims[-1], down_dims[-1]) for _ in range(2)])
        for outputs, channels in reversed(levels[1:]):
            parts = [block(2 * channels, outputs), block(outputs, outputs), Upsample1d(outputs)]
            self.up_modules.append(nn.ModuleList(parts))
        self.final_conv = nn.Sequential(
            Conv1dBlock(down_dims[0], down_dims[0], kernel_size), nn.Conv1d(down_dims[0], input_dim, 1)
        )

    def forward(
        self, sample: Tensor, timestep: Any, local_cond: Tensor | None = None, global_cond: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        t = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep, device=sample.device)
        t = t.expand(sample.shape[0])
        feature = self.diffusion_step_encoder(t)
        if global_cond is not None:
            feature = torch.cat([feature, global_cond], dim=-1)
        x, skips = sample.transpose(1, 2), []
        for level, (first, second, down) in enumerate(self.down_modules):
            x = first(x, feature)
            if level == 0 and local_cond is not None:
                assert self.local_cond_encoder is not None
                x = x + self.local_cond_encoder[0](local_cond.transpose(1, 2), feature)  # the second one is not used
            x = second(x, feature)
            skips.append(x)
            x = down(x)
        for module in self.mid_modules:
            x = module(x, feature)
        for first, second, up in self.up_modules:
            x = up(second(first(torch.cat([x, skips.pop()], dim=1), feature), feature))
        return self.final_conv(x).transpose(1, 2)


@of("diffusion_policy.policy.diffusion_unet_lowdim_policy")
class DiffusionUnetLowdimPolicy(nn.Module):
    def __init__(
        self, model: nn.Module, noise_scheduler: Any, horizon: int, obs_dim: int, action_dim: int, n_action_steps: int,
        n_obs_steps: int, num_inference_steps: int | None = None, obs_as_local_cond: bool = False,
        obs_as_global_cond: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.noise_scheduler, self.kwargs = model, noise_scheduler, kwargs
        self.horizon, self.obs_dim, self.action_dim = horizon, obs_dim, action_dim
        self.n_action_steps, self.n_obs_steps = n_action_steps, n_obs_steps
        self.obs_as_local_cond, self.obs_as_global_cond = obs_as_local_cond, obs_as_global_cond
        self.num_inference_steps = num_inference_steps or noise_scheduler.config.num_train_timesteps

    def conditional_sample(
        self, condition_data: Tensor, condition_mask: Tensor, local_cond: Tensor | None = None,
        global_cond: Tensor | None = None, generator: torch.Generator | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        x = torch.randn(
            condition_data.shape, dtype=condition_data.dtype, device=condition_data.device, generator=generator
        )
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            x[condition_mask] = condition_data[condition_mask]
            out = self.model(x, t, local_cond=local_cond, global_cond=global_cond)
            x = self.noise_scheduler.step(out, t, x, generator=generator, **kwargs).prev_sample
        x[condition_mask] = condition_data[condition_mask]
        return x

    @torch.no_grad()
    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The observations are not normalised."""
        obs, first = obs_dict["obs"], next(self.parameters())
        n, seen, values = len(obs), self.n_obs_steps, self.action_dim
        inpainted = not (self.obs_as_local_cond or self.obs_as_global_cond)
        data = torch.zeros(n, self.horizon, values + (self.obs_dim if inpainted else 0)).to(first)
        mask = torch.zeros_like(data, dtype=torch.bool)
        conditions: dict[str, Tensor] = {}
        if self.obs_as_local_cond:
            conditions["local_cond"] = F.pad(obs[:, :seen], (0, 0, 0, self.horizon - seen)).to(first)
        elif self.obs_as_global_cond:
            conditions["global_cond"] = obs[:, :seen].reshape(n, -1)
        else:
            data[:, :seen, values:] = obs[:, :seen]
            mask[:, :seen, values:] = True
        sample = self.conditional_sample(data, mask, **conditions, **self.kwargs)
        return {"action": sample[:, seen : seen + self.n_action_steps, :values], "action_pred": sample[..., :values]}


# lerobot


@of(OF_LEROBOT)
class DiffusionSinusoidalPosEmb(SinusoidalPosEmb):
    pass


@of(OF_LEROBOT)
class DiffusionConv1dBlock(Conv1dBlock):
    pass


@of(OF_LEROBOT)
class DiffusionConditionalResidualBlock1d(nn.Module):
    def __init__(self, channels: int, outputs: int, condition: int, kernel: int, groups: int, scales: bool) -> None:
        super().__init__()
        self.use_film_scale_modulation, self.out_channels = scales, outputs
        self.conv1 = DiffusionConv1dBlock(channels, outputs, kernel, groups)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(condition, outputs * (2 if scales else 1)))
        self.conv2 = DiffusionConv1dBlock(outputs, outputs, kernel, groups)
        self.residual_conv = nn.Conv1d(channels, outputs, 1) if channels != outputs else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = film(self.conv1(x), self.cond_encoder(condition), self.use_film_scale_modulation)
        return self.conv2(h) + self.residual_conv(x)


@of(OF_LEROBOT)
class DiffusionConditionalUnet1d(nn.Module):
    def __init__(self, config: Any, global_cond_dim: int) -> None:
        super().__init__()
        self.config = config
        width, dims = config.diffusion_step_embed_dim, config.down_dims
        self.diffusion_step_encoder = nn.Sequential(
            DiffusionSinusoidalPosEmb(width), nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
        )

        def block(channels: int, outputs: int) -> nn.Module:
            options = (config.kernel_size, config.n_groups, config.use_film_scale_modulation)
            return DiffusionConditionalResidualBlock1d(channels, outputs, width + global_cond_dim, *options)

        self.down_modules, self.up_modules, self.mid_modules = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        levels = list(zip((config.action_feature.shape[0], *dims[:-1]), dims, strict=True))
        for index, (channels, outputs) in enumerate(levels):
            down = nn.Conv1d(outputs, outputs, 3, 2, 1) if index < len(levels) - 1 else nn.Identity()
            self.down_modules.append(nn.ModuleList([block(channels, outputs), block(outputs, outputs), down]))
        self.mid_modules.extend([block(dims[-1], dims[-1]) for _ in range(2)])
        for outputs, channels in reversed(levels[1:]):
            up = nn.ConvTranspose1d(outputs, outputs, 4, 2, 1)
            self.up_modules.append(nn.ModuleList([block(2 * channels, outputs), block(outputs, outputs), up]))
        self.final_conv = nn.Sequential(
            DiffusionConv1dBlock(dims[0], dims[0], config.kernel_size), nn.Conv1d(dims[0], levels[0][0], 1)
        )

    def forward(self, x: Tensor, timestep: Tensor, global_cond: Tensor | None = None) -> Tensor:
        feature = self.diffusion_step_encoder(timestep)
        if global_cond is not None:
            feature = torch.cat([feature, global_cond], dim=-1)
        x, skips = x.transpose(1, 2), []
        for first, second, down in self.down_modules:
            x = second(first(x, feature), feature)
            skips.append(x)
            x = down(x)
        for module in self.mid_modules:
            x = module(x, feature)
        for first, second, up in self.up_modules:
            x = up(second(first(torch.cat([x, skips.pop()], dim=1), feature), feature))
        return self.final_conv(x).transpose(1, 2)


@of(OF_LEROBOT)
class DiffusionModel(nn.Module):
    """Of observations that are a state alone; the vision encoder is no part of the loop."""

    def __init__(self, config: Any, noise_scheduler: Any) -> None:
        super().__init__()
        self.config, self.noise_scheduler = config, noise_scheduler
        self.unet = DiffusionConditionalUnet1d(config, config.state_dim * config.n_obs_steps)
        self.num_inference_steps = config.num_inference_steps or noise_scheduler.config.num_train_timesteps

    def conditional_sample(
        self, batch_size: int, global_cond: Tensor | None = None, generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        first, config = next(self.parameters()), self.config
        x = noise
        if x is None:
            shape = (batch_size, config.horizon, config.action_feature.shape[0])
            x = torch.randn(shape, dtype=first.dtype, device=first.device, generator=generator)
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            times = torch.full(x.shape[:1], t, dtype=torch.long, device=x.device)
            out = self.unet(x, times, global_cond=global_cond)
            x = self.noise_scheduler.step(out, t, x, generator=generator).prev_sample
        return x

    def generate_actions(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        state, config = batch["observation.state"], self.config
        sample = self.conditional_sample(len(state), global_cond=state.flatten(1), noise=noise)
        first = config.n_obs_steps - 1
        return sample[:, first : first + config.n_action_steps]


@of(OF_LEROBOT)
class DiffusionPolicy(nn.Module):
    def __init__(self, config: Any, noise_scheduler: Any) -> None:
        super().__init__()
        self.config, self.diffusion = config, DiffusionModel(config, noise_scheduler)
        self.reset()

    def reset(self) -> None:
        seen, acted = deque(maxlen=self.config.n_obs_steps), deque(maxlen=self.config.n_action_steps)
        self._queues: dict[str, deque[Tensor]] = {"observation.state": seen, "action": acted}

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        seen, acted = self._queues.values()
        seen.extend([batch["observation.state"]] * (1 if seen else self.config.n_obs_steps))
        if not acted:
            batch = {"observation.state": torch.stack(list(seen), 1)}
            acted.extend(self.diffusion.generate_actions(batch, noise).unbind(1))
        return acted.popleft()


def lerobot_config(**changed: Any) -> Any:
    """A small configuration; the library's defaults are 512, 1024, 2048 channels, 64 positions and 128 for time."""
    values = {
        "n_obs_steps": 2, "horizon": 16, "n_action_steps": 3, "down_dims": (16, 32), "kernel_size": 5, "n_groups": 8,
        "diffusion_step_embed_dim": 16, "use_film_scale_modulation": True, "num_inference_steps": None, "state_dim": 3,
        "action_feature": SimpleNamespace(shape=(2,)), "gradient_checkpointing": False,
    }  # fmt: skip
    return SimpleNamespace(**values | changed)


def _load_checkouts() -> None:
    """Take the networks of a checkout in place of those restated here."""
    names = globals()
    if os.environ.get("FASTDDPM_DIFFUSION_POLICY"):
        names["ConditionalUnet1D"] = checkouts.diffusion_policy().ConditionalUnet1D
    if os.environ.get("FASTDDPM_LEROBOT"):
        names["DiffusionConditionalUnet1d"] = checkouts.lerobot().DiffusionConditionalUnet1d


_load_checkouts()
