"""The same loop in plain torch: eager in a dtype, and compiled as well as torch.compile can; no fastddpm in them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.networks.precision import tf32
from fastddpm.perf.profiling.timing import capture, first_lines
from fastddpm.process.schedule import NoiseSchedule
from gpu.networks import CONFIGS, Problem

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
Noise = Callable[[int], Tensor]


def plain_unet(problem: Problem, dtype: torch.dtype, channels_last: bool, *, fused: bool = False) -> nn.Module:
    """diffusers' UNet2DModel with the problem's weights; where diffusers is not installed, ours on torch's own ops.

    `fused`: q, k and v of diffusers' attention as one product.
    """
    try:
        from diffusers import UNet2DModel
    except ImportError:
        unet: Any = deepcopy(problem.unet)
        unet.backend = "eager"
    else:
        unet = UNet2DModel(**CONFIGS[problem.name])
        unet.load_state_dict(problem.unet.state_dict())
        if fused:
            fuse_attention(unet)
    # Not diffusers' own `to`, which warns of parts to be kept in float32 where there are none.
    unet = nn.Module.to(unet.eval().requires_grad_(False), problem.device, dtype)
    return unet.to(memory_format=torch.channels_last) if channels_last else unet


def fuse_attention(unet: nn.Module) -> None:
    """Joins the projections of diffusers' attention blocks, as its pipelines' `fuse_qkv_projections` does."""
    from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, Attention):
                module.fuse_projections(fuse=True)
                module.set_processor(FusedAttnProcessor2_0())


def unet_name(unet: nn.Module) -> str:
    """Whose U-Net it is."""
    return "diffusers UNet2DModel" if type(unet).__module__.startswith("diffusers") else "fastddpm UNet, eager ops"


def predict(unet: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """The network's output, whether it returns a tensor or an object that has it."""
    out = unet(x, t)
    return out if isinstance(out, Tensor) else out.sample


def ancestral_rows(schedule: NoiseSchedule, steps: int) -> tuple[list[int], Tensor]:
    """Timesteps of "leading" spacing and rows [a b c d s] of DDPM (Ho et al. 2020, eq. 7 and 11), "fixed_large".

    x0 = clip(a x_t + b out), x_{t-1} = c x0 + d x_t + s z, in float64.
    """
    abar = torch.cumprod(1 - schedule.betas.double(), 0)
    stride = len(abar) // steps
    timesteps = [i * stride for i in range(steps)][::-1]
    rows = []
    for t in timesteps:
        now, before = abar[t], abar[t - stride] if t >= stride else abar.new_ones(())
        alpha = now / before
        beta = 1 - alpha
        scale = 1 / (1 - now)
        rows.append(
            torch.stack(
                [
                    now**-0.5,
                    -((1 - now) ** 0.5) * now**-0.5,
                    before**0.5 * beta * scale,
                    alpha**0.5 * (1 - before) * scale,
                    beta**0.5 if t > 0 else torch.zeros_like(beta),
                ]
            )
        )
    return timesteps, torch.stack(rows)


class EagerLoop:
    """The loop in eager torch: state in float32 (float64 for a float64 network), network in `dtype`.

    Its coefficients are numbers and its timesteps are on the device, so that the host waits for nothing.
    """

    def __init__(
        self,
        problem: Problem,
        dtype: torch.dtype,
        batch: int,
        steps: int,
        *,
        allow_tf32: bool = False,
        channels_last: bool = False,
        noise: Noise | None = None,
    ) -> None:
        self.unet = plain_unet(problem, dtype, channels_last)
        self.problem, self.dtype, self.allow_tf32, self.noise = problem, dtype, allow_tf32, noise
        self.state = torch.float64 if dtype == torch.float64 else torch.float32
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        timesteps, rows = ancestral_rows(problem.schedule, steps)
        self.timesteps = torch.tensor(timesteps, device=problem.device)
        self.rows: list[list[float]] = rows.tolist()
        self.shape = (batch, *problem.shape)

    def _draw(self, index: int) -> Tensor:
        if self.noise is not None:
            return self.noise(index).to(self.state)
        return torch.randn(self.shape, device=self.problem.device, dtype=self.state)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            with tf32(self.allow_tf32):
                x = self._draw(-1)
                for index, (a, b, c, d, s) in enumerate(self.rows):
                    net_in = x.to(self.dtype).contiguous(memory_format=self.format)
                    out = predict(self.unet, net_in, self.timesteps[index]).to(self.state)
                    x0 = (a * x + b * out).clamp(-1, 1)
                    x = c * x0 + d * x
                    if s:
                        x += s * self._draw(index)
                return x
        finally:
            torch.backends.cudnn.benchmark = benchmark

    def report(self) -> dict[str, Any]:
        """Whose network it was."""
        return {"network": unet_name(self.unet)}


class EagerNetwork:
    """The network alone, `repeats` times."""

    def __init__(
        self,
        problem: Problem,
        dtype: torch.dtype,
        batch: int,
        repeats: int,
        *,
        allow_tf32: bool = False,
        channels_last: bool = False,
    ) -> None:
        self.unet = plain_unet(problem, dtype, channels_last)
        self.allow_tf32, self.repeats = allow_tf32, repeats
        x = torch.randn(batch, *problem.shape, device=problem.device, dtype=dtype)
        self.x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        self.t = torch.tensor(500, device=problem.device)

    @torch.no_grad()
    def __call__(self) -> None:
        benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            with tf32(self.allow_tf32):
                for _ in range(self.repeats):
                    predict(self.unet, self.x, self.t)
        finally:
            torch.backends.cudnn.benchmark = benchmark

    report = EagerLoop.report


# Its best: convolutions and products autotuned, 1x1 convolutions as products, weights folded in as constants. The
# graph is captured here, of the step as a whole, which leaves out what torch's own wrapper does between replays.
COMPILE_OPTIONS: dict[str, Any] = {
    "max_autotune": True,
    "coordinate_descent_tuning": True,
    "conv_1x1_as_mm": True,
    "freezing": True,
    "triton.cudagraphs": False,
}


class CompiledLoop:
    """The loop with a step compiled as a whole (network, update and noise), replayed from a CUDA graph.

    Where compiling with frozen weights fails it is compiled without, and the report says so and why.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype, batch: int, steps: int) -> None:
        self.steps, self.without = steps, ""
        # From here on nobody may reset it while this is used: the graph reads what it holds.
        torch._dynamo.reset()
        device, shape = problem.device, (batch, *problem.shape)
        self.unet = plain_unet(problem, dtype, channels_last=True, fused=True)
        timesteps, rows = ancestral_rows(problem.schedule, steps)
        self.timesteps = torch.tensor(timesteps, device=device)
        self.rows = rows.float().to(device)
        self.x = torch.randn(shape, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        unet = self.unet

        def advance(x: Tensor, step: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
            t = timesteps.index_select(0, step)
            a, b, c, d, s = rows.index_select(0, step)[0].unbind()
            net_in = x.to(dtype).contiguous(memory_format=torch.channels_last)
            out = predict(unet, net_in, t.expand(len(x))).float()
            return c * (a * x + b * out).clamp(-1, 1) + d * x + s * torch.randn_like(x)

        def step_once() -> None:
            self.x.copy_(compiled(self.x, self.step, self.timesteps, self.rows))
            self.step.add_(1)

        options = dict(COMPILE_OPTIONS)
        benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            with torch.no_grad():
                compiled = torch.compile(advance, fullgraph=True, dynamic=False, options=options)
                try:
                    step_once()
                except Exception as error:
                    self.without = f"without freezing, which failed: {first_lines(error, 1)}"
                    torch._dynamo.reset()
                    options["freezing"] = False
                    compiled = torch.compile(advance, fullgraph=True, dynamic=False, options=options)
                    step_once()
                self.step.zero_()
                self.replay = capture([step_once], device)
        finally:
            torch.backends.cudnn.benchmark = benchmark

    def __call__(self) -> None:
        with torch.no_grad():
            self.step.zero_()
            for _ in range(self.steps):
                self.replay()

    def report(self) -> dict[str, Any]:
        """Whose network it was, and what could not be had."""
        return {"network": unet_name(self.unet), "note": self.without}


def matches(
    got: Tensor, truth: Tensor, eager: Tensor, floor: tuple[float, float], factor: float = 2.0
) -> dict[str, Any]:
    """How far `got` is from `truth`, and whether that is within a dtype's floor or `factor` times what eager loses."""
    from fastddpm_kernels.testing import errors

    ours, theirs = errors(got, truth), errors(eager, truth)
    bounds = [max(f, factor * e) for f, e in zip(floor, theirs, strict=True)]
    return {
        "rms": ours[0],
        "max": ours[1],
        "eager_rms": theirs[0],
        "eager_max": theirs[1],
        "bound_rms": bounds[0],
        "bound_max": bounds[1],
        "ok": ours[0] <= bounds[0] and ours[1] <= bounds[1],
    }
