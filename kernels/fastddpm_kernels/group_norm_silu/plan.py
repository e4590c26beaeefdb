"""Divide a call of a norm into programs: arithmetic on shapes, without triton."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastddpm_kernels import tuned
from fastddpm_kernels.device.processors import num_processors


@dataclass(frozen=True)
class Limits:
    """The limits of a kernel's registers and splits.

    Attributes:
        one_pass_elements: the largest slab that a program holds in registers.
        tile_elements: the elements of a tile where a program loops over several.
        thread_elements: the elements of a tile per thread (of a warp of 32), which sets the number of warps.
        few_elements: the same where the programs are fewer than processors, so that what a thread does is waited for.
        max_splits: the most splits of the pixels, where a slab is larger; every program of the second pass reads the
            results of all splits of the first.
    """

    one_pass_elements: int
    tile_elements: int
    thread_elements: int
    max_splits: int
    few_elements: int = 8

    def num_warps(self, elements: int, few: bool) -> int:
        each = min(self.few_elements, self.thread_elements) if few else self.thread_elements
        return min(max(elements // (32 * each), 1), 16)


@dataclass(frozen=True)
class Plan:
    """The division of a call into programs: slabs of whole groups, times splits of the pixels into tiles."""

    one_pass: bool
    slabs: int
    slab_groups: int
    block_c: int
    block_p: int
    splits: int
    tiles: int  # per split
    num_warps: int

    def constexprs(self) -> dict[str, int]:
        block_g = _power_of_2(self.slab_groups)
        return {"SLAB_GROUPS": self.slab_groups, "BLOCK_P": self.block_p, "BLOCK_C": self.block_c, "BLOCK_G": block_g}


def make_plan(x: Tensor, channels: int, groups: int, processors: int, limits: Limits) -> Plan:
    """Choose the tiles by heuristics, the most important first: read once; fill the chip; whole sectors.

    Args:
        x: gives batch, pixels, dtype and memory format.
        channels, groups: of x and x2 together.
        processors: the number to fill.
        limits: of the kernels.
    """
    pixels = math.prod(x.shape[2:])
    return _make_plan(x.shape[0], pixels, x.itemsize, not x.is_contiguous(), channels, groups, processors, limits)


@functools.lru_cache(maxsize=4096)
def _make_plan(
    batch: int,
    pixels: int,
    itemsize: int,
    channels_last: bool,
    channels: int,
    groups: int,
    processors: int,
    limits: Limits,
) -> Plan:
    size, batch, pixels = channels // groups, max(batch, 1), max(pixels, 1)

    def narrowest(row_bytes: int) -> int:
        """Return the fewest groups whose channels make whole blocks of `row_bytes` where channels are adjacent."""
        return min(math.lcm(size, max(row_bytes // itemsize, 1)) // size, groups) if channels_last else 1

    def slabs(slab: int) -> int:
        return -(-groups // slab)

    def width(slab: int) -> int:
        return _power_of_2(slab * size)

    block_p = _power_of_2(pixels)
    slab = narrowest(32)  # a sector
    if batch * slabs(slab) < processors or block_p * width(slab) > limits.one_pass_elements:
        # A thread's widest load: half a sector. The neighbour that needs the other half finds it in L2.
        slab = narrowest(16)
    elements, idle = block_p * width(slab), batch * slabs(slab) < processors // 4
    one_pass = elements <= (limits.tile_elements if idle else limits.one_pass_elements)
    tiles = splits = 1
    if one_pass:
        while (
            slab * 2 <= groups
            and block_p * width(slab * 2) <= limits.tile_elements
            and batch * slabs(slab * 2) >= 2 * processors
        ):
            slab *= 2
    else:
        slab = narrowest(32)
        while slab * 2 <= groups and width(slab * 2) <= (64 if channels_last else 8):
            slab *= 2
        block_p = max(limits.tile_elements // width(slab), 1)
        all_tiles = -(-pixels // block_p)
        # Many programs, with enough tiles to pay for reading the other splits' sums; but first a full chip.
        programs = batch * slabs(slab)
        splits = min(-(-8 * processors // programs), -(-all_tiles // 4))
        splits = max(splits, min(-(-2 * processors // programs), all_tiles))
        tiles = -(-all_tiles // min(splits, limits.max_splits))
        splits = -(-all_tiles // tiles)
    num_warps = limits.num_warps(block_p * width(slab), batch * slabs(slab) * splits < processors)
    return Plan(one_pass, slabs(slab), slab, width(slab), block_p, splits, tiles, num_warps)


# The limits of the forward kernels of `group_norm_silu`.
LIMITS = Limits(one_pass_elements=32768, tile_elements=8192, thread_elements=32, max_splits=128)
# The limits of its backward kernels: two tiles mean fewer elements, and sums per channel mean fewer splits.
# 8 elements to a thread: with 16, one of the kernels spills under triton 3.6.
BACKWARD_LIMITS = Limits(one_pass_elements=8192, tile_elements=4096, thread_elements=8, max_splits=32)


# Tiles above this fit no kernel, whatever a table says.
LARGEST_TILE = 2**17


def forward_plan(x: Tensor, channels: int, groups: int) -> Plan:
    """Return the plan of `group_norm_silu`, forward, on x's device: a tuned or a heuristic one."""
    plan = _tuned_plan("group_norm_silu", x, channels, groups)
    return make_plan(x, channels, groups, num_processors(x.device), LIMITS) if plan is None else plan


def in_place_plan(x: Tensor, channels: int, groups: int, workspace: int | None = None) -> Plan:
    """Return the plan of `group_norm_silu_`, whether or not it has a residual.

    `workspace`: its elements, if it exists. A tuned plan that needs more is not used, so an op that was bound before
    the shape was tuned runs as before.
    """
    plan = _tuned_plan("group_norm_silu_", x, channels, groups)
    if plan is not None and (workspace is None or forward_workspace(x, groups, plan) <= workspace):
        return plan
    processors = num_processors(x.device)
    return _in_place_plan(x.shape, x.itemsize, not x.is_contiguous(), channels, groups, processors, LIMITS)


def backward_plan(x: Tensor, channels: int, groups: int, limits: Limits = BACKWARD_LIMITS) -> Plan:
    """Return the plan of the gradient of `group_norm_silu`."""
    plan = _tuned_plan("group_norm_silu_backward", x, channels, groups)
    return make_plan(x, channels, groups, num_processors(x.device), limits) if plan is None else plan


def heuristic_plan(op: str, shape: tuple[int, ...], itemsize: int, processors: int) -> Plan:
    """Return the heuristic plan of a `group_norm_silu` op for a tuned shape."""
    batch, pixels, channels, second, groups, last = shape
    if op != "group_norm_silu_":
        limits = LIMITS if op == "group_norm_silu" else BACKWARD_LIMITS
        return _make_plan(batch, pixels, itemsize, bool(last), channels + second, groups, processors, limits)
    size = torch.Size((batch, channels, pixels))
    return _in_place_plan(size, itemsize, bool(last), channels + second, groups, processors, LIMITS)


@functools.lru_cache(maxsize=4096)
def derived_plan(
    batch: int,
    pixels: int,
    channels: int,
    groups: int,
    one_pass: bool,
    slab_groups: int,
    num_warps: int,
    block_p: int = 1,
    splits: int = 1,
    per_channel: bool = False,
) -> Plan | None:
    """Return the plan of a tuned choice, correct for any choice; None if no kernel could hold it.

    Args:
        batch, pixels, channels, groups: of the call; the channels of x and x2 together.
        one_pass, slab_groups, num_warps: as in `Plan`.
        block_p, splits: as in `Plan`, for two passes.
        per_channel: whether the second pass reads sums of every channel, as in the gradient.
    """
    pixels, slab = max(pixels, 1), min(slab_groups, groups)
    width = _power_of_2(slab * (channels // groups))
    tiles = 1
    if one_pass:
        block_p, splits = _power_of_2(pixels), 1
    else:
        all_tiles = -(-pixels // block_p)
        tiles = -(-all_tiles // min(splits, all_tiles))
        splits = -(-all_tiles // tiles)
    if max(block_p, _power_of_2(splits) if per_channel else 1) * width > LARGEST_TILE:
        return None
    return Plan(one_pass, -(-groups // slab), slab, width, block_p, splits, tiles, num_warps)


def choice_of(plan: Plan) -> tuned.Choice:
    """Return the choice from which `derived_plan` makes `plan`."""
    choice = {"one_pass": plan.one_pass, "slab_groups": plan.slab_groups, "num_warps": plan.num_warps}
    return choice if plan.one_pass else {**choice, "block_p": plan.block_p, "splits": plan.splits}


def _tuned_plan(op: str, x: Tensor, channels: int, groups: int) -> Plan | None:
    batch, own, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    shape = (batch, pixels, own, channels - own, groups, int(not x.is_contiguous()))
    choice = tuned.choice(op, x.device, x.dtype, shape)
    if choice is None:
        return None
    return derived_plan(batch, pixels, channels, groups, **choice, per_channel=op == "group_norm_silu_backward")


@functools.lru_cache(maxsize=4096)
def _in_place_plan(
    shape: torch.Size,
    itemsize: int,
    channels_last: bool,
    channels: int,
    groups: int,
    processors: int,
    limits: Limits,
) -> Plan:
    pixels = math.prod(shape[2:])

    def plan_within(limits: Limits) -> Plan:
        return _make_plan(shape[0], pixels, itemsize, channels_last, channels, groups, processors, limits)

    plan = plan_within(limits)
    # A residual is a second tile in flight. Registers hold both tiles of the largest slabs only where no pixel is
    # masked and there are few second addresses; other variants (compiled for sm_90 and sm_100) would spill.
    elements = plan.slab_groups * (channels // groups) * pixels
    concat = channels > shape[1] and (itemsize == 4 or elements > limits.one_pass_elements * 3 // 4)
    if plan.one_pass and (concat or pixels & (pixels - 1)):
        plan = plan_within(replace(limits, one_pass_elements=limits.one_pass_elements // 2))
    if plan.one_pass and itemsize == 4 and plan.block_p * plan.block_c > limits.one_pass_elements // 2:
        # With 16 warps a thread has 128 registers, all of them for both tiles of float32. With 8 it has 255.
        plan = replace(plan, num_warps=min(plan.num_warps, 8))
    return plan


def forward_workspace(x: Tensor, groups: int, plan: Plan) -> int:
    """Return the number of float32 elements between the passes: a mean and a sum of squares per split and group."""
    return 0 if plan.one_pass else 2 * x.shape[0] * plan.splits * groups


def _power_of_2(n: int) -> int:
    """Return the least power of 2 that is at least n >= 1."""
    return 1 << (n - 1).bit_length()
