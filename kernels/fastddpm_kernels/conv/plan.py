"""Divide a convolution on a GPU into programs: the tiles that a kernel may have, and the likely best one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

SHARED = 163 * 1024  # bytes of shared memory of a program, on an A100
RESERVED = 24 * 1024  # of them not for stages
COLUMNS = 32  # columns of blocks that are merged at once
APPLIED = 32  # pixels of a program that normalises the input
MERGED = 64  # most columns of blocks that every program merges for itself


class Problem(NamedTuple):
    """What decides how a convolution is divided.

    Attributes:
        n, height, width: of the result's grid: y, or with `upsample` one of its four phases, of x's size.
        channels, channels2, out: C, C2 and O.
        kernel: its side; 2 with `upsample`.
        stride: of the convolution.
        upsample: whether there are four phases.
        shortcut, shortcut2: channels of the shortcut, 0 without.
        span, unit: of y's statistics; unit is 0 without.
        columns: spans and units of a group that the norm merges; 0 without a norm.
        groups: of the norm.
        source: pixels of x.
        itemsize: bytes of a value.
        rate: multiply-adds per cycle of one processor.
    """

    n: int
    height: int
    width: int
    channels: int
    channels2: int
    out: int
    kernel: int
    stride: int
    upsample: bool
    shortcut: int
    shortcut2: int
    span: int
    unit: int
    columns: int
    groups: int
    source: int
    itemsize: int
    rate: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def steps(self, block_k: int) -> int:
        """Return the steps of the loop over K."""
        main = sum(-(-c // block_k) for c in (self.channels, self.channels2))
        return self.kernel**2 * main + sum(-(-c // block_k) for c in (self.shortcut, self.shortcut2))


@dataclass(frozen=True)
class Tile:
    """The division of a call into programs, and their compilation.

    Attributes:
        block_m, block_n, block_k: pixels and output channels of a program, input channels of a step.
        splits: programs that share the steps of a tile.
        one_launch: whether the last of these programs adds up their sums, in order; else a second launch does it.
        num_warps: of 32 threads.
        num_stages: steps whose operands are in flight.
        norm: who normalises. "merge": every program, which also merges the statistics for itself. "table": every
            program, by coefficients from a launch before. "apply": a launch before, once and not once for each tap.
        pdl: whether a launch may begin before the previous one ends, where the GPU can (sm_90).
        tma: whether tiles are copied by tensor descriptors, where the GPU can (sm_90).
        persistent: whether there are no more programs than processors, each of which makes several tiles.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int = 1
    one_launch: bool = True
    num_warps: int = 4
    num_stages: int = 3
    norm: str = "merge"
    pdl: bool = False
    tma: bool = False
    persistent: bool = False

    def choice(self) -> dict[str, Any]:
        return asdict(self)

    def pixels(self, problem: Problem) -> int:
        """Return the rows of a tile that belong to one image."""
        return min(self.block_m, 1 << max(problem.pixels - 1, 0).bit_length())

    def tiles_m(self, problem: Problem) -> int:
        pixels = self.pixels(problem)
        if pixels < self.block_m:
            return -(-problem.n // (self.block_m // pixels))
        return problem.n * -(-problem.pixels // pixels)

    def programs(self, problem: Problem) -> int:
        tiles = self.tiles_m(problem) * -(-problem.out // self.block_n)
        return tiles * self.splits * (4 if problem.upsample else 1)

    def finishes(self, problem: Problem) -> bool:
        """Return whether the kernel itself writes the result; else a second launch does it."""
        return (self.splits == 1 or self.one_launch) and not (problem.upsample and problem.unit)

    def why_not(self, problem: Problem) -> str | None:
        """Return why the tile cannot run a problem, or None."""
        if problem.unit and self.finishes(problem):
            if self.block_m < problem.span:
                return f"block_m is {self.block_m}, must be at least a span, {problem.span}"
            if self.block_n < problem.unit:
                return f"block_n is {self.block_n}, must be at least a unit, {problem.unit}"
        if self.norm == "merge" and problem.columns > MERGED:
            return f"{problem.columns} columns of statistics are too many to merge in every program"
        if self.splits > problem.steps(self.block_k):
            return f"splits is {self.splits}, there are only {problem.steps(self.block_k)} steps"
        if self.tma and (reason := self._why_no_boxes(problem)):
            return reason
        if self.block_m * self.block_n > 128 * 256:
            return f"a tile of {self.block_m} x {self.block_n} is too large for the registers"
        return None

    def _why_no_boxes(self, problem: Problem) -> str | None:
        """Return why descriptors cannot copy the tiles of a problem, or None."""
        sources = (problem.channels, problem.channels2, problem.shortcut, problem.shortcut2)
        if problem.stride != 1 or any(c % self.block_k for c in sources):
            return f"tma takes stride 1 and channels that are multiples of block_k, {self.block_k}"
        if self.box(problem) is None:
            return f"tma takes tiles that are rectangles, which {self.block_m} of {problem.width} pixels are not"
        return None

    def box(self, problem: Problem) -> tuple[int, int, int] | None:
        """Return the images, rows and columns of a tile, if it is a box of them."""
        rows, width = self.pixels(problem), problem.width
        if rows < self.block_m or rows == problem.pixels:
            whole = rows == problem.pixels and width & (width - 1) == 0
            return (self.block_m // rows, rows // width, width) if whole else None
        if width % rows == 0:
            return 1, 1, rows
        return (1, rows // width, width) if rows % width == 0 else None

    def launches(self, problem: Problem) -> int:
        """Return the number of kernels of a call."""
        before = 0
        if problem.columns:
            before = {"merge": 0, "table": 1, "apply": 1 + (problem.columns > MERGED)}[self.norm]
        return 1 + before + (not self.finishes(problem))

    def rows(self, problem: Problem) -> int:
        """Return the rows of norm coefficients in the workspace."""
        if not problem.columns:
            return 0
        if self.norm == "table" or problem.columns > MERGED:
            return problem.n
        if self.norm == "apply":
            return apply_programs(problem)
        return self.programs(problem) * (self.block_m // self.pixels(problem))

    def workspace(self, problem: Problem) -> tuple[int, int, int]:
        """Return the float32 elements for norm coefficients, for the normalised input and for the sums of splits."""
        row = row_size(problem)
        applied = 0
        if problem.columns and self.norm == "apply":
            applied = problem.n * problem.source * (problem.channels + problem.channels2) * problem.itemsize
        sums = problem.n * problem.pixels * problem.out * (4 if problem.upsample else 1)
        return self.rows(problem) * row, -(-applied // 16) * 4, self.splits * sums if self.splits > 1 else 0


def apply_programs(problem: Problem) -> int:
    """Return the programs of the launch that normalises the input."""
    return problem.n * -(-problem.source // APPLIED)


def row_size(problem: Problem) -> int:
    """Return the float32 elements of one sample's norm coefficients, a multiple of 4."""
    return -(-2 * (problem.channels + problem.channels2 + problem.groups) // 4) * 4


# (block_m, block_n, num_warps) on tensor cores, and with fused multiply-adds.
TENSOR_SHAPES = (
    (128, 128, 8), (128, 64, 4), (64, 128, 8), (64, 64, 4), (128, 32, 4), (64, 32, 4), (32, 64, 4), (32, 32, 4),
    (16, 64, 4), (16, 32, 4), (64, 16, 4), (128, 16, 4),
)  # fmt: skip
FMA_SHAPES = ((64, 64, 8), (64, 32, 4), (32, 64, 4), (32, 32, 4), (64, 16, 4), (16, 32, 4))
NORMS = ("merge", "table", "apply")
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
HALF, TF32, FMA = 2048, 1024, 128
# Cycles of Hopper, predicted, not measured: bytes from memory per cycle, from L2 per cycle of a processor; a step's
# latency beyond that; what a program takes besides its loop; counting programs in; a further launch; a norm's work per
# value that is loaded.
_MEMORY, _BYTES, _STEP, _PROGRAM, _ARRIVAL, _LAUNCH, _NORM = 2400, 64, 60, 1500, 700, 2600, 8 / 128


@lru_cache(maxsize=1024)
def likely_tile(problem: Problem, processors: int, shared: int = SHARED) -> Tile:
    """Return the tile of least predicted time on a GPU of so many processors and bytes of shared memory of a program.

    The prediction is the cycles of the processor with the most programs, plus those of further launches.
    """
    return min(candidates(problem, shared), key=lambda tile: predicted_cycles(problem, tile, processors))


def candidates(problem: Problem, shared: int = SHARED) -> Iterator[Tile]:
    """Yield the tiles that `likely_tile` compares."""
    for block_m, block_n, num_warps in FMA_SHAPES if problem.rate == FMA else TENSOR_SHAPES:
        if block_n > 16 and block_n >= 2 * problem.out and problem.unit <= block_n // 2:
            continue
        block_k = depth(problem)
        stages = most_stages(problem, block_m, block_n, block_k, shared)
        if stages < 2:
            continue
        for splits in SPLITS:
            for one_launch in (True, False) if splits > 1 else (True,):
                for norm in NORMS if problem.columns else NORMS[:1]:
                    tile = Tile(block_m, block_n, block_k, splits, one_launch, num_warps, stages, norm)
                    if tile.why_not(problem) is None:
                        yield tile


def most_stages(problem: Problem, block_m: int, block_n: int, block_k: int, shared: int) -> int:
    """Return the stages, up to 4, that fit. Of two sources the stages of one loop may outlive those of the next."""
    sources = (problem.channels, problem.channels2, problem.shortcut, problem.shortcut2)
    stage = (block_m + block_n) * block_k * problem.itemsize * min(sum(c > 0 for c in sources), 2)
    return min((shared - RESERVED) // stage, 4)


def depth(problem: Problem) -> int:
    """Return the input channels of a step: the largest power of two that divides the channels, within reason."""
    deepest = 16 if problem.rate == FMA else 128 // problem.itemsize
    sources = [c for c in (problem.channels, problem.channels2, problem.shortcut, problem.shortcut2) if c]
    block_k = deepest
    while block_k > max(deepest // 4, 16) and any(c % block_k for c in sources):
        block_k //= 2
    if any(c % block_k for c in sources):
        block_k = min(deepest, max(1 << (max(sources) - 1).bit_length(), 16))
    return block_k


def predicted_cycles(problem: Problem, tile: Tile, processors: int) -> float:
    """Return the predicted cycles of a call."""
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    multiply = m * n * k / (0.7 * problem.rate)
    read = (m + n) * k * problem.itemsize / _BYTES
    norm = m * k * _NORM if problem.columns and tile.norm != "apply" else 0
    steps = -(-problem.steps(k) // tile.splits)
    bytes_out = m * n * (problem.itemsize if tile.splits == 1 else 4)
    own = steps * (max(multiply, read, norm) + _STEP) + bytes_out / _BYTES
    waves = -(-tile.programs(problem) // processors)
    total = waves * own + _PROGRAM
    _, applied, sums = tile.workspace(problem)
    if tile.splits > 1 and tile.one_launch:
        total += tile.splits * m * n * 4 / _BYTES + _ARRIVAL
    if not tile.finishes(problem):
        total += _LAUNCH + sums * 4 / (_BYTES * processors)
    if problem.columns:
        total += {"merge": 600 * waves, "table": _LAUNCH, "apply": _LAUNCH + 8 * applied / _MEMORY}[tile.norm]
    return total
