"""Pack the weights of one-dimensional convolutions in the order in which a backend reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm_kernels import native

TRANSPOSED = (4, 2, 1)  # kernel, stride and padding
# The taps of a transposed convolution for outputs of each parity: of x at the same place, then of its neighbour.
_PHASES = ((1, 3), (0, 2))


@dataclass(frozen=True)
class PackedWeight:
    """A weight as a backend reads it.

    Attributes:
        values: of `packed_values`, in the dtype of the convolution; may be overwritten.
        backend: "native" or "triton".
        in_channels, out_channels, kernel: of the convolution.
        transposed: whether it is a transposed one.
        channels2: the number of `in_channels` that belong to x2.
    """

    values: Tensor
    backend: str
    in_channels: int
    out_channels: int
    kernel: int
    transposed: bool = False
    channels2: int = 0


def pack(
    weight: Tensor, backend: str, *, transposed: bool = False, dtype: torch.dtype = torch.float32, channels2: int = 0
) -> PackedWeight:
    """Return a weight [O, C + C2, k], or [C + C2, O, 4] if `transposed`, packed for a backend."""
    values = packed_values(weight, backend, transposed=transposed, dtype=dtype, channels2=channels2)
    channels, outputs = weight.shape[:2] if transposed else (weight.shape[1], weight.shape[0])
    return PackedWeight(values, backend, channels, outputs, weight.shape[2], transposed, channels2)


@torch.no_grad()
def packed_values(
    weight: Tensor, backend: str, *, transposed: bool = False, dtype: torch.dtype = torch.float32, channels2: int = 0
) -> Tensor:
    """Return the values of a `PackedWeight`, one-dimensional, on the weight's device (native: on the CPU).

    A transposed convolution is two convolutions of two taps, one for outputs of each parity: its phases.
    For "triton": [phases, O, taps, C + C2]. For "native": [phases, panels, C + C2, taps, panel], panels of
    neighbouring output channels; in bfloat16 two input channels are next to each other, [.., (C + C2) / 2, taps, panel,
    2], and x and x2 are each filled up with a zero to an even number.
    """
    phases = weight.detach()[None]
    if transposed:
        phases = torch.stack([phases[0][:, :, taps].transpose(0, 1) for taps in _PHASES])
    phases = phases.to(dtype)  # [phases, O, C, taps]
    if backend == "triton":
        return phases.permute(0, 1, 3, 2).contiguous().flatten()
    panel = native.get().functions.fastddpm_conv1d_panel()
    phases = phases.cpu()
    if dtype == torch.bfloat16:
        own = phases.shape[2] - channels2
        parts = [phases[:, :, :own], phases[:, :, own:]]
        phases = torch.cat([F.pad(part, (0, 0, 0, part.shape[2] % 2)) for part in parts], 2)
    phases = F.pad(phases, (0, 0, 0, 0, 0, -phases.shape[1] % panel)).unflatten(1, (-1, panel))
    if dtype == torch.bfloat16:
        phases = phases.unflatten(3, (-1, 2)).permute(0, 1, 3, 5, 2, 4)
    else:
        phases = phases.permute(0, 1, 3, 4, 2)
    return phases.contiguous().flatten()
