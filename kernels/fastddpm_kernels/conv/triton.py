"""Launch the convolution's kernels (`triton_kernels`): one to three launches that allocate nothing in a bound call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastddpm_kernels import tuned
from fastddpm_kernels.conv.examples import Example
from fastddpm_kernels.conv.packing import phase_weight
from fastddpm_kernels.conv.plan import (
    APPLIED,
    COLUMNS,
    FMA,
    HALF,
    MERGED,
    SHARED,
    TF32,
    Problem,
    Tile,
    apply_programs,
    likely_tile,
    row_size,
)
from fastddpm_kernels.conv.statistics import Norm
from fastddpm_kernels.conv.triton_kernels import apply_kernel, conv_kernel, finish_kernel, table_kernel
from fastddpm_kernels.device.processors import num_processors
from fastddpm_kernels.device.variant import Descriptor, Launch, Variant, packaged_variants, run_launches
from fastddpm_kernels.group_norm_silu.triton_tile import unit_rows

OPTIONS = {"enable_fp_fusion": True}
VENDOR = {"implementation": "vendor"}
GROUP_M = 8  # tiles of rows that run side by side for all columns
STAGES_OF_64 = 2  # on GPUs with 64 threads to a warp: one tile in registers, one in 64 KiB of shared memory


class Operands(NamedTuple):
    """The arguments of `conv_` that its kernels read and write; the weight as they read it (`prepared`)."""

    y: Tensor
    x: Tensor
    weight: Tensor
    x2: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    stride: int = 1
    padding: int = 1
    upsample: bool = False
    norm: Norm | None = None
    time_bias: Tensor | None = None
    shortcut: Tensor | None = None
    shortcut2: Tensor | None = None
    shortcut_weight: Tensor | None = None
    statistics: Tensor | None = None
    allow_tf32: bool = False

    @property
    def kernel(self) -> int:
        return 2 if self.upsample else self.weight.shape[2]


def channels_last_weight(weight: Tensor, upsample: bool) -> Tensor:
    """Return a weight as the kernel reads it, [O][k][k][C] or, with `upsample`, [phase][O][2][2][C]; or a copy."""
    if upsample:
        return weight if weight.ndim == 5 else phase_weight(weight)
    return weight.contiguous(memory_format=torch.channels_last)


def prepared(o: Operands) -> Operands:
    """Return operands whose weight is as the kernel reads it."""
    return o._replace(weight=channels_last_weight(o.weight, o.upsample))


def problem_of(o: Operands) -> Problem:
    """Return what decides how a call is divided."""
    n, out, *size = o.y.shape
    height, width = o.x.shape[2:] if o.upsample else size
    c2, d, d2 = (0 if image is None else image.shape[1] for image in (o.x2, o.shortcut, o.shortcut2))
    columns = groups = 0
    if o.norm is not None:
        groups = o.norm.num_groups
        members = (o.x.shape[1] + c2) // groups
        for values, channels in ((o.norm.statistics, o.x.shape[1]), (o.norm.statistics2, c2)):
            if values is not None:
                columns = max(columns, members * values.shape[2] // channels)
    return Problem(
        n, height, width, o.x.shape[1], c2, out, o.kernel, o.stride, o.upsample, d, d2,
        0 if o.statistics is None else out // o.statistics.shape[2], columns, groups, o.x.shape[2] * o.x.shape[3],
        o.x.itemsize, HALF if o.x.itemsize == 2 else TF32 if o.allow_tf32 else FMA,
    )  # fmt: skip


def make_launches(o: Operands, tile: Tile, workspace: Tensor | None) -> list[Launch]:
    """Return the launches of a call, also for ahead-of-time compilation (meta tensors suffice)."""
    problem = problem_of(o)
    if reason := tile.why_not(problem):
        raise ValueError(reason)
    sizes = tile.workspace(problem)
    if workspace is None and sum(sizes):
        workspace = torch.empty(sum(sizes), dtype=torch.float32, device=o.x.device)
    table = applied = sums = blocks = None
    if workspace is not None:
        parts = workspace[: sum(sizes)].split(sizes)
        table, applied, sums, blocks = (part if size else None for part, size in zip(parts, sizes, strict=True))
    launches = []
    if o.norm is not None and (tile.norm == "table" or problem.columns > MERGED):
        launches.append(_table_launch(o, o.norm, problem, tile, table))
    if o.norm is not None and tile.norm == "apply" and applied is not None:
        n, channels, (height, width) = problem.n, problem.channels + problem.channels2, o.x.shape[2:]
        h = applied.view(o.x.dtype)[: n * problem.source * channels].view(n, height, width, channels).movedim(-1, 1)
        launches.append(_apply_launch(o, o.norm, problem, tile, table, h))
        o = o._replace(x=h, x2=None, norm=None)
        problem, table = problem_of(o), None
    launches.append(_conv_launch(o, problem, tile, table, sums, blocks))
    if not tile.finishes(problem):
        assert sums is not None
        launches.append(finish_launch(o.y, sums, o.bias, o.time_bias, o.residual, o.statistics, tile.splits, tile.pdl))
    return launches


def _conv_launch(
    o: Operands, problem: Problem, tile: Tile, table: Tensor | None, sums: Tensor | None, blocks: Tensor | None
) -> Launch:
    c, c2, d, d2 = problem.channels, problem.channels2, problem.shortcut, problem.shortcut2
    pixels, whole = tile.pixels(problem), tile.finishes(problem)
    plain = tile.splits > 1 and not tile.one_launch  # what is to be added waits for the second launch
    counters = None
    if tile.splits > 1 and tile.one_launch:
        counters = torch.zeros(tile.programs(problem) // tile.splits, dtype=torch.int32, device=o.x.device)
    time_bias, time_stride = unit_rows(None if plain else o.time_bias)
    statistics = o.statistics if whole else None
    arrivals = None
    if statistics is not None and tile.parts(problem) > 1:
        arrivals = _counters(problem.n, problem.out, tile.block_n, o.x.device)
    args: dict[str, Any] = {
        "y": None if plain else o.y, "sums": sums, "counters": counters, "x": o.x, "x2": o.x2,
        "weight": o.weight, "shortcut": o.shortcut, "shortcut2": o.shortcut2, "shortcut_weight": o.shortcut_weight,
        "bias": None if plain else o.bias, "time_bias": time_bias, "residual": None if plain else o.residual,
        "statistics": statistics, "blocks": None if arrivals is None else blocks, "arrivals": arrivals, "table": table,
        **_norm_args(o.norm, problem), "plane": _plane(statistics), "time_stride": time_stride,
        "N": problem.n, "H": o.x.shape[2], "W": o.x.shape[3], "GH": problem.height, "GW": problem.width,
        "C": c, "C2": c2, "D": d, "D2": d2, "CO": problem.out, "PADDING": o.padding,
    }  # fmt: skip
    if tile.tma:
        args |= _descriptors(o, problem, tile)
    below, right = (
        (a - 1) * o.stride + o.kernel - o.padding - b for a, b in zip(o.y.shape[2:], o.x.shape[2:], strict=True)
    )
    constexprs = {
        "KERNEL": o.kernel, "STRIDE": o.stride, "UPSAMPLE": o.upsample,
        "INSIDE": not o.upsample and o.padding == 0 and below <= 0 and right <= 0,
        "EVEN": all(value % tile.block_k == 0 for value in (c, c2, d, d2)),
        "NORM": o.norm is not None, "SILU": o.norm is not None and o.norm.activation == "silu",
        "MERGE": o.norm is not None and tile.norm == "merge",
        "GROUPS": triton.next_power_of_2(max(problem.groups, 1)),
        "SPLITS": tile.splits, "PRECISION": "ieee" if problem.rate == FMA else "tf32", "PIXELS": pixels,
        "UNIT": problem.unit if statistics is not None else 1,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "BLOCK_COLUMNS": _columns(problem), "GROUP_M": GROUP_M, "PDL": tile.pdl, "TMA": tile.tma,
        "PERSISTENT": tile.persistent,
    }  # fmt: skip
    options = {"num_stages": tile.num_stages, **_launch_options(tile.pdl)}
    programs = tile.programs(problem)
    if tile.persistent:
        programs = min(programs, num_processors(o.x.device))
    return Launch("conv.tile", conv_kernel, programs, args, constexprs, tile.num_warps, options)


def _descriptors(o: Operands, problem: Problem, tile: Tile) -> dict[str, Descriptor | None]:
    """Return descriptors of the images, [N, H, W, C], and of the weights, [O, K]."""
    box = tile.box(problem)
    assert box is not None

    def image(x: Tensor | None) -> Descriptor | None:
        return None if x is None else Descriptor(x.permute(0, 2, 3, 1), (*box, tile.block_k))

    def rows(weight: Tensor | None) -> Descriptor | None:
        return None if weight is None else Descriptor(weight, (tile.block_n, tile.block_k))

    k = o.kernel**2 * (problem.channels + problem.channels2)
    weight = o.weight if o.upsample else o.weight.permute(0, 2, 3, 1)
    return {
        "x": image(o.x), "x2": image(o.x2), "shortcut": image(o.shortcut), "shortcut2": image(o.shortcut2),
        "weight": rows(weight.reshape(-1, k)), "shortcut_weight": rows(o.shortcut_weight),
    }  # fmt: skip


def _norm_args(norm: Norm | None, problem: Problem) -> dict[str, Any]:
    """Return the arguments of the kernels that merge statistics."""
    if norm is None:
        names = ("of_x", "of_x2", "gamma", "beta", "scale", "shift")
        numbers = ("row_stride", "plane1", "plane2", "units1", "units2", "scale_stride", "shift_stride", "groups",
                   "SIZE")  # fmt: skip
        return {**dict.fromkeys(names), **dict.fromkeys(numbers, 0), "eps": 0.0}
    scale, scale_stride = unit_rows(norm.scale)
    shift, shift_stride = unit_rows(norm.shift)
    first, second = norm.statistics, norm.statistics2
    return {
        "of_x": first, "of_x2": second, "gamma": norm.weight, "beta": norm.bias, "scale": scale, "shift": shift,
        "row_stride": row_size(problem), "plane1": _plane(first), "plane2": _plane(second), "units1": first.shape[2],
        "units2": 0 if second is None else second.shape[2], "scale_stride": scale_stride, "shift_stride": shift_stride,
        "eps": float(norm.eps), "groups": norm.num_groups,
        "SIZE": (problem.channels + problem.channels2) // norm.num_groups,
    }  # fmt: skip


def _table_launch(o: Operands, norm: Norm, problem: Problem, tile: Tile, table: Tensor | None) -> Launch:
    groups = triton.next_power_of_2(norm.num_groups)
    while groups > 1 and problem.n * -(-norm.num_groups // groups) < 64:
        groups //= 2
    args = {"table": table, **_norm_args(norm, problem), "P": o.x.shape[2] * o.x.shape[3], "C": problem.channels,
            "C2": problem.channels2}  # fmt: skip
    columns = min(1024 // groups, triton.next_power_of_2(problem.columns))
    constexprs = {"GROUPS": groups, "BLOCK_COLUMNS": columns, "PDL": tile.pdl}
    programs = problem.n * -(-norm.num_groups // groups)
    return Launch("conv.table", table_kernel, programs, args, constexprs, 4, _launch_options(tile.pdl))


def _apply_launch(o: Operands, norm: Norm, problem: Problem, tile: Tile, table: Tensor | None, h: Tensor) -> Launch:
    args = {"h": h, "x": o.x, "x2": o.x2, "table": table, **_norm_args(norm, problem), "P": problem.source,
            "C": problem.channels, "C2": problem.channels2}  # fmt: skip
    constexprs = {
        "SILU": norm.activation == "silu", "MERGE": problem.columns <= MERGED,
        "GROUPS": triton.next_power_of_2(norm.num_groups),
        "BLOCK_COLUMNS": _columns(problem), "BLOCK_P": APPLIED,
        "BLOCK_C": min(128, max(triton.next_power_of_2(h.shape[1]), 16)), "PDL": tile.pdl,
    }  # fmt: skip
    return Launch("conv.apply", apply_kernel, apply_programs(problem), args, constexprs, 4, _launch_options(tile.pdl))


def finish_launch(
    y: Tensor, sums: Tensor, bias: Tensor | None, time_bias: Tensor | None, residual: Tensor | None,
    statistics: Tensor | None, splits: int, pdl: bool = False,
) -> Launch:  # fmt: skip
    """Return the launch that adds up `splits` tensors of y's form, adds the rest and leaves the statistics."""
    n, out, height, width = y.shape
    pixels = height * width
    unit = 1 if statistics is None else out // statistics.shape[2]
    block_m = min(max(triton.next_power_of_2(pixels), 16), 64)
    block_n = max(unit, min(32, triton.next_power_of_2(out)))
    part = min(block_m, triton.next_power_of_2(pixels))
    tiles = -(-n // (block_m // part)) if part < block_m else n * -(-pixels // part)
    time_bias, time_stride = unit_rows(time_bias)
    blocks = arrivals = None
    if statistics is not None and pixels > part:
        arrivals = _counters(n, out, block_n, y.device)
        numel = 2 * n * -(-pixels // part) * (out // unit)
        blocks = torch.empty(numel, dtype=torch.float32, device=y.device)
    args = {"y": y, "sums": sums, "bias": bias, "time_bias": time_bias, "residual": residual, "statistics": statistics,
            "blocks": blocks, "arrivals": arrivals, "plane": _plane(statistics), "time_stride": time_stride, "N": n,
            "P": pixels, "CO": out}  # fmt: skip
    constexprs = {"SPLITS": splits, "PIXELS": part, "UNIT": unit, "BLOCK_M": block_m, "BLOCK_N": block_n,
                  "PDL": pdl}  # fmt: skip
    return Launch("conv.finish", finish_kernel, tiles * -(-out // block_n), args, constexprs, 4, _launch_options(pdl))


def _counters(n: int, out: int, block_n: int, device: torch.device) -> Tensor:
    """Return zeros in which the tiles of each sample and block of columns count themselves; they reset it."""
    return torch.zeros(n * -(-out // block_n), dtype=torch.int32, device=device)


def _plane(statistics: Tensor | None) -> int:
    return 0 if statistics is None else statistics[0].numel()


def _columns(problem: Problem) -> int:
    return min(COLUMNS, triton.next_power_of_2(max(problem.columns, 1)))


def _launch_options(pdl: bool) -> dict[str, Any]:
    return {**OPTIONS, "launch_pdl": True} if pdl else OPTIONS


def key_shape(o: Operands) -> tuple[int, ...]:
    """Return the shape of a call in a tuned table: the fields of "fused_conv"."""
    n, c, height, width = o.x.shape
    c2, d, d2 = (0 if image is None else image.shape[1] for image in (o.x2, o.shortcut, o.shortcut2))
    return (
        n, height, width, c, c2, o.y.shape[1], 3 if o.upsample else o.weight.shape[2], o.stride, int(o.upsample),
        0 if o.norm is None else o.norm.num_groups, int(o.norm is not None and o.norm.activation == "silu"), d + d2,
        0 if o.statistics is None else o.y.shape[1] // o.statistics.shape[2], int(o.allow_tf32),
    )  # fmt: skip


def tuned_choice(o: Operands) -> tuned.Choice | None:
    """Return the measured choice for a call; None if there is none."""
    return tuned.choice("fused_conv", o.x.device, o.x.dtype, key_shape(o))


def tile_of(o: Operands, choice: tuned.Choice | None = None) -> Tile:
    """Return the tile of a choice that fits the call, else the likely best one."""
    problem = problem_of(o)
    if choice is not None and choice != VENDOR:
        tile = Tile(**choice)
        if tile.why_not(problem) is None:
            return tile if _is_hopper(o.x.device) else replace(tile, pdl=False, tma=False, persistent=False)
    return likely_tile(problem, *processors_and_shared(o.x.device))


def processors_and_shared(device: torch.device) -> tuple[int, int]:
    """Return the multiprocessors of a device, and the bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return num_processors(device), SHARED
    properties = torch.cuda.get_device_properties(device)
    return num_processors(device), int(getattr(properties, "shared_memory_per_block_optin", 64 * 1024))


def _is_hopper(device: torch.device) -> bool:
    """Return whether a device has tensor descriptors, and launches that begin before those they depend on end."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def bind(o: Operands, workspace: Tensor | None, choice: tuned.Choice | None = None) -> Callable[[], object]:
    """Return a function that runs the call, by a choice or, if None, by the tuned or the likely best tile."""
    tile = tile_of(o, tuned_choice(o) if choice is None else choice)
    return partial(run_launches, make_launches(prepared(o), tile, workspace), o.x)


def run_tile(o: Operands, tile: Tile) -> None:
    """Run a call by a tile, whatever a table or the heuristics say."""
    run_launches(make_launches(prepared(o), tile, None), o.x)


def bind_epilogue(
    y: Tensor, x: Tensor, bias: Tensor | None, time_bias: Tensor | None, residual: Tensor | None,
    statistics: Tensor | None,
) -> Callable[[], object]:  # fmt: skip
    """Return a function that writes x plus the rest to y, and its statistics."""
    return partial(run_launches, [finish_launch(y, x, bias, time_bias, residual, statistics, 1)], x)


def variants_of(o: Operands, tile: Tile, tag: str) -> list[Variant]:
    """Return the kernels of a call by a tile, at meta tensors."""
    found = []
    for launch in make_launches(prepared(o), tile, None):
        options = {name: value for name, value in launch.options.items() if name != "num_stages"}
        found.append(
            replace(
                launch.variant(tag), num_stages=tile.num_stages, num_stages_of_64=STAGES_OF_64, options=options,
                num_warps_of_64=max(launch.num_warps // 2, 1),
            )
        )  # fmt: skip
    return found


def operands_of(example: Example, dtype: torch.dtype, allow_tf32: bool = False) -> Operands:
    """Return an example's operands without values, on the meta device."""
    values = example.make(lambda name, *shape: torch.empty(shape, dtype=dtype, device="meta"))
    return Operands(**example.call(values, dtype), allow_tf32=allow_tf32)


def aot_variants() -> list[Variant]:
    """Return the kernels that common U-Net layers take on a GPU of 132 processors, and the tuned ones."""
    half, single, bfloat = torch.float16, torch.float32, torch.bfloat16
    block = Example(1, 16, 16, 256, 256, groups=32)
    variants: dict[str, Variant] = {}
    for tag, example, dtype, tf32 in (
        ("16x16 batch 1", block, half, False),
        ("16x16 batch 1", block, bfloat, False),
        ("16x16 batch 1", block, single, True),
        ("16x16 batch 1", block, single, False),
        ("16x16 batch 4 concat", replace(block, n=4, channels2=128, shortcut=True, residual=False), half, False),
        ("4x4 batch 1", replace(block, height=4, width=4), half, False),
        ("4x4 batch 64 concat", replace(block, n=64, height=4, width=4, channels2=256, shortcut=True), half, False),
        ("qkv 16x16 batch 4", replace(block, n=4, out=768, kernel=1, silu=False, residual=False), half, False),
        ("32x32 batch 256", Example(256, 32, 32, 128, 128, groups=32), half, False),
        ("32x32 batch 256", Example(256, 32, 32, 128, 128, groups=32), single, True),
        ("32x32 batch 64 concat", Example(64, 32, 32, 256, 128, 128, groups=32, shortcut=True), half, False),
        ("64x64 batch 2 film", Example(2, 64, 64, 320, 320, groups=32, film=True), half, False),
        ("upsample 16x16 batch 1", Example(1, 16, 16, 256, 256, upsample=True), half, False),
        ("downsample 32x32 batch 64", Example(64, 32, 32, 128, 128, stride=2, time=False, residual=False), half, False),
        ("image to 128 batch 64", Example(64, 32, 32, 3, 128, time=False, residual=False), half, False),
        ("128 to image batch 1", Example(1, 32, 32, 128, 3, groups=32, residual=False, statistics=False), half, False),
    ):
        o = operands_of(example, dtype, tf32)
        kind = "tf32" if tf32 else {half: "fp16", single: "fp32", bfloat: "bf16"}[dtype]
        tile = tile_of(o)
        for variant in variants_of(o, tile, f"{kind}, {tag}, {tile.block_m}x{tile.block_n}x{tile.block_k}"):
            variants[variant.name] = variant
    return [*variants.values(), *packaged_variants(("fused_conv",), tuned_variants)]


def tuned_variants(key: tuned.Key, choice: tuned.Choice) -> list[Variant]:
    """Return the kernels of a tuned choice; none if it is the vendor's."""
    if key.op != "fused_conv" or choice == VENDOR:
        return []
    o = operands_of(example_of(key), key.dtype, bool(key.named()["tf32"]))
    return variants_of(o, Tile(**choice), f"tuned, {key.dtype}, {key.shape}")


def example_of(key: tuned.Key) -> Example:
    """Return a call of a tuned table's shape, with what the table does not tell."""
    k = key.named()
    return Example(
        k["batch"], k["height"], k["width"], k["channels"], k["out_channels"], k["channels2"], k["kernel"], k["stride"],
        upsample=bool(k["upsample"]), groups=k["groups"], silu=bool(k["silu"]), shortcut=bool(k["shortcut"]),
        residual=not k["shortcut"], statistics=bool(k["unit"]), units=k["unit"],
    )  # fmt: skip
