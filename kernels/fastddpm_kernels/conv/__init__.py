"""Convolutions of a diffusion U-Net in place, with what surrounds them; on the CPU by fewer multiplications.

    y = conv(upsample(concat(x, x2)), weight) + bias + residual

The native backend has three algorithms, for weights that are packed once:

    winograd4   3x3, stride 1, padding 1: 36 multiplications for 4x4 outputs, where the definition has 144; after
                upsampling 25 (Lavin & Gray 2016, arXiv:1509.09308)
    winograd2   16 for 2x2 outputs, where the definition has 36
    direct      the definition; after upsampling four 2x2 convolutions, 16 for 2x2 outputs in place of 36

What they lose: transforms take sums and differences, so their results cancel. The bound that a test holds them to is
`error_factor` times what the definition loses. Weights are transformed in float64 and rounded once. In bfloat16, where
the CPU multiplies that, there is no winograd4, which loses too much; winograd2 takes 9 for 2x2 after upsampling.

Memory traffic: each input and output once; packed weights of winograd4 are 4 times, of winograd2 1.8 times those of
the convolution, which is what counts for few pixels: `choose_algorithm` weighs both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm_kernels import backend as _backend
from fastddpm_kernels import native as _native
from fastddpm_kernels import tuned as _tuned
from fastddpm_kernels.conv.packing import (
    ALGORITHMS,
    TILE,
    PackedWeight,
    error_factor,
    pack,
    packed_values,
    why_not_packed,
)
from fastddpm_kernels.group_norm_silu.ops import is_channels_last

__all__ = [
    "ALGORITHMS",
    "PackedWeight",
    "choose_algorithm",
    "conv_",
    "error_factor",
    "likely_algorithm",
    "pack",
    "packed_values",
    "possible_algorithms",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The costs by which an algorithm is chosen, in multiplications and additions of the matrix products in float32, from
# measurements on Zen 4 and Zen 5 cores: of a value that is transformed, and of a byte of weights, at which all cores
# share the memory. In float32 14 and 6 would fit a little better, but choose winograd4, which loses more, more often.
_TRANSFORM_COST, _BYTE_COST = {torch.float32: 30, torch.bfloat16: 6}, 4
_CPU = torch.device("cpu")


@torch.no_grad()
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
    backend: str = "auto",
) -> None:
    """Convolution of `concat(x, x2)`, plus bias and residual, written to `y`. Not differentiable.

    Args:
        y: `[N, O, H', W']`, overwritten; not the memory of `x` or `x2`. Its size says how far the image is padded
            below and to the right: by 0 to k - 1 rows and columns of zeros.
        x: `[N, C, H, W]`, float32 or bfloat16 (also float16 and float64 on `eager` and `reference`). On `native` this,
            `x2`, `residual` and `y` must be channels-last, and C and C2 even in bfloat16 for all but winograd2.
        weight: `[O, C + C2, k, k]`, x's dtype; or, on `native`, a `PackedWeight` (else it is packed at every call).
        x2: `[N, C2, H, W]`: the op acts as if on `torch.cat((x, x2), 1)`.
        bias: `[O]`, any floating dtype.
        residual: `[N, O, H', W']`, x's dtype; may be `y` itself.
        stride: of the convolution.
        padding: rows and columns of zeros above and to the left.
        upsample: convolve the image upsampled by two (nearest neighbour), so that y is [N, O, 2 H, 2 W]; k = 3,
            stride 1 and padding 1 only.
        backend: `"auto"`, `"native"`, `"eager"` or `"reference"`.

    Raises:
        TypeError: an argument is not a tensor, or of a dtype that is not taken.
        ValueError: a shape, device, memory format or value that does not fit.
        BackendError: the backend that was named cannot run here.
    """
    kernel, inner = _check(y, x, weight, x2, bias, residual, stride, padding, upsample)
    packed = isinstance(weight, PackedWeight)
    if isinstance(weight, PackedWeight):
        _check_packed(weight, x, x2)
    named = "native" if packed and backend == "auto" else backend
    backend = _backend.resolve("conv", named, x.device.type, x.dtype)
    given = [t for t in (y, x, x2, residual) if t is not None]
    if backend == "native" and (wrong := [t for t in given if t.numel() and not is_channels_last(t, or_both=True)]):
        if named == "native":
            raise ValueError(f"a tensor has strides {wrong[0].stride()}, must be channels-last on the native backend")
        backend = "eager"
    if packed and backend != "native":
        raise ValueError(f"weight is packed for the native backend, must be a tensor [O, C, k, k] on {backend}")
    if y.numel() == 0:
        return
    if isinstance(weight, Tensor) and backend == "native":
        algorithm = choose_algorithm(
            x.shape[0], x.shape[2], x.shape[3], inner, len(weight), kernel=kernel, stride=stride, padding=padding,
            upsample=upsample, dtype=x.dtype,
        )  # fmt: skip
        if (y.shape[2], y.shape[3]) != (x.shape[2], x.shape[3]) and not upsample:
            algorithm = "direct"
        channels2 = 0 if x2 is None else x2.shape[1]
        if named == "native" or why_not_packed(algorithm, x.shape[1], channels2, x.dtype) is None:
            weight = pack(weight, algorithm, upsample, dtype=x.dtype, channels2=channels2)
    if isinstance(weight, PackedWeight):
        _native_conv(y, x, weight, x2, None if bias is None else bias.float(), residual, stride, padding)
        return
    wide = torch.float64 if backend == "reference" else x.dtype
    h = (x if x2 is None else torch.cat((x, x2), 1)).to(wide)
    if upsample:
        h = F.interpolate(h, scale_factor=2, mode="nearest")
    below, right = ((a - 1) * stride + kernel - padding - b for a, b in zip(y.shape[2:], h.shape[2:], strict=True))
    if (below, right) != (padding, padding):
        h, padding = F.pad(h, (padding, right, padding, below)), 0
    value = F.conv2d(h, weight.to(wide), None if bias is None else bias.to(wide), stride, padding)
    if residual is not None:
        value = value + residual.to(wide)
    y.copy_(value)


def choose_algorithm(
    n: int, height: int, width: int, in_channels: int, out_channels: int, *, kernel: int = 3, stride: int = 1,
    padding: int = 1, upsample: bool = False, threads: int | None = None, dtype: torch.dtype = torch.float32,
) -> str:  # fmt: skip
    """The fastest algorithm where a tuned table has it, else the likely one, by multiplications and bytes of weights.

    Args:
        n, height, width, in_channels: of the input, `height` and `width` before it is upsampled.
        out_channels, kernel, stride, padding, upsample: of the convolution.
        threads: None for torch's.
        dtype: float32 or bfloat16.
    """
    if (kernel, stride, padding) != (3, 1, 1):
        return "direct"
    threads = torch.get_num_threads() if threads is None else threads
    shape = (n, height, width, in_channels, out_channels, int(upsample), threads)
    found = _tuned.choice("conv", _CPU, dtype, shape)
    if found is not None and found["algorithm"] in possible_algorithms(upsample, dtype):
        return str(found["algorithm"])
    return likely_algorithm(*shape, dtype=dtype)


def possible_algorithms(upsample: int, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Those of 3x3 convolutions that pad by 1."""
    if dtype == torch.bfloat16:
        return ("winograd2", "direct")
    return ("direct", "winograd4") if upsample else ALGORITHMS


def likely_algorithm(
    n: int, height: int, width: int, in_channels: int, out_channels: int, upsample: int, threads: int, *,
    dtype: torch.dtype = torch.float32,
) -> str:  # fmt: skip
    """`choose_algorithm` of 3x3 convolutions that pad by 1, where no table has a choice."""
    factor, half = 2 if upsample else 1, dtype == torch.bfloat16
    height, width, pairs = height * factor, width * factor, in_channels * out_channels
    product = 1 if half else 2
    padded = (-(-in_channels // 32) * 32 if half else in_channels) * out_channels

    def cost(algorithm: str) -> float:
        per_byte = _BYTE_COST * threads * dtype.itemsize * pairs
        if algorithm == "direct":
            taps = 4 if upsample else 9
            return product * n * height * width * taps * pairs + per_byte * (16 if upsample else 9)
        m = TILE[algorithm]
        points = (m + 1) ** 2 if upsample else (m + 2) ** 2
        tiles = n * -(-height // m) * -(-width // m)
        return points * (tiles * (product * padded + _TRANSFORM_COST[dtype] * (in_channels + out_channels)) + per_byte)

    return min(possible_algorithms(upsample, dtype), key=cost)


def _native_conv(
    y: Tensor, x: Tensor, weight: PackedWeight, x2: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    stride: int, padding: int,
) -> None:  # fmt: skip
    if weight.algorithm == "direct":
        _native.conv_direct(y, x, x2, weight.values, bias, residual, weight.kernel, stride, padding, weight.upsample)
    else:
        _native.conv3x3_winograd(y, x, x2, weight.values, bias, residual, TILE[weight.algorithm], weight.upsample)


def _check_packed(weight: PackedWeight, x: Tensor, x2: Tensor | None) -> None:
    if weight.values.dtype != x.dtype:
        raise TypeError(f"weight is packed for {weight.values.dtype}, must be for x's dtype, {x.dtype}")
    channels2 = 0 if x2 is None else x2.shape[1]
    if x.dtype == torch.bfloat16 and weight.channels2 != channels2:
        raise ValueError(f"weight is packed for {weight.channels2} channels of x2, must be for {channels2}")


def _check(
    y: Tensor, x: Tensor, weight: Tensor | PackedWeight, x2: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, stride: int, padding: int, upsample: bool,
) -> tuple[int, int]:  # fmt: skip
    """Checks every argument. Returns the size of the kernel and the number of input channels."""
    plain = None if isinstance(weight, PackedWeight) else weight
    given = {"x": x, "y": y, "weight": plain, "x2": x2, "bias": bias, "residual": residual}
    for name, value in given.items():
        if value is None and (name not in ("x", "y", "weight") or isinstance(weight, PackedWeight)):
            continue
        if not isinstance(value, Tensor):
            what = "a tensor or a PackedWeight" if name == "weight" else "a tensor"
            raise TypeError(f"{name} is {type(value).__name__}, must be {what}")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} is {value.dtype}, must be float32, float16, bfloat16 or float64")
        if name != "bias" and value.dtype != x.dtype:
            raise TypeError(f"{name} is {value.dtype}, must be of x's dtype, {x.dtype}")
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, must be on x's device, {x.device}")
    if x.ndim != 4 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [N, C, H, W] with at least one channel")
    inner = x.shape[1]
    if x2 is not None:
        if x2.ndim != 4 or x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:] or x2.shape[1] < 1:
            raise ValueError(f"x2 has shape {tuple(x2.shape)}, must equal x's {tuple(x.shape)} but for the channels")
        inner += x2.shape[1]
    if isinstance(weight, PackedWeight):
        shape: tuple[int, ...] = (weight.out_channels, weight.in_channels, weight.kernel, weight.kernel)
        if weight.upsample != upsample:
            raise ValueError(f"weight is packed for upsample={weight.upsample}, must be for {upsample}")
    else:
        shape = tuple(weight.shape)
    if len(shape) != 4 or shape[0] < 1 or shape[1] != inner or shape[2] < 1 or shape[2] != shape[3]:
        raise ValueError(f"weight has shape {shape}, must be [O, {inner}, k, k]")
    out, kernel = shape[0], shape[2]
    if stride < 1:
        raise ValueError(f"stride is {stride}, must be at least 1")
    if not 0 <= padding < kernel:
        raise ValueError(f"padding is {padding}, must be from 0 to {kernel - 1}")
    if upsample and (kernel, stride, padding) != (3, 1, 1):
        raise ValueError(f"upsample is True with kernel {kernel}, stride {stride}, padding {padding}, must be 3, 1, 1")
    factor = 2 if upsample else 1
    fits = y.ndim == 4 and y.shape[:2] == (x.shape[0], out)
    for a, b in zip(y.shape[2:], x.shape[2:], strict=False):
        more = (a - 1) * stride + kernel - padding - factor * b  # rows that are added below
        fits = fits and (more == 1 if upsample else -stride < more < kernel)
    if not fits:
        raise ValueError(f"y has shape {tuple(y.shape)}, must be x's {tuple(x.shape)} convolved, with {out} channels")
    if isinstance(weight, PackedWeight) and weight.algorithm != "direct":
        same = upsample or y.shape[2:] == x.shape[2:]
        if (kernel, stride, padding) != (3, 1, 1) or not same:
            raise ValueError(f"weight is packed for {weight.algorithm}, must be for direct: stride or padding is not 1")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, must be [{out}], one per row of weight")
    if residual is not None and residual.shape != y.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, must be y's, {tuple(y.shape)}")
    for name, value in (("x", x), ("x2", x2)):
        if value is not None and y.numel() and value.data_ptr() == y.data_ptr():
            raise ValueError(f"y is {name}, must be other memory, since all of {name} is read for it")
    return kernel, inner
