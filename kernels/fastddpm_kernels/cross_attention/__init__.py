"""Attend from the pixels of an image to a sequence, such as a text, and maybe to the image as well.

    y = softmax(q k^T / sqrt(head_dim) + mask) v          for every head

Keys and values lie side by side, so one product makes both; those of a text are the same at every step of a loop. No
backend keeps the scores of all queries, so an image of 16,384 pixels may attend to itself. On a GPU torch's own
kernels run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastddpm_kernels.backend import resolve
from fastddpm_kernels.checks import check_operands
from fastddpm_kernels.cross_attention.formula import cross_attention_by_torch
from fastddpm_kernels.cross_attention.native import bind_cross_attention
from fastddpm_kernels.inplace import InPlace
from fastddpm_kernels.layout import rows


@InPlace
def cross_attention_(
    y: Tensor,
    q: Tensor,
    kv: Tensor,
    heads: int,
    *,
    own: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Callable[[], object]:
    """Write the attention of the queries `q` to the keys and values `kv`, and then `own`, to `y`. Not differentiable.

    Args:
        y: `[N, C, H, W]`, overwritten; not the memory of another argument.
        q: `[N, C, H, W]`, the queries of all heads side by side; may be some channels of a wider tensor. float32 or
            bfloat16 (also float16 and float64 on `eager` and `reference`).
        kv: `[N, 2C, 1, L]` or any other two spatial sizes: the keys of all heads, then their values. L may be any number.
        heads: number of heads; divides C.
        own: `[N, 2C, H', W']`, further keys and values, attended to after those of `kv`.
        mask: `[N, L + H' * W']`, any floating dtype, is added to the scores of every query.
        backend: `"auto"`, `"native"`, `"eager"` (torch's `scaled_dot_product_attention`) or `"reference"`. On `native`
            the channels of a pixel must be adjacent, and in bfloat16 the channels of a head even.

    Raises:
        TypeError: an argument is not a floating tensor, or has an unsupported dtype.
        ValueError: a shape, device or memory format that does not fit.
        BackendError: the named backend cannot run here.
    """
    _check(y, q, kv, heads, own, mask)

    def unfit() -> str | None:
        if q.dtype == torch.bfloat16 and q.shape[1] // heads % 2:
            return f"heads have {q.shape[1] // heads} channels, must be even in bfloat16"
        for name, image in (("y", y), ("q", q), ("kv", kv), ("own", own)):
            view = None if image is None else rows(image)
            if image is not None and image.numel() and (view is None or (view.stride(0) % 2 and q.itemsize == 2)):
                return f"{name} has strides {image.stride()}, must be channels-last on the native backend"
        return None

    backend = resolve("cross_attention_", backend, q.device.type, q.dtype, unfit)
    if y.numel() == 0:
        return lambda: None
    if backend == "native":
        return bind_cross_attention(y, q, kv, heads, own, mask)
    return partial(torch.no_grad()(cross_attention_by_torch), y, q, kv, heads, own, mask, backend)


def _check(y: Tensor, q: Tensor, kv: Tensor, heads: int, own: Tensor | None, mask: Tensor | None) -> None:
    check_operands(q, {"y": y, "kv": kv}, {"own": own}, {"mask": mask}, name="q")
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}, must be [N, C, H, W]")
    if heads < 1 or q.shape[1] < heads or q.shape[1] % heads:
        raise ValueError(f"heads is {heads}, must divide q's {q.shape[1]} channels")
    if y.shape != q.shape:
        raise ValueError(f"y has shape {tuple(y.shape)}, must be q's, {tuple(q.shape)}")
    for name, pair in (("kv", kv), ("own", own)):
        if pair is not None and (pair.ndim != 4 or pair.shape[:2] != (q.shape[0], 2 * q.shape[1])):
            raise ValueError(f"{name} has shape {tuple(pair.shape)}, must be [{q.shape[0]}, {2 * q.shape[1]}, H, W]")
    keys = sum(pair.shape[2] * pair.shape[3] for pair in (kv, own) if pair is not None)
    if keys < 1:
        raise ValueError(f"kv has shape {tuple(kv.shape)}, must have at least one key")
    if mask is not None and mask.shape != (q.shape[0], keys):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, must be {(q.shape[0], keys)}, one per key")
    for name, other in (("q", q), ("kv", kv), ("own", own)):
        if other is not None and y.numel() and y.device.type != "meta" and other.data_ptr() == y.data_ptr():
            raise ValueError(f"y is {name}, must be other memory")
