"""Choose the algorithm of a native convolution."""

from __future__ import annotations

import torch

from fastddpm_kernels import tuned
from fastddpm_kernels.conv.packing import ALGORITHMS, TILE
from fastddpm_kernels.native.machine import threads as native_threads

# Costs of a transformed value and of a byte of weights, read from memory or from the last cache, in halves of a
# multiply-add of float32 products, measured on Zen 4 and Zen 5 cores (all cores share the memory). In float32 14 and
# 6 would fit a little better, but would choose winograd4, which is less accurate, more often.
_TRANSFORM_COST, _BYTE_COST, _CACHED_COST = {torch.float32: 30, torch.bfloat16: 6}, 4, 1
# Costs of transforming a weight [3, 3] for tiles of m x m at a call, and the tiles that one transform is for.
_TAPS_COST, _TILES = {4: 300, 2: 100}, 84
_CPU = torch.device("cpu")


def choose_algorithm(
    n: int, height: int, width: int, in_channels: int, out_channels: int, *, kernel: int = 3, stride: int = 1,
    padding: int = 1, upsample: bool = False, threads: int | None = None, dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None, cached: bool = False,
) -> str:  # fmt: skip
    """Return the fastest algorithm from a tuned table, else the one predicted by `likely_algorithm`.

    Args:
        n, height, width, in_channels: of the input, `height` and `width` before upsampling.
        out_channels, kernel, stride, padding, upsample: of the convolution.
        threads: None for those of `native.threads()` in a tuned table, and two in the prediction: without a table the
            choice, and so every bit of a result, does not depend on their number.
        dtype: float32 or bfloat16.
        stored: of the packed weights, None for `dtype`; tuned tables are for that.
        cached: whether the weights of all layers stay in the last cache from step to step.
    """
    if (kernel, stride, padding) != (3, 1, 1):
        return "direct"
    shape = (n, height, width, in_channels, out_channels, int(upsample))
    own = (*shape, native_threads() if threads is None else threads)
    found = tuned.choice("conv", _CPU, dtype, own) if stored in (None, dtype) else None
    if found is not None and found["algorithm"] in possible_algorithms(upsample, dtype):
        return str(found["algorithm"])
    return likely_algorithm(*shape, 2 if threads is None else threads, dtype=dtype, stored=stored, cached=cached)


def possible_algorithms(upsample: int, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Return the algorithms for 3x3 convolutions of stride 1 that pad by 1."""
    if dtype == torch.bfloat16:
        return ("winograd2", "direct")
    return ("direct", "winograd4") if upsample else ALGORITHMS


def likely_algorithm(
    n: int, height: int, width: int, in_channels: int, out_channels: int, upsample: int, threads: int, *,
    dtype: torch.dtype = torch.float32, stored: torch.dtype | None = None, cached: bool = False,
) -> str:  # fmt: skip
    """Return the cheapest algorithm for a 3x3 convolution of stride 1 that pads by 1.

    It weighs multiplications against the bytes of the packed weights, which matter most for few pixels.
    """
    factor, half = 2 if upsample else 1, dtype == torch.bfloat16
    height, width, pairs = height * factor, width * factor, in_channels * out_channels
    product = 1 if half else 2
    padded = (-(-in_channels // 32) * 32 if half else in_channels) * out_channels

    def cost(algorithm: str) -> float:
        # Weights in a cache would make winograd4 a little faster for small images, and twice to five times less exact.
        near = cached and algorithm != "winograd4"
        per_byte = (_CACHED_COST if near else _BYTE_COST) * threads * (stored or dtype).itemsize * pairs
        if algorithm == "direct":
            taps = 4 if upsample else 9
            return product * n * height * width * taps * pairs + per_byte * (16 if upsample else 9)
        m = TILE[algorithm]
        points = (m + 1) ** 2 if upsample else (m + 2) ** 2
        tiles = n * -(-height // m) * -(-width // m)
        return points * (tiles * (product * padded + _TRANSFORM_COST[dtype] * (in_channels + out_channels)) + per_byte)

    return min(possible_algorithms(upsample, dtype), key=cost)


def likely_tile(
    n: int, height: int, width: int, in_channels: int, out_channels: int, dtype: torch.dtype = torch.float32
) -> int:
    """Return the tile's side of the cheapest way to multiply with weights that stay as they are; 0 for "direct".

    See `PackedWeight.tile`. Tiles of 4, which are less exact, must save a quarter of the time.
    """
    half, pairs = dtype == torch.bfloat16, in_channels * out_channels
    product = 1 if half else 2

    def cost(m: int) -> float:
        tiles = n * -(-height // m) * -(-width // m)
        transforms = (m + 2) ** 2 * tiles * _TRANSFORM_COST[dtype] * (in_channels + out_channels)
        return (m + 2) ** 2 * tiles * product * pairs + transforms + _TAPS_COST[m] * pairs * -(-tiles // _TILES)

    costs = {0: float(product * n * height * width * 9 * pairs), 2: cost(2)}
    if not half:
        costs[4] = cost(4) / 0.75
    return min(costs, key=costs.__getitem__)
