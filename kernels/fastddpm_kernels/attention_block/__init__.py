"""Compute a whole attention block of one head in one launch, for the small images where launches are the cost.

    y = x + values (softmax(q h^T) h) + bias        h = group_norm(x),  q = h scores + scores_bias, for every pixel

The projections are folded into two matrices (`fold`): queries meet the normalised pixels themselves, which are keys and
values at once, so four products remain of five and nothing is written but the result. The norm's scale moves from the
pixels to queries and sums, its shift falls out of the softmax; so pixels are read as they are.

Device-memory traffic: the image once and the result once; every program reads all pixels of its sample and both
matrices from L2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastddpm_kernels.attention_block.formula import eager, fold, reference
from fastddpm_kernels.backend import resolve
from fastddpm_kernels.checks import check_operands, not_float64, same_memory
from fastddpm_kernels.conv.checks import check_statistics
from fastddpm_kernels.inplace import InPlace
from fastddpm_kernels.layout import is_channels_last

__all__ = ["MOST_CHANNELS", "attention_block_", "attention_block_launches", "fold"]

MOST_CHANNELS = 512  # that the registers and the shared memory of one program hold


@InPlace
def attention_block_(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    scores: Tensor,
    scores_bias: Tensor,
    values: Tensor,
    values_bias: Tensor,
    *,
    eps: float = 1e-5,
    given: Tensor | None = None,
    statistics: Tensor | None = None,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> Callable[[], object]:
    """Write x plus the attention of its group norm to itself to `y`. Not differentiable.

    On `triton` statistics, scores and sums are float32; the queries, the exponentials and the attended sums are rounded
    to x's dtype between products, as a separate kernel would.

    Args:
        y: `[N, C, H, W]`, overwritten; not the memory of `x`.
        x: `[N, C, H, W]`, float32, float16 or bfloat16 (float64 on `eager` and `reference`). On `triton` both must be
            channels-last, and C at most 512.
        weight, bias: `[C]` of the norm, any floating dtype.
        num_groups: divides C.
        scores, values: `[C, C]` from `fold`, x's dtype; contiguous on `triton`.
        scores_bias, values_bias: `[C]` from `fold`, any floating dtype.
        eps: added to the variance.
        given: the statistics of `x`, as `conv_` leaves them; without, they are computed.
        statistics: float32 `statistics_shape(y, unit)`, overwritten with those of y as it is stored.
        allow_tf32: whether float32 products may round their factors to 11 significant bits, on `triton`.
        backend: `"auto"`, `"triton"`, `"eager"` or `"reference"`.

    Raises:
        TypeError: an argument is not a floating tensor, or has an unsupported dtype.
        ValueError: a shape, device, memory format or value that does not fit.
        BackendError: the named backend cannot run here.
    """
    vectors = {"weight": weight, "bias": bias, "scores_bias": scores_bias, "values_bias": values_bias}
    _check(y, x, num_groups, {"scores": scores, "values": values}, vectors, eps)
    if given is not None and x.shape[1] // num_groups % (unit := check_statistics("given", given, x)):
        raise ValueError(f"given has units of {unit} channels, which straddle groups of {x.shape[1] // num_groups}")
    if statistics is not None:
        check_statistics("statistics", statistics, y)
    backend = resolve("attention_block", backend, x.device.type, x.dtype)
    if backend == "triton":
        _check_for_triton(y, x, {"scores": scores, "values": values, **vectors})
    if y.numel() == 0:
        return lambda: None
    operands = (weight, bias, num_groups, eps, scores, scores_bias, values, values_bias)
    if backend == "triton":
        from fastddpm_kernels.attention_block.triton import bind

        return bind(y, x, *operands, allow_tf32, given, statistics)
    run = reference if backend == "reference" else eager
    return partial(torch.no_grad()(run), y, x, *operands, given, statistics)


def attention_block_launches(x: Tensor, statistics: Tensor | None = None) -> int:
    """Return how many kernels `attention_block_` launches on `triton`: 1 or, for statistics of wide images, 2."""
    from fastddpm_kernels.attention_block.triton import leaves_statistics

    if x.numel() == 0:
        return 0
    return 1 if statistics is None or leaves_statistics(x) else 2


def _check(
    y: Tensor, x: Tensor, num_groups: int, matrices: dict[str, Tensor], vectors: dict[str, Tensor], eps: float
) -> None:
    check_operands(x, {"y": y, **matrices}, None, dict(vectors))
    if x.ndim != 4 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [N, C, H, W] with at least one channel")
    channels = x.shape[1]
    if y.shape != x.shape:
        raise ValueError(f"y has shape {tuple(y.shape)}, must be x's, {tuple(x.shape)}")
    for name, matrix in matrices.items():
        if matrix.shape != (channels, channels):
            raise ValueError(f"{name} has shape {tuple(matrix.shape)}, must be {(channels, channels)}")
    for name, vector in vectors.items():
        if vector.shape != (channels,):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, must be [{channels}], one per channel")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}, must divide the {channels} channels")
    if not eps > 0:
        raise ValueError(f"eps is {eps}, must be positive")
    if y.numel() and same_memory(y, x):
        raise ValueError("y is x, must be other memory, since every pixel attends to all of x")


def _check_for_triton(y: Tensor, x: Tensor, constants: dict[str, Tensor]) -> None:
    not_float64(x)
    if x.shape[1] > MOST_CHANNELS:
        raise ValueError(f"x has {x.shape[1]} channels, must have at most {MOST_CHANNELS} on the triton backend")
    for name, value in (("y", y), ("x", x)):
        if value.numel() and not is_channels_last(value, or_both=True):
            raise ValueError(f"{name} has strides {value.stride()}, must be channels-last on the triton backend")
    for name, value in constants.items():
        if not value.is_contiguous():
            raise ValueError(f"{name} has strides {value.stride()}, must be contiguous on the triton backend")
