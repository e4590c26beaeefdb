"""Compute the convolutions of a diffusion U-Net in place, with what comes before and after them.

    y = conv(upsample(norm(concat(x, x2))), weight) + bias + time_bias + residual + conv1x1(concat(shortcut, shortcut2))

`norm` is a group norm with FiLM and SiLU (`Norm`), from statistics of x and x2 that earlier calls wrote; the zeros of
the padding come after it. A call can write the `statistics` of its own result, so that a residual block is two calls:

    conv_(h, x, w1, norm=Norm(..., statistics=of_x), bias=b1, time_bias=row, statistics=of_h)
    conv_(y, h, w2, norm=Norm(..., statistics=of_h), bias=b2, residual=x, statistics=of_y)

On the CPU the native backend takes fewer multiplications. It has three algorithms, for weights that are packed once:

    winograd4   3x3, stride 1, padding 1: 36 multiplications for 4x4 outputs, where the definition has 144; after
                upsampling 25 (Lavin & Gray 2016, arXiv:1509.09308)
    winograd2   16 for 2x2 outputs, where the definition has 36
    direct      the definition; after upsampling four 2x2 convolutions, 16 for 2x2 outputs in place of 36

Accuracy: transforms add and subtract, so digits cancel. Tests bound the error by `error_factor` times that of the
definition. Weights are transformed in float64 and rounded once. In bfloat16, on CPUs that multiply it, there is no
winograd4, whose error is too large; winograd2 takes 9 multiplications for 2x2 outputs after upsampling.

Memory traffic: each input and output once. The packed weights of winograd4 are 4 times as large as those of the
convolution, of winograd2 1.8 times. For few pixels this dominates, and `choose_algorithm` weighs both. Where memory is
scarce, weights stay as they are and are transformed at every call (`PackedWeight.tile`), by `likely_tile`.

On a GPU the triton backend is an implicit matrix product on tensor cores, with norm, sums and statistics in the same
kernel. Only its name selects it, or a tuned table that measured it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.backend import resolve, unproved, why_not
from fastddpm_kernels.checks import check_operands
from fastddpm_kernels.conv.algorithm import choose_algorithm, likely_algorithm, likely_tile, possible_algorithms
from fastddpm_kernels.conv.checks import (
    check_added,
    check_conv,
    check_for_triton,
    check_fused,
    check_packed,
)
from fastddpm_kernels.conv.formula import add, conv_by_torch, statistics_by_torch
from fastddpm_kernels.conv.native import bind_conv as bind_native
from fastddpm_kernels.conv.packing import (
    ALGORITHMS,
    PackedWeight,
    error_factor,
    pack,
    packed_values,
    why_not_packed,
)
from fastddpm_kernels.conv.statistics import Norm, statistics_shape, statistics_unit
from fastddpm_kernels.inplace import InPlace
from fastddpm_kernels.layout import not_channels_last
from fastddpm_kernels.native.binding import bind_with_floats

__all__ = [
    "ALGORITHMS",
    "Norm",
    "PackedWeight",
    "choose_algorithm",
    "conv_",
    "conv_epilogue_",
    "conv_launches",
    "conv_workspace",
    "error_factor",
    "likely_algorithm",
    "likely_tile",
    "pack",
    "packed_values",
    "possible_algorithms",
    "statistics_shape",
    "statistics_unit",
]


@InPlace
def conv_(
    y: Tensor,
    x: Tensor,
    weight: Tensor | PackedWeight,
    *,
    x2: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    upsample: bool = False,
    norm: Norm | None = None,
    time_bias: Tensor | None = None,
    shortcut: Tensor | None = None,
    shortcut2: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    statistics: Tensor | None = None,
    workspace: Tensor | None = None,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> Callable[[], object]:
    """Write the convolution of `norm(concat(x, x2))`, plus what is to be added, to `y`. Not differentiable.

    Args:
        y: `[N, O, H', W']`, overwritten; not the memory of `x`, `x2` or a shortcut. Its size implies the padding
            below and to the right: 0 to k - 1 rows and columns of zeros.
        x: `[N, C, H, W]`, float32 or bfloat16 (also float16 on `triton`, and float64 on `eager` and `reference`). On
            `native` and `triton` all images must be channels-last, and on `native` C and C2 even in bfloat16 for all
            but winograd2.
        weight: `[O, C + C2, k, k]`, x's dtype, on `triton` channels-last (a contiguous one is copied at every call, or
            once by `bind`); or, on `native`, a `PackedWeight` (else it is packed at every call). With
            `upsample` also the phases `[4, O, 2, 2, C + C2]` of `phase_weight`, which are otherwise made by `bind`.
        x2: `[N, C2, H, W]`: the op acts as if on `torch.cat((x, x2), 1)`.
        bias: `[O]`, any floating dtype.
        residual: `[N, O, H', W']`, x's dtype; may be `y` itself.
        stride: of the convolution.
        padding: rows and columns of zeros above and to the left.
        upsample: convolve the image upsampled by two (nearest neighbour), so that y is [N, O, 2 H, 2 W]; k = 3,
            stride 1 and padding 1 only.
        norm: applied to concat(x, x2) first. Not on `native`, which has none of the following either.
        time_bias: `[N, O]`, any floating dtype, added to every pixel. Rows may be strided or expanded.
        shortcut, shortcut2, shortcut_weight: `[N, D, H', W']` and `[N, D2, H', W']`, convolved by 1x1 with
            `[O, D + D2]` and added, all of x's dtype.
        statistics: float32 `statistics_shape(y, unit)`, overwritten with those of y as it is stored.
        workspace: float32, one-dimensional, of at least `conv_workspace` elements, overwritten; may serve one call
            after another. Without it a call that needs one allocates it.
        allow_tf32: whether float32 products may round their factors to 11 significant bits (TensorFloat-32), on
            `triton`; torch's own setting decides for `eager`.
        backend: `"auto"`, `"triton"`, `"native"`, `"eager"` or `"reference"`.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: a shape, device, memory format or value that does not fit.
        BackendError: the named backend cannot run here.
    """
    kernel, inner = check_conv(y, x, weight, x2, bias, residual, stride, padding, upsample)
    check_fused(y, x, x2, norm, time_bias, shortcut, shortcut2, shortcut_weight, statistics, workspace)
    packed, channels2, algorithm = False, 0 if x2 is None else x2.shape[1], ""
    if isinstance(weight, PackedWeight):
        check_packed(weight, x, channels2)
        packed = True
    options: dict[str, Any] = {
        "x2": x2, "bias": bias, "residual": residual, "stride": stride, "padding": padding, "upsample": upsample,
        "norm": norm, "time_bias": time_bias, "shortcut": shortcut, "shortcut2": shortcut2,
        "shortcut_weight": shortcut_weight, "statistics": statistics, "allow_tf32": allow_tf32,
    }  # fmt: skip
    besides = {"norm": norm, "time_bias": time_bias, "shortcut": shortcut, "statistics": statistics}

    def unfit() -> str | None:
        nonlocal algorithm
        if given := [name for name, value in besides.items() if value is not None]:
            return f"{given[0]} is given, which the native backend does not compute"
        if reason := not_channels_last(x=x, y=y, x2=x2, residual=residual):
            return reason
        if packed:
            return None
        algorithm = choose_algorithm(
            x.shape[0], x.shape[2], x.shape[3], inner, y.shape[1], kernel=kernel, stride=stride, padding=padding,
            upsample=upsample, dtype=x.dtype,
        )  # fmt: skip
        if y.shape[2:] != x.shape[2:] and not upsample:
            algorithm = "direct"
        return why_not_packed(algorithm, x.shape[1], channels2, x.dtype)

    if packed and backend == "auto":
        backend = "native"
    elif backend == "auto" and x.is_cuda and _measured_faster(y, x, weight, options):
        backend = "triton"
    backend = resolve("conv", backend, x.device.type, x.dtype, unfit)
    if packed and backend != "native":
        raise ValueError(f"weight is packed for the native backend, must be a tensor [O, C, k, k] on {backend}")
    if y.numel() == 0:
        return lambda: None
    if backend == "native":
        if isinstance(weight, Tensor):
            weight = pack(weight, algorithm, upsample, dtype=x.dtype, channels2=channels2)
        own = weight
        return bind_with_floats(lambda bias: bind_native(y, x, own, x2, bias, residual, stride, padding), bias)
    assert isinstance(weight, Tensor)
    if backend == "triton":
        from fastddpm_kernels.conv.triton import Operands
        from fastddpm_kernels.conv.triton import bind as bind_triton

        images = {"y": y, "x": x, "x2": x2, "residual": residual, "shortcut": shortcut, "shortcut2": shortcut2}
        check_for_triton(x, images, {"weight": weight, "shortcut_weight": shortcut_weight, "bias": bias})
        if workspace is not None and workspace.numel() < (needed := conv_workspace(y, x, weight, **options)):
            raise ValueError(f"workspace has {workspace.numel()} elements, must have {needed} or more")
        return bind_triton(Operands(y, x, weight, **options), workspace)
    plain = weight
    dtype = torch.float64 if backend == "reference" else x.dtype

    @torch.no_grad()
    def run() -> None:
        value = conv_by_torch(
            x, plain, x2, bias, residual, stride, padding, upsample, y.shape, dtype, norm, time_bias, shortcut,
            shortcut2, shortcut_weight,
        )  # fmt: skip
        y.copy_(value)
        if statistics is not None:
            statistics_by_torch(statistics, y)

    return run


@InPlace
def conv_epilogue_(
    y: Tensor,
    x: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    time_bias: Tensor | None = None,
    statistics: Tensor | None = None,
    backend: str = "auto",
) -> Callable[[], object]:
    """Write `x + bias + time_bias + residual` to `y`, and the statistics of y: what follows a vendor's convolution.

    Not differentiable. One launch on `triton`.

    Args:
        y: `[N, O, H, W]`, overwritten; may be `x` or `residual` itself.
        x: `[N, O, H, W]`, channels-last on `triton`, as are `y` and `residual`.
        bias, residual, time_bias, statistics: as in `conv_`.
        backend: `"auto"`, `"triton"`, `"eager"` or `"reference"`.

    Raises:
        TypeError, ValueError, BackendError: as `conv_`.
    """
    check_operands(x, {"y": y}, {"residual": residual}, {"bias": bias})
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [N, O, H, W]")
    for name, value in (("y", y), ("residual", residual)):
        if value is not None and value.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be x's, {tuple(x.shape)}")
    if bias is not None and bias.shape != x.shape[1:2]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, must be [{x.shape[1]}]")
    check_added(y, time_bias, statistics)
    backend = resolve("conv", backend, x.device.type, x.dtype, lambda: "there is no native kernel of the epilogue")
    if y.numel() == 0:
        return lambda: None
    if backend == "triton":
        from fastddpm_kernels.conv.triton import bind_epilogue

        check_for_triton(x, {"y": y, "x": x, "residual": residual}, {"bias": bias})
        return bind_epilogue(y, x, bias, time_bias, residual, statistics)
    dtype = torch.float64 if backend == "reference" else x.dtype

    @torch.no_grad()
    def run() -> None:
        y.copy_(add(x.to(dtype), bias, time_bias, residual))
        if statistics is not None:
            statistics_by_torch(statistics, y)

    return run


def conv_workspace(y: Tensor, x: Tensor, weight: Tensor, **options: Any) -> int:
    """Return the number of float32 elements that `conv_` needs as its `triton` workspace; 0 if none.

    Args:
        y, x, weight, options: those of `conv_`. Their values do not matter: for tensors without any (on device `meta`)
            the answer is that of a GPU of 132 multiprocessors without tuned tables.
    """
    if y.numel() == 0:
        return 0
    tile, problem = _plan(y, x, weight, options)
    return int(sum(tile.workspace(problem)))


def conv_launches(y: Tensor, x: Tensor, weight: Tensor, **options: Any) -> int:
    """Return how many kernels `conv_` launches on `triton`: 1 to 3, or 0 for an empty batch. See `conv_workspace`."""
    if y.numel() == 0:
        return 0
    tile, problem = _plan(y, x, weight, options)
    return int(tile.launches(problem))


def _plan(y: Tensor, x: Tensor, weight: Tensor, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return the tile of a call and its problem."""
    from fastddpm_kernels.conv.triton import Operands, problem_of, tile_of, tuned_choice

    operands = Operands(y, x, weight, **options)
    return tile_of(operands, tuned_choice(operands)), problem_of(operands)


def _measured_faster(y: Tensor, x: Tensor, weight: Tensor | PackedWeight, options: dict[str, Any]) -> bool:
    """Return whether a tuned table has a tile for this call, on a GPU where the kernel is trusted."""
    if isinstance(weight, PackedWeight) or x.dtype == torch.float64 or unproved(("conv",), "cuda"):
        return False
    if why_not("triton", "cuda", "conv") is not None:
        return False
    from fastddpm_kernels.conv.triton import VENDOR, Operands, tuned_choice

    choice = tuned_choice(Operands(y, x, weight, **options))
    return choice is not None and choice != VENDOR
