"""Compute channel RMSNorm, FiLM and SiLU: a program holds all channels of a few pixels; both ways are one pass."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels import tuned
from fastddpm_kernels.device.processors import num_processors
from fastddpm_kernels.device.variant import Launch, Variant
from fastddpm_kernels.group_norm_silu.plan import LARGEST_TILE
from fastddpm_kernels.group_norm_silu.triton_tile import affine, pointers, row, silu, silu_gradient, unit_rows

TILE_ELEMENTS = 4096


@triton.jit
def _forward(
    y, x, x2, weight, bias, scale, shift, residual, scale_stride, shift_stride, P, blocks, eps, root,
    C1: tl.constexpr, C2: tl.constexpr, SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = C1 + C2
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    mask = (p < P)[:, None] & (c < C)[None, :]
    a, b = affine(weight, None, scale, shift, n, scale_stride, shift_stride, c, c < C)
    tile = tl.load(pointers(x, x2, n, p, c, P, C1, C2, CHANNELS_LAST), mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        tile += row(bias, 0, 0, c, c < C)[None, :]
    r = root / tl.maximum(tl.sqrt(tl.sum(tile * tile, axis=1)), eps)
    v = tile * r[:, None] * a[None, :] + b[None, :]
    if SILU:
        v = silu(v)
    if residual is not None:
        v += tl.load(pointers(residual, None, n, p, c, P, C, 0, CHANNELS_LAST), mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers(y, None, n, p, c, P, C, 0, CHANNELS_LAST), v.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dx, dx2, partial, dy, x, x2, weight, scale, shift, scale_stride, shift_stride, P, partial_stride, splits, tiles,
    eps, root,
    C1: tl.constexpr, C2: tl.constexpr, SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """With u = x * root / |x|: partial[0, n, split] = sum dv, partial[1, n, split] = sum dv * u, per channel."""
    C: tl.constexpr = C1 + C2
    n = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    c = tl.arange(0, BLOCK_C)
    a, b = affine(weight, None, scale, shift, n, scale_stride, shift_stride, c, c < C)
    sum_dv = tl.zeros([BLOCK_C], tl.float32)
    sum_dvu = tl.zeros([BLOCK_C], tl.float32)
    start = split * tiles * BLOCK_P
    end = tl.minimum(start + tiles * BLOCK_P, P)
    for p0 in range(start, end, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & (c < C)[None, :]
        u = tl.load(pointers(x, x2, n, p, c, P, C1, C2, CHANNELS_LAST), mask=mask, other=0.0).to(tl.float32)
        dv = tl.load(pointers(dy, None, n, p, c, P, C, 0, CHANNELS_LAST), mask=mask, other=0.0).to(tl.float32)
        norm = tl.sqrt(tl.sum(u * u, axis=1))
        r = root / tl.maximum(norm, eps)
        u = u * r[:, None]
        if SILU:
            dv = silu_gradient(dv, u * a[None, :] + b[None, :])
        sum_dv += tl.sum(dv, axis=0)
        sum_dvu += tl.sum(dv * u, axis=0)
        d = dv * a[None, :]
        # Below eps the divisor is a constant, so the gradient has no projection term.
        along = tl.where(norm > eps, tl.sum(d * u, axis=1) / C, 0.0)
        d = r[:, None] * (d - u * along[:, None])
        tl.store(pointers(dx, dx2, n, p, c, P, C1, C2, CHANNELS_LAST), d.to(dx.dtype.element_ty), mask=mask)
    slot = partial + (n * splits + split) * C + c
    tl.store(slot, sum_dv, mask=c < C)
    tl.store(slot + partial_stride, sum_dvu, mask=c < C)


def _tile(x: Tensor, channels: int, thread_elements: int, elements: int) -> tuple[dict[str, int], int]:
    """Return block sizes and warps: all channels of enough pixels for a tile, or of fewer to fill the chip."""
    block_c, pixels = triton.next_power_of_2(channels), math.prod(x.shape[2:])
    least = 1 if not x.is_contiguous() else 32 // x.itemsize  # pixels that fill a sector
    block_p = max(min(elements // block_c, triton.next_power_of_2(pixels)), 1)
    while block_p > least and x.shape[0] * -(-pixels // block_p) < num_processors(x.device):
        block_p //= 2
    block_p = max(block_p, min(least, triton.next_power_of_2(pixels)))
    return {"BLOCK_P": block_p, "BLOCK_C": block_c}, min(max(block_p * block_c // (32 * thread_elements), 1), 16)


def forward_launches(
    y: Tensor, x: Tensor, weight: Tensor, eps: float, x2: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, silu: bool, bias: Tensor | None = None, residual: Tensor | None = None,
    choice: tuned.Choice | None = None,
) -> list[Launch]:  # fmt: skip
    """Return the launch that writes y. x, x2, y and residual are dense and of one memory format.

    `choice`: overrides the tables and heuristics."""
    (n, channels), pixels = y.shape[:2], math.prod(x.shape[2:])
    if choice is None:
        shape = (n, pixels, x.shape[1], channels - x.shape[1], int(not x.is_contiguous()))
        choice = tuned.choice("rms_norm_silu", x.device, x.dtype, shape)
    tile, num_warps = _tile(x, channels, 32, TILE_ELEMENTS)
    if choice is not None and choice["block_p"] * tile["BLOCK_C"] <= LARGEST_TILE:
        tile, num_warps = {**tile, "BLOCK_P": choice["block_p"]}, choice["num_warps"]
    blocks = -(-pixels // tile["BLOCK_P"])
    scale, scale_stride = unit_rows(scale)
    shift, shift_stride = unit_rows(shift)
    args = {"y": y, "x": x, "x2": x2, "weight": weight.contiguous(), "bias": bias, "scale": scale, "shift": shift,
            "residual": residual, "scale_stride": scale_stride, "shift_stride": shift_stride, "P": pixels,
            "blocks": blocks, "eps": eps, "root": math.sqrt(channels)}  # fmt: skip
    constexprs = {"C1": x.shape[1], "C2": channels - x.shape[1], "SILU": silu,
                  "CHANNELS_LAST": not x.is_contiguous(), **tile}  # fmt: skip
    name = "rms_norm_silu" if bias is None and residual is None else "rms_norm_silu_"
    return [Launch(f"{name}.forward", _forward, n * blocks, args, constexprs, num_warps)]


def heuristic_choice(x: Tensor, channels: int) -> tuned.Choice:
    """Return the choice that `forward_launches` takes if no table has one."""
    tile, num_warps = _tile(x, channels, 32, TILE_ELEMENTS)
    return {"block_p": tile["BLOCK_P"], "num_warps": num_warps}


def heuristic_backward(x: Tensor, channels: int) -> tuned.Choice:
    """Return the choice that `backward_launches` takes if no table has one."""
    # Of the sizes tried, the one that spills under neither triton 3.6 nor 3.9.
    tile, num_warps = _tile(x, channels, 16, 2 * TILE_ELEMENTS)
    splits, _ = _splits(-(-math.prod(x.shape[2:]) // tile["BLOCK_P"]), -(-4 * num_processors(x.device) // x.shape[0]))
    return {"block_p": tile["BLOCK_P"], "splits": splits, "num_warps": num_warps}


def _splits(blocks: int, wanted: int) -> tuple[int, int]:
    """Return (splits, blocks to each): about as many as are wanted, none of them empty."""
    tiles = -(-blocks // min(wanted, blocks))
    return -(-blocks // tiles), tiles


def tuned_variants(key: tuned.Key, choice: tuned.Choice) -> list[Variant]:
    """Return the kernels of a tuned choice: with and without bias and residual, or with FiLM backward."""
    n, pixels, c1, c2, last = key.shape

    def image(channels: int) -> Tensor:
        shape = (n, 1, pixels, channels) if last else (n, channels, 1, pixels)
        return torch.empty(shape, dtype=key.dtype, device="meta").movedim(-1 if last else 1, 1)

    x, x2, y = image(c1), image(c2) if c2 else None, image(c1 + c2)
    weight = torch.empty(c1 + c2, dtype=torch.float32, device="meta")
    rows = torch.empty(n, c1 + c2, dtype=key.dtype, device="meta")
    if key.op == "rms_norm_silu_backward":
        launches, _ = backward_launches(x, x2, y, x, weight, 1e-12, x2, rows, rows, True, choice)
        return [launch.variant(f"tuned, {key.dtype}, {key.shape}") for launch in launches]
    return [
        launch.variant(f"tuned, {key.dtype}, {key.shape}")
        for bias, residual in ((None, None), (weight, y))
        for launch in forward_launches(y, x, weight, 1e-12, x2, rows, rows, True, bias, residual, choice)
    ]


def backward_launches(
    dx: Tensor, dx2: Tensor | None, dy: Tensor, x: Tensor, weight: Tensor, eps: float, x2: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, silu: bool, choice: tuned.Choice | None = None,
) -> tuple[list[Launch], Tensor]:  # fmt: skip
    """Return the launch that writes dx and dx2, and the partial sums that it writes, [2, N, splits, C].

    `choice`: overrides the tables and heuristics."""
    (n, channels), pixels = dy.shape[:2], math.prod(x.shape[2:])
    block_c = triton.next_power_of_2(channels)
    if choice is None:
        shape = (n, pixels, x.shape[1], channels - x.shape[1], int(not x.is_contiguous()))
        choice = tuned.choice("rms_norm_silu_backward", x.device, x.dtype, shape)
    if choice is None or choice["block_p"] * block_c > LARGEST_TILE:
        choice = heuristic_backward(x, channels)
    tile, num_warps = {"BLOCK_P": choice["block_p"], "BLOCK_C": block_c}, choice["num_warps"]
    splits, tiles = _splits(-(-pixels // choice["block_p"]), choice["splits"])
    partial = torch.empty(2, n, splits, channels, dtype=torch.float32, device=x.device)
    scale, scale_stride = unit_rows(scale)
    shift, shift_stride = unit_rows(shift)
    args = {"dx": dx, "dx2": dx2, "partial": partial, "dy": dy, "x": x, "x2": x2, "weight": weight.contiguous(),
            "scale": scale, "shift": shift, "scale_stride": scale_stride, "shift_stride": shift_stride, "P": pixels,
            "partial_stride": partial.stride(0), "splits": splits, "tiles": tiles, "eps": eps,
            "root": math.sqrt(channels)}  # fmt: skip
    constexprs = {"C1": x.shape[1], "C2": channels - x.shape[1], "SILU": silu,
                  "CHANNELS_LAST": not x.is_contiguous(), **tile}  # fmt: skip
    return [Launch("rms_norm_silu.backward", _backward, n * splits, args, constexprs, num_warps)], partial
