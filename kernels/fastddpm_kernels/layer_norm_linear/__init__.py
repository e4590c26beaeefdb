"""Normalise the channels of every pixel and multiply them by a matrix, in one launch; optionally gate the result.

    h = (x - mean(x)) / sqrt(var(x) + eps) weight^T + bias          y = h, or h[:, :O] * gelu(h[:, O:])

It computes `x weight^T` and corrects the result: the mean is subtracted times the sum of a row of the weight, so that
pixels are multiplied as they are and their statistics are summed on the way. The norm's own weight and bias belong into
`weight` and `bias`.

Device-memory traffic: the input and the output once, as long as the rows that neighbouring programs share stay in L2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastddpm_kernels.backend import resolve
from fastddpm_kernels.checks import check_operands, not_float64, same_memory
from fastddpm_kernels.inplace import InPlace
from fastddpm_kernels.layer_norm_linear.formula import eager, reference
from fastddpm_kernels.layout import rows


@InPlace
def layer_norm_linear_(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    sums: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    gate: bool = False,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> Callable[[], object]:
    """Write the layer norm of `x` (Ba et al. 2016, arXiv:1607.06450), times `weight`, to `y`. Not differentiable.

    On `triton` products and statistics are summed in float32 and the result is rounded once.

    Args:
        y: `[N, O, ...]`, overwritten; not the memory of `x`.
        x: `[N, C, ...]`, float32, float16 or bfloat16 (float64 on `eager` and `reference`). On `triton` both must be
            channels-last.
        weight: `[O, C]`, with `gate` `[2 O, C]`: values before gates. x's dtype; contiguous on `triton`.
        sums: of the rows of `weight`, of any floating dtype, as `weight` is rounded: float32 or more.
        bias: one per row of `weight`, any floating dtype.
        eps: added to the variance.
        gate: whether the values are multiplied by the GELU of the gates (Shazeer 2020, arXiv:2002.05202).
        allow_tf32: whether float32 products may round their factors to 11 significant bits, on `triton`.
        backend: `"auto"`, `"triton"`, `"eager"` or `"reference"`.

    Raises:
        TypeError: an argument is not a floating tensor, or has an unsupported dtype.
        ValueError: a shape, device, memory format or value that does not fit.
        BackendError: the named backend cannot run here.
    """
    _check(y, x, weight, sums, bias, eps, gate)
    backend = resolve("layer_norm_linear", backend, x.device.type, x.dtype)
    if backend == "triton":
        not_float64(x)
        for name, image in (("y", y), ("x", x)):
            if image.numel() and rows(image) is None:
                raise ValueError(f"{name} has strides {image.stride()}, must be channels-last on the triton backend")
        for name, value in (("weight", weight), ("sums", sums), ("bias", bias)):
            if not value.is_contiguous():
                raise ValueError(f"{name} has strides {value.stride()}, must be contiguous on the triton backend")
    if y.numel() == 0:
        return lambda: None
    if backend == "triton":
        from fastddpm_kernels.layer_norm_linear.triton import bind

        return bind(y, x, weight, sums, bias, eps, gate, allow_tf32)
    return partial(
        torch.no_grad()(reference if backend == "reference" else eager), y, x, weight, bias, eps, gate
    )  # fmt: skip


def _check(y: Tensor, x: Tensor, weight: Tensor, sums: Tensor, bias: Tensor, eps: float, gate: bool) -> None:
    check_operands(x, {"y": y, "weight": weight}, None, {"sums": sums, "bias": bias})
    if x.ndim < 2 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [N, C, ...] with at least one channel")
    if weight.ndim != 2 or weight.shape[0] < 1 or weight.shape[1] != x.shape[1] or (gate and weight.shape[0] % 2):
        wanted = f"[{'2 O' if gate else 'O'}, {x.shape[1]}]"
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must be {wanted}")
    for name, vector in (("sums", sums), ("bias", bias)):
        if vector.shape != weight.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, must be [{len(weight)}], one per row of weight")
    shape = (x.shape[0], len(weight) // (2 if gate else 1), *x.shape[2:])
    if y.shape != shape:
        raise ValueError(f"y has shape {tuple(y.shape)}, must be {shape}")
    if not eps > 0:
        raise ValueError(f"eps is {eps}, must be positive")
    if y.numel() and same_memory(y, x):
        raise ValueError("y is x, must be other memory, since all of x is read for it")
