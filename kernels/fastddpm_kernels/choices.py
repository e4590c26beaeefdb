"""What there is to choose: the ops, what a shape of each consists of, and what a choice may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Choice = Mapping[str, Any]

_NORM = ("batch", "pixels", "channels", "channels2", "groups", "channels_last")
_RMS_NORM = ("batch", "pixels", "channels", "channels2", "channels_last")
# What a shape consists of, integers. `threads` are torch's. Of the element-wise ops also which tensors there are:
# `noise` and `known` are 1 where noise is given, 2 where it is made; `target` is 1 for the noise, 2 for the velocity.
# The dtype of `reverse_step` is its network's.
FIELDS: dict[str, tuple[str, ...]] = {
    "group_norm_silu": _NORM,
    "group_norm_silu_": _NORM,
    "group_norm_silu_backward": _NORM,
    "rms_norm_silu": _RMS_NORM,
    "rms_norm_silu_backward": _RMS_NORM,
    "pointwise_conv": ("rows", "columns", "channels", "channels2", "residual", "tf32"),
    "upsample_conv": ("batch", "height", "width", "channels", "out_channels", "tf32"),
    "reverse_step": (
        *("batch", "channels", "pixels", "channels_last", "noise", "guided", "learned", "multistep", "x0", "net_in"),
        "known",
    ),
    "q_sample": ("batch", "channels", "pixels", "channels_last", "noise", "target"),
    "residual_add": (
        *("batch", "channels", "height", "width", "channels_last", "padded", "residual", "bias", "total"),
    ),
    "conv": ("batch", "height", "width", "channels", "out_channels", "upsample", "threads"),
}
_WARPS, _SPLITS = (1, 2, 4, 8, 16), range(1, 129)
_PIXELS, _TILE, _DEPTH = (tuple(2**k for k in range(first, last)) for first, last in ((0, 14), (4, 9), (4, 9)))
_PLANS: tuple[dict[str, Sequence[Any]], ...] = (
    {"one_pass": (True,), "slab_groups": range(1, 1025), "num_warps": _WARPS},
    {"one_pass": (False,), "slab_groups": range(1, 1025), "block_p": _PIXELS, "splits": _SPLITS, "num_warps": _WARPS},
)
# Of at least four elements, those of one counter of the noise. Results are the same bits.
_ELEMENTS: tuple[dict[str, Sequence[Any]], ...] = ({"block": tuple(2**k for k in range(5, 14)), "num_warps": _WARPS},)
# What a choice may consist of. The ops derive all else, so that any of these values gives a right result.
ALTERNATIVES: dict[str, tuple[dict[str, Sequence[Any]], ...]] = {
    "group_norm_silu": _PLANS,
    "group_norm_silu_": _PLANS,
    "group_norm_silu_backward": _PLANS,
    "rms_norm_silu": ({"block_p": _PIXELS, "num_warps": _WARPS},),
    "rms_norm_silu_backward": ({"block_p": _PIXELS, "splits": range(1, 8193), "num_warps": _WARPS},),
    "pointwise_conv": (
        {"block_m": _TILE, "block_n": _TILE, "block_k": _DEPTH, "num_warps": _WARPS, "num_stages": range(1, 7)},
        {"implementation": ("addmm",)},
    ),
    "upsample_conv": ({"implementation": ("transposed", "plain")},),
    "reverse_step": _ELEMENTS,
    "q_sample": _ELEMENTS,
    "residual_add": _ELEMENTS,
    "conv": ({"algorithm": ("winograd4", "winograd2", "direct")},),
}


class Key(NamedTuple):
    """What a choice is for. `shape` has the `FIELDS` of `op`."""

    op: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def named(self) -> dict[str, int]:
        """The shape, by name."""
        return dict(zip(FIELDS[self.op], self.shape, strict=True))
