"""Transform and pack the weights that native convolutions read; bound the error of the transforms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm_kernels import backend, native
from fastddpm_kernels.native.binding import THREADS, bind
from fastddpm_kernels.native.memory import empty

ALGORITHMS = ("winograd4", "winograd2", "direct")
TILE = {"winograd4": 4, "winograd2": 2}
# The finite points at which the polynomials are evaluated, in the order of the kernel (`winograd.cpp`); then infinity.
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 1.0, -1.0, 0.625, -0.625)}
_VANISHING = 2  # the point -1, of an upsampled image
# The taps of a 3x3 kernel that fall on one input row of an upsampled image, for an output row of each parity.
_PHASES = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))


@dataclass(frozen=True)
class PackedWeight:
    """A weight as a native algorithm reads it.

    Attributes:
        values: of `packed_values`, in the dtype of the convolution or stored in float16 for one in float32; may be
            overwritten.
        algorithm: one of `ALGORITHMS`.
        in_channels, out_channels, kernel: of the weight [out_channels, in_channels, kernel, kernel].
        upsample: whether it is to be applied to an image upsampled by two.
        channels2: the number of `in_channels` that belong to x2.
        tile: 2 or 4: compute by winograd2 or winograd4, transforming the weight, packed as for "direct", at every call.
    """

    values: Tensor
    algorithm: str
    in_channels: int
    out_channels: int
    kernel: int
    upsample: bool = False
    channels2: int = 0
    tile: int = 0


def pack(
    weight: Tensor, algorithm: str, upsample: bool = False, *, dtype: torch.dtype = torch.float32, channels2: int = 0,
    stored: torch.dtype | None = None, tile: int = 0,
) -> PackedWeight:  # fmt: skip
    """Return a weight [O, C + C2, k, k] packed for an algorithm. See `packed_values`, and `PackedWeight` for `tile`."""
    out_channels, in_channels, kernel, _ = weight.shape
    values = packed_values(weight, algorithm, upsample, dtype=dtype, channels2=channels2, stored=stored)
    return PackedWeight(values, algorithm, in_channels, out_channels, kernel, upsample, channels2, tile)


def why_not_packed(algorithm: str, channels: int, channels2: int, dtype: torch.dtype) -> str | None:
    """Return why a weight for so many channels of x and x2 cannot be packed, or None."""
    if dtype == torch.bfloat16 and algorithm == "direct" and (channels % 2 or channels2 % 2):
        return f"there are {channels} + {channels2} input channels, must be even numbers in bfloat16 for 'direct'"
    if dtype == torch.bfloat16 and algorithm == "winograd4":
        return "algorithm is 'winograd4', must be 'winograd2' or 'direct' in bfloat16"
    return None


def why_not_tile(weight: PackedWeight) -> str | None:
    """Return why the weight of a 3x3 convolution cannot be transformed at every call, or None."""
    if weight.algorithm != "direct" or weight.upsample or weight.values.dtype == torch.float16:
        return "it must be packed for direct, not for an upsampled image, not in float16"
    if weight.values.dtype == torch.float32:
        return None if weight.tile in (2, 4) else "it must be 2 or 4"
    channels = weight.in_channels - weight.channels2
    if weight.tile != 2 or channels % 32 or weight.channels2 % 32:
        return "in bfloat16 it must be 2, and channels of x and x2 multiples of 32"
    return None


def why_not_stored(stored: torch.dtype | None, dtype: torch.dtype) -> str | None:
    """Return why weights for a native convolution in `dtype` cannot be stored as `stored`, or None."""
    if stored is None or stored == dtype:
        return None
    if (stored, dtype) != (torch.float16, torch.float32):
        return f"weights are stored as {stored} for {dtype}, must be float16 for float32"
    return native.why_not() or (None if native.get().half else "this CPU, or its compiler, has no F16C")


@torch.no_grad()
def packed_values(
    weight: Tensor, algorithm: str, upsample: bool = False, *, dtype: torch.dtype = torch.float32, channels2: int = 0,
    stored: torch.dtype | None = None, values: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the values of a `PackedWeight`, one-dimensional, on the CPU.

    Panels of neighbouring output channels, as many as the kernel's registers hold: [points or phases, panels, taps,
    C, panel]. In bfloat16 two input channels are next to each other: [.., C / 2, panel, 2]; for winograd2 of every 32
    those with even numbers come first, and x and x2 (the last `channels2`) are each filled up with zeros to as many.
    Computed in float64 and rounded to float32, and to bfloat16 or float16 from that.

    Args:
        weight: [O, C, k, k], of any strides.
        algorithm, upsample, channels2: see `PackedWeight`.
        dtype: of the convolution.
        stored: the dtype of the values: None for `dtype`, or float16 where `dtype` is float32: half the bytes to read.
        values: of an earlier call with such a weight, to be overwritten and returned; None for new memory.

    Raises:
        ValueError: the algorithm does not compute such a convolution, a value is beyond float16's range, or `values`
            are others.
        BackendError: there is no native backend here, or none in `dtype`, or none that reads float16.
    """
    if reason := backend.why_not("native", "cpu", "conv", dtype) or why_not_stored(stored, dtype):
        raise backend.BackendError(f"conv: backend 'native' cannot run here: {reason}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm is {algorithm!r}, must be one of {', '.join(ALGORITHMS)}")
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must be [O, C, k, k]")
    out_channels, in_channels, kernel, _ = weight.shape
    if (algorithm != "direct" or upsample) and kernel != 3:
        raise ValueError(f"weight is {kernel}x{kernel}, must be 3x3 for {algorithm} or upsampling")
    if reason := why_not_packed(algorithm, in_channels - channels2, channels2, dtype):
        raise ValueError(reason)
    if algorithm == "winograd2" and upsample and dtype == torch.float32:
        raise ValueError("algorithm is 'winograd2', must be 'winograd4' or 'direct' where the image is upsampled")
    w = weight.detach().cpu()
    if w.dtype not in (torch.float32, torch.float64):
        w = w.float()
    matrix, taps = None, kernel
    if algorithm != "direct":
        _, matrix, _ = _transforms(TILE[algorithm])
        if upsample:
            matrix = matrix[[point for point in range(len(matrix)) if point != _VANISHING]]
        taps = 1
    elif upsample:
        matrix, taps = torch.tensor(_PHASES, dtype=torch.float64).flatten(0, 1), 2
    rows = kernel if matrix is None else len(matrix)
    half, grouped = dtype == torch.bfloat16, dtype == torch.bfloat16 and algorithm != "direct"
    channels = in_channels - channels2
    depth = -(-channels // 32) * 32 + -(-channels2 // 32) * 32 if grouped else in_channels
    panel = native.get().panel
    size = rows * rows * -(-out_channels // panel) * panel * depth
    if values is None:
        values = empty((size,), stored or dtype)
    elif values.shape != (size,) or values.dtype != (stored or dtype):
        raise ValueError(f"values are {values.dtype} {tuple(values.shape)}, must be {stored or dtype} {(size,)}")
    kind = 1 if half else 2 if stored == torch.float16 else 0
    bind(
        "fastddpm_conv_pack", values, w, None if matrix is None else matrix.contiguous(), *w.stride(), out_channels,
        channels, channels2, kernel, rows, taps, grouped, w.dtype == torch.float64, kind, THREADS,
    )()  # fmt: skip
    if kind == 2 and not bool(values.isfinite().all()) and bool(w.isfinite().all()):
        largest = float(packed_values(weight, algorithm, upsample, channels2=channels2).abs().max())
        raise ValueError(f"stored is {stored}, must be float32: packed weights reach {largest:.3g}")
    return values


def _transforms(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return A^T [m, m + 2], G [m + 2, 3] and B^T [m + 2, m + 2] in float64, with y = A^T ((G w) * (B^T x)).

    At a point p, A^T holds its powers, G those divided by the product of its differences to the others, and B^T the
    coefficients of the polynomial that has the other points for its zeros. At infinity, the highest powers.
    """
    points = _POINTS[m]
    a, g = torch.zeros(m, m + 2, dtype=torch.float64), torch.zeros(m + 2, 3, dtype=torch.float64)
    b = torch.zeros(m + 2, m + 2, dtype=torch.float64)
    for j, point in enumerate(points):
        others = [p for p in points if p != point]
        a[:, j] = torch.tensor([point**i for i in range(m)])
        g[j] = torch.tensor([point**k for k in range(3)], dtype=torch.float64) / math.prod(point - p for p in others)
        b[j, : m + 1] = _coefficients(others)
    a[-1, -1] = g[-1, -1] = 1
    b[-1] = _coefficients(list(points))
    return a, g, b


def _coefficients(zeros: list[float]) -> Tensor:
    """Return the coefficients of the polynomial with these zeros, the constant first, the highest 1."""
    result = torch.ones(1, dtype=torch.float64)
    for z in zeros:
        result = F.pad(result, (1, 0)) - z * F.pad(result, (0, 1))
    return result


def error_factor(algorithm: str, *, worst: bool = False) -> float:
    """Return the factor between an algorithm's error and that of the definition in the same precision.

    Root mean square over the outputs of a tile, or of its `worst` output. For independent inputs and weights of
    variance 1, the sum of products at point j has the size |G_j| |B_j|, by the norms of the rows, and is rounded in
    proportion; A^T[i, j] of that error reaches output i, which itself has the size sqrt(3), the definition's taps.
    Both dimensions have that factor, so it is squared. The points of `_POINTS` are near the least of mean and worst.
    """
    if algorithm == "direct":
        return 1.0
    a, g, b = _transforms(TILE[algorithm])
    squares = (a * g.norm(dim=1) * b.norm(dim=1)).square().sum(1) / 3  # of the factor, for each output
    return float(squares.max() if worst else squares.mean())


@torch.no_grad()
def phase_weight(weight: Tensor) -> Tensor:
    """Return the weights of the four 2x2 convolutions that are a 3x3 one of an image upsampled by two.

    The result's pixel (2 i + p, 2 j + q) is phase 2 p + q at (i, j), whose first tap is at (i - 1 + p, j - 1 + q). Taps
    are added up in float64 and rounded once.

    Args:
        weight: [O, C, 3, 3].

    Returns:
        [4, O, 2, 2, C], contiguous, of weight's dtype.
    """
    phases = torch.tensor(_PHASES, dtype=torch.float64, device=weight.device)  # [phase, tap, of 3]
    folded = torch.einsum("pak,qbl,oikl->pqoabi", phases, phases, weight.double())
    return folded.flatten(0, 1).to(weight.dtype).contiguous()
