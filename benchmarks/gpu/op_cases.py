"""What the ops are measured on: tensors of a U-Net's layers and of the loop, with what is right for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fastddpm_kernels.group_norm_silu import group_norm_silu, group_norm_silu_
from fastddpm_kernels.philox import sample_keys
from fastddpm_kernels.pointwise_conv import pointwise_conv_
from fastddpm_kernels.q_sample import q_sample
from fastddpm_kernels.residual_add import residual_add_
from fastddpm_kernels.reverse_step import reverse_step, reverse_step_
from torch import Tensor

from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import ddpm_table

# Rows [A B C D E F S] in the middle of 50 steps of DDIM with eta = 0.
DDIM_ROW = [3.573, -3.430, 0.3363, 0.0, 0.9418, 0.0, 0.0]

Tensors = dict[str, Tensor]
# Runs an op on tensors with a backend; returns all that it has written.
Run = Callable[[Tensors, str], tuple[Tensor, ...]]


@dataclass
class Case:
    """One op on one shape.

    Attributes:
        op: its name.
        name: of the case, unique.
        dtype: of the network.
        make: fresh random tensors for one call.
        run: the op.
        bytes: of each input read once and each output written once.
        truth: what is right for tensors, in float64 or by the specification.
        flops: of the matrix product in it, if any.
        torch_run: idiomatic torch where that is not the op with backend "eager".
        compiled: whether it is measured under torch.compile too.
    """

    op: str
    name: str
    dtype: torch.dtype
    make: Callable[[], Tensors]
    run: Run
    bytes: int
    truth: Callable[[Tensors], tuple[Tensor, ...]]
    flops: int = 0
    torch_run: Callable[[Tensors], tuple[Tensor, ...]] | None = None
    compiled: bool = False

    def eager(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The same in idiomatic torch."""
        return self.run(tensors, "eager") if self.torch_run is None else self.torch_run(tensors)


def image(device: torch.device, dtype: torch.dtype, n: int, c: int, side: int) -> Tensor:
    """Random [n, c, side, side], channels-last."""
    return torch.randn(n, side, side, c, device=device).to(dtype).permute(0, 3, 1, 2)


def q_sample_case(device: torch.device, dtype: torch.dtype, prediction_type: str, batch: int, side: int) -> Case:
    """The noising step with noise made in registers: x_0 is read, x_t and the target are written."""
    abar = NoiseSchedule.linear(1000).alphas_cumprod
    table = torch.stack([abar.sqrt(), (1 - abar).sqrt()], 1).float().to(device)
    keys = sample_keys([0] * batch, range(batch), device)
    step = torch.tensor([7], device=device)

    def make() -> Tensors:
        x0 = (torch.rand(batch, 3, side, side, device=device) * 2 - 1).to(dtype)
        return {"x0": x0, "t": torch.randint(0, 1000, (batch,), device=device)}

    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        return q_sample(
            tensors["x0"], table, tensors["t"], keys=keys, step=step, prediction_type=prediction_type, backend=backend
        )

    def torch_run(tensors: Tensors) -> tuple[Tensor, ...]:
        x0 = tensors["x0"]
        signal, sigma = table[tensors["t"]].view(-1, 2, 1, 1, 1).to(dtype).unbind(1)
        z = torch.randn_like(x0)
        x_t = signal * x0 + sigma * z
        return x_t, (z if prediction_type == "epsilon" else signal * z - sigma * x0)

    size = 3 * batch * 3 * side * side * dtype.itemsize
    name = f"{prediction_type} {_short(dtype)} {batch}x3x{side}x{side}"
    return Case(
        "q_sample",
        name,
        dtype,
        make,
        run,
        size,
        lambda tensors: run(tensors, "reference"),
        torch_run=torch_run,
        compiled=prediction_type == "epsilon" and dtype == torch.float16,
    )


def reverse_step_case(device: torch.device, dtype: torch.dtype, sampler: str, batch: int, side: int) -> Case:
    """The update in place, with the network's next input written along; channels-last as a U-Net leaves it."""
    guided = sampler == "guided"
    row = torch.tensor([DDIM_ROW]) if sampler == "ddim" else _ancestral_row()
    row = row.to(device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    options: dict[str, Any] = {
        "clip_range": 1.0,
        "keys": None if sampler == "ddim" else sample_keys([0] * batch, range(batch), device),
        "guidance_scale": torch.tensor([3.0], device=device) if guided else None,
    }

    def make() -> Tensors:
        out = image(device, dtype, batch * (1 + guided), 3, side)
        return {"x": torch.randn(batch, 3, side, side, device=device), "out": out, "net_in": torch.empty_like(out)}

    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        x, net_in = tensors["x"], tensors["net_in"]
        reverse_step_(x, tensors["out"], row, step, net_in=net_in, **options, backend=backend)
        return x, net_in

    def truth(tensors: Tensors) -> tuple[Tensor, ...]:
        x = reverse_step(tensors["x"], tensors["out"], row, step, **options, backend="reference")[0]
        return x, torch.cat([x] * (1 + guided)).to(dtype)

    a, b, c, d, e, _, s = row[0].tolist()

    def torch_run(tensors: Tensors) -> tuple[Tensor, ...]:
        x, out = tensors["x"], tensors["out"].float()
        if guided:
            first, second = out.chunk(2)
            out = first + 3.0 * (second - first)
        new = c * (a * x + b * out).clamp(-1, 1) + d * x + e * out
        if s:
            new = new + s * torch.randn_like(x)
        x.copy_(new)
        tensors["net_in"].copy_(torch.cat([new, new]) if guided else new)
        return x, tensors["net_in"]

    elements = batch * 3 * side * side
    size = elements * (8 + 2 * (1 + guided) * dtype.itemsize)
    name = f"{sampler} {_short(dtype)} {batch}x3x{side}x{side}"
    return Case(
        "reverse_step",
        name,
        dtype,
        make,
        run,
        size,
        truth,
        torch_run=torch_run,
        compiled=sampler == "ancestral" and dtype == torch.float16,
    )


def _ancestral_row() -> Tensor:
    schedule = NoiseSchedule.linear(1000)
    table = ddpm_table(schedule, torch.tensor([501, 500]))
    return table.rows[:1].float()


def group_norm_case(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int], *, residual: bool, compiled: bool
) -> Case:
    """GroupNorm and SiLU of [N, C(+C2), side, side] with a time bias, into a given place; 32 groups at most.

    `residual`: the end of the block before too, x + residual, written beside.
    """
    n, c, c2, side = shape
    channels = c + c2
    groups = 32 if channels % 32 == 0 else 8

    def make() -> Tensors:
        tensors = {
            "x": image(device, dtype, n, c, side),
            "weight": torch.randn(channels, device=device).to(dtype),
            "bias": torch.randn(channels, device=device).to(dtype),
            "time_bias": torch.randn(n, channels, device=device).to(dtype),
            "y": torch.full((n, side, side, channels), torch.nan, device=device, dtype=dtype).permute(0, 3, 1, 2),
        }
        if c2:
            tensors["x2"] = image(device, dtype, n, c2, side)
        if residual:
            tensors |= {"residual": image(device, dtype, n, c, side), "total": torch.empty_like(tensors["x"])}
        return tensors

    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        rest = dict(tensors)
        group_norm_silu_(rest.pop("y"), rest.pop("x"), num_groups=groups, **rest, backend=backend)
        return (tensors["y"], tensors["total"]) if residual else (tensors["y"],)

    def functional(tensors: Tensors, backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        rest = {name: t for name, t in tensors.items() if name not in ("y", "total", "residual")}
        if residual:
            rest["x"] = tensors["x"] + tensors["residual"]  # rounded, as the op's sum is
        total = rest["x"]
        rest = {name: t.to(dtype) for name, t in rest.items()}
        y = group_norm_silu(**rest, num_groups=groups, backend=backend)
        return (y, total) if residual else (y,)

    elements = n * side * side
    size = elements * (2 * channels + 2 * c * residual) * dtype.itemsize
    kind = "residual " if residual else ""
    return Case(
        "group_norm_silu",
        f"{kind}{_short(dtype)} {n}x{c}{f'+{c2}' if c2 else ''}x{side}x{side}",
        dtype,
        make,
        run,
        size,
        lambda tensors: functional(tensors, "reference", torch.float64),
        torch_run=lambda tensors: functional(tensors, "eager", dtype),
        compiled=compiled,
    )


def pointwise_case(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int, int], *, residual: bool
) -> Case:
    """A 1x1 convolution of [N, C(+C2), side, side] to O channels, with bias and residual."""
    n, c, c2, o, side = shape

    def make() -> Tensors:
        tensors = {
            "y": torch.full((n, side, side, o), torch.nan, device=device, dtype=dtype).permute(0, 3, 1, 2),
            "x": image(device, dtype, n, c, side),
            "weight": (torch.randn(o, c, device=device) * (c + c2) ** -0.5).to(dtype),
            "bias": torch.randn(o, device=device).to(dtype),
        }
        if c2:
            tensors["x2"] = image(device, dtype, n, c2, side)
            tensors["weight2"] = (torch.randn(o, c2, device=device) * (c + c2) ** -0.5).to(dtype)
        if residual:
            tensors["residual"] = image(device, dtype, n, o, side)
        return tensors

    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        rest = dict(tensors)
        pointwise_conv_(rest.pop("y"), rest.pop("x"), rest.pop("weight"), **rest, backend=backend)
        return (tensors["y"],)

    def torch_run(tensors: Tensors) -> tuple[Tensor, ...]:
        x, weight = tensors["x"], tensors["weight"]
        if c2:
            x, weight = torch.cat([x, tensors["x2"]], 1), torch.cat([weight, tensors["weight2"]], 1)
        y = torch.nn.functional.conv2d(x, weight[:, :, None, None], tensors["bias"])
        return (y + tensors["residual"] if residual else y,)

    def truth(tensors: Tensors) -> tuple[Tensor, ...]:
        return run({name: t.double() for name, t in tensors.items()}, "reference")

    pixels = n * side * side
    size = (pixels * (c + c2 + o * (1 + residual)) + o * (c + c2)) * dtype.itemsize
    return Case(
        "pointwise_conv",
        f"{_short(dtype)} {n}x{c}{f'+{c2}' if c2 else ''}x{side}x{side} to {o}{' + residual' if residual else ''}",
        dtype,
        make,
        run,
        size,
        truth,
        flops=2 * pixels * (c + c2) * o,
        torch_run=torch_run,
    )


def residual_add_case(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], border: int) -> Case:
    """x + residual + bias of [N, C, side, side] into an image `border` pixels wider and higher."""
    n, c, side = shape

    def make() -> Tensors:
        outer = side + border
        return {
            "y": torch.zeros(n, outer, outer, c, device=device, dtype=dtype).permute(0, 3, 1, 2),
            "x": image(device, dtype, n, c, side),
            "residual": image(device, dtype, n, c, side),
            "bias": torch.randn(c, device=device).to(dtype),
        }

    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        rest = dict(tensors)
        residual_add_(rest.pop("y"), rest.pop("x"), **rest, backend=backend)
        return (tensors["y"],)

    def torch_run(tensors: Tensors) -> tuple[Tensor, ...]:
        value = tensors["x"] + tensors["residual"] + tensors["bias"][:, None, None]
        return (torch.nn.functional.pad(value, (0, border, 0, border)) if border else value,)

    return Case(
        "residual_add",
        f"{_short(dtype)} {n}x{c}x{side}x{side}{f' in a border of {border}' if border else ''}",
        dtype,
        make,
        run,
        3 * n * c * side * side * dtype.itemsize,
        lambda tensors: run({name: t.double() for name, t in tensors.items()}, "reference"),
        torch_run=torch_run,
    )


def all_cases(device: torch.device, small: bool) -> list[Callable[[], Case]]:
    """The cases, each made when its turn comes: loop and training first, then the layers of both U-Nets."""
    half, single = torch.float16, torch.float32
    big = (2, 8) if small else (2048, 64)

    def norm(shape: tuple[int, int, int, int], residual: bool = False, compiled: bool = False) -> Callable[[], Case]:
        return lambda: group_norm_case(device, half, shape, residual=residual, compiled=compiled)

    cases: list[Callable[[], Case]] = [
        lambda: reverse_step_case(device, half, "ancestral", *big),
        lambda: q_sample_case(device, half, "epsilon", *big),
        lambda: q_sample_case(device, single, "epsilon", *big),
        lambda: reverse_step_case(device, half, "guided", *big),
    ]
    if small:
        return [
            *cases,
            norm((2, 16, 0, 8)),
            norm((2, 16, 16, 4), residual=True),
            lambda: pointwise_case(device, half, (2, 16, 16, 24, 4), residual=True),
            lambda: residual_add_case(device, half, (2, 16, 4), 1),
        ]
    return [
        *cases,
        norm((256, 128, 0, 32), compiled=True),
        norm((256, 128, 128, 32)),
        norm((256, 256, 0, 16), residual=True, compiled=True),
        norm((16, 128, 0, 256)),
        norm((16, 256, 256, 64), residual=True),
        norm((1, 128, 0, 32)),
        norm((1, 128, 0, 256)),
        norm((256, 256, 0, 8)),
        lambda: pointwise_case(device, half, (256, 256, 0, 768, 16), residual=False),
        lambda: pointwise_case(device, half, (256, 256, 128, 128, 32), residual=True),
        lambda: pointwise_case(device, half, (1, 256, 0, 768, 16), residual=False),
        lambda: residual_add_case(device, half, (256, 128, 32), 1),
        lambda: residual_add_case(device, half, (256, 256, 16), 0),
        lambda: reverse_step_case(device, half, "ddim", *big),
        lambda: reverse_step_case(device, single, "ancestral", *big),
        lambda: q_sample_case(device, half, "v_prediction", *big),
    ]


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
