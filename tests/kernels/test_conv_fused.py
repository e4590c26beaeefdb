"""`conv_` with norm, sums and statistics, and `conv_epilogue_`: every backend against `reference` in float64.

The kernels run in triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels import tuned
from fastddpm_kernels.backend import BackendError
from fastddpm_kernels.conv import (
    Norm,
    conv_,
    conv_epilogue_,
    conv_launches,
    conv_workspace,
    statistics_shape,
    statistics_unit,
)
from fastddpm_kernels.conv.examples import Example, results
from fastddpm_kernels.conv.formula import statistics_by_torch
from fastddpm_kernels.conv.plan import Problem, likely_tile
from fastddpm_kernels.conv.space import HARD, check_all, failures, write
from fastddpm_kernels.testing import assert_close, check_op, check_refuses, poisoned_memory
from fastddpm_kernels.tuned import Key
from torch import Tensor

HALF, SINGLE, BFLOAT = torch.float16, torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    why: str
    example: Example
    dtype: torch.dtype = HALF
    tile: dict[str, Any] | None = None  # None for the likely one
    launches: int | None = None


def tile(
    m: int,
    n: int,
    k: int,
    splits: int = 1,
    one_launch: bool = True,
    norm: str = "merge",
    tma: bool = False,
    persistent: bool = False,
) -> dict[str, Any]:
    return {"block_m": m, "block_n": n, "block_k": k, "splits": splits, "one_launch": one_launch, "num_warps": 4,
            "num_stages": 3, "norm": norm, "pdl": False, "tma": tma, "persistent": persistent}  # fmt: skip


PLAIN = {"bias": False, "time": False, "residual": False, "statistics": False}
ALL = Example(2, 5, 7, 20, 24, 12, groups=4, film=True, shortcut=True)
UP = Example(1, 5, 3, 32, 20, upsample=True)
MANY = Example(1, 24, 48, 24, 8, 8, groups=1, film=True)
BOXES = Example(1, 8, 16, 32, 40, 16, groups=4, shortcut=True)
TWO = Example(2, 5, 7, 20, 24, 12, groups=8, shortcut=True)  # groups straddle the sources, channels no tile
CASES = {
    "plain": Case("a product alone", Example(2, 5, 7, 24, 20, **PLAIN)),
    "plain_single": Case("in float32 without tensor cores", Example(2, 5, 7, 24, 20, **PLAIN), SINGLE),
    "everything": Case("each term at once", ALL),
    "everything_single": Case("as everything", ALL, SINGLE),
    "everything_bfloat16": Case("as everything", Example(2, 5, 7, 20, 24, 12, groups=4, shortcut=True), BFLOAT),
    "four_by_four": Case("several images in a tile, the last absent", Example(3, 4, 4, 32, 48, groups=4, film=True)),
    "four_by_four_two": Case("as four_by_four, of two sources", Example(5, 4, 4, 32, 16, 32, groups=8), HALF,
                             tile(64, 16, 16), 1),
    "one_pixel": Case("an image of a pixel, all of it borders", Example(3, 1, 1, 8, 8, groups=2)),
    "one_channel": Case("every size is one", Example(1, 1, 1, 1, 1, groups=1)),
    "odd": Case("the last tile has one pixel", Example(2, 13, 5, 8, 10, groups=2)),
    "two_tiles": Case("tiles in both directions, the last not full", Example(1, 9, 11, 16, 40, groups=4), HALF,
                      tile(64, 32, 16)),
    "padding_after": Case("zeros are after the norm, whose bias is not", Example(1, 3, 3, 8, 8, groups=1, silu=False)),
    "pointwise_norm": Case("attention's projection", Example(2, 4, 6, 32, 24, kernel=1, groups=8, silu=False)),
    "pointwise_two": Case("a projection of two sources", Example(2, 4, 6, 20, 24, 12, kernel=1)),
    "five": Case("a larger kernel", Example(1, 6, 7, 6, 9, kernel=5)),
    "image_channels": Case("fewer channels than a step has", Example(2, 6, 8, 3, 20)),
    "to_image_channels": Case("fewer columns than a tile has", Example(2, 6, 8, 20, 3, groups=4, time=False)),
    "downsample": Case("padded below and to the right alone", Example(2, 6, 8, 12, 20, stride=2)),
    "downsample_odd": Case("padded on every side, an odd height", Example(2, 7, 8, 12, 20, stride=2, padding=1)),
    "upsample": Case("the last of four phases merges", Example(2, 5, 3, 12, 20, upsample=True), HALF, None, 1),
    "upsample_norm": Case("phases of a normalised image", Example(1, 4, 4, 12, 20, upsample=True, groups=4)),
    "upsample_alone": Case("without statistics", Example(1, 5, 3, 12, 20, upsample=True, statistics=False)),
    "split": Case("three parts, the tile's last program adds up", TWO, HALF, tile(64, 16, 16, 3), 1),
    "split_single": Case("as split", TWO, SINGLE, tile(64, 16, 16, 3), 1),
    "split_two": Case("a second launch adds up", TWO, HALF, tile(64, 16, 16, 3, False), 2),
    "split_upsample": Case("each phase is split", UP, HALF, tile(16, 32, 16, 4), 1),
    "split_upsample_two": Case("as split_upsample", UP, SINGLE,
                               tile(16, 32, 16, 4, False), 2),
    "table": Case("coefficients from a launch before", TWO, HALF, tile(64, 32, 16, norm="table"), 2),
    "apply": Case("the norm in a launch before", TWO, HALF, tile(64, 32, 16, norm="apply"), 2),
    "apply_split": Case("as apply, split", TWO, SINGLE, tile(64, 32, 16, 2, False, norm="apply"), 3),
    "many_tiles": Case("the last of 18 tiles merges their statistics", MANY, HALF, tile(64, 16, 16, norm="table"), 2),
    "many_tiles_apply": Case("as many_tiles", MANY, HALF,
                              tile(64, 16, 32, norm="apply"), 2),
    "boxes": Case("descriptors of rows, several to a tile, beyond the image", replace(BOXES, height=6), HALF,
                  tile(64, 32, 16, tma=True), 1),
    "boxes_of_images": Case("descriptors of images, the last absent", replace(BOXES, n=3, height=4, width=4), HALF,
                            tile(64, 32, 16, 3, tma=True), 1),
    "boxes_of_a_row": Case("descriptors of half a row", replace(BOXES, height=2, width=128), HALF,
                           tile(64, 32, 16, tma=True, norm="apply"), 2),
    "boxes_upsampled": Case("descriptors of phases", Example(1, 4, 4, 32, 40, 16, groups=4, upsample=True), HALF,
                            tile(16, 32, 16, tma=True), 1),
    "empty": Case("nothing to do", Example(0, 4, 4, 8, 8), HALF, None, 0),
}  # fmt: skip


def random(name: str, *shape: int) -> Tensor:
    shift = {"x": 3.0, "x2": -2.0, "norm.weight": 1.0}.get(name, 0.0)  # a mean larger than the deviation
    return torch.randn(shape, dtype=torch.float64) + shift


def key_of(call: dict[str, Any], device: torch.device) -> Key:
    from fastddpm_kernels.conv.triton import Operands, key_shape

    return Key("fused_conv", call["x"].dtype, key_shape(Operands(**call)))


def run_case(case: Case, backend: str, dtype: torch.dtype, values: dict[str, Tensor]) -> dict[str, Any]:
    """Run a case on `values`; return its call."""
    call = case.example.call(values, dtype)
    choices = {key_of(call, call["x"].device): case.tile} if backend == "triton" and case.tile else {}
    with tuned.using(call["x"].device, choices):
        if backend == "triton":
            if case.launches is not None:
                assert conv_launches(**call) == case.launches
            size = conv_workspace(**call)
            call["workspace"] = torch.full((size,), torch.nan, device=call["x"].device)
        conv_(**call, backend=backend)
    return call


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_case_against_the_reference(case: Case, backend: str, device: torch.device) -> None:
    values = {
        name: value.to(device, case.dtype).double() for name, value in case.example.make(random).items()
    }  # exact in the case's dtype

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        call = run_case(case, backend, dtype, values)
        if backend == "triton" and case.example.statistics and call["y"].numel():
            truth = torch.empty_like(call["statistics"], dtype=torch.float64)
            statistics_by_torch(truth, call["y"].double())
            for name, own, exact in zip(("mean", "deviation"), call["statistics"], truth, strict=True):
                assert_close(own, exact, name=f"{name} of what is stored")
        return results(call)

    def compare(name: str, actual: Tensor, expected: Tensor, eager: Tensor) -> None:
        # A float32 product without tensor cores adds its K terms one after the other.
        factor = 4.0 if case.dtype == SINGLE else 2.0
        assert_close(actual, expected, eager=eager, factor=factor, dtype=case.dtype, name=name)

    check_op(run, backend, case.dtype, rounds=8.0, compare=compare)


def test_reference_is_the_definition() -> None:
    """Two convolutions of a residual block, from statistics, against torch's group norm."""
    x, x2 = (torch.randn(2, c, 5, 7, dtype=torch.float64) + 3 for c in (24, 12))
    whole, (gamma, beta) = torch.cat((x, x2), 1), torch.randn(2, 36, dtype=torch.float64)
    weight, second = torch.randn(20, 36, 3, 3, dtype=torch.float64), torch.randn(20, 20, 3, 3, dtype=torch.float64)
    of_x, of_x2, of_h = (
        torch.empty(statistics_shape(image, unit), dtype=torch.float64)
        for image, unit in ((x, statistics_unit(24, (12, 0))), (x2, statistics_unit(12, (12, 24))), (whole[:, :20], 1))
    )
    for image, values in ((x, of_x), (x2, of_x2)):
        conv_epilogue_(image, image, statistics=values, backend="reference")
    h, y = (torch.empty(2, 20, 5, 7, dtype=torch.float64) for _ in range(2))
    row = torch.randn(1, 20, dtype=torch.float64)
    norm = Norm(gamma, beta, 3, of_x, of_x2)
    conv_(h, x, weight, x2=x2, norm=norm, time_bias=row.expand(2, 20), statistics=of_h, backend="reference")
    short = torch.randn(20, 36, dtype=torch.float64)
    norm = Norm(gamma[:20], beta[:20], 5, of_h)
    conv_(y, h, second, norm=norm, shortcut=x, shortcut2=x2, shortcut_weight=short, backend="reference")
    expected = F.conv2d(F.silu(F.group_norm(whole, 3, gamma, beta)), weight, padding=1) + row[:, :, None, None]
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-10)
    expected = F.conv2d(F.silu(F.group_norm(h, 5, gamma[:20], beta[:20])), second, padding=1)
    expected += F.conv2d(whole, short[:, :, None, None])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-10)


def test_statistics_do_not_cancel(backend: str, device: torch.device) -> None:
    """The mean is a thousand deviations: a sum of squares in float32 would keep no digit of the variance."""
    x = (1e3 + torch.randn(2, 8, 9, 9, device=device)).contiguous(memory_format=torch.channels_last)
    values = torch.empty(statistics_shape(x, 4), device=device)
    truth = torch.empty_like(values, dtype=torch.float64)
    y = torch.empty_like(x)
    conv_epilogue_(y, x, statistics=values, backend=backend)
    statistics_by_torch(truth, x.double())
    assert torch.equal(x, y)
    # The means of two tiles, a tenth of a deviation apart, have 24 bits each, ten of which are the mean's.
    assert_close(values[1], truth[1], eager=truth[1] * (1 + 5e-6), name="deviation")


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_epilogue(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    example = Example(3, 4, 5, 1, 12)
    values = {n: v.to(device, dtype).double() for n, v in example.make(random).items() if n not in ("x", "weight")}
    values["x"] = torch.randn(3, 12, 4, 5, device=device).to(dtype).double()

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        call = example.call(values, dtype)
        kept = {name: call[name] for name in ("y", "x", "bias", "time_bias", "residual", "statistics")}
        conv_epilogue_(**kept, backend=backend)
        return results(kept)

    check_op(run, backend, dtype, rounds=8.0)


@pytest.mark.parametrize("name", ["split", "four_by_four_two"])
def test_the_same_bits_at_every_run_and_in_any_batch(name: str, on_triton: torch.device) -> None:
    """A bound call runs again; a sample's result does not depend on the others."""
    case = CASES[name]
    values = {n: v.to(on_triton) for n, v in case.example.make(random).items()}
    call = case.example.call(values, case.dtype)
    with tuned.using(on_triton, {key_of(call, on_triton): case.tile}), poisoned_memory():
        run = conv_.bind(**call, backend="triton")
    run()
    first = {name: value.clone() for name, value in results(call).items()}
    for value in results(call).values():
        value.fill_(torch.nan)
    run()
    for found, value in results(call).items():
        assert torch.equal(value, first[found]), found
    alone = {n: v[-1:] if len(v) == case.example.n and n not in ("weight", "bias") else v for n, v in values.items()}
    one = Case(case.why, Example(**{**vars(case.example), "n": 1}), case.dtype, case.tile)
    assert torch.equal(run_case(one, "triton", case.dtype, alone)["y"], first["y"][-1:])


def test_a_program_may_have_several_tiles(on_triton: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, whether three programs share the tiles, merging statistics for each, or each has its own."""
    from fastddpm_kernels.conv import triton

    example = replace(ALL, n=5, shortcut=False)
    values = {n: v.to(on_triton) for n, v in example.make(random).items()}
    found = []
    for persistent in (False, True):
        monkeypatch.setattr(triton, "num_processors", lambda device: 3)
        case = Case("", example, HALF, tile(64, 16, 16, 2, persistent=persistent), 1)
        found.append(results(run_case(case, "triton", HALF, values)))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


def test_auto_takes_the_kernel_only_by_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastddpm_kernels import backend

    monkeypatch.setattr(backend, "why_not", lambda *_: None)
    assert backend.resolve("conv", "auto", "cuda", HALF) == "eager"
    assert backend.resolve("conv", "triton", "cuda", HALF) == "triton"


def meta(*shape: int, dtype: torch.dtype = SINGLE) -> Tensor:
    return torch.ones(*shape, dtype=dtype)


GOOD: dict[str, Any] = {"y": meta(2, 8, 4, 4), "x": meta(2, 4, 4, 4), "weight": meta(8, 4, 3, 3)}
NORM = Norm(meta(4), meta(4), 2, meta(*statistics_shape((2, 4, 4, 4), 2)))


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (ValueError, r"norm.weight .*\(3,\)", {"norm": NORM._replace(weight=meta(3))}),
        (ValueError, "norm.num_groups is 3", {"norm": NORM._replace(num_groups=3)}),
        (ValueError, "norm.statistics has units of 2 .*straddle", {"norm": NORM._replace(num_groups=4)}),
        (ValueError, r"norm.statistics has shape \(2, 2, 2, 2\)", {"norm": NORM._replace(statistics=meta(2, 2, 2, 2))}),
        (TypeError, "norm.statistics .*float16", {"norm": NORM._replace(statistics=NORM.statistics.half())}),
        (ValueError, "norm.statistics2", {"norm": NORM._replace(statistics2=NORM.statistics)}),
        (ValueError, "norm.eps is 0", {"norm": NORM._replace(eps=0)}),
        (ValueError, "norm.activation is 'relu'", {"norm": NORM._replace(activation="relu")}),
        (ValueError, "norm.shift is None", {"norm": NORM._replace(scale=meta(2, 4))}),
        (ValueError, r"norm.scale .*\(4,\)", {"norm": NORM._replace(scale=meta(4), shift=meta(2, 4))}),
        (ValueError, r"time_bias .*\(1, 8\)", {"time_bias": meta(1, 8)}),
        (ValueError, "time_bias .*strides", {"time_bias": meta(8, 2).t()}),
        (ValueError, "shortcut_weight is None", {"shortcut": meta(2, 3, 4, 4)}),
        (ValueError, "shortcut is None", {"shortcut2": meta(2, 3, 4, 4)}),
        (ValueError, r"shortcut_weight .*\[8, 3\]", {"shortcut": meta(2, 3, 4, 4), "shortcut_weight": meta(3, 8)}),
        (ValueError, "shortcut has shape", {"shortcut": meta(2, 3, 4, 3), "shortcut_weight": meta(8, 3)}),
        (ValueError, "y is shortcut", {"shortcut": GOOD["y"], "shortcut_weight": meta(8, 8)}),
        (ValueError, r"statistics .*\(2, 2, 1, 3\)", {"statistics": meta(2, 2, 1, 3)}),
        (TypeError, "workspace .*float16", {"workspace": meta(3, dtype=HALF)}),
        (ValueError, "workspace .*one-dimensional", {"workspace": meta(3, 3)}),
        (BackendError, "norm is given", {"norm": NORM, "backend": "native"}),
    ],
)
def test_bad_input(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    check_refuses(conv_, error, message, **GOOD | changed)


def test_bad_input_of_triton(on_triton: torch.device) -> None:
    def refuses(error: type[Exception], message: str, **changed: Tensor) -> None:
        given = {name: value.to(on_triton) for name, value in {**GOOD, **changed}.items()}
        check_refuses(conv_, error, message, **given, backend="triton")

    last = {n: v.contiguous(memory_format=torch.channels_last) for n, v in GOOD.items()}
    refuses(ValueError, "y has strides .*channels-last", y=GOOD["y"].clone())
    refuses(TypeError, "x is torch.float64", **{n: v.double() for n, v in last.items()})
    big = conv_workspace(**last, stride=1)
    assert big == 0 or big > 0
    check_refuses(statistics_shape, ValueError, "unit is 3", x=(2, 6, 4, 4), unit=3)
    check_refuses(conv_epilogue_, ValueError, "bias has shape", y=GOOD["y"], x=GOOD["y"], bias=meta(3))
    check_refuses(conv_epilogue_, ValueError, "residual has shape", y=GOOD["y"], x=GOOD["y"], residual=GOOD["x"])


# A sample of the search space: `python -m fastddpm_kernels.conv.space` goes through all of it.


def test_a_sample_of_the_search_space_is_right(on_triton: torch.device) -> None:
    rows = check_all(["fp16"], on_triton, every=61)
    assert {row["shape"] for row in rows} == set(HARD)
    assert failures(rows) == []


@pytest.mark.slow
def test_a_sample_of_the_search_space_compiles() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = ["-m", "fastddpm_kernels.conv.space", "compile", "--target", "sm_80", "sm_100", "--every", "61"]
    run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "0 of them fail" in run.stdout


def test_what_fails_is_told(tmp_path: Path) -> None:
    good, bad = {"of_bound": 0.5, "tile": "a"}, {"of_bound": float("nan"), "tile": "b"}
    assert failures([good, {"spills": 8}]) == []
    assert len(failures([good, bad, {"of_bound": 1.5}, {"error": "no"}])) == 3
    for value in (1, 2):  # the second replaces the first
        write(str(tmp_path / "a.json"), "check", [{"shape": "s", "dtype": "fp16", "tile": "a", "of_bound": value}])
    write(str(tmp_path / "a.json"), "compile", [{"variant": "v", "target": "sm_90"}])
    content = json.loads((tmp_path / "a.json").read_text())
    assert [row["of_bound"] for row in content["check"]] == [2]
    assert len(content["compile"]) == 1


# The division into programs.


def problem(n: int, side: int, channels: int, **changed: Any) -> Problem:
    from fastddpm_kernels.conv.triton import operands_of, problem_of

    return problem_of(operands_of(Example(n, side, side, channels, channels, groups=32, **changed), HALF))


def test_small_calls_are_split_until_they_fill_the_gpu() -> None:
    for n, side, channels in ((1, 32, 128), (1, 16, 256), (1, 8, 256), (1, 4, 256), (1, 64, 320), (1, 8, 1280)):
        own = problem(n, side, channels)
        tile = likely_tile(own, 132)
        assert tile.programs(own) >= 64, (side, tile)
        assert tile.why_not(own) is None
    large = problem(256, 32, 128)
    tile = likely_tile(large, 132)
    assert (tile.block_m, tile.block_n, tile.splits) == (128, 128, 1)


def test_a_tile_fits_the_memory_of_its_gpu() -> None:
    from fastddpm_kernels.conv.fused_tuning import tiles_of

    for shared in (64 * 1024, 99 * 1024, 163 * 1024, 227 * 1024):
        own = problem(64, 32, 128, channels2=128, shortcut=True)
        tile = likely_tile(own, 100, shared)
        assert tile.num_stages * (tile.block_m + tile.block_n) * tile.block_k * 2 <= shared
        tiles = list(tiles_of(own, shared))
        assert tile in tiles
        assert any(tile.tma for tile in tiles) is (shared > 220 * 1024)


def test_units_divide_every_group_that_reads_a_tensor() -> None:
    assert statistics_unit(128, (4, 0), (12, 256)) == 4
    assert statistics_unit(320, (10, 0), (30, 640)) == 2
    assert statistics_unit(1280, (40, 0), (80, 1280)) == 8
    assert statistics_unit(96) == 32
