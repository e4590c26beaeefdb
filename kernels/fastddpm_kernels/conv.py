"""Convolutions of a diffusion U-Net in place, with what surrounds them; on the CPU by fewer multiplications.

    y = conv(upsample(concat(x, x2)), weight) + bias + residual

The native backend has three algorithms, for weights that are packed once:

    winograd4   3x3, stride 1, padding 1: 36 multiplications for 4x4 outputs, where the definition has 144; after
                upsampling 25 (Lavin & Gray 2016, arXiv:1509.09308)
    winograd2   16 for 2x2 outputs, where the definition has 36
    direct      the definition; after upsampling four 2x2 convolutions, 16 for 2x2 outputs in place of 36

What they lose: transforms take sums and differences, so their results cancel. The bound that a test holds them to is
`error_factor` times what the definition loses. Weights are transformed in float64 and rounded once.

Memory traffic: each input and output once; packed weights of winograd4 are 4 times, of winograd2 1.8 times those of
the convolution, which is what counts for few pixels: `choose_algorithm` weighs both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm_kernels import _backend, _native, _tuned
from fastddpm_kernels._norm_ops import is_channels_last

ALGORITHMS = ("winograd4", "winograd2", "direct")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_TILE = {"winograd4": 4, "winograd2": 2}
# The finite points at which the polynomials are evaluated, in the order of the kernel (`winograd.cpp`); then infinity.
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 1.0, -1.0, 0.625, -0.625)}
_VANISHING = 2  # the point -1, of an upsampled image
# What an output row of each parity sees of an upsampled image: the taps of a 3x3 kernel that fall on one input row.
_PHASES = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))
# The costs by which an algorithm is chosen, in multiplications and additions of the matrix products, from measurements
# on a Zen 4 core: of a float that is transformed, and of a byte of weights, at which all cores share the memory.
_TRANSFORM_COST, _BYTE_COST = 30, 4
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class PackedWeight:
    """A weight as a native algorithm reads it.

    Attributes:
        values: of `packed_values`; may be filled anew.
        algorithm: one of `ALGORITHMS`.
        in_channels, out_channels, kernel: of the weight [out_channels, in_channels, kernel, kernel].
        upsample: whether it is to be applied to an image upsampled by two.
    """

    values: Tensor
    algorithm: str
    in_channels: int
    out_channels: int
    kernel: int
    upsample: bool = False


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
        x: `[N, C, H, W]`, float32 (float16, bfloat16 and float64 on `eager` and `reference`). On `native` this, `x2`,
            `residual` and `y` must be channels-last.
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
            upsample=upsample,
        )  # fmt: skip
        if (y.shape[2], y.shape[3]) != (x.shape[2], x.shape[3]) and not upsample:
            algorithm = "direct"
        weight = pack(weight, algorithm, upsample)
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
    padding: int = 1, upsample: bool = False, threads: int | None = None,
) -> str:  # fmt: skip
    """The fastest algorithm where a tuned table has it, else the likely one, by multiplications and bytes of weights.

    Args:
        n, height, width, in_channels: of the input, `height` and `width` before it is upsampled.
        out_channels, kernel, stride, padding, upsample: of the convolution.
        threads: None for torch's.
    """
    if (kernel, stride, padding) != (3, 1, 1):
        return "direct"
    threads = torch.get_num_threads() if threads is None else threads
    possible = ("direct", "winograd4") if upsample else ALGORITHMS
    shape = (n, height, width, in_channels, out_channels, int(upsample), threads)
    found = _tuned.choice("conv", _CPU, torch.float32, shape)
    if found is not None and found["algorithm"] in possible:
        return str(found["algorithm"])
    return likely_algorithm(*shape)


def likely_algorithm(
    n: int, height: int, width: int, in_channels: int, out_channels: int, upsample: int, threads: int
) -> str:
    """`choose_algorithm` of 3x3 convolutions that pad by 1, where no table has a choice."""
    possible = ("direct", "winograd4") if upsample else ALGORITHMS
    factor = 2 if upsample else 1
    height, width, pairs = height * factor, width * factor, in_channels * out_channels

    def cost(algorithm: str) -> float:
        per_byte = _BYTE_COST * threads * 4 * pairs
        if algorithm == "direct":
            taps = 4 if upsample else 9
            return 2 * n * height * width * taps * pairs + per_byte * (16 if upsample else 9)
        m = _TILE[algorithm]
        points = 25 if upsample else (m + 2) ** 2
        tiles = n * -(-height // m) * -(-width // m)
        return points * (tiles * (2 * pairs + _TRANSFORM_COST * (in_channels + out_channels)) + per_byte)

    return min(possible, key=cost)


def error_factor(algorithm: str, *, worst: bool = False) -> float:
    """How much more a result may differ from the exact one than that of the definition in the same precision.

    Root mean square over the outputs of a tile, or of its `worst` output. For independent inputs and weights of
    variance 1, the sum of products at point j has the size |G_j| |B_j|, by the norms of the rows, and is rounded in
    proportion; A^T[i, j] of that error reaches output i, which itself has the size sqrt(3), the definition's taps.
    Both dimensions have that factor, so it is squared. The points of `_POINTS` are near the least of mean and worst.
    """
    if algorithm == "direct":
        return 1.0
    a, g, b = _transforms(_TILE[algorithm])
    squares = (a * g.norm(dim=1) * b.norm(dim=1)).square().sum(1) / 3  # of the factor, for each output
    return float(squares.max() if worst else squares.mean())


def pack(weight: Tensor, algorithm: str, upsample: bool = False) -> PackedWeight:
    """A weight [O, C, k, k] made ready for an algorithm. See `packed_values`."""
    out_channels, in_channels, kernel, _ = weight.shape
    return PackedWeight(
        packed_values(weight, algorithm, upsample), algorithm, in_channels, out_channels, kernel, upsample
    )


@torch.no_grad()
def packed_values(weight: Tensor, algorithm: str, upsample: bool = False) -> Tensor:
    """The values of a `PackedWeight`, float32, one-dimensional, on the CPU.

    Panels of neighbouring output channels, as many as the kernel's registers hold: [points or phases, panels, taps,
    C, panel]. Computed in float64 and rounded once.

    Raises:
        ValueError: the algorithm does not compute such a convolution.
        BackendError: there is no native backend here.
    """
    if reason := _native.why_not():
        raise _backend.BackendError(f"conv: backend 'native' cannot run here: {reason}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm is {algorithm!r}, must be one of {', '.join(ALGORITHMS)}")
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must be [O, C, k, k]")
    if (algorithm != "direct" or upsample) and weight.shape[2] != 3:
        raise ValueError(f"weight is {weight.shape[2]}x{weight.shape[3]}, must be 3x3 for {algorithm} or upsampling")
    if algorithm == "winograd2" and upsample:
        raise ValueError("algorithm is 'winograd2', must be 'winograd4' or 'direct' where the image is upsampled")
    w = weight.detach().cpu().double()
    out_channels = len(w)
    if algorithm == "direct" and not upsample:
        products = w.permute(2, 3, 0, 1).flatten(0, 1)[None]
    elif algorithm == "direct":
        taps = torch.tensor(_PHASES, dtype=torch.float64)
        products = torch.einsum("pak,qbl,oikl->pqaboi", taps, taps, w).flatten(2, 3).flatten(0, 1)
    else:
        _, g, _ = _transforms(_TILE[algorithm])
        if upsample:
            g = g[[point for point in range(len(g)) if point != _VANISHING]]
        products = torch.einsum("ak,bl,oikl->aboi", g, g, w).flatten(0, 1)[:, None]
    # [phases or points, taps, O, C] -> [.., panels, taps, C, panel]
    panel = _native.get().panel
    panels = -(-out_channels // panel)
    products = F.pad(products, (0, 0, 0, panels * panel - out_channels))
    products = products.unflatten(2, (panels, panel)).permute(0, 2, 1, 4, 3)
    return products.to(torch.float32).contiguous().flatten()


def _transforms(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """A^T [m, m + 2], G [m + 2, 3] and B^T [m + 2, m + 2] in float64: y = A^T ((G w) * (B^T x)) is the convolution.

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
    """Of the polynomial with these zeros, the constant first, the highest 1."""
    result = torch.ones(1, dtype=torch.float64)
    for z in zeros:
        result = F.pad(result, (1, 0)) - z * F.pad(result, (0, 1))
    return result


def _native_conv(
    y: Tensor, x: Tensor, weight: PackedWeight, x2: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    stride: int, padding: int,
) -> None:  # fmt: skip
    if weight.algorithm == "direct":
        _native.conv_direct(y, x, x2, weight.values, bias, residual, weight.kernel, stride, padding, weight.upsample)
    else:
        _native.conv3x3_winograd(y, x, x2, weight.values, bias, residual, _TILE[weight.algorithm], weight.upsample)


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
