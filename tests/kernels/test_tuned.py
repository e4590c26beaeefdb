"""Tuned tables: what is looked up is what runs, whatever else a file holds is ignored, and results stay right."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastddpm_kernels import tuned
from fastddpm_kernels.conv import choose_algorithm, likely_algorithm
from fastddpm_kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_,
    group_norm_silu_launches,
    group_norm_silu_workspace,
    rms_norm_silu,
)
from fastddpm_kernels.group_norm_silu import plan as norm_plan
from fastddpm_kernels.philox import sample_keys
from fastddpm_kernels.pointwise_conv import pointwise_conv_
from fastddpm_kernels.q_sample import q_sample
from fastddpm_kernels.residual_add import residual_add_
from fastddpm_kernels.reverse_step import reverse_step_
from fastddpm_kernels.testing import assert_close
from fastddpm_kernels.tuned import Choice, Key

CPU = torch.device("cpu")
SHAPE = (2, 12, 10, 24, 40)  # batch, height, width, channels, out_channels
CONV = Key("conv", torch.float32, (*SHAPE, 0, 2))
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a table into the user's cache (or the package's folder), both of which are empty otherwise."""
    monkeypatch.setenv("FASTDDPM_TUNED", "1")
    monkeypatch.setenv("FASTDDPM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "PACKAGE", tmp_path / "package")
    tuned.forget()

    def write(
        choices: dict[Key, Choice | None], where: torch.device = CPU, *, package: bool = False, **changed: Any
    ) -> Path:
        path = tuned.package_path(where) if package else tuned.user_path(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [tuned.record(key, choice, tuned_us=1.0) for key, choice in choices.items()]
        path.write_text(json.dumps({**tuned.header(where), "created": "now", "entries": entries, **changed}))
        tuned.forget()
        return path

    yield write
    tuned.forget()


def algorithm() -> str:
    return choose_algorithm(*SHAPE, threads=2)


def test_a_choice_is_taken_for_its_shape_alone(write: Write) -> None:
    assert algorithm() == likely_algorithm(*CONV.shape) != "direct"
    write({CONV: {"algorithm": "direct"}})
    assert algorithm() == "direct"
    other = (3, *SHAPE[1:])
    assert choose_algorithm(*other, threads=2) == likely_algorithm(*other, 0, 2)
    assert choose_algorithm(*SHAPE, threads=3) == likely_algorithm(*SHAPE, 0, 3)


def test_the_users_table_comes_before_the_packages(write: Write) -> None:
    write({CONV: {"algorithm": "direct"}}, package=True)
    assert algorithm() == "direct"
    write({CONV: {"algorithm": "winograd2"}})
    assert algorithm() == "winograd2"
    write({CONV: None})  # the heuristics were the best
    assert algorithm() == likely_algorithm(*CONV.shape)
    assert tuned.known(CPU) == {CONV}


def test_a_stale_table_is_ignored_and_that_is_said_once(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write({CONV: {"algorithm": "direct"}}, native="native-of-before.so")
    with caplog.at_level(logging.WARNING, "fastddpm.kernels"):
        assert algorithm() == algorithm() == likely_algorithm(*CONV.shape)
    assert len(caplog.records) == 1
    assert f"{path} is ignored: it was measured with other kernels" in caplog.text
    assert tuned.describe(CPU) == [f"{path}: ignored, it was measured with other kernels"]


def test_what_a_gpus_table_must_agree_with(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"schema": tuned.SCHEMA, "device": "NVIDIA H200", "triton": "3.9.0", "driver": "570.1", "cuda": "12.8",
           "kernels": "abc"}  # fmt: skip
    monkeypatch.setattr(tuned, "header", lambda device: now)
    path = write({CONV: None}, torch=None)
    assert tuned.read(path, CPU).ignored is None  # torch may have changed
    for name, value in (("triton", "3.6.0"), ("driver", "550.54.15"), ("device", "NVIDIA H100")):
        reason = tuned.read(write({CONV: None}, **{name: value}), CPU).ignored
        assert reason == f"it was measured with {name} {value}, this is {now[name]}"
    assert tuned.read(write({}, kernels="abd"), CPU).ignored == "it was measured with other kernels"


WRONG: dict[str, Any] = {
    "algorithm": {"choice": {"algorithm": "fastest"}},
    "parameter": {"choice": {"algorithm": "direct", "num_warps": 4}},
    "type": {"choice": {"algorithm": ["direct"]}},
    "op": {"op": "conv4d"},
    "dtype": {"dtype": "float64"},
    "shape": {"shape": {"batch": 1}},
    "size": {"shape": {**CONV.named(), "batch": -1}},
    "number": {"shape": {**CONV.named(), "batch": 1.5}},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_makes_no_sense_is_ignored_whole(write: Write, wrong: dict[str, Any]) -> None:
    good = tuned.record(CONV, {"algorithm": "direct"})
    path = write({}, entries=[good, {**good, **wrong}])
    assert algorithm() == likely_algorithm(*CONV.shape)
    assert str(tuned.read(path, CPU).ignored).startswith("it cannot be used: ValueError: an entry ")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "fastddpm.tuned/1"}', "\x00"])
def test_a_broken_file_is_ignored(write: Write, text: str) -> None:
    write({}).write_text(text)
    tuned.forget()
    assert algorithm() == likely_algorithm(*CONV.shape)
    assert "it cannot be used" in tuned.describe(CPU)[0]


def test_tables_can_be_switched_off(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write({CONV: {"algorithm": "direct"}})
    monkeypatch.setenv("FASTDDPM_TUNED", "0")
    assert algorithm() == likely_algorithm(*CONV.shape)
    assert tuned.known(CPU) == set()


def test_an_algorithm_that_cannot_upsample_is_not_taken(write: Write) -> None:
    key = Key("conv", torch.float32, (*SHAPE, 1, 2))
    write({key: {"algorithm": "winograd2"}})
    assert choose_algorithm(*SHAPE, upsample=True, threads=2) == likely_algorithm(*key.shape)


def test_lookups_are_recorded(write: Write) -> None:
    with tuned.recording() as seen:
        algorithm(), algorithm()
        with tuned.recording() as inner:
            algorithm()
    algorithm()
    assert (seen, inner) == ({CONV: 3}, {CONV: 1})


def test_plans_cover_all_pixels_and_groups_whatever_was_chosen() -> None:
    for pixels in (1, 3, 64, 1000):
        for groups, channels in ((1, 24), (6, 48), (32, 32)):
            for slab in (1, 4, 33):
                for block_p, splits in ((1, 128), (16, 3), (1024, 7)):
                    plan = norm_plan.derived_plan(2, pixels, channels, groups, False, slab, 4, block_p, splits)
                    assert plan is not None
                    assert plan.slabs * plan.slab_groups >= groups > (plan.slabs - 1) * plan.slab_groups
                    assert plan.block_c >= plan.slab_groups * channels // groups
                    span = plan.tiles * plan.block_p
                    assert plan.splits * span >= pixels > (plan.splits - 1) * span
                    assert plan.splits <= splits
                one = norm_plan.derived_plan(2, pixels, channels, groups, True, slab, 4)
                assert one is not None
                assert one.block_p >= pixels
    assert norm_plan.derived_plan(1, 2**14, 1024, 1, True, 1, 4) is None  # no registers hold that


@pytest.mark.parametrize("op", ["group_norm_silu", "group_norm_silu_"])
def test_the_heuristics_plans_are_choices_too(op: str) -> None:
    for batch in (1, 64):
        for pixels in (16, 63, 1024, 65536):
            for channels, second, groups in ((128, 0, 32), (256, 128, 32), (7, 0, 7)):
                shape = (batch, pixels, channels, second, groups, 1)
                plan = norm_plan.heuristic_plan(op, shape, 2, 132)
                choice = norm_plan.choice_of(plan)
                assert norm_plan.derived_plan(batch, pixels, channels + second, groups, **choice) == plan
                entry = tuned.record(Key(op, torch.float16, shape), choice)
                assert tuned.entry(json.loads(json.dumps(entry)))[1] == choice


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


TWO_PASSES = {"one_pass": False, "slab_groups": 2, "num_warps": 2, "block_p": 8, "splits": 3}


def test_norms_run_as_their_tables_say(write: Write, device: torch.device) -> None:
    pytest.importorskip("triton")
    x, weight, bias = image(2, 24, 5, 7).to(device), torch.randn(24, device=device), torch.randn(24, device=device)
    shape = (2, 35, 24, 0, 4, 1)
    assert group_norm_silu_launches(x, 24, 4) == 1
    workspace = torch.empty(group_norm_silu_workspace(x, 24, 4), device=device)
    truth = group_norm_silu(x.double(), weight, bias, 4, backend="reference")
    write({Key(op, torch.float32, shape): TWO_PASSES for op in ("group_norm_silu", "group_norm_silu_")}, x.device)
    assert group_norm_silu_launches(x, 24, 4) == 2
    assert norm_plan.in_place_plan(x, 24, 4) == norm_plan.derived_plan(2, 35, 24, 4, **TWO_PASSES)
    assert norm_plan.forward_plan(x, 24, 4) == norm_plan.derived_plan(2, 35, 24, 4, **TWO_PASSES)
    assert_close(group_norm_silu(x, weight, bias, 4, backend="triton"), truth, dtype=torch.float32)
    # What was bound before the shape was tuned has no room for another plan, and keeps its own.
    for scratch in (None, workspace, torch.empty(group_norm_silu_workspace(x, 24, 4), device=device)):
        y = torch.full_like(x, float("nan"))
        group_norm_silu_(y, x, weight, bias, 4, workspace=scratch, backend="triton")
        assert_close(y, truth, dtype=torch.float32)


def test_rms_norm_runs_as_its_table_says(write: Write, device: torch.device) -> None:
    triton_side = pytest.importorskip("fastddpm_kernels.group_norm_silu.triton_rms")
    x, weight = image(2, 24, 5, 7).to(device), torch.randn(24, device=device)
    write({Key("rms_norm_silu", torch.float32, (2, 35, 24, 0, 1)): {"block_p": 2, "num_warps": 1}}, x.device)
    launch = triton_side.forward_launches(torch.empty_like(x), x, weight, 1e-12, None, None, None, True)[0]
    assert (launch.constexprs["BLOCK_P"], launch.num_warps, launch.programs) == (2, 1, 2 * 18)
    truth = rms_norm_silu(x.double(), weight, backend="reference")
    assert_close(rms_norm_silu(x, weight, backend="triton"), truth, dtype=torch.float32)


def test_a_pointwise_convolution_runs_as_its_table_says(
    write: Write, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = pytest.importorskip("fastddpm_kernels.pointwise_conv.triton")
    tiles = []
    made = side.make_launch
    monkeypatch.setattr(side, "make_launch", lambda *a: tiles.append(a[-1]) or made(*a))
    for dtype in (torch.float32, torch.float16):
        x, x2 = (torch.randn(50, c).to(device, dtype) for c in (20, 12))
        weight, weight2 = (torch.randn(24, c).to(device, dtype) for c in (20, 12))
        given = {"x2": x2, "weight2": weight2, "bias": torch.randn(24, device=device)}
        y, truth, eager = torch.empty(3, 50, 24, device=device, dtype=dtype)
        pointwise_conv_(truth, x, weight, **given, backend="reference")
        pointwise_conv_(eager, x, weight, **given, backend="eager")
        key = Key("pointwise_conv", dtype, (50, 24, 20, 12, 0, 0))
        tile = {"block_m": 16, "block_n": 32, "block_k": 16, "num_warps": 2, "num_stages": 2}
        write({key: tile}, x.device)
        pointwise_conv_(y.fill_(float("nan")), x, weight, **given, backend="triton")
        assert dataclasses.asdict(tiles[-1]) == tile
        assert_close(y, truth, eager=eager)
        write({key: side.MATMUL}, x.device)
        count = len(tiles)
        pointwise_conv_(y.fill_(float("nan")), x, weight, **given, backend="triton")
        if dtype == torch.float16:
            assert torch.equal(y, eager)
        else:  # torch's switch for TF32 would decide how that rounds, not the argument
            assert_close(y, truth, eager=eager)
        assert len(tiles) - count == (dtype == torch.float32)


def image_of(dtype: torch.dtype, device: torch.device, *shape: int) -> torch.Tensor:
    return image(*shape).to(device, dtype)


def noised(device: torch.device) -> tuple[torch.Tensor, ...]:
    angle = torch.linspace(0.1, 1.5, 7, device=device)
    table, t = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([6, 2], device=device)
    x0, keys = image_of(torch.float32, device, 2, 3, 11, 9), sample_keys([5, 5], [0, 1], device)
    return q_sample(x0, table, t, keys=keys, prediction_type="v_prediction", backend="triton")


def stepped(device: torch.device) -> tuple[torch.Tensor, ...]:
    x, out = torch.randn(2, 3, 11, 9, device=device), image_of(torch.float16, device, 4, 6, 11, 9)
    net_in, x0 = torch.zeros_like(out[:, :3]), torch.zeros_like(x)
    reverse_step_(
        x, out, torch.rand(2, 7, device=device), torch.ones(1, dtype=torch.int64, device=device), x0=x0, net_in=net_in,
        keys=sample_keys([5, 5], [0, 1], device), clip_range=1.0, guidance_scale=torch.ones(1, device=device),
        log_variance=torch.tensor([[-3.0, -1.0]] * 2, device=device), backend="triton",
    )  # fmt: skip
    return x, x0, net_in


def added(device: torch.device) -> tuple[torch.Tensor, ...]:
    x, residual = (image_of(torch.float16, device, 2, 24, 5, 7) for _ in range(2))
    y, total = torch.zeros(2, 6, 8, 24, dtype=x.dtype, device=device).movedim(-1, 1), torch.empty_like(x)
    residual_add_(y, x, residual=residual, bias=torch.rand(24, device=device), total=total, backend="triton")
    return y, total


ELEMENTWISE = {
    "q_sample": (noised, (2, 3, 99, 1, 2, 2), torch.float32),
    "reverse_step": (stepped, (2, 3, 99, 1, 2, 1, 1, 0, 1, 1, 0), torch.float16),
    "residual_add": (added, (2, 24, 5, 7, 1, 1, 1, 1, 1), torch.float16),
}


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_element_wise_ops_run_as_their_tables_say_with_the_same_bits(
    op: str, write: Write, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip(f"fastddpm_kernels.{op}.triton")
    run, shape, dtype = ELEMENTWISE[op]
    ran, launched = module.run, []
    monkeypatch.setattr(module, "run", lambda launch, like: launched.append(launch) or ran(launch, like))

    def results() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        return run(device)

    with tuned.recording() as seen:
        usual = results()
    assert seen == {Key(op, dtype, shape): 1}
    for choice in ({"block": 32, "num_warps": 1}, {"block": 64, "num_warps": 8}, {"block": 8192, "num_warps": 16}):
        write({Key(op, dtype, shape): choice}, usual[0].device)
        assert all(map(torch.equal, results(), usual)), choice
        assert {"block": launched[-1].constexprs["BLOCK"], "num_warps": launched[-1].num_warps} == choice


def test_a_block_that_counts_too_far_is_not_taken() -> None:
    strided = pytest.importorskip("fastddpm_kernels.device.strided")
    choice = {"block": 8192, "num_warps": 1}
    assert strided.block_and_warps(choice, 1, 2**31 - 8192, CPU) == (8192, 1)
    assert strided.block_and_warps(choice, 1, 2**31 - 8191, CPU) == (strided.MOST_BLOCK, strided.NUM_WARPS)
    assert strided.block_and_warps(None, 1, 2**31 - 4095, CPU, 4096)[0] == 2048
    # Few elements: as many programs as there can be.
    assert strided.block_and_warps(None, 1, 3072, CPU)[0] == strided.BLOCK
    assert strided.block_and_warps(None, 8, 3072, CPU)[0] == strided.MOST_BLOCK
    assert strided.launch_options(CPU, 8)["num_warps"] == 8


ONE_PASS = {"one_pass": True, "slab_groups": 3, "num_warps": 1}
GRADIENTS: dict[str, tuple[tuple[int, ...], list[Choice]]] = {
    "group_norm_silu_backward": ((2, 35, 24, 12, 4, 1), [ONE_PASS, TWO_PASSES, {**TWO_PASSES, "splits": 128}]),
    "rms_norm_silu_backward": (
        (2, 35, 24, 12, 1),
        [{"block_p": block_p, "splits": splits, "num_warps": 2} for block_p, splits in ((1, 8192), (4, 3), (64, 2))],
    ),
}


@pytest.mark.parametrize("op", GRADIENTS)
def test_gradients_of_norms_run_as_their_tables_say(op: str, write: Write, device: torch.device) -> None:
    pytest.importorskip("triton")
    shape, choices = GRADIENTS[op]
    given = [image_of(torch.float32, device, 2, c, 5, 7) for c in (24, 12)]
    given += [torch.randn(size, device=device) for size in ((36,), (36,), (2, 36), (2, 36))]
    dy = image_of(torch.float32, device, 2, 36, 5, 7)

    def gradients(dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, ...]:
        x, x2, weight, bias, scale, shift = inputs = [t.to(dtype).requires_grad_() for t in given]
        film = {"x2": x2, "scale": scale, "shift": shift, "backend": backend}
        if op == "group_norm_silu_backward":
            y = group_norm_silu(x, weight, bias, 4, **film)
        else:
            y = rms_norm_silu(x, weight, **film)
            del inputs[3]
        return torch.autograd.grad(y, inputs, dy.to(dtype))

    truth, eager = gradients(torch.float64, "reference"), gradients(torch.float32, "eager")
    with tuned.recording() as seen:
        usual = gradients(torch.float32, "triton")
    key = Key(op, torch.float32, shape)
    assert seen[key] == 1
    for choice in [None, *choices]:
        write({key: choice}, given[0].device)
        found = gradients(torch.float32, "triton")
        if choice is None:
            assert all(map(torch.equal, found, usual))
        for actual, expected, own in zip(found, truth, eager, strict=True):
            assert_close(actual, expected, eager=own)


def test_choices_that_no_kernel_could_hold_are_not_taken(write: Write) -> None:
    triton_side = pytest.importorskip("fastddpm_kernels.group_norm_silu.triton_rms")
    wide = {"one_pass": False, "slab_groups": 1, "num_warps": 4, "block_p": 1, "splits": 128}
    assert norm_plan.derived_plan(1, 4096, 2048, 1, **wide) is not None
    assert norm_plan.derived_plan(1, 4096, 2048, 1, **wide, per_channel=True) is None  # of which splits * channels
    x, weight = image(1, 4096, 64, 1), torch.randn(4096)
    usual = triton_side.heuristic_backward(x, 4096)
    write({Key("rms_norm_silu_backward", torch.float32, (1, 64, 4096, 0, 1)): {**usual, "block_p": 64}})
    (launch,), _ = triton_side.backward_launches(x, None, x, x, weight, 1e-12, None, None, None, True)
    assert launch.constexprs["BLOCK_P"] == usual["block_p"] < 64


def test_choices_that_are_tried_take_the_place_of_tables(write: Write) -> None:
    write({CONV: {"algorithm": "direct"}})
    with tuned.using(CPU, {}):
        assert algorithm() == likely_algorithm(*CONV.shape)
        with tuned.using(CPU, {CONV: {"algorithm": "winograd2"}}):
            assert algorithm() == "winograd2"
            tuned.forget()
    assert algorithm() == "direct"


TUNED: dict[str, tuple[str, torch.dtype, tuple[int, ...], Choice, int]] = {  # module, ..., kernels
    "group_norm_silu_backward": (
        "group_norm_silu", torch.bfloat16, (64, 1024, 128, 0, 32, 1), {**TWO_PASSES, "block_p": 64}, 4
    ),
    "rms_norm_silu_backward": (
        "group_norm_silu", torch.float16, (64, 1024, 64, 64, 1), {"block_p": 8, "splits": 4, "num_warps": 2}, 1
    ),
    "q_sample": ("q_sample", torch.float32, (64, 3, 1024, 1, 2, 1), {"block": 1024, "num_warps": 2}, 1),
    "reverse_step": (
        "reverse_step", torch.float16, (64, 3, 1024, 1, 2, 0, 0, 0, 0, 1, 0), {"block": 1024, "num_warps": 2}, 2
    ),
    "residual_add": (
        "residual_add", torch.float16, (64, 128, 32, 32, 1, 1, 1, 1, 1), {"block": 1024, "num_warps": 2}, 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", TUNED)
def test_what_the_packages_tables_hold_is_compiled(op: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    name, dtype, shape, choice, count = TUNED[op]
    module = pytest.importorskip(f"fastddpm_kernels.{name}.triton")
    about = {"schema": tuned.SCHEMA, "device": "NVIDIA H200", "kernels": tuned._kernels(), "target": "sm_90"}
    monkeypatch.setattr(tuned, "header", lambda device: about)
    write({Key(op, dtype, shape): choice, Key("upsample_conv", dtype, (8,) * 5 + (0,)): None}, package=True)
    found = [variant for variant in module.aot_variants() if variant.target is not None]
    assert len(found) == count
    assert {(variant.target, variant.num_warps) for variant in found} == {("sm_90", choice["num_warps"])}
    sizes = {name.upper(): value for name, value in choice.items() if name.startswith("block")}
    assert all(sizes.items() <= variant.constexprs.items() for variant in found)
    assert len({variant.name for variant in found}) == count


def test_the_packages_tables_are_compiled_for_their_gpu(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    aot = pytest.importorskip("fastddpm_kernels.group_norm_silu.triton")
    key = Key("group_norm_silu_", torch.float16, (64, 1024, 128, 0, 32, 1))
    about = {"schema": tuned.SCHEMA, "device": "NVIDIA H200", "kernels": tuned._kernels(), "target": "sm_90"}
    monkeypatch.setattr(tuned, "header", lambda device: about)
    write({key: {"one_pass": True, "slab_groups": 4, "num_warps": 8}}, package=True)
    found = [variant for variant in aot.aot_variants() if variant.target is not None]
    assert len(found) == 3  # with a residual whose sum is kept, or is not, and without
    assert {(variant.target, variant.num_warps, variant.constexprs["SLAB_GROUPS"]) for variant in found} == {
        ("sm_90", 8, 4)
    }
    write({key: {"one_pass": True, "slab_groups": 4, "num_warps": 8}}, package=True, kernels="others")
    assert not [variant for variant in aot.aot_variants() if variant.target is not None]


def test_committed_tables_can_be_read() -> None:
    for path in tuned.PACKAGE.glob("*.json"):
        table = tuned.read(path, None)
        assert table.ignored is None, path
        assert table.entries, path
        assert tuned.slug(table.header["device"]) == path.stem
