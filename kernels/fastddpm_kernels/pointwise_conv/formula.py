"""Compute the 1x1 convolution in plain torch: the definition in float64, and torch's matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm_kernels.checks import same_memory
from fastddpm_kernels.layout import rows


def reference(
    y: Tensor, x: Tensor, weight: Tensor, x2: Tensor | None, weight2: Tensor | None, bias: Tensor | None,
    residual: Tensor | None,
) -> None:  # fmt: skip
    """Write the definition, in float64, to `y`."""
    value = torch.einsum("oc,nc...->no...", weight.double(), x.double())
    if x2 is not None and weight2 is not None:
        value = value + torch.einsum("oc,nc...->no...", weight2.double(), x2.double())
    if bias is not None:
        value = value + bias.double().reshape(-1, *(1,) * (x.ndim - 2))
    if residual is not None:
        value = value + residual.double()
    y.copy_(value)


def by_matmul(
    y: Tensor, x: Tensor, weight: Tensor, x2: Tensor | None, weight2: Tensor | None, bias: Tensor | None,
    residual: Tensor | None,
) -> None:  # fmt: skip
    """Write the result of torch's matrix products to `y`, on views; other memory formats are copied first."""
    out = rows(y)
    if out is None:
        dense = y.new_empty(y.shape[0], *y.shape[2:], y.shape[1]).movedim(-1, 1)
        by_matmul(dense, x, weight, x2, weight2, bias, residual)
        y.copy_(dense)
        return
    if bias is not None:
        bias = bias.to(y.dtype)
    a = _rows_of(x)
    if residual is None and bias is None:
        torch.mm(a, weight.t(), out=out)
    elif residual is None and bias is not None:
        torch.addmm(bias, a, weight.t(), out=out)
    elif residual is not None:
        if same_memory(residual, y):
            out.addmm_(a, weight.t())
        else:
            torch.addmm(_rows_of(residual), a, weight.t(), out=out)
        if bias is not None:
            out.add_(bias)
    if x2 is not None and weight2 is not None:
        out.addmm_(_rows_of(x2), weight2.t())


def _rows_of(x: Tensor) -> Tensor:
    view = rows(x)
    return x.movedim(1, -1).reshape(-1, x.shape[1]) if view is None else view
