"""Steps as native programs on the CPU: the same images, bit for bit, as from Python, whatever ends a segment."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from fastddpm_kernels.native.program import Program
from torch import Tensor

from fastddpm.networks.frozen import Program as FrozenProgram
from fastddpm.networks.unet.model import UNet
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling.runner import NativeRunner, Runner
from fastddpm.sampling.sampler import Sampler

pytestmark = pytest.mark.usefixtures("native")

SCHEDULE = NoiseSchedule.from_name("linear", 1000)
FIELDS: dict[str, Any] = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 4,
    "block_out_channels": (16, 24), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "num_class_embeds": 5,
}  # fmt: skip
KNOWN = {"known": torch.rand(3, 8, 8), "known_mask": torch.ones(1, 8, 4).repeat(1, 1, 2).cumsum(2).remainder(2)}
# What a sampler is made with and what its `sample` is given; one for each thing that makes other steps.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ancestral": ({}, {}),
    "multistep": ({"method": "dpmsolver++"}, {}),
    "guided": ({"null_class": 4}, {"guidance_scale": 3.0}),
    "guided_for_some_time": ({"null_class": 4, "guidance_interval": (300, 700)}, {"guidance_scale": [3.0, 0.5]}),
    "rescaled": ({"null_class": 4, "guidance_rescale": 0.7}, {"guidance_scale": 3.0}),
    "thresholded": ({"thresholding": True, "clip_sample": False}, {}),
    "inpainted": ({}, KNOWN),
    "given_noise": ({}, {"noise": torch.randn(8, 2, 3, 8, 8)}),
    "trajectory": ({}, {"return_trajectory": 3}),
    "callback": ({}, {"callback": lambda row, t, x: x.mul_(0.9) is None}),
    "stopped": ({}, {"callback": lambda row, t, x: row == 4}),
    "bfloat16": ({"dtype": "bfloat16", "backend": "native"}, {}),
}


def make_unet(**fields: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(**FIELDS | fields).eval()


def sampler(unet: UNet, **settings: Any) -> Sampler:
    return Sampler(unet, SCHEDULE, **{"num_inference_steps": 8, **settings})


def images(drawn: Any) -> list[Tensor]:
    return [drawn] if isinstance(drawn, Tensor) else [v for v in vars(drawn).values() if isinstance(v, Tensor)]


@pytest.mark.parametrize("case", CASES)
def test_images_are_those_of_the_plain_loop(case: str, request: pytest.FixtureRequest) -> None:
    if case == "bfloat16":
        request.getfixturevalue("native_bfloat16")
    settings, given = CASES[case]
    unet, drawn = make_unet(), []
    for cuda_graph in ("auto", False):
        draw = sampler(unet, cuda_graph=cuda_graph, **settings)
        for seed in (0, 1):  # the second finds the loop of the first
            drawn.append(images(draw.sample(2, class_labels=[1, 3], seed=seed, **given)))
        (runner,) = draw._pool.idle
        assert type(runner) is (NativeRunner if cuda_graph else Runner)
        if isinstance(runner, NativeRunner):
            assert all(isinstance(program, Program) for program in runner._programs.values())
            native = case not in ("rescaled", "thresholded")  # where torch has something to do as well
            assert all(program.is_native == native for program in runner._programs.values() if program is not None)
            assert draw.graph_report()["mode"] == "native"
    for ours, plain in zip(drawn[:2], drawn[2:], strict=True):
        assert len(ours) == len(plain) > 0
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
        assert bool(torch.isfinite(ours[0]).all())
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_weights_that_change_are_taken_over() -> None:
    unet = make_unet()
    ours, plain = sampler(unet), sampler(unet, cuda_graph=False)
    before = ours.sample(1, class_labels=1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.1)
    after = ours.sample(1, class_labels=1)
    assert torch.equal(after, plain.sample(1, class_labels=1))
    assert not torch.equal(after, before)


def test_a_model_that_is_not_native_runs_from_python() -> None:
    for draw in (
        Sampler(lambda x, t: 0.1 * x, SCHEDULE, num_inference_steps=3),
        sampler(make_unet(num_class_embeds=None), backend="eager", num_inference_steps=3),
    ):
        draw.sample(1, shape=(3, 8, 8))
        assert type(draw._pool.idle[0]) is Runner
        assert draw.graph_report()["mode"] == "plain"


def test_what_cannot_be_recorded_runs_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = make_unet()
    ours, plain = sampler(unet), sampler(unet, cuda_graph=False)
    call = FrozenProgram.__call__

    def reads(self: FrozenProgram, step: Tensor) -> Tensor:
        assert int(step) >= 0
        return call(self, step)

    monkeypatch.setattr(FrozenProgram, "__call__", reads)
    assert torch.equal(ours.sample(1, class_labels=1), plain.sample(1, class_labels=1))
    assert ours.graph_report()["mode"] == "plain"


def test_a_call_of_the_library_is_short_enough_to_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = sampler(make_unet(), num_inference_steps=40)
    calls: list[int] = []

    def advance(self: Program, times: int) -> None:
        calls.append(times)
        time.sleep(0.02 * times)

    monkeypatch.setattr(Program, "advance", advance)
    draw.sample(1, class_labels=1)
    assert sum(calls) == 40
    assert max(calls) <= 10  # 0.2 s
    assert len(calls) <= 8
